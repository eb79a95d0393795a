"""The functions and structures of native.cpp, where comments tell what they are.

Shape suffixes: B requests; C candidates, all requests together; D model dimension; T tasks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchrec_amort.ops.cores import usable_cores

Struct = TypeVar("Struct", bound=ctypes.Structure)

_SUFFIXES = {torch.float32: "", torch.bfloat16: "_bfloat16"}

# VERSION of native.cpp: one more whenever a function or a structure that Python uses changes.
VERSION = 1


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


@dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """Rows of embeddings, which may be left where they are until they are read.

    Args:
        table: float32 [T, D].
        ids: int64 [R], its rows in turn; None if they are the table itself.
    """

    table: Tensor
    ids: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows, R."""
        return self.table.shape[0] if self.ids is None else self.ids.shape[0]

    def tensor(self) -> Tensor:
        """[R, D]."""
        return self.table if self.ids is None else self.table.index_select(0, self.ids)


@dataclass(frozen=True, eq=False)
class Candidates:
    """What C candidates are scored from.

    Args:
        items: rows [C, D] that the encoder reads, if there is one.
        dense: float32 [C, inputs], if the head reads them.
        slots: rows [C, D] of each slot of the head.
    """

    items: EmbeddingRows | None = None
    dense: Tensor | None = None
    slots: Sequence[EmbeddingRows] = ()


# In the order of torchrec_amort_layout in native.cpp.
STRUCTS: tuple[type[ctypes.Structure], ...] = (
    LayerStruct,
    EncoderStruct,
    LinearStruct,
    HeadStruct,
    RequestStruct,
    RowsStruct,
    CandidatesStruct,
    StateStruct,
    HistoryStruct,
)


def refuse_other_build(library: ctypes.CDLL, path: str) -> None:
    """Refuse native code that was not built from the native.cpp of this version: it would read other memory.

    Args:
        library: the build.
        path: where it is.

    Raises:
        RuntimeError: tells the two versions or layouts.
    """
    again = "build it again: pip install -e . in a checkout, or install the package anew"
    try:
        version = ctypes.c_int64.in_dll(library, "torchrec_amort_version").value
    except ValueError:  # a build from before there were versions
        version = 0
    if version != VERSION:
        raise RuntimeError(f"{path}: native code of version {version}, but Python reads version {VERSION}: {again}")
    layout = (ctypes.c_int64 * 2 * len(STRUCTS)).in_dll(library, "torchrec_amort_layout")
    for struct, (size, last) in zip(STRUCTS, layout, strict=True):
        have = ctypes.sizeof(struct), getattr(struct, struct._fields_[-1][0]).offset
        if have != (size, last):
            raise RuntimeError(
                f"{path}: native code has a {struct.__name__} of {size} bytes, its last field at {last}, but Python "
                f"one of {have[0]}, at {have[1]}: {again}"
            )


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The build for this processor that multiplies numbers of a type; None if there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    kinds = [kind for kind in ("avx512", "avx2") if capability.startswith(("AVX512", kind.upper()))]
    if capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported():
        kinds.insert(0, "avx512_bf16")
    for kind in kinds:
        spec = find_spec(f"torchrec_amort.ops._native_{kind}")
        if spec is not None and spec.origin is not None:
            library = ctypes.CDLL(spec.origin)
            refuse_other_build(library, spec.origin)
            return library if hasattr(library, "torchrec_amort_score" + _SUFFIXES[dtype]) else None
    return None


def why_no_build(weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why native code cannot multiply weights here, or None if it can.

    Raises:
        RuntimeError: the build is of another version: that is mended, and not served by PyTorch instead.
    """
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


def address(tensor: Tensor, name: str, dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor's entries are, one after the other.

    Args:
        tensor: on a CPU, contiguous.
        name: what an error calls it.
        dtype: that it needs to have.

    Raises:
        ValueError: it is not so.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else f"of strides {tensor.stride()}"
        raise ValueError(
            f"{name} is {layout}, {tensor.dtype}, on {tensor.device}; native code reads contiguous {dtype} on a CPU"
        )
    return tensor.data_ptr()


def _rows(of: Sequence[EmbeddingRows], name: str, count: int, dim: int) -> ctypes.Array[RowsStruct]:
    """Where rows of embeddings are, `count` of `dim` each; those given live until they are read."""
    return array(RowsStruct, [_row_fields(rows, name, count, dim) for rows in of])


def _row_fields(rows: EmbeddingRows, name: str, count: int, dim: int) -> tuple[int, int | None, int]:
    table, ids = rows.table, rows.ids
    if table.dim() != 2 or table.shape[1] != dim or len(rows) != count:
        raise ValueError(f"{name}: {len(rows)} rows of a table {list(table.shape)}, not {count} rows of {dim}")
    stride, of_column = table.stride()
    if table.dtype != torch.float32 or table.device.type != "cpu" or of_column != 1:
        raise ValueError(
            f"{name}: a table of {table.dtype}, strides {table.stride()}, on {table.device}; native code reads "
            "torch.float32 on a CPU whose columns are next to each other"
        )
    return table.data_ptr(), None if ids is None else address(ids, f"{name}: ids", torch.int64), stride


def encode(
    encoder: EncoderStruct, terms: Sequence[EmbeddingRows], histories: Sequence[History], dtype: torch.dtype
) -> None:
    """Phase one: write the keys and values of the events that are added to histories.

    Args:
        encoder: its weights.
        terms: rows [N, D] each, whose sum are the events.
        histories: of each request.
        dtype: of weights, keys and values.

    Raises:
        ValueError: rows are of another number, width, type, device or layout than native code reads.
    """
    num_events = sum(added for *_, added in histories)
    _function("encode", dtype)(
        ctypes.byref(encoder),
        _rows(terms, "events", num_events, encoder.dim),
        ctypes.c_int64(len(terms)),
        array(HistoryStruct, histories),
        ctypes.c_int64(len(histories)),
        ctypes.c_int(_num_threads()),
    )


def score(
    encoder: EncoderStruct | None,
    head: HeadStruct | None,
    candidates: Candidates,
    num_candidates: Sequence[int],
    histories: Sequence[History],
    requests: Sequence[Request],
    dtype: torch.dtype,
    interacted: Tensor | None = None,
) -> Tensor:
    """Phase two.

    Args:
        encoder: makes the last vector of each candidate; None if there is none.
        head: makes logits of the vectors; None to have the encoder's.
        candidates: what they are scored from.
        num_candidates: of each request.
        histories: of each request; none without encoder.
        requests: what each adds; none without head.
        dtype: of weights, keys and values.
        interacted: float32 [C, U, D]: to be written with the vectors that a head interacts, if given.

    Returns:
        Tensor: float32 [C, T] of a head, or else [C, D].

    Raises:
        ValueError: candidates, histories or requests are of another number, width, type, device or layout than native
            code reads.
    """
    count, num_requests = sum(num_candidates), len(num_candidates)
    for name, of, wanted in (
        ("histories", histories, 0 if encoder is None else num_requests),
        ("requests", requests, 0 if head is None else num_requests),
        ("slots", candidates.slots, 0 if head is None else head.num_slots),
    ):
        if len(of) != wanted:
            raise ValueError(f"{name} are {len(of)}, but native code reads {wanted}")
    given, width = CandidatesStruct(), 0
    if encoder is not None:
        if candidates.items is None:
            raise ValueError("items are None, but the encoder reads them")
        given.items = _rows([candidates.items], "items", count, encoder.dim)[0]
        width = encoder.dim
    if head is not None:
        slots = _rows(candidates.slots, "slots", count, head.dim)
        given.slots = ctypes.addressof(slots)
        width = head.num_tasks
    if head is not None and head.num_dense_layers > 0:
        dense = candidates.dense
        if dense is None or dense.shape != (count, head.num_dense_inputs):
            have = None if dense is None else list(dense.shape)
            raise ValueError(f"dense inputs are {have}, but native code reads {[count, head.num_dense_inputs]}")
        given.dense = address(dense, "dense inputs")
    out = torch.empty(count, width)
    _function("score", dtype)(
        None if encoder is None else ctypes.byref(encoder),
        None if head is None else ctypes.byref(head),
        ctypes.byref(given),
        (ctypes.c_int64 * num_requests)(*num_candidates),
        ctypes.c_int64(num_requests),
        array(HistoryStruct, histories),
        array(RequestStruct, requests),
        ctypes.c_void_p(out.data_ptr()),
        None if interacted is None else ctypes.c_void_p(address(interacted, "interacted")),
        ctypes.c_int(_num_threads()),
    )
    return out


def _num_threads() -> int:
    """PyTorch's choice, but no more than there are cores for."""
    return min(torch.get_num_threads(), usable_cores())


@cache
def _function(phase: str, dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(_library(dtype), f"torchrec_amort_{phase}{_SUFFIXES[dtype]}")
    return function
