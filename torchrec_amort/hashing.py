"""The hash by which ids of any size find a row of a table: fixed, the same in every language and version."""

from __future__ import annotations

import numpy as np


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
