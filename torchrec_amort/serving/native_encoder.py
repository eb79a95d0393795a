"""AmortizedHistoryArch by native code: the same function, close to the rate of a CPU's matrix products.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H attention
heads of dimension K.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
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
        num_events: events that are there.
        capacity: events that there is memory for.
        num_layers: layers with keys and values.
        dim: D.
        num_heads: H.
        dtype: of keys and values.
    """

    def __init__(
        self, num_events: int, capacity: int, num_layers: int, dim: int, num_heads: int, dtype: torch.dtype
    ) -> None:
        self._num_events, self._capacity = num_events, capacity
        self._num_heads, self._head_dim = num_heads, dim // num_heads
        self.dtype = dtype
        # Of each layer. Keys head by head, so that each is read in order; of values, events are next to each other.
        self._keys = torch.empty(num_layers, num_heads, capacity, self._head_dim, dtype=dtype)
        self._values = torch.empty(num_layers, dim, capacity + 1, dtype=dtype)
        if dtype == torch.bfloat16:
            # Products read one event beyond the last, times zero: it must be finite.
            self._values.zero_()
        keys, values, size = self._keys.data_ptr(), self._values.data_ptr(), dtype.itemsize
        states = [
            (
                keys + layer * dim * capacity * size,
                values + layer * dim * (capacity + 1) * size,
                capacity * self._head_dim,
                self._head_dim,
                capacity + 1,
            )
            for layer in range(num_layers)
        ]
        self._states = native.array(native.StateStruct, states)
        self.address = ctypes.addressof(self._states)
        self._lock = threading.Lock()

    def refuse_other_encoder(self, num_layers: int, num_heads: int, dim: int) -> None:
        """Refuse an encoder of another size: it would read beyond what is here.

        Raises:
            ValueError: tells both sizes.
        """
        have = len(self._states), self._num_heads, self._num_heads * self._head_dim
        if have != (num_layers, num_heads, dim):
            raise ValueError(
                f"state is of {have[0]} layers, {have[1]} heads, dimension {have[2]}, but the encoder has "
                f"{num_layers}, {num_heads}, {dim}: encode the history with it"
            )

    def take(self, num_past: int, num_events: int) -> bool:
        """Take the space for the events that come after the first `num_past`, if nobody has and it is there."""
        with self._lock:
            if self._num_events != num_past or num_events > self._capacity:
                return False
            self._num_events = num_events
            return True

    def keys(self, start: int, num_events: int) -> tuple[Tensor, ...]:
        """Of each layer, [N, H, K]: those of so many events from `start` on."""
        return self._keys[:, :, start : start + num_events].transpose(1, 2).unbind()

    def values(self, start: int, num_events: int) -> tuple[Tensor, ...]:
        """Of each layer, [N, H, K]: those of so many events from `start` on."""
        rows = self._values[:, :, start : start + num_events].transpose(1, 2)
        return rows.unflatten(2, (self._num_heads, self._head_dim)).unbind()


class _NativeState(HistoryState):
    """A state as native code reads it. Its tensors are made when somebody asks: a small request waits for each.

    Args:
        room: where its keys and values are.
        start: its first event there.
        num_events: of each request.
    """

    def __init__(self, room: _Room, start: int, num_events: Sequence[int]) -> None:
        vars(self).update(room=room, start=start, num_events=num_events)

    room: _Room
    start: int
    num_events: Sequence[int]

    def __len__(self) -> int:
        return len(self.num_events)

    def __getitem__(self, index: int | slice) -> HistoryState:
        requests = self.requests(index)
        before = sum(self.num_events[: requests.start])
        return _NativeState(self.room, self.start + before, self.num_events[requests.start : requests.stop])

    @cached_property
    def keys(self) -> tuple[Tensor, ...]:
        return self.room.keys(self.start, sum(self.num_events))

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        return self.room.values(self.start, sum(self.num_events))

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor(self.num_events, dtype=torch.int64)

    def histories(self, added: Sequence[int] = ()) -> list[native.History]:
        """Of each request, for native code; if events are added, they are the latest of those that are here."""
        starts = accumulate(self.num_events[:-1], initial=self.start)
        address, added = self.room.address, added or [0] * len(self)
        return [
            (address, start, count - more, more)
            for start, count, more in zip(starts, self.num_events, added, strict=True)
        ]


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
        self.vectors = arch.vectors
        self._is_causal = arch.is_causal
        self._num_layers = len(arch.layers)
        self._weights = native.Weights()
        keep = self._weights.keep
        layers = [self._layer(layer) for layer in arch.layers]
        self._layers = (native.LayerStruct * len(layers))(*layers)
        self.struct = native.EncoderStruct(
            arch.embedding_dim,
            self.num_heads,
            cast(nn.Linear, arch.layers[0].feedforward[0]).out_features,
            len(layers),
            arch.is_causal,
            arch.output_norm.eps,
            ctypes.addressof(self._layers),
            keep(arch.output_norm.weight),
            keep(arch.output_norm.bias),
        )

    def _layer(self, layer: AmortizedHistoryLayer) -> native.LayerStruct:
        keep = self._weights.keep
        widen, _, narrow = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(layer.feedforward))
        return native.LayerStruct(
            keep(layer.attention_norm.weight),
            keep(layer.attention_norm.bias),
            keep(layer.query.weight, self.dtype),
            keep(layer.key_value.weight, self.dtype),
            keep(layer.output.weight, self.dtype),
            keep(layer.feedforward_norm.weight),
            keep(layer.feedforward_norm.bias),
            keep(widen.weight, self.dtype),
            keep(widen.bias),
            keep(narrow.weight, self.dtype),
            keep(narrow.bias),
        )

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the keys and values of those before them as they are."""
        return self._is_causal

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one; see `AmortizableEncoder.encode_history`."""
        return self.encode_events([_whole(history.values())], history.lengths())

    def encode_events(self, terms: Sequence[EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of events whose vectors are sums.

        Args:
            terms: what to add up, rows [N, D] each, one of B per request, oldest event first.
            lengths_B: int64 [B].
        """
        num_events = lengths_B.tolist()
        state = self._empty(num_events)
        native.encode(self.struct, terms, state.histories(num_events), self.dtype)
        return state

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only; see `AmortizableEncoder.extend_history`.

        A single request's state grows in place where there is room after its events, of which states that were there
        before see nothing; else it moves to where there is.
        """
        if not self.is_extendable:
            return super().extend_history(state, events)
        past, new = self._readable(state), events.lengths().tolist()
        refuse_other_requests(len(past), len(new))
        num_events = [old + more for old, more in zip(past.num_events, new, strict=True)]
        if len(new) == 1 and past.room.take(past.start + past.num_events[0], past.start + num_events[0]):
            longer = _NativeState(past.room, past.start, num_events)
        else:
            longer = self._empty(num_events, spare=max(SPARE_EVENTS, sum(num_events) // 8))
            for request in range(len(new)):
                _copy(past[request], longer[request])
        native.encode(self.struct, [_whole(events.values())], longer.histories(new), self.dtype)
        return longer

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two; see `AmortizableEncoder.score_candidates`."""
        return self.score_states([state], candidates)

    def score_states(self, states: Sequence[HistoryState], candidates: JaggedTensor) -> Tensor:
        """Phase two, the requests' states not put together; see `AmortizableEncoder.score_states`."""
        num_candidates = candidates.lengths().tolist()
        readable = self.readable(states, len(num_candidates))
        vectors_CD = native.score(
            self.struct,
            None,
            native.Candidates(_whole(candidates.values())),
            num_candidates,
            [history for state in readable for history in state.histories()],
            [],
            self.dtype,
        )
        return self.vectors(vectors_CD)

    def readable(self, states: Sequence[HistoryState], num_requests: int) -> list[_NativeState]:
        """The states as native code reads them; to be kept until it has done so.

        Raises:
            ValueError: they are not of so many requests.
        """
        refuse_other_requests(sum(len(state) for state in states), num_requests)
        return [self._readable(state) for state in states]

    def _empty(self, num_events: Sequence[int], spare: int = 0) -> _NativeState:
        """A state to be written; a single request's may have room for more events."""
        total = sum(num_events)
        room = _Room(total, total + spare, self._num_layers, self.embedding_dim, self.num_heads, self.dtype)
        return _NativeState(room, 0, num_events)

    def _readable(self, state: HistoryState) -> _NativeState:
        """The state as native code reads it: itself, if it was written here."""
        if isinstance(state, _NativeState) and state.room.dtype == self.dtype:
            state.room.refuse_other_encoder(self._num_layers, self.num_heads, self.embedding_dim)
            return state
        readable = self._empty(state.lengths.tolist())
        _copy(state, readable)
        return readable


def _copy(state: HistoryState, longer: HistoryState) -> None:
    """Copy keys and values to the start of others."""
    for old, new in zip(state.keys + state.values, longer.keys + longer.values, strict=True):
        new[: old.shape[0]] = old


def _whole(rows_ND: Tensor) -> EmbeddingRows:
    # Both return what is as it should be, but only after a while.
    is_whole = rows_ND.dtype == torch.float32 and rows_ND.is_contiguous()
    return EmbeddingRows(rows_ND if is_whole else rows_ND.float().contiguous())
