"""AmortizedHistoryArch by native code: the same function, close to the rate of a CPU's matrix products.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H attention
heads of dimension K.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.inference import native
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.history import AmortizedHistoryArch, AmortizedHistoryLayer


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
        past_B = torch.zeros_like(history.lengths(), dtype=torch.int64)
        state = self._empty(history.lengths())
        self._write(state, history, past_B)
        return state

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only; see `AmortizableEncoder.extend_history`."""
        if not self.is_extendable:
            return super().extend_history(state, events)
        refuse_other_requests(state, events)
        longer = self._empty(state.lengths + events.lengths())
        for request in range(len(state)):
            past, place = state[request], longer[request]
            for old, new in zip(past.keys + past.values, place.keys + place.values, strict=True):
                new[: old.shape[0]] = old
        self._write(longer, events, state.lengths)
        return longer

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two; see `AmortizableEncoder.score_candidates`."""
        return self.score_states([state], candidates)

    def score_states(self, states: Sequence[HistoryState], candidates: JaggedTensor) -> Tensor:
        """Phase two, the requests' states not put together; see `AmortizableEncoder.score_states`."""
        num_events_B, readable = self.readable(states, len(candidates.lengths()))
        items_CD = candidates.values().float().contiguous()
        given = native.CandidatesStruct(items_CD.data_ptr())
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

    def _empty(self, lengths_B: Tensor) -> HistoryState:
        """A state to be written: keys [N, H, K], and values of that shape whose events are next to each other."""
        num_events, dim = int(lengths_B.sum()), self.embedding_dim
        shape = (self.num_heads, -1)
        keys = [torch.empty(num_events, dim, dtype=self.dtype).unflatten(1, shape) for _ in range(self._num_layers)]
        # Products of bfloat16 read one value beyond the last, times zero: it must be finite.
        values = [torch.zeros(dim, num_events + 1, dtype=self.dtype) for _ in range(self._num_layers)]
        views = [value[:, :num_events].t().unflatten(1, shape) for value in values]
        return HistoryState(tuple(keys), tuple(views), lengths_B)

    def _write(self, state: HistoryState, events: JaggedTensor, past_B: Tensor) -> None:
        native.encode(self.struct, events.values(), events.lengths(), past_B, self.pointers(state), self.dtype)

    def _readable(self, state: HistoryState) -> HistoryState:
        """The state as native code reads it: itself, if it was written here."""
        if all(key.stride()[1:] == (key.shape[2], 1) and key.dtype == self.dtype for key in state.keys) and all(
            value.stride()[0] == 1
            and value.stride()[1] == value.shape[2] * value.stride()[2]
            and value.stride()[2] > value.shape[0]
            and value.dtype == self.dtype
            for value in state.values
        ):
            return state
        readable = self._empty(state.lengths)
        for old, new in zip(state.keys + state.values, readable.keys + readable.values, strict=True):
            new.copy_(old)
        return readable

    def pointers(self, state: HistoryState) -> list[native.StateStruct]:
        """Of each request in turn, where its keys and values of each layer are."""
        size = self.dtype.itemsize
        starts = [0, *torch.cumsum(state.lengths, 0).tolist()][:-1]
        return [
            native.StateStruct(
                key.data_ptr() + start * key.stride(0) * size,
                value.data_ptr() + start * size,
                key.stride(0),
                value.stride(2),
            )
            for start in starts
            for key, value in zip(state.keys, state.values, strict=True)
        ]
