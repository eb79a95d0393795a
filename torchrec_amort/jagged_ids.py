"""Rows and keys of a KeyedJaggedTensor, taken out and put together.

A `KeyedJaggedTensor` keeps what it works out from its lengths. These functions let it; whoever reads somebody else's
takes a `shallow_copy` first.

Shape suffixes: R rows; V values of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

JaggedIds = tuple[Tensor, Tensor]  # values [V], and lengths [R]: how many of each row


def shallow_copy(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same tensors in another `KeyedJaggedTensor`, which may keep what the first one should not."""
    # Its constructor, and `copy.copy`, take ten times as long as a small request can spare.
    copied = KeyedJaggedTensor.__new__(type(kjt))
    vars(copied).update(vars(kjt))
    # The tensors of each key keep their offsets, too.
    copied._jt_dict = None
    return copied


def have_one_each(kjt: KeyedJaggedTensor) -> bool:
    """Whether each row of each key has exactly one id."""
    lengths = kjt.lengths()
    return kjt.values().numel() == lengths.numel() and (lengths.numel() == 0 or int(lengths.min()) == 1)


def span_of(kjt: KeyedJaggedTensor, key: str, start: int, stop: int) -> slice:
    """Where the values of the rows of a key from `start` to `stop` are."""
    place, stride = kjt.keys().index(key), kjt.stride()
    if (start, stop) == (0, stride):
        # Kept on the host: a GPU is asked once for all keys, or not at all if it was known before they were moved.
        of_keys = kjt.offset_per_key()
        return slice(of_keys[place], of_keys[place + 1])
    first, offsets = place * stride, kjt.offsets()
    return slice(int(offsets[first + start]), int(offsets[first + stop]))


def rows_of(kjt: KeyedJaggedTensor, key: str, start: int, stop: int) -> JaggedIds:
    """Values and lengths of the rows of a key from `start` to `stop`; views."""
    first = kjt.keys().index(key) * kjt.stride()
    return kjt.values()[span_of(kjt, key, start, stop)], kjt.lengths()[first + start : first + stop]


def rows_of_all(kjt: KeyedJaggedTensor, start: int, stop: int, keys: Sequence[str] | None = None) -> KeyedJaggedTensor:
    """The rows from `start` to `stop` of some keys, of all if `keys` is None, with their weights if they have some."""
    keys, weights = list(kjt.keys() if keys is None else keys), kjt.weights_or_none()
    firsts = [kjt.keys().index(key) * kjt.stride() for key in keys]
    rows = [slice(first + start, first + stop) for first in firsts]
    # Offsets would take as much memory as ids that are one of each row.
    spans = rows if have_one_each(kjt) else [span_of(kjt, key, start, stop) for key in keys]

    def cut(flat: Tensor, pieces: list[slice]) -> Tensor:
        # A copy even of one piece: quantized tables would read a view from its start on.
        return torch.cat([flat[:0], *(flat[piece] for piece in pieces)])

    return KeyedJaggedTensor(
        keys,
        cut(kjt.values(), spans),
        weights=None if weights is None else cut(weights, spans),
        lengths=cut(kjt.lengths(), rows),
        stride=stop - start,
    )


def select_rows(kjt: KeyedJaggedTensor, rows: Tensor, keys: Sequence[str]) -> KeyedJaggedTensor:
    """The given rows of the given keys, in that order; a row may be taken many times."""
    kjt = shallow_copy(kjt)
    first_of_key = torch.tensor([kjt.keys().index(key) * kjt.stride() for key in keys], device=rows.device)
    places, lengths = taken(kjt.lengths(), (first_of_key[:, None] + rows).flatten().long())
    weights = kjt.weights_or_none()
    return KeyedJaggedTensor(
        keys=list(keys),
        values=kjt.values()[places],
        weights=None if weights is None else weights[places],
        lengths=lengths,
        stride=rows.numel(),
    )


def taken(lengths: Tensor, lists: Tensor) -> JaggedIds:
    """Some of many lists that stand one after the other.

    Args:
        lengths: [L], of all lists.
        lists: int64 [S], the wanted ones; one may be wanted many times.

    Returns:
        tuple: int64, the places of their entries, and [S], their lengths.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    lengths = lengths[lists]
    # Where an entry goes, less where its list goes, plus where its list comes from.
    shift = torch.repeat_interleave(starts[lists] - (torch.cumsum(lengths, 0) - lengths), lengths)
    return torch.arange(shift.numel(), device=lists.device) + shift, lengths


def keyed(rows: Mapping[str, JaggedIds], stride: int) -> KeyedJaggedTensor:
    """Put the rows of several keys together."""
    values, lengths = zip(*rows.values(), strict=True)
    return KeyedJaggedTensor(list(rows), torch.cat(values), lengths=torch.cat(lengths), stride=stride)
