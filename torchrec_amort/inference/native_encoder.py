"""AmortizedHistoryArch by native code: the same function, close to the rate of a CPU's matrix products.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H attention
heads of dimension K.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.inference import native
from torchrec_amort.inference.lookup import EmbeddingRows
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.history import AmortizedHistoryArch, AmortizedHistoryLayer

# Events that a state has room for when it is extended, at least.
SPARE_EVENTS = 128


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
    return native.why_no_build(encoder.output_norm.weight, dtype)


@dataclass(frozen=True, eq=False)
class _StateWithRoom(HistoryState):
    """A state as native code reads it, that may grow in place."""

    room: _Room = field(kw_only=True)


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
        self._num_events, self._capacity, self._shape = num_events, capacity, (num_heads, dim // num_heads)
        # Head by head, so that each is read in order.
        self._keys = [torch.empty(num_heads, capacity, dim // num_heads, dtype=dtype) for _ in range(num_layers)]
        # Events are next to each other. Products of bfloat16 read one beyond the last, times zero: it must be finite.
        self._values = [torch.zeros(dim, capacity + 1, dtype=dtype) for _ in range(num_layers)]
        self._lock = threading.Lock()
        head_dim = dim // num_heads
        self.dtype = dtype
        self.pointers = [
            native.StateStruct(key.data_ptr(), value.data_ptr(), capacity * head_dim, head_dim, capacity + 1)
            for key, value in zip(self._keys, self._values, strict=True)
        ]

    def take(self, num_past: int, num_events: int) -> bool:
        """Take the space for the events that come after the first `num_past`, if nobody has and it is there."""
        with self._lock:
            if self._num_events != num_past or num_events > self._capacity:
                return False
            self._num_events = num_events
            return True

    def state(self, num_events: int, lengths_B: Tensor) -> _StateWithRoom:
        """The first events, keys and values [N, H, K]; they are of requests of these lengths."""
        (heads, head_dim), row = self._shape, self._capacity + 1
        shape = (num_events, heads, head_dim)
        # One view each, not one after the other: a request for few rows waits for every call.
        keys = [key.as_strided(shape, (head_dim, self._capacity * head_dim, 1)) for key in self._keys]
        values = [value.as_strided(shape, (1, head_dim * row, row)) for value in self._values]
        return _StateWithRoom(tuple(keys), tuple(values), lengths_B, room=self)


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
        state = self._empty(int(lengths_B.sum()), lengths_B)
        self._write(state, terms, lengths_B, torch.zeros_like(lengths_B, dtype=torch.int64))
        return state

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only; see `AmortizableEncoder.extend_history`.

        A single request's state grows in place where there is room after its events, of which states that were there
        before see nothing; else it moves to where there is.
        """
        if not self.is_extendable:
            return super().extend_history(state, events)
        refuse_other_requests(state, events)
        lengths_B = state.lengths + events.lengths()
        num_events = int(lengths_B.sum())
        longer: HistoryState
        if isinstance(state, _StateWithRoom) and len(state) == 1 and state.room.take(int(state.lengths), num_events):
            longer = state.room.state(num_events, lengths_B)
        else:
            longer = self._empty(num_events, lengths_B, spare=max(SPARE_EVENTS, num_events // 8))
            for request in range(len(state)):
                past, place = state[request], longer[request]
                for old, new in zip(past.keys + past.values, place.keys + place.values, strict=True):
                    new[: old.shape[0]] = old
        self._write(longer, [_whole(events.values())], events.lengths(), state.lengths)
        return longer

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two; see `AmortizableEncoder.score_candidates`."""
        return self.score_states([state], candidates)

    def score_states(self, states: Sequence[HistoryState], candidates: JaggedTensor) -> Tensor:
        """Phase two, the requests' states not put together; see `AmortizableEncoder.score_states`."""
        num_events_B, readable = self.readable(states, len(candidates.lengths()))
        items_CD = candidates.values().float().contiguous()
        given = native.CandidatesStruct(native.RowsStruct.of(EmbeddingRows(items_CD)))
        pointers = [pointer for state in readable for pointer in self.pointers(state)]
        vectors_CD = native.score(
            self.struct,
            None,
            given,
            candidates.lengths(),
            num_events_B,
            pointers,
            [],
            torch.empty_like(items_CD),
            self.dtype,
        )
        return self.vectors(vectors_CD)

    def readable(self, states: Sequence[HistoryState], num_requests: int) -> tuple[Tensor, list[HistoryState]]:
        """Events of each request, and the states as native code reads them; to be kept until it has done so.

        Raises:
            ValueError: they are not of so many requests.
        """
        num_events_B = states[0].lengths if len(states) == 1 else torch.cat([state.lengths for state in states])
        if len(num_events_B) != num_requests:
            raise ValueError(
                f"the states are of {len(num_events_B)} requests, the candidates of {num_requests}: they need one "
                "history each"
            )
        return num_events_B, [self._readable(state) for state in states]

    def _empty(self, num_events: int, lengths_B: Tensor, spare: int = 0) -> HistoryState:
        """A state to be written; a single request's may have room for more events."""
        room = _Room(num_events, num_events + spare, self._num_layers, self.embedding_dim, self.num_heads, self.dtype)
        return room.state(num_events, lengths_B)

    def _write(self, state: HistoryState, terms: Sequence[EmbeddingRows], lengths_B: Tensor, past_B: Tensor) -> None:
        native.encode(self.struct, terms, lengths_B, past_B, self.pointers(state), self.dtype)

    def _readable(self, state: HistoryState) -> HistoryState:
        """The state as native code reads it: itself, if it was written here."""
        if isinstance(state, _StateWithRoom) and state.room.dtype == self.dtype:
            return state
        if all(key.stride(2) == 1 and key.dtype == self.dtype for key in state.keys) and all(
            value.stride(0) == 1
            and value.stride(1) == value.shape[2] * value.stride(2)
            and value.stride(2) > value.shape[0]
            and value.dtype == self.dtype
            for value in state.values
        ):
            return state
        readable = self._empty(state.keys[0].shape[0], state.lengths)
        for old, new in zip(state.keys + state.values, readable.keys + readable.values, strict=True):
            new.copy_(old)
        return readable

    def pointers(self, state: HistoryState) -> list[native.StateStruct]:
        """Of each request in turn, where its keys and values of each layer are."""
        if isinstance(state, _StateWithRoom) and len(state) == 1:
            return state.room.pointers
        size = self.dtype.itemsize
        starts = [0] if len(state) == 1 else [0, *torch.cumsum(state.lengths, 0).tolist()][:-1]
        return [
            native.StateStruct(
                key.data_ptr() + start * key.stride(0) * size,
                value.data_ptr() + start * size,
                key.stride(1),
                key.stride(0),
                value.stride(2),
            )
            for start in starts
            for key, value in zip(state.keys, state.values, strict=True)
        ]


def _whole(rows_ND: Tensor) -> EmbeddingRows:
    return EmbeddingRows(rows_ND.float().contiguous())
