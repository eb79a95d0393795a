"""AmortizedHistoryArch by native code: the same function, close to the rate of a CPU's matrix products.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H attention
heads of dimension K.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.history import AmortizedHistoryArch, AmortizedHistoryLayer
from torchrec_amort.modules.plain import Plain, why_unlike
from torchrec_amort.ops import native
from torchrec_amort.ops.native import EmbeddingRows

# Events that a state has room for when it is extended, at least.
SPARE_EVENTS = 128

_PLAIN = Plain(
    AmortizedHistoryArch,
    AmortizedHistoryLayer,
    nn.ModuleList,
    nn.LayerNorm,
    nn.Linear,
    nn.Sequential,
    nn.ReLU,
    nn.Dropout,
    nn.Identity,
)


def why_not_native(encoder: nn.Module | None, dtype: torch.dtype) -> str | None:
    """Why native code cannot serve an encoder here, or None if it can.

    Args:
        encoder: the history encoder of a model.
        dtype: `torch.float32` or `torch.bfloat16`: of weights, keys and values.

    Example::

        encoder = arch if why_not_native(arch, torch.float32) else NativeEncoder(arch)
    """
    if type(encoder) is not AmortizedHistoryArch:
        return f"it serves AmortizedHistoryArch, and this is {type(encoder).__name__}"
    has = {
        "reads_itself": encoder.reads_itself,
        "rotary": encoder.is_rotary,
        "has_summary": encoder.has_summary,
        "recent_events": encoder.compression is not None,
        "a head of odd dimension": encoder.head_dim % 2 == 1,
    }
    for option, is_given in has.items():
        if is_given:
            return f"it does not do {option}"
    if reason := _PLAIN.why_not_any(encoder, "history_arch") or why_unlike(encoder, _as_built(encoder), "history_arch"):
        return reason
    if cast(nn.Linear, encoder.layers[0].feedforward[0]).out_features % 2:
        return "it does not do an odd feedforward_dim"
    return native.why_no_build(encoder.output_norm.weight, dtype)


def _as_built(arch: AmortizedHistoryArch) -> AmortizedHistoryArch:
    """An arch as its constructor makes it, of the sizes of one whose modules are of the usual classes."""
    first = arch.layers[0]
    widths = [module.out_features for module in first.feedforward.modules() if isinstance(module, nn.Linear)]
    return AmortizedHistoryArch(
        arch.embedding_dim,
        len(arch.layers),
        arch.embedding_dim // arch.head_dim,
        next(iter(widths), None),
        "causal" if arch.is_causal else "full",
        getattr(first.dropout, "p", 0.0),
        torch.device("meta"),
        num_vectors=arch.num_slots,
        backend=arch.backend,
    )


class _Room:
    """Memory of keys and values with space for more events.

    Args:
        keys: of each layer, head by head, so that each is read in order: [L, H, n, K].
        values: of each layer, events next to each other: [L, D, n + 1]. What is no event's is finite in bfloat16, since
            products read one more, times zero.
        num_events: events that are there.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_events: int) -> None:
        self.keys, self.values = keys, values
        self._num_events = num_events
        self._lock = threading.Lock()

    def take(self, num_past: int, num_events: int) -> bool:
        """Take the space for the events that come after the first `num_past`, if nobody has and it is there."""
        with self._lock:
            if self._num_events != num_past or num_events > self.keys.shape[2]:
                return False
            self._num_events = num_events
            return True


class NativeState(HistoryState):
    """A state as native code reads it. Its other tensors are made when somebody asks: a small request waits for each.

    Args:
        room: where its keys and values are.
        start: its first event there.
        stop: where they end.
        lengths: int64 [B].
    """

    def __init__(self, room: _Room, start: int, stop: int, lengths: Tensor) -> None:
        vars(self).update(room=room, start=start, stop=stop, lengths=lengths)

    room: _Room
    start: int
    stop: int

    @classmethod
    def of_tensors(cls, keys: Tensor, values: Tensor, lengths: Tensor) -> NativeState:
        """The state whose keys [L, H, n, K] and values [L, D, n + 1] these are."""
        num_events = keys.shape[2]
        return cls(_Room(keys, values, num_events), 0, num_events, lengths)

    @classmethod
    def of(cls, state: HistoryState, dtype: torch.dtype) -> NativeState:
        """A state itself, if native code wrote it, or else a copy."""
        if isinstance(state, NativeState) and state.room.keys.dtype == dtype:
            return state
        keys = torch.stack(state.keys).transpose(1, 2).to(dtype).contiguous()
        values = F.pad(torch.stack(state.values).flatten(2).transpose(1, 2).to(dtype), (0, 1)).contiguous()
        return cls.of_tensors(keys, values, state.lengths.long())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, contiguous, of which `of_tensors` makes the state again."""
        keys, values = self.room.keys[:, :, self.start : self.stop], self.room.values[:, :, self.start : self.stop + 1]
        return keys.contiguous(), values.contiguous()

    def __getitem__(self, index: int | slice) -> HistoryState:
        requests, num_events = self.requests(index), self.lengths.tolist()
        start = self.start + sum(num_events[: requests.start])
        stop = start + sum(num_events[requests.start : requests.stop])
        return NativeState(self.room, start, stop, self.lengths[requests.start : requests.stop])

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        return self.room.keys[:, :, self.start : self.stop].transpose(1, 2).unbind()

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        rows = self.room.values[:, :, self.start : self.stop].transpose(1, 2)
        return rows.unflatten(2, (self.room.keys.shape[1], -1)).unbind()


class NativeEncoder(AmortizableEncoder):
    """An AmortizedHistoryArch as native code runs it; for inference only.

    It works on tiles of rows that stay in the cache of one core through all layers, reads each request's keys and
    values where they are, and pads nothing. The weights are those of the moment that it is made.

    Args:
        arch: on a CPU.
        dtype: of weights, keys and values; sums and what passes from layer to layer are float32 in either case.

    Raises:
        ValueError: `why_not_native` tells why.

    Example::

        encoder = NativeEncoder(arch.eval())
        vectors_CD = encoder.score_candidates(encoder.encode_history(history), candidates)
    """

    def __init__(self, arch: AmortizedHistoryArch, dtype: torch.dtype = torch.float32) -> None:
        if reason := why_not_native(arch, dtype):
            raise ValueError(f"no native encoder: {reason}")
        super().__init__(arch.embedding_dim, arch.num_slots)
        self.dtype = dtype
        self.num_heads = arch.embedding_dim // arch.head_dim
        self.epsilon = arch.output_norm.eps
        self.vectors = arch.vectors
        self._beside_pytorch = False
        self._is_causal = arch.is_causal
        # In the order of operators.cpp.
        layers = [_weights_of(layer) for layer in arch.layers]
        for name in layers[0]:
            is_matrix = name not in ("widen_bias", "layer_vectors")
            of_layers = torch.stack([weights[name].detach() for weights in layers])
            self.register_buffer(name, of_layers.to(dtype if is_matrix else torch.float32))
        self.register_buffer("output_norm", torch.stack([*arch.output_norm.parameters()]).detach().float())

    def beside_pytorch(self) -> NativeEncoder:
        """The same encoder, to be run between PyTorch's own operations, as with a head in PyTorch.

        PyTorch's threads then share the work: they stay awake between operations, and others would share cores with
        them.
        """
        other = copy.copy(self)
        other._beside_pytorch = True
        return other

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the keys and values of those before them as they are."""
        return self._is_causal

    def weights(self) -> list[Tensor]:
        """What operators read of it."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one; see `AmortizableEncoder.encode_history`."""
        return self.encode_events([_whole(history.values())], history.lengths())

    def encode_events(self, terms: Sequence[EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of events whose vectors are sums.

        Args:
            terms: what to add up, rows [N, D] each, one of B per request, oldest event first.
            lengths_B: int64 [B].
        """
        lengths_B = lengths_B.to(torch.int64, copy=True)
        keys, values = torch.ops.torchrec_amort.encode_history(
            self.weights(),
            self.num_heads,
            self._is_causal,
            self.epsilon,
            *of_each(terms),
            lengths_B,
            self._beside_pytorch,
        )
        return NativeState.of_tensors(keys, values, lengths_B)

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only; see `AmortizableEncoder.extend_history`.

        A single request's state grows in place where there is room after its events, of which states that were there
        before see nothing; else it moves to where there is.
        """
        if not self.is_extendable:
            return super().extend_history(state, events)
        past, new_B = NativeState.of(state, self.dtype), events.lengths().long()
        refuse_other_requests(len(past), len(new_B))
        lengths_B, stop = past.lengths + new_B, past.stop + int(new_B.sum())
        if len(new_B) == 1 and past.room.take(past.stop, stop):
            longer = NativeState(past.room, past.start, stop, lengths_B)
        else:
            longer = _with_room(past, lengths_B)
        torch.ops.torchrec_amort.extend_history(
            self.weights(),
            self.num_heads,
            self.epsilon,
            *of_each([_whole(events.values())]),
            new_B,
            past.lengths,
            longer.room.keys,
            longer.room.values,
            longer.start,
            self._beside_pytorch,
        )
        return longer

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two; see `AmortizableEncoder.score_candidates`."""
        return self.score_states([state], candidates)

    def score_states(self, states: Sequence[HistoryState], candidates: JaggedTensor) -> Tensor:
        """Phase two, the requests' states not put together; see `AmortizableEncoder.score_states`."""
        num_candidates_B, items = candidates.lengths(), _whole(candidates.values())
        vectors_CD: Tensor = torch.ops.torchrec_amort.score_candidates(
            self.weights(),
            self.num_heads,
            self.epsilon,
            *self.of_states(states),
            items.table,
            None,
            num_candidates_B,
            self._beside_pytorch,
        )
        return self.vectors(vectors_CD)

    def of_states(self, states: Sequence[HistoryState]) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor]]:
        """Keys, values, first event and lengths of each state, as operators read them."""
        readable = [NativeState.of(state, self.dtype) for state in states]
        return (
            [state.room.keys for state in readable],
            [state.room.values for state in readable],
            [state.start for state in readable],
            [state.lengths for state in readable],
        )


def _weights_of(layer: AmortizedHistoryLayer) -> dict[str, Tensor]:
    widen, _, narrow = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(layer.feedforward))
    vectors: list[Tensor] = [*layer.attention_norm.parameters(), *layer.feedforward_norm.parameters(), narrow.bias]
    return {
        "query": layer.query.weight,
        "key_value": layer.key_value.weight,
        "output": layer.output.weight,
        "widen": widen.weight,
        "narrow": narrow.weight,
        "widen_bias": widen.bias,
        "layer_vectors": torch.stack(vectors),
    }


def _with_room(past: NativeState, lengths_B: Tensor) -> NativeState:
    """A copy of a state whose requests have space for so many events each, and some more after the last."""
    num_layers, num_heads, _, head_dim = past.room.keys.shape
    total, dtype = int(lengths_B.sum()), past.room.keys.dtype
    capacity = total + max(SPARE_EVENTS, total // 8)
    keys = torch.empty(num_layers, num_heads, capacity, head_dim, dtype=dtype)
    # In bfloat16, products read one event beyond the last, times zero: it must be finite.
    new = torch.zeros if dtype == torch.bfloat16 else torch.empty
    values = new(num_layers, num_heads * head_dim, capacity + 1, dtype=dtype)
    start, old_start = 0, past.start
    for num_past, num_events in zip(past.lengths.tolist(), lengths_B.tolist(), strict=True):
        old, longer = slice(old_start, old_start + num_past), slice(start, start + num_past)
        keys[:, :, longer], values[:, :, longer] = past.room.keys[:, :, old], past.room.values[:, :, old]
        start, old_start = start + num_events, old.stop
    return NativeState(_Room(keys, values, total), 0, total, lengths_B)


def of_each(rows: Sequence[EmbeddingRows]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Tables, and ids if there are some. What quantized collections return may be in float16."""
    tables = [of_one.table if of_one.ids is not None else _whole(of_one.table).table for of_one in rows]
    return tables, [of_one.ids for of_one in rows]


def _whole(rows_ND: Tensor) -> EmbeddingRows:
    # Both return what is as it should be, but only after a while.
    is_whole = rows_ND.dtype == torch.float32 and rows_ND.is_contiguous()
    return EmbeddingRows(rows_ND if is_whole else rows_ND.float().contiguous())
