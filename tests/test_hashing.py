import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launch import ROOT
from torchrec_amort import hash_ids
from torchrec_amort.hashing import Vocabulary, hash_text, ids_of_text

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_the_test_vectors_of_the_docs_are_kept() -> None:
    section = (ROOT / "docs" / "data.md").read_text().split("### The hash")[1].split("\n##")[0]
    header, _, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    sizes = [int(cell.removeprefix("row of ").replace(",", "")) for cell in header.split(" | ")[1:]]
    rows = [[int(cell.replace(",", "")) for cell in line.split(" | ")] for line in lines]
    ids = np.array([row[0] for row in rows])
    assert {0, -1, 2**53 + 1, 2**63 - 1, -(2**63)} <= set(ids.tolist())
    assert np.stack([ids, *(hash_ids(ids, size) for size in sizes)], axis=1).tolist() == rows


def test_the_test_vectors_of_text_are_kept() -> None:
    section = (ROOT / "docs" / "data.md").read_text().split("### Text")[1].split("\n##")[0]
    _, _, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    ids = dict(line.split(" | ") for line in lines)
    text = ["" if name == "the empty text" else name.strip("`") for name in ids]
    assert {"", "København"} <= set(text)
    assert hash_text(text).tolist() == [int(number.replace(",", "")) for number in ids.values()]


def test_a_vocabulary_gives_rows_from_1_on_in_its_order() -> None:
    texts = pa.array(["b", "a", "b", None, "c", "a", "b"])
    vocabulary = Vocabulary.of(texts, min_count=2)
    assert vocabulary.values.to_pylist() == ["b", "a"]
    assert vocabulary.rows(hash_text(["a", "b", "c", ""])).tolist() == [2, 1, 0, 0]
    numbers = Vocabulary(pa.array([7, -1, 2**62]))
    assert numbers.rows(np.array([2**62, 7, 0, -1])).tolist() == [3, 1, 0, 2]
    assert Vocabulary(pa.array([], pa.int64())).rows(np.array([3])).tolist() == [0]
    for values, message in (([1, None], "has a null"), ([1, 2, 1], "has 1 and 1, which are one id")):
        with pytest.raises(ValueError, match=message):
            Vocabulary(pa.array(values))


@given(st.lists(st.text()))
def test_text_is_hashed_alike_alone_and_in_a_column(texts: list[str]) -> None:
    assert ids_of_text(pa.array(texts, pa.string())).tolist() == [int(hash_text([text])[0]) for text in texts]


def test_it_is_the_finalizer_of_splitmix64() -> None:
    # What the generator published gives for seed 1234567 (rosettacode.org): the finalizer of seed + k * gamma.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + k * 0x9E3779B97F4A7C15) % 2**64 for k in range(1, 5)]
    ids = np.array(states, dtype=np.uint64).view(np.int64)
    assert hash_ids(ids, 2**62).tolist() == [1 + bits % (2**62 - 1) for bits in published]


@given(st.lists(INT64), st.integers(2, 2**63 - 1))
def test_every_id_has_a_row_and_the_unknown_one_its_own(ids: list[int], table_size: int) -> None:
    rows = hash_ids(np.array(ids, dtype=np.int64), table_size)
    assert rows.dtype == np.int64
    assert ((rows >= 0) & (rows < table_size)).all()
    assert ((rows == 0) == (np.array(ids, dtype=np.int64) == 0)).all()
    assert rows.tolist() == [int(hash_ids(np.array(id_), table_size)) for id_ in ids]


@pytest.mark.parametrize("table_size", [2, 1001, 1024, 4099])
@pytest.mark.parametrize("stride", [1, -1, 1000, 2**10, 2**32, 2**40 + 1])
def test_rows_are_hit_evenly_whatever_the_ids_have_in_common(stride: int, table_size: int) -> None:
    ids = np.arange(1, 200_001) * stride
    counts = np.bincount(hash_ids(ids, table_size), minlength=table_size)[1:]
    freedom, expected = table_size - 2, len(ids) / (table_size - 1)
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    assert abs(chi_square - freedom) <= 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("rows_per_id", [0.5, 1, 10])
def test_as_many_ids_share_a_row_as_the_docs_say(rows_per_id: float) -> None:
    num_ids = 50_000
    table_size = int(num_ids * rows_per_id)
    rows = hash_ids(np.arange(1, num_ids + 1), table_size)
    share = float((np.bincount(rows)[rows] > 1).mean())
    assert share == pytest.approx(1 - (1 - 1 / (table_size - 1)) ** (num_ids - 1), abs=0.01)


def test_a_table_of_the_unknown_id_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="table_size is 1, not 2 or more"):
        hash_ids(np.array([5]), 1)
