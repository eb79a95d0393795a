"""Tensors of the Open Inference Protocol, and the tables of requests that they say.

A column of requests is a tensor of its name. With one value for each of B requests it is [B]. A list for each is [B, n]
where all have n entries, or all their entries one after the other, [N], beside `NAME.lengths`, [B]. Vectors have one
dimension more. Where each entry has a list of ids, it is all ids, [M], beside `NAME.counts`, [N] or [B, n]. Or a single
tensor `arrow`, of datatype BYTES and shape [1], holds all columns: an Arrow IPC stream.

Shape suffixes: B requests; N entries of all requests, n of each; M ids of all entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import RequestSchema

ARROW = "arrow"
LENGTHS, COUNTS = ".lengths", ".counts"

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
DATATYPES = (*_DTYPES, "BYTES")
# Of types of Arrow's, and of arrays, the protocol's word.
DATATYPE_OF_COLUMN = {pa.int64(): "INT64", pa.float32(): "FP32", pa.string(): "BYTES"}
DATATYPE_OF: dict[Any, str] = {np.dtype(dtype): datatype for datatype, dtype in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class InputTensor:
    """A tensor of a request.

    Args:
        name: as the protocol has it.
        datatype: one of `DATATYPES`.
        shape: its dimensions.
        values: numpy array of that shape; of BYTES, of objects that are bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of(cls, name: str, datatype: str, shape: Sequence[int], data: Any) -> InputTensor:
        """Read a tensor.

        Args:
            name: as the protocol has it.
            datatype: as the protocol has it.
            shape: its dimensions.
            data: `bytes`, as raw contents have them; or a list of numbers, or of text or bytes, nested or flat.

        Raises:
            InputError: names the tensor and what does not fit.

        Example::

            InputTensor.of("user_id", "INT64", [2], [7, 8])
        """
        what = f"tensor {name!r}"
        if datatype not in DATATYPES:
            raise InputError(f"{what}: datatype is {datatype!r}, not one of {', '.join(DATATYPES)}")
        if any(size < 0 for size in shape):
            raise InputError(f"{what}: shape is {list(shape)}: give sizes of 0 or more")
        values = _raw(what, datatype, data) if isinstance(data, bytes) else _listed(what, datatype, data)
        expected = int(np.prod(shape, dtype=object)) if shape else 1
        if values.size != expected:
            raise InputError(f"{what}: has {values.size} values, but its shape {list(shape)} has {expected}")
        return cls(name, datatype, tuple(shape), values.reshape(tuple(shape)))


def _raw(what: str, datatype: str, data: bytes) -> np.ndarray:
    if datatype != "BYTES":
        dtype = np.dtype(_DTYPES[datatype]).newbyteorder("<")
        if len(data) % dtype.itemsize:
            raise InputError(f"{what}: has {len(data)} bytes, and a value of {datatype} has {dtype.itemsize}")
        return np.frombuffer(data, dtype)
    # Each value is told after its number of bytes, four bytes themselves.
    values: list[bytes] = []
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "little")
        if place + 4 + size > len(data):
            raise InputError(
                f"{what}: value {len(values)} has {size} bytes, but {max(len(data) - place - 4, 0)} follow"
            )
        values.append(data[place + 4 : place + 4 + size])
        place += 4 + size
    return _objects(values)


def _listed(what: str, datatype: str, data: Any) -> np.ndarray:
    if datatype == "BYTES":
        flat = _flat(data)
        if other := next((value for value in flat if not isinstance(value, str | bytes)), None):
            raise InputError(f"{what}: datatype is BYTES, but has {other!r}: give text")
        return _objects([value.encode() if isinstance(value, str) else value for value in flat])
    try:
        given = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{what}: cannot be read ({one_line(error)}): give numbers") from error
    if given.dtype == object or given.dtype.kind not in "biuf":
        raise InputError(f"{what}: datatype is {datatype}, but its data are not all numbers")
    dtype = np.dtype(_DTYPES[datatype])
    with np.errstate(over="ignore", invalid="ignore"):
        values = given.astype(dtype)
    is_other = values != given
    if given.dtype.kind == "f" and dtype.kind == "f":
        # What overflows; rounding is what the datatype asks for, and what is not a number stays.
        is_other = np.isinf(values) & ~np.isinf(given)
    if is_other.any():
        raise InputError(f"{what}: datatype {datatype} cannot hold {given[is_other].flat[0]}")
    return values


def _flat(data: Any) -> list[Any]:
    return [value for part in data for value in _flat(part)] if isinstance(data, list) else [data]


def _objects(values: Sequence[bytes]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def table_of(tensors: Sequence[InputTensor], schema: RequestSchema) -> pa.Table:
    """The requests that tensors say.

    Args:
        tensors: of one call.
        schema: of the requests; what they have is checked when it is read.

    Returns:
        pa.Table: one row for each request, with the columns that are given.

    Raises:
        InputError: a tensor is twice there, is of no column, or does not fit another one: names both.

    Example::

        tensors = [InputTensor.of("user_id", "INT64", [1], [7]), InputTensor.of("candidate_item", "INT64", [1, 1], [5])]
        table_of(tensors, schema)
    """
    given = {tensor.name: tensor for tensor in tensors}
    if len(given) < len(tensors):
        twice = sorted(name for name in given if sum(tensor.name == name for tensor in tensors) > 1)
        raise InputError(f"tensor {twice[0]!r}: is there twice")
    if ARROW in given:
        if others := sorted(given.keys() - {ARROW}):
            raise InputError(f"tensor {others[0]!r}: all columns are in {ARROW!r}: leave one of the two out")
        return _of_arrow(given[ARROW])
    types = {field.name: field.type for field in schema.arrow_schema()}
    known = [name + ending for name in types for ending in ("", LENGTHS, COUNTS)]
    if other := sorted(given.keys() - set(known)):
        raise InputError(f"tensor {other[0]!r}: no such column: there are {list(types)}, or {ARROW!r} for all")
    columns = {name: _column(given, name, kind) for name, kind in types.items() if name in given}
    if not columns:
        raise InputError("there is no tensor of a column: give one for each, or all of them in 'arrow'")
    numbers = {name: len(column) for name, column in columns.items()}
    first = next(iter(numbers))
    for name, number in numbers.items():
        if number != numbers[first]:
            raise InputError(f"tensor {name!r}: is of {number} requests, but {first!r} of {numbers[first]}")
    return pa.table(columns)


def _of_arrow(tensor: InputTensor) -> pa.Table:
    if tensor.datatype != "BYTES" or tensor.values.size != 1:
        raise InputError(
            f"tensor {ARROW!r}: is {tensor.datatype} {list(tensor.shape)}, not BYTES [1]: give one Arrow IPC stream"
        )
    try:
        with pa.ipc.open_stream(pa.py_buffer(tensor.values.flat[0])) as stream:
            table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"tensor {ARROW!r}: not an Arrow IPC stream ({one_line(error)})") from error
    return table


def _column(given: Mapping[str, InputTensor], name: str, kind: pa.DataType) -> pa.Array:
    """A column of requests: its entries, in the lists that it has."""
    tensor, endings = given[name], (LENGTHS, COUNTS)[: _depth(kind)]
    for ending in (LENGTHS, COUNTS)[len(endings) :]:
        if name + ending in given:
            raise InputError(f"tensor {name + ending!r}: {name!r} has no such lists: leave it out")
    array, shape, of_shape = _entries(tensor), list(tensor.shape), name
    if not endings and len(shape) == 2 and shape[1] == 1:
        shape.pop()
    for ending in reversed(endings):
        sizes_of = given.get(name + ending)
        if sizes_of is None and len(shape) > 1:
            size = shape.pop()
            sizes = np.full(int(np.prod(shape, dtype=np.int64)), size)
        elif sizes_of is not None and len(shape) == 1:
            sizes, shape, of_shape = _sizes(sizes_of), list(sizes_of.shape), sizes_of.name
            if int(sizes.sum()) != len(array):
                raise InputError(
                    f"tensor {of_shape!r}: adds up to {int(sizes.sum())}, but there are {len(array)} entries"
                )
        else:
            raise InputError(
                f"tensor {of_shape!r}: shape is {list(given[of_shape].shape)}"
                + (f" beside {name + ending!r}: give [{len(array)}]" if sizes_of else f": give {name + ending!r}, too")
            )
        array = _lists(array, sizes)
    if len(shape) != 1:
        told = list(given[of_shape].shape)
        raise InputError(f"tensor {of_shape!r}: shape is {told}: give {len(told) - len(shape) + 1} dimensions")
    return array


def _depth(kind: pa.DataType) -> int:
    return 1 + _depth(kind.value_type) if pa.types.is_list(kind) else 0


def _sizes(tensor: InputTensor) -> np.ndarray:
    """int64: sizes of lists, one after the other."""
    if not np.issubdtype(tensor.values.dtype, np.integer):
        raise InputError(f"tensor {tensor.name!r}: is {tensor.datatype}: give integers")
    sizes = tensor.values.astype(np.int64).reshape(-1)
    if sizes.size and sizes.min() < 0:
        raise InputError(f"tensor {tensor.name!r}: has {sizes.min()}: give sizes of 0 or more")
    return sizes


def _entries(tensor: InputTensor) -> pa.Array:
    flat = tensor.values.reshape(-1)
    if tensor.datatype != "BYTES":
        return pa.array(flat)
    try:
        return pa.array(flat.tolist(), pa.binary()).cast(pa.string())
    except pa.ArrowInvalid as error:
        raise InputError(f"tensor {tensor.name!r}: has bytes that are no UTF-8 text") from error


def _lists(values: pa.Array, sizes: np.ndarray) -> pa.Array:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values)
