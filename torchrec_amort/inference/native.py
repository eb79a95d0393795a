"""The functions and structures of native.cpp, where comments tell what they are.

Shape suffixes: B requests; C candidates, all requests together; D model dimension; T tasks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchrec_amort.inference.lookup import EmbeddingRows

Struct = TypeVar("Struct", bound=ctypes.Structure)

_SUFFIXES = {torch.float32: "", torch.bfloat16: "_bfloat16"}


class LayerStruct(ctypes.Structure):
    """One layer of the encoder: addresses of its weights."""

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


class EncoderStruct(ctypes.Structure):
    """An AmortizedHistoryArch."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dim", "heads", "width", "num_layers", "is_causal")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layers", "output_norm_weight", "output_norm_bias")),
    ]


class LinearStruct(ctypes.Structure):
    """A linear layer, with even numbers of inputs and outputs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


class HeadStruct(ctypes.Structure):
    """A DotHead."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "dim",
                "num_request_vectors",
                "num_slots",
                "num_dense_inputs",
                "num_dense_layers",
                "num_over_layers",
                "num_tasks",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("dense", "over")),
    ]


class RequestStruct(ctypes.Structure):
    """What a request adds to its candidates' logits."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("dense", "vectors", "first")]


# The fields of a RequestStruct.
Request = tuple[int | None, int | None, int | None]


class RowsStruct(ctypes.Structure):
    """Rows of embeddings."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("table", "ids")), ("stride", ctypes.c_int64)]


class CandidatesStruct(ctypes.Structure):
    """What candidates are scored from."""

    _fields_ = [("items", RowsStruct), *((name, ctypes.c_void_p) for name in ("dense", "slots"))]


class StateStruct(ctypes.Structure):
    """Keys and values of one layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("head_stride", "key_stride", "value_stride")),
    ]


class HistoryStruct(ctypes.Structure):
    """Where one request's keys and values are, in all layers."""

    _fields_ = [("states", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("start", "past", "added"))]


# The fields of a HistoryStruct.
History = tuple[int, int, int, int]


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


def why_no_build(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why native code cannot multiply weights here, or None if it can."""
    if weight.device.type != "cpu":
        return f"the weights are on {weight.device}"
    if dtype not in _SUFFIXES or _library(dtype) is None:
        return f"no build for this processor multiplies {dtype}: it needs x86-64 and a compiler when installed"
    return None


class Weights:
    """Copies of weights that native code points at."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def keep(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a copy that lives as long as this."""
        self._kept.append(weight.detach().to(dtype, copy=True).contiguous())
        return self._kept[-1].data_ptr()


def array(struct: type[Struct], fields: Sequence[Any]) -> ctypes.Array[Struct]:
    """Structures one after the other, of a tuple of fields each: less to make than a structure each."""
    return (struct * len(fields))(*fields)


def rows(of: Sequence[EmbeddingRows]) -> ctypes.Array[RowsStruct]:
    """Where rows of embeddings are; those given live until they are read."""
    return array(RowsStruct, [_row_fields(one) for one in of])


def _row_fields(rows: EmbeddingRows) -> tuple[int, int | None, int]:
    stride, of_column = rows.table.stride()
    assert rows.table.dtype == torch.float32
    assert of_column == 1
    return rows.table.data_ptr(), None if rows.ids is None else rows.ids.data_ptr(), stride


def encode(
    encoder: EncoderStruct, terms: Sequence[EmbeddingRows], histories: Sequence[History], dtype: torch.dtype
) -> None:
    """Phase one: write the keys and values of the events that are added to histories.

    Args:
        encoder: its weights.
        terms: rows [N, D] each, whose sum are the events.
        histories: of each request.
        dtype: of weights, keys and values.
    """
    _function("encode", dtype)(
        ctypes.byref(encoder),
        rows(terms),
        ctypes.c_int64(len(terms)),
        array(HistoryStruct, histories),
        ctypes.c_int64(len(histories)),
        ctypes.c_int(torch.get_num_threads()),
    )


def score(
    encoder: EncoderStruct | None,
    head: HeadStruct | None,
    candidates: CandidatesStruct,
    num_candidates: Sequence[int],
    histories: Sequence[History],
    requests: Sequence[Request],
    out: Tensor,
    dtype: torch.dtype,
    interacted: Tensor | None = None,
) -> Tensor:
    """Phase two.

    Args:
        encoder: makes the last vector of each candidate; None if there is none.
        head: makes logits of the vectors; None to have the encoder's.
        candidates: addresses of what they are scored from.
        num_candidates: of each request.
        histories: of each request; none without encoder.
        requests: what each adds; none without head.
        out: float32 [C, D] or, with a head, [C, T]: to be written.
        dtype: of weights, keys and values.
        interacted: float32 [C, U, D]: to be written with the vectors that a head interacts, if given.

    Returns:
        Tensor: `out`.
    """
    _function("score", dtype)(
        None if encoder is None else ctypes.byref(encoder),
        None if head is None else ctypes.byref(head),
        ctypes.byref(candidates),
        (ctypes.c_int64 * len(num_candidates))(*num_candidates),
        ctypes.c_int64(len(num_candidates)),
        array(HistoryStruct, histories),
        array(RequestStruct, requests),
        ctypes.c_void_p(out.data_ptr()),
        None if interacted is None else ctypes.c_void_p(interacted.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


@cache
def _function(phase: str, dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(_library(dtype), f"torchrec_amort_{phase}{_SUFFIXES[dtype]}")
    return function
