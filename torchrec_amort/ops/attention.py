"""Attention over jagged rows: every row reads the keys of its own request, and no others.

Shape suffixes: B requests; R rows that ask, N keys, all requests together; G requests of a group, M rows and S keys
of its longest; H attention heads of dimension K.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from torchrec_amort.ops.jagged import expand, offsets

Backend = Literal["packed", "padded"]

# Padding that costs about as much as one more call: pairs of a row and a key.
PAIRS_OF_A_CALL = 2**16


class JaggedAttention:
    """Which rows read which keys; worked out once, used by every layer.

    A single request is attended to as it is. Of several, `packed` wastes next to nothing on padding: on CUDA in half
    precision it is torch's variable-length attention, unless rows read a key of their own and gradients are wanted;
    elsewhere requests of similar lengths are padded together, in as many groups as pay for their calls. `padded` pads
    all requests to the longest. Both give the same result, to rounding.

    Args:
        row_lengths_B: int64 [B], rows of each request.
        key_lengths_B: int64 [B], keys of each request; rows of a request without keys read exactly zero.
        is_causal: rows are the last of the events that the keys are of, and read those up to themselves: of m rows
            and n keys of a request, row i reads keys 0 to n - m + i.
        backend: `packed` or `padded`.

    Example::

        attention = JaggedAttention(torch.tensor([1, 2]), torch.tensor([3, 0]))
        read_RHK = attention(torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8))
    """

    def __init__(
        self, row_lengths_B: Tensor, key_lengths_B: Tensor, *, is_causal: bool = False, backend: Backend = "packed"
    ) -> None:
        self.row_lengths_B = row_lengths_B
        self.key_lengths_B = key_lengths_B
        self.is_causal = is_causal
        self.backend: Backend = backend

    def __call__(
        self, queries_RHK: Tensor, keys_NHK: Tensor, values_NHK: Tensor, own: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Read the values, weighted by the softmax of scaled products of queries and keys.

        Args:
            queries_RHK: [R, H, K].
            keys_NHK: [N, H, K].
            values_NHK: [N, H, K].
            own: a key and a value, each [R, H, K], that each row reads beside its request's.

        Returns:
            Tensor: [R, H, K].
        """
        tensors = [queries_RHK, keys_NHK, values_NHK, *(own or ())]
        if self.row_lengths_B.shape[0] == 1:
            padded = [tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors]
            return _attention(padded, None, self.is_causal).squeeze(0).transpose(0, 1)
        if torch.compiler.is_compiling():
            lengths = (self.row_lengths_B, self.key_lengths_B)
            read: Tensor = torch.ops.torchrec_amort.jagged_attention(
                tensors, *lengths, self.is_causal, self.backend == "packed"
            )
            return read
        # Variable-length attention has no gradient by the sum of its softmax, which a row's own key is weighed by.
        has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if self.backend == "packed" and _has_varlen_kernel(tensors) and not (own and has_gradients):
            return self._varlen(queries_RHK, keys_NHK, values_NHK, own)
        return self._join([group.attend(tensors, self.is_causal) for group in self._groups], self._row_order_R)

    def gradients(self, gradient_RHK: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of a call by its tensors, for where autograd does not see the call."""
        parts = zip(*(group.gradients(gradient_RHK, tensors, self.is_causal) for group in self._groups), strict=True)
        orders = (self._row_order_R, self._key_order_N, self._key_order_N, self._row_order_R, self._row_order_R)
        return [self._join(part, order) for part, order in zip(parts, orders, strict=False)]

    def _join(self, parts: Sequence[Tensor], order_R: Tensor | None) -> Tensor:
        return parts[0] if order_R is None else torch.cat(list(parts)).index_select(0, order_R)

    def _varlen(
        self, queries_RHK: Tensor, keys_NHK: Tensor, values_NHK: Tensor, own: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        read = varlen_attn(
            queries_RHK,
            keys_NHK,
            values_NHK,
            offsets(self.row_lengths_B).int(),
            offsets(self.key_lengths_B).int(),
            *self._longest,
            window_size=(-1, 0) if self.is_causal else (-1, -1),
            return_aux=AuxRequest(lse=own is not None),
        )
        if own is None:
            assert isinstance(read, Tensor)
            return read
        (read_RHK, log_sum_HR), (own_key_RHK, own_value_RHK) = read, own
        # Without a key the sum is zero, and its logarithm infinite of either sign.
        num_rows = queries_RHK.shape[0]
        has_keys_R = expand(self.key_lengths_B, self.row_lengths_B, num_rows) > 0
        log_sum_RH = log_sum_HR.t().masked_fill(~has_keys_R[:, None], -torch.inf)
        logits_RH = (queries_RHK.float() * own_key_RHK.float()).sum(-1) * queries_RHK.shape[-1] ** -0.5
        weight_RH1 = torch.sigmoid(logits_RH - log_sum_RH).unsqueeze(-1)
        return torch.lerp(read_RHK.float(), own_value_RHK.float(), weight_RH1).to(read_RHK.dtype)

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Rows and keys of the longest requests; asked of the device once, whatever the number of layers."""
        rows, keys = torch.stack([self.row_lengths_B.max(), self.key_lengths_B.max()]).tolist()
        return max(1, rows), max(1, keys)

    @cached_property
    def _groups(self) -> list[_Group]:
        rows, keys = (
            np.asarray(lengths.tolist(), dtype=np.int64) for lengths in (self.row_lengths_B, self.key_lengths_B)
        )
        device = self.row_lengths_B.device
        groups = _split(rows, keys) if self.backend == "packed" else [np.arange(len(rows))]
        if len(groups) == 1:
            return [_Group(_Padding(None, rows, device), _Padding(None, keys, device))]
        row_starts, key_starts = np.cumsum(rows) - rows, np.cumsum(keys) - keys
        return [
            _Group(
                _Padding(row_starts[group], rows[group], device),
                _Padding(key_starts[group], keys[group], device),
            )
            for group in groups
        ]

    @cached_property
    def _row_order_R(self) -> Tensor | None:
        return _order([group.rows.rows_R for group in self._groups])

    @cached_property
    def _key_order_N(self) -> Tensor | None:
        return _order([group.keys.rows_R for group in self._groups])


def _order(rows_of_groups: Sequence[Tensor | None]) -> Tensor | None:
    """Where each row stands among the rows of the groups, group after group; None if there is one group."""
    rows = [rows_R for rows_R in rows_of_groups if rows_R is not None]
    return torch.argsort(torch.cat(rows)) if rows else None


def _has_varlen_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's variable-length attention, which is FlashAttention-2, takes such queries, keys and values."""
    dtypes, head_dim = {tensor.dtype for tensor in tensors}, tensors[0].shape[-1]
    is_taken = dtypes in ({torch.float16}, {torch.bfloat16}) and head_dim % 8 == 0 and head_dim <= 256
    return is_taken and _has_flash_attention(tensors[0].device)


def _has_flash_attention(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _split(rows: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Put requests into groups: each is padded to its longest request, for less than a call more would cost."""
    octave = np.frexp(keys)[1]
    groups: list[list[int]] = []
    used = most_rows = most_keys = 0
    for request in np.lexsort((-keys, -rows, -octave)).tolist():
        m, n = int(rows[request]), int(keys[request])
        wide, tall = max(most_rows, m), max(most_keys, n)
        if groups and (len(groups[-1]) + 1) * wide * tall - used - m * n <= PAIRS_OF_A_CALL:
            groups[-1].append(request)
            used, most_rows, most_keys = used + m * n, wide, tall
        else:
            groups.append([request])
            used, most_rows, most_keys = m * n, m, n
    return [np.array(group) for group in groups] or [np.arange(0)]


class _Padding:
    """Where the rows of a group of requests stand in padded form."""

    def __init__(self, starts_G: np.ndarray | None, lengths_G: np.ndarray, device: torch.device) -> None:
        """Without `starts_G` the group is the whole batch, in order."""
        self.num_requests = len(lengths_G)
        self.lengths_G = lengths_G
        self.device = device
        self.width = max(1, int(lengths_G.max(initial=0)))
        places_S = np.arange(self.width)
        mask_GS = places_S < lengths_G[:, None]
        self.is_dense = bool(mask_GS.all())
        to_device = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
        self.rows_R = None if starts_G is None else to_device((starts_G[:, None] + places_S)[mask_GS])
        if not self.is_dense:
            self.places_R = to_device(np.flatnonzero(mask_GS))
            self._mask_GS = to_device(mask_GS)
            self._is_empty_G1 = to_device((lengths_G == 0)[:, None])

    def real_keys(self) -> Tensor | None:
        """bool [G, 1, 1, S]: where there is a key; None if everywhere."""
        return None if self.is_dense else self._mask_GS[:, None, None, :]

    def readable_keys(self) -> Tensor | None:
        """bool [G, 1, 1, S]: as `real_keys`, but who has no key reads padding, whose value is zero."""
        return None if self.is_dense else (self._mask_GS | self._is_empty_G1)[:, None, None, :]

    def pad(self, rows_RHK: Tensor) -> Tensor:
        """[R, H, K] to [G, H, M, K], zeros where there is no row."""
        if self.rows_R is not None:
            rows_RHK = rows_RHK.index_select(0, self.rows_R)
        trailing = rows_RHK.shape[1:]
        if not self.is_dense:
            empty_PHK = rows_RHK.new_zeros(self.num_requests * self.width, *trailing)
            rows_RHK = empty_PHK.index_copy(0, self.places_R, rows_RHK)
        return rows_RHK.view(self.num_requests, self.width, *trailing).transpose(1, 2)

    def unpad(self, padded_GHMK: Tensor) -> Tensor:
        """[G, H, M, K] to [R, H, K]: what `pad` was given, in the group's order."""
        rows_PHK = padded_GHMK.transpose(1, 2).flatten(0, 1)
        return rows_PHK if self.is_dense else rows_PHK.index_select(0, self.places_R)


class _Group:
    """Requests whose attention is worked out in one call."""

    def __init__(self, rows: _Padding, keys: _Padding) -> None:
        self.rows = rows
        self.keys = keys

    def attend(self, tensors: Sequence[Tensor], is_causal: bool) -> Tensor:
        """What the group's rows read: [R, H, K] of queries, keys, values and, maybe, own keys and own values."""
        return self.rows.unpad(_attention(self._pad(tensors), self._mask(len(tensors) > 3, is_causal), is_causal))

    def gradients(self, gradient_RHK: Tensor, tensors: Sequence[Tensor], is_causal: bool) -> list[Tensor]:
        """Gradients of `attend`, by each of its tensors."""
        queries, keys, values, *own = self._pad(tensors)
        mask = self._mask(bool(own), is_causal)
        if is_causal and mask is None:
            mask = _causal_mask(queries, keys)
        padded = _attention_gradients(self.rows.pad(gradient_RHK), queries, keys, values, own, mask)
        sides = (self.rows, self.keys, self.keys, self.rows, self.rows)
        return [side.unpad(tensor) for side, tensor in zip(sides, padded, strict=False)]

    def _mask(self, has_own: bool, is_causal: bool) -> Tensor | None:
        """Which keys a row reads, bool [G, 1, M or 1, S]; None if all, or all up to itself where rows are the keys."""
        if not is_causal:
            return self.keys.real_keys() if has_own else self.keys.readable_keys()
        # No row reads a later key, hence none reads padding, which comes last.
        return None if np.array_equal(self.rows.lengths_G, self.keys.lengths_G) else self._past_and_own_keys

    @cached_property
    def _past_and_own_keys(self) -> Tensor:
        places_M1 = np.arange(self.rows.width)[:, None]
        last_GM1 = (self.keys.lengths_G - self.rows.lengths_G)[:, None, None] + places_M1
        mask_GMS = np.arange(self.keys.width) <= last_GM1
        return torch.from_numpy(mask_GMS[:, None]).to(self.rows.device)

    def _pad(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        sides = (self.rows, self.keys, self.keys, self.rows, self.rows)
        return [side.pad(tensor) for side, tensor in zip(sides, tensors, strict=False)]


def _attention(padded: Sequence[Tensor], mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention of padded queries, keys, values and, maybe, own keys and values; a causal mask is made if not given."""
    queries, keys, values, *own = padded
    is_square = queries.shape[-2] == keys.shape[-2]
    if is_causal and mask is None and (own or not is_square):
        mask = _causal_mask(queries, keys)
    if own:
        return _attention_with_own(queries, keys, values, own, mask)
    is_causal = is_causal and mask is None
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)


def _causal_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """bool [M, S]: the rows are the last of the keys, and read those up to themselves."""
    num_rows, num_keys = queries.shape[-2], keys.shape[-2]
    last_M = torch.arange(num_rows, device=keys.device) + (num_keys - num_rows)
    return torch.arange(num_keys, device=keys.device) <= last_M[:, None]


def _weights(queries: Tensor, keys: Tensor, own: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Softmax of scaled products with the keys and, last, the row's own key if there is one: [G, H, M, S (+ 1)]."""
    logits = queries @ keys.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    products = [logits, *((queries * own_key).sum(-1, keepdim=True) for own_key in own[:1])]
    return torch.softmax(torch.cat(products, dim=-1) * queries.shape[-1] ** -0.5, dim=-1)


def _attention_with_own(
    queries: Tensor, keys: Tensor, values: Tensor, own: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """Attention whose softmax has one term more: the row's own key."""
    weights = _weights(queries, keys, own, mask)
    return weights[..., :-1] @ values + weights[..., -1:] * own[1]


def _attention_gradients(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, own: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Gradients of attention, with or without a row's own term, by queries, keys, values and own key and value."""
    weights, num_keys = _weights(queries, keys, own, mask), keys.shape[-2]
    by_weights = [gradient @ values.transpose(-1, -2), *((gradient * value).sum(-1, keepdim=True) for value in own[1:])]
    by_weights_GHMS = torch.cat(by_weights, dim=-1)
    by_logits = weights * (by_weights_GHMS - (weights * by_weights_GHMS).sum(-1, keepdim=True))
    by_logits = by_logits * queries.shape[-1] ** -0.5
    by_queries = by_logits[..., :num_keys] @ keys + sum(by_logits[..., num_keys:] * own_key for own_key in own[:1])
    by_keys = by_logits[..., :num_keys].transpose(-1, -2) @ queries
    by_values = weights[..., :num_keys].transpose(-1, -2) @ gradient
    by_own = [by_logits[..., num_keys:] * queries, weights[..., num_keys:] * gradient] if own else []
    return [by_queries, by_keys, by_values, *by_own]


# Lengths decide shapes, which torch.compile and torch.export cannot follow: to them the whole is one operator.
@torch.library.custom_op("torchrec_amort::jagged_attention", mutates_args=())
def _attend(
    tensors: Sequence[Tensor], row_lengths: Tensor, key_lengths: Tensor, is_causal: bool, is_packed: bool
) -> Tensor:
    queries, keys, values, *own = tensors
    attention = _of_lengths(row_lengths, key_lengths, is_causal, is_packed)
    return attention(queries, keys, values, (own[0], own[1]) if own else None).clone(memory_format=_CONTIGUOUS)


@torch.library.custom_op("torchrec_amort::jagged_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    tensors: Sequence[Tensor],
    row_lengths: Tensor,
    key_lengths: Tensor,
    is_causal: bool,
    is_packed: bool,
) -> list[Tensor]:
    gradients = _of_lengths(row_lengths, key_lengths, is_causal, is_packed).gradients(gradient, tensors)
    return [g.clone(memory_format=_CONTIGUOUS) for g in gradients]


_CONTIGUOUS = torch.contiguous_format


def _of_lengths(row_lengths: Tensor, key_lengths: Tensor, is_causal: bool, is_packed: bool) -> JaggedAttention:
    return JaggedAttention(row_lengths, key_lengths, is_causal=is_causal, backend="packed" if is_packed else "padded")


@_attend.register_fake
def _(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    return torch.empty_like(tensors[0], memory_format=_CONTIGUOUS)


@_attend_backward.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=_CONTIGUOUS) for tensor in tensors]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, row_lengths, key_lengths, *ctx.options = inputs
    ctx.save_for_backward(*tensors, row_lengths, key_lengths)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *tensors, row_lengths, key_lengths = ctx.saved_tensors
    return _attend_backward(gradient, tensors, row_lengths, key_lengths, *ctx.options), None, None, None, None


_attend.register_autograd(_gradients, setup_context=_keep_inputs)
