"""How ids of any size, and text, find a row of a table: fixed, the same in every language and version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

# Of Spark's function `xxhash64`, so that a plan on Spark gives the same ids.
_SEED = 42


def hash_ids(ids: np.ndarray, table_size: int) -> np.ndarray:
    """The row of each id: 0 for id 0, the unknown one, and one of the others for any other id.

    The finalizer of SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014)
    spreads the ids, so that neighbours, or multiples of a number, do not meet in few rows. `docs/data.md` has it for
    other languages, with test vectors.

    Args:
        ids: int64, of any shape; an id of uint64 is that of the same bits.
        table_size: rows of the table, 2 or more.

    Returns:
        np.ndarray: int64, from 0 to `table_size - 1`, of the shape of `ids`.

    Raises:
        ValueError: the table has no row beside that of the unknown id.

    Example::

        hash_ids(np.array([0, 1, -1, 2**62]), table_size=1000)  # [0, 374, 664, 370]
    """
    if table_size < 2:
        raise ValueError(f"table_size is {table_size}, not 2 or more: row 0 is the unknown id's")
    rows = 1 + (mix(ids) % (table_size - 1)).astype(np.int64)
    return np.where(ids == 0, 0, rows)


def mix(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of a number changes about half of the bits that come out.

    Args:
        numbers: int64 or uint64, of any shape.

    Returns:
        np.ndarray: uint64, of that shape; different numbers stay different, and 0 stays 0.

    Example::

        mix(np.array([1]))  # [6238072747940578789]
    """
    bits = numbers.astype(np.uint64)
    bits ^= bits >> 30
    bits *= 0xBF58476D1CE4E5B9
    bits ^= bits >> 27
    bits *= 0x94D049BB133111EB
    bits ^= bits >> 31
    return bits


def hash_text(text: Iterable[str]) -> np.ndarray:
    """The id of each text: XXH64 of its UTF-8 bytes with seed 42, as an int64 of the same bits.

    `docs/data.md` has test vectors for other languages.

    Args:
        text: any.

    Returns:
        np.ndarray: int64, one for each.

    Example::

        hash_text(["", "news"])  # [-7444071767201028348, -7564045931908447509]
    """
    hashes = [xxhash.xxh64_intdigest(one.encode(), seed=_SEED) for one in text]
    return np.array(hashes, dtype=np.uint64).astype(np.int64)


def ids_of_text(text: pa.Array) -> np.ndarray:
    """The id of each text of a column, worked out once for each that is another one.

    Args:
        text: strings, none null.

    Returns:
        np.ndarray: int64; see `hash_text`.

    Example::

        ids_of_text(pa.array(["news", "sport", "news"]))
    """
    coded = text.dictionary_encode()
    hashes = hash_text(coded.dictionary.to_pylist())
    return hashes[coded.indices.to_numpy()] if len(text) else hashes


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids that have a row of a table, from row 1 on; all others have row 0, the unknown id's.

    Args:
        values: int64 or strings, each once, in the order of their rows.

    Raises:
        ValueError: a value is null or there twice, or two strings have one hash.

    Example::

        vocabulary = Vocabulary(pa.array(["news", "sport"]))
        vocabulary.rows(hash_text(["sport", "opinion"]))  # [2, 0]
    """

    values: pa.Array

    def __post_init__(self) -> None:
        if self.values.null_count:
            raise ValueError("a vocabulary has a null: leave it out")
        ids = ids_of_text(self.values) if pa.types.is_string(self.values.type) else self.values.to_numpy()
        order = np.argsort(ids, kind="stable")
        if len(twice := np.flatnonzero(np.diff(ids[order]) == 0)):
            one, other = (self.values[int(order[twice[0] + place])].as_py() for place in (0, 1))
            raise ValueError(f"a vocabulary has {one!r} and {other!r}, which are one id: leave one out")
        object.__setattr__(self, "_ids", ids[order])
        object.__setattr__(self, "_rows", order + 1)

    @classmethod
    def of(cls, values: pa.Array | pa.ChunkedArray, min_count: int = 1) -> Vocabulary:
        """The values that are there often enough, the most frequent first and equally frequent ones in order.

        Args:
            values: int64 or strings; nulls are left out.
            min_count: how often at least.

        Example::

            Vocabulary.of(pa.array(["news", "sport", "news"]), min_count=2)
        """
        counts = pc.value_counts(pc.drop_null(values))
        names, numbers = counts.field("values"), counts.field("counts")
        table = pa.table({"value": names, "count": numbers}).filter(pc.greater_equal(numbers, min_count))
        table = table.sort_by([("count", "descending"), ("value", "ascending")])
        return cls(table["value"].combine_chunks())

    def __len__(self) -> int:
        """The number of ids, one less than the rows that they need."""
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.values.equals(other.values)

    __hash__ = None  # type: ignore[assignment]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id.

        Args:
            ids: int64, of text its `hash_text`.

        Returns:
            np.ndarray: int64; 0 for unknown ones.
        """
        known: np.ndarray = self._ids  # type: ignore[attr-defined]
        if not len(known):
            return np.zeros(len(ids), dtype=np.int64)
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        rows: np.ndarray = np.where(known[places] == ids, self._rows[places], 0)  # type: ignore[attr-defined]
        return rows
