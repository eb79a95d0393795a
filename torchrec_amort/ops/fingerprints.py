"""Fingerprints: integers that are the same for equal rows, and for others as good as never.

Shape suffixes: R rows; D entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Integers as wide as an entry, by its bytes.
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# Odd, so that no bit of an entry is lost; another one for each entry, so that their order counts.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


def mixed(prints_R: Tensor, numbers_R: Tensor) -> Tensor:
    """int64 [R]: fingerprints, with one number more in each.

    Args:
        prints_R: int64 [R], or a scalar for all.
        numbers_R: int64 [R].
    """
    # What a linear congruential generator does with each entry put in: the high bits are folded down, for a product
    # moves bits upwards only.
    prints_R = (prints_R ^ numbers_R) * _FACTOR
    return prints_R ^ (prints_R >> 32)


def fingerprints(rows_RD: Tensor, prints_R: Tensor) -> Tensor:
    """int64 [R]: of rows, by their bits.

    Args:
        rows_RD: floats or integers.
        prints_R: int64 [R], of what else they are told apart by.
    """
    bits_RD = rows_RD.contiguous().view(_BITS[rows_RD.element_size()]).long()
    for bits_R in bits_RD.unbind(1):
        prints_R = mixed(prints_R, bits_R)
    return prints_R
