"""What MIND tells of its news: their categories, and their titles and abstracts as vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_amort.columns import MisfitError, typed
from torchrec_amort.data.mind_tsv import read_tsv, refuse_lines
from torchrec_amort.data.parquet import refuse_missing_columns
from torchrec_amort.data.splits import number
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.hashing import ids_of_text
from torchrec_amort.schema import Content

COLUMNS = ("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
CATEGORIES = ("category", "subcategory")
# Numbers of a hashed bag of words.
BAG_SIZE = 64
# What stands between words.
NO_WORD = r"[^\p{L}\p{N}]+"


@dataclass(frozen=True)
class News:
    """News of `news.tsv`; row 0 is of all that are not in it.

    Args:
        names: of N news.
        categories: `category` and `subcategory`, N + 1 of each; null if there is none.
        vectors: float32 [N + 1, size]; zero where there is none.
    """

    names: pa.Array
    categories: dict[str, pa.Array]
    vectors: np.ndarray

    def rows(self, names: pa.Array) -> np.ndarray:
        """The row of each news: int64, 0 for those that are not in the file."""
        return number(names, self.names)


def read_news(path: Path, vectors: Path | None = None) -> News:
    """Read `news.tsv`.

    Args:
        path: the file.
        vectors: Parquet of columns `id`, the names of news, and `vector`, lists of as many numbers; the words of titles
            and abstracts become vectors if it is not given.

    Raises:
        InputError: there is no such file, a line or row is not as it should be, or the files have no news in common.

    Example::

        read_news(Path("MINDsmall_train/news.tsv")).categories["category"]
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file: give MIND's news.tsv")
    columns = read_tsv(path, COLUMNS)
    names = columns["id"]
    refuse_lines(path, "id", names, names.is_valid(), "the name of a news")
    refuse_lines(path, "id", names, _is_first(names), "a name that no line before has")
    text = pc.binary_join_element_wise(
        columns["title"], columns["abstract"], " ", null_handling="replace", null_replacement=""
    )
    return News(
        names,
        {name: pa.concat_arrays([pa.nulls(1, pa.string()), columns[name]]) for name in CATEGORIES},
        _with_none(bags_of_words(text)) if vectors is None else _read_vectors(vectors, names),
    )


def bags_of_words(text: pa.Array, size: int = BAG_SIZE) -> np.ndarray:
    """Hashed bags of words: each word adds 1 or -1 to one of `size` numbers, and the vector is scaled to length 1.

    Words are runs of letters and digits, in lower case. Of a word's `hash_text`, as an unsigned number, the remainder
    by `size` is the place, and the top bit the sign: set for -1.

    Args:
        text: strings, none null.
        size: of the vectors.

    Returns:
        np.ndarray: float32 [N, size]; zeros for a text without words, or whose words cancel out.

    Example::

        bags_of_words(pa.array(["Rain, then sun"]))
    """
    words = pc.split_pattern_regex(pc.utf8_lower(text), NO_WORD)
    entries, rows = words.flatten(), pc.list_parent_indices(words)
    is_word = pc.not_equal(entries, "")
    entries, rows = entries.filter(is_word), rows.filter(is_word).to_numpy()
    hashes = ids_of_text(entries)
    places = rows * size + (hashes.astype(np.uint64) % size).astype(np.int64)
    sums = np.bincount(places, np.where(hashes < 0, -1.0, 1.0), minlength=len(text) * size).reshape(-1, size)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _is_first(names: pa.Array) -> pa.Array:
    """Whether no entry before is the same."""
    coded = names.dictionary_encode().indices.to_numpy()
    is_first = np.zeros(len(coded), dtype=bool)
    is_first[np.unique(coded, return_index=True)[1]] = True
    return pa.array(is_first)


def _with_none(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(vectors, shape=(1, vectors.shape[1])), vectors])


def _read_vectors(path: Path, names: pa.Array) -> np.ndarray:
    """The vector of each news, after that of none."""
    given = _read_parquet(path)
    ids, sizes = given["id"], given["vector"].value_lengths().to_numpy()
    if not len(ids) or not sizes[0]:
        raise InputError(f"{path}: has no numbers in row 0: give a vector of 1 number or more for each news")
    if len(other := np.flatnonzero(sizes != sizes[0])):
        raise InputError(
            f"{path}: row {other[0]}: vector has {sizes[other[0]]} numbers, but that of row 0 has {sizes[0]}: make "
            "them all of one size"
        )
    if (twice := pc.index(_is_first(ids), False).as_py()) >= 0:
        raise InputError(f"{path}: row {twice}: id is {ids[twice].as_py()!r}, which a row before has: leave one out")
    rows = number(names, ids)
    if not rows.any():
        raise InputError(
            f"{path}: none of its {len(ids)} ids is one of the {len(names)} of news.tsv: give their vectors"
        )
    return _with_none(_with_none(given["vector"].flatten().to_numpy().reshape(len(ids), -1))[rows])


def _read_parquet(path: Path) -> dict[str, pa.Array]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: give Parquet of columns id and vector")
    types: dict[str, tuple[pa.DataType, Content]] = {
        "id": (pa.string(), "text"),
        "vector": (pa.list_(pa.float32()), "number"),
    }
    try:
        refuse_missing_columns(path, types, pq.read_schema(path).names)
        table = pq.read_table(path, columns=list(types))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}): write it as Parquet") from error
    columns = {}
    for name, (kind, content) in types.items():
        try:
            columns[name] = typed(table[name], kind, content, rounded=True, finite=True)
        except MisfitError as misfit:
            raise InputError(f"{path}: row {misfit.place}: {name} {misfit}: mend the row") from misfit
    return columns
