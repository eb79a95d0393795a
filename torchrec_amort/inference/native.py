"""AmortizedHistoryArch by native code: the same function, on a CPU, at close to the rate of its matrix products.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H attention
heads of dimension K.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.history import AmortizedHistoryArch, AmortizedHistoryLayer

_SUFFIXES = {torch.float32: "", torch.bfloat16: "_bfloat16"}


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "attention_norm_weight",
            "attention_norm_bias",
            "query",
            "key_value",
            "output",
            "feedforward_norm_weight",
            "feedforward_norm_bias",
            "widen",
            "widen_bias",
            "narrow",
            "narrow_bias",
        )
    ]


class _Encoder(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dim", "heads", "width", "num_layers", "is_causal")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layers", "output_norm_weight", "output_norm_bias")),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_stride", "value_stride")),
    ]


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The build for this processor that multiplies numbers of a type; None if there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    kinds = [kind for kind in ("avx512", "avx2") if capability.startswith(("AVX512", kind.upper()))]
    if capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported():
        kinds.insert(0, "avx512_bf16")
    for kind in kinds:
        spec = find_spec(f"torchrec_amort.inference._native_{kind}")
        if spec is not None and spec.origin is not None:
            library = ctypes.CDLL(spec.origin)
            return library if hasattr(library, "torchrec_amort_score" + _SUFFIXES[dtype]) else None
    return None


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
    if encoder.output_norm.weight.device.type != "cpu":
        return f"the weights are on {encoder.output_norm.weight.device}"
    if dtype not in _SUFFIXES or _library(dtype) is None:
        return f"no build for this processor multiplies {dtype}: it needs x86-64 and a compiler when installed"
    return None


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
        library = _library(dtype)
        assert library is not None
        self._encode = getattr(library, "torchrec_amort_encode" + _SUFFIXES[dtype])
        self._score = getattr(library, "torchrec_amort_score" + _SUFFIXES[dtype])
        self._weights: list[Tensor] = []
        layers = [self._layer(layer) for layer in arch.layers]
        self._layers = (_Layer * len(layers))(*layers)
        self._encoder = _Encoder(
            arch.embedding_dim,
            self.num_heads,
            cast(nn.Linear, arch.layers[0].feedforward[0]).out_features,
            len(layers),
            arch.is_causal,
            arch.output_norm.eps,
            ctypes.addressof(self._layers),
            self._keep(arch.output_norm.weight),
            self._keep(arch.output_norm.bias),
        )

    def _layer(self, layer: AmortizedHistoryLayer) -> _Layer:
        widen, _, narrow = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(layer.feedforward))
        return _Layer(
            self._keep(layer.attention_norm.weight),
            self._keep(layer.attention_norm.bias),
            self._keep(layer.query.weight, self.dtype),
            self._keep(layer.key_value.weight, self.dtype),
            self._keep(layer.output.weight, self.dtype),
            self._keep(layer.feedforward_norm.weight),
            self._keep(layer.feedforward_norm.bias),
            self._keep(widen.weight, self.dtype),
            self._keep(widen.bias),
            self._keep(narrow.weight, self.dtype),
            self._keep(narrow.bias),
        )

    def _keep(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a copy that lives as long as the encoder."""
        self._weights.append(weight.detach().to(dtype, copy=True).contiguous())
        return self._weights[-1].data_ptr()

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
        lengths_B = torch.cat([state.lengths for state in states]) if len(states) > 1 else states[0].lengths
        pointers, kept = [], []
        for state in states:
            readable = self._readable(state)
            kept.append(readable)
            pointers += self._pointers(readable)
        vectors_CD = candidates.values().float().contiguous()
        num_candidates_B = candidates.lengths().long().contiguous()
        if len(lengths_B) != len(num_candidates_B):
            raise ValueError(
                f"the states are of {len(lengths_B)} requests, the candidates of {len(num_candidates_B)}: they need "
                "one history each"
            )
        read_CD = torch.empty_like(vectors_CD)
        self._score(
            ctypes.byref(self._encoder),
            ctypes.c_void_p(vectors_CD.data_ptr()),
            ctypes.c_void_p(num_candidates_B.data_ptr()),
            ctypes.c_void_p(lengths_B.data_ptr()),
            ctypes.c_int64(len(lengths_B)),
            ctypes.byref((_State * len(pointers))(*pointers)),
            ctypes.c_void_p(read_CD.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        )
        return self.vectors(read_CD)

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
        events_ND, lengths_B = events.values().float().contiguous(), events.lengths().long().contiguous()
        pointers = self._pointers(state)
        past_B = past_B.contiguous()
        self._encode(
            ctypes.byref(self._encoder),
            ctypes.c_void_p(events_ND.data_ptr()),
            ctypes.c_void_p(lengths_B.data_ptr()),
            ctypes.c_void_p(past_B.data_ptr()),
            ctypes.c_int64(len(lengths_B)),
            ctypes.byref((_State * len(pointers))(*pointers)),
            ctypes.c_int(torch.get_num_threads()),
        )

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

    def _pointers(self, state: HistoryState) -> list[_State]:
        """Of each request in turn, where its keys and values of each layer are."""
        size = self.dtype.itemsize
        starts = [0, *torch.cumsum(state.lengths, 0).tolist()][:-1]
        return [
            _State(
                key.data_ptr() + start * key.stride(0) * size,
                value.data_ptr() + start * size,
                key.stride(0),
                value.stride(2),
            )
            for start in starts
            for key, value in zip(state.keys, state.values, strict=True)
        ]
