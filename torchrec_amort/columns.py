"""Columns of any Arrow type in the types of a schema: value by value the same, or refused with the first wrong one.

Times become whole seconds since 1970 UTC. Timestamps of any unit and time zone and dates are taken for what they are,
those without a time zone as UTC. Integers are taken for seconds, so those after the year 2200 are refused: they are of
another unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import Content, RequestSchema

# The first second of the year 2200.
LATEST_TIME = 7_258_118_400
_UNITS = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_SECONDS_PER_DAY = 86_400
_KINDS_OF_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_TYPES: dict[Content, pa.DataType] = {
    "id": pa.int64(),
    "text": pa.string(),
    "time": pa.int64(),
    "number": pa.float32(),
}
_WANTED: dict[Content, str] = {
    "id": "integers",
    "text": "text",
    "time": "timestamps or whole seconds since 1970",
    "number": "numbers",
}


class MisfitError(Exception):
    """A value that its column cannot hold.

    Args:
        place: its row.
        what: what is wrong with it.
        if_rounded: what would become of it if the column were rounded, if that would help.
    """

    def __init__(self, place: int, what: str, if_rounded: str = "") -> None:
        super().__init__(what)
        self.place, self.if_rounded = place, if_rounded


def typed_table(table: pa.Table, schema: RequestSchema, source: str = "requests", first_row: int = 0) -> pa.Table:
    """The columns of requests that a schema names, in its types and its order.

    Floats are rounded to float32, and times cut to whole seconds.

    Args:
        table: one row per request; of the schema's columns, some may be absent.
        schema: what the requests are made of.
        source: where the table comes from, for error messages.
        first_row: number of the table's first row there, for error messages.

    Returns:
        pa.Table: a column that has its type already is the same; each is in one piece.

    Raises:
        InputError: a value is null or cannot be had in the column's type: names the source, the request and the
            column.

    Example::

        typed_table(pa.table({"time": [datetime(2020, 1, 1)], "user": [7]}), schema)  # user: 7, time: 1577836800
    """
    arrays = typed_columns(table, schema, source, first_row)
    fields = [field for field in schema.arrow_schema() if field.name in arrays]
    return pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields))


def typed_columns(table: pa.Table, schema: RequestSchema, source: str, first_row: int) -> dict[str, pa.Array]:
    """The columns of `typed_table`, by their names.

    Args:
        table: see `typed_table`.
        schema: what the requests are made of.
        source: where the table comes from, for error messages.
        first_row: number of the table's first row there, for error messages.

    Raises:
        InputError: see `typed_table`.
    """
    contents, present = schema.contents, set(table.schema.names)
    arrays = {}
    for field in schema.arrow_schema():
        name, nullable = field.name, field.nullable
        if name not in present:
            continue
        try:
            arrays[name] = typed(table[name], field.type, contents[name], rounded=True, finite=False, nullable=nullable)
        except MisfitError as misfit:
            raise InputError(
                f"{source}: request {first_row + misfit.place}: {name} {misfit}: write "
                f"{wanted(field.type, contents[name], nullable)}"
            ) from misfit
    return arrays


def column_of(values: Sequence[Any], expected: pa.DataType, content: Content, nullable: bool = False) -> pa.Array:
    """Python values of requests as a column of as many rows.

    Args:
        values: of each request a number or time, or a list or numpy array of them.
        expected: the column's type.
        content: what its values are.
        nullable: whether ids, and lists of them, may be null.

    Raises:
        MisfitError: the first value that cannot be had in the column's type.
    """
    if _are_of(_PYTHON_TYPES[content], values, expected):
        # What does not fit, or is not finite, is told of below.
        with suppress(ValueError, TypeError, OverflowError, MisfitError):
            array = pa.chunked_array([pa.array(values, expected)])
            return typed(array, expected, content, rounded=True, finite=True, nullable=nullable)
    # One by one: Arrow finds one type for all that it reads together, and does not tell which value has none.
    arrays = []
    for row, value in enumerate(values):
        try:
            arrays.append(_value(value, expected, content, nullable))
        except MisfitError as misfit:
            misfit.place = row
            raise
    return pa.concat_arrays(arrays)


def typed(
    column: pa.ChunkedArray,
    expected: pa.DataType,
    content: Content,
    *,
    rounded: bool,
    finite: bool,
    nullable: bool = False,
) -> pa.Array:
    """A column in another type, in one piece.

    Args:
        column: of any type.
        expected: int64, float32, strings or lists of them.
        content: what its values are.
        rounded: whether floats may be rounded to float32, and timestamps cut to whole seconds.
        finite: whether NaN and infinite numbers are refused.
        nullable: whether ids, and lists of several ids, may be null.

    Returns:
        pa.Array: the column itself, if it is that already.

    Raises:
        MisfitError: a value is null or cannot be had in that type.
    """
    chunks = column.chunks
    if len(chunks) > 1 and column.type.equals(expected):
        chunks = [pa.concat_arrays(chunks)]
    arrays, first_row = [], 0
    for chunk in chunks:
        try:
            arrays.append(_typed(chunk, expected, content, rounded, finite, nullable))
        except MisfitError as misfit:
            misfit.place += first_row
            raise
        except NotImplementedError as error:
            raise MisfitError(first_row, f"is {chunk.type}, which cannot be read ({one_line(error)})") from error
        first_row += len(chunk)
    if len(arrays) == 1:
        return arrays[0]
    return pa.concat_arrays(arrays) if arrays else pa.array([], expected)


def wanted(expected: pa.DataType, content: Content, nullable: bool = False) -> str:
    """What to write into a column, for messages."""
    lists = ""
    while pa.types.is_list(expected):
        lists, expected = f"{lists}lists of ", expected.value_type
    return f"{lists}{_WANTED[content]}{'' if nullable else ', none null'}"


def decoded(array: pa.Array) -> pa.Array:
    """The array without dictionaries and runs around its values."""
    while True:
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pa.types.is_run_end_encoded(array.type):
            array = pc.run_end_decode(array)
        else:
            return array


# ----- lists --------------------------------------------------------------------------------------------------------


def _typed(
    array: pa.Array, expected: pa.DataType, content: Content, rounded: bool, finite: bool, nullable: bool
) -> pa.Array:
    if _is_typed(array, expected, content, finite):
        return array
    if not len(array):
        return array if array.type.equals(expected) else pa.array([], expected)
    array = decoded(array)
    is_list = pa.types.is_list(expected)
    # Of lists, those of ids of one entry may be null, and not those of events or candidates.
    if array.null_count and not (nullable and not (is_list and pa.types.is_list(expected.value_type))):
        raise MisfitError(int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]), "is null")
    if pa.types.is_null(array.type):
        array = array.cast(expected)
    if not is_list:
        return _scalars(array, content, rounded, finite)
    if not any(is_kind(array.type) for is_kind in _KINDS_OF_LISTS):
        raise MisfitError(0, f"is {array.type}, not a list")
    # Not a cast: pyarrow's own of a list view leaves its sizes out.
    entries = array.flatten()
    try:
        converted = _typed(entries, expected.value_type, content, rounded, finite, nullable)
    except MisfitError as misfit:
        row = int(np.searchsorted(_offsets(array)[1:], misfit.place, side="right"))
        raise MisfitError(row, _of_list(str(misfit)), misfit.if_rounded) from misfit
    if converted is entries and array.type.equals(expected) and not array.null_count:
        return array
    return pa.ListArray.from_arrays(pa.array(_offsets(array), pa.int32()), converted)


def _offsets(lists: pa.Array) -> np.ndarray:
    """Where each list begins among the entries of all, and where the last one ends."""
    lengths = pc.list_value_length(lists)
    if lengths.null_count:
        lengths = lengths.fill_null(0)
    return np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)])


def _scalars(array: pa.Array, content: Content, rounded: bool, finite: bool) -> pa.Array:
    if array.null_count:
        is_null, some = array.is_null(), array.drop_null()
        given = _scalars(some, content, rounded, finite) if len(some) else pa.array([], _TYPES[content])
        return pc.replace_with_mask(pa.nulls(len(array), given.type), pc.invert(is_null), given)
    if content == "time":
        return _times(array, rounded)
    if content == "text":
        return _strings(array)
    return _integers(array) if content == "id" else _floats(array, rounded, finite)


def _is_typed(array: pa.Array, expected: pa.DataType, content: Content, finite: bool) -> bool:
    """Whether an array is what it should be already, told by its type and its counts of nulls alone."""
    if not array.type.equals(expected) or content == "time" or (content == "number" and finite):
        return False
    if array.null_count:
        return False
    while pa.types.is_list(array.type):
        array = array.values
        if array.null_count:
            return False
    return True


def _of_list(what: str) -> str:
    if what == "is null":
        return "has a null"
    return what if what.startswith("has ") else f"has an entry that {what}"


# ----- numbers ------------------------------------------------------------------------------------------------------


def _refuse_others(values: np.ndarray, is_right: np.ndarray, holder: str, if_rounded: str = "") -> None:
    """Refuse the first of the values that is not right."""
    if not is_right.all():
        place = int(np.argmin(is_right))
        value = values[place].item()
        if not np.isfinite(value):
            raise MisfitError(place, f"is {value}, not a finite number")
        raise MisfitError(place, f"is {value}, which {holder} does not hold exactly", if_rounded)


def _integers(array: pa.Array) -> pa.Array:
    """Whole numbers of any type, as int64."""
    kind = array.type
    if kind.equals(pa.int64()):
        return array
    if pa.types.is_decimal(kind):
        return _integers_of_decimals(array)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise MisfitError(0, f"is {kind}, not a number")
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        values = values.astype(np.float64, copy=False)
        # As float64 the greatest int64 is 2**63, which is none.
        fits = np.isfinite(values) & (values == np.floor(values)) & (values >= -(2.0**63)) & (values < 2.0**63)
        _refuse_others(values, fits, "int64")
    elif kind.equals(pa.uint64()):
        _refuse_others(values, values < np.uint64(2**63), "int64")
    return pa.array(values.astype(np.int64))


def _integers_of_decimals(array: pa.Array) -> pa.Array:
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid:
        values = array.to_pylist()
        place = next(p for p, v in enumerate(values) if v != int(v) or not -(2**63) <= v < 2**63)
        raise MisfitError(place, f"is {values[place]}, which int64 does not hold exactly") from None


def _floats(array: pa.Array, rounded: bool, finite: bool) -> pa.Array:
    """Numbers and booleans as float32."""
    kind = array.type
    if kind.equals(pa.float32()) and not finite:
        return array
    if pa.types.is_decimal(kind):
        if not rounded:
            raise MisfitError(0, f"is {kind}, which float32 does not hold exactly", "to round it")
        array = array.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise MisfitError(0, f"is {kind}, not a number")
    values = array.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    fits = np.isfinite(narrow) | (not finite and ~np.isfinite(values))
    if rounded:
        _refuse_others(values, fits, "float32")
    else:
        wide = values.astype(np.float64)
        # Beyond 2**53, float64 does not tell whole numbers apart.
        is_told = (np.abs(wide) < 2.0**53) | (values.dtype.kind == "f")
        _refuse_others(values, fits & (narrow == wide) & is_told, "float32", "to round it")
    return array if kind.equals(pa.float32()) else pa.array(narrow)


def _strings(array: pa.Array) -> pa.Array:
    """Text of any type, as strings."""
    kind = array.type
    if kind.equals(pa.string()):
        return array
    if not (pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise MisfitError(0, f"is {kind}, not text")
    return array.cast(pa.string())


# ----- times --------------------------------------------------------------------------------------------------------


def _times(array: pa.Array, rounded: bool) -> pa.Array:
    """Times as whole seconds since 1970 UTC."""
    kind = array.type
    if pa.types.is_temporal(kind):
        seconds = _seconds(array, rounded)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        seconds = _integers(array)
    else:
        raise MisfitError(0, f"is {kind}, not a time")
    values = seconds.to_numpy()
    if values.max() > LATEST_TIME:
        place = int(np.argmax(values > LATEST_TIME))
        value, hint = int(values[place]), ""
        unit = next((unit for unit, factor in _UNITS.items() if value <= LATEST_TIME * factor), None)
        if unit and not pa.types.is_temporal(kind):
            hint = f"; it looks like {unit}, divide it by {_UNITS[unit]:,}"
        raise MisfitError(place, f"is {value}, after the year 2200 in seconds since 1970{hint}")
    return seconds


def _seconds(array: pa.Array, rounded: bool) -> pa.Array:
    """Timestamps and dates as whole seconds since 1970 UTC; fractions are cut if they may be."""
    kind = array.type
    if pa.types.is_date32(kind):
        return pa.array(array.view(pa.int32()).to_numpy().astype(np.int64) * _SECONDS_PER_DAY)
    if not (pa.types.is_timestamp(kind) or pa.types.is_date64(kind)):
        raise MisfitError(0, f"is {kind}, not a time")
    unit: Any = kind.unit if pa.types.is_timestamp(kind) else "ms"
    ticks = array.view(pa.int64()).to_numpy()
    seconds, fractions = np.divmod(ticks, _TICKS_PER_SECOND[unit])
    if not rounded and fractions.any():
        place = int(np.argmax(fractions != 0))
        told = np.datetime64(int(ticks[place]), unit)
        raise MisfitError(place, f"is {told}, not a whole second", "to cut it to whole seconds")
    return pa.array(seconds)


# ----- Python values ------------------------------------------------------------------------------------------------


# Those that Arrow reads as a column's type or refuses.
_PYTHON_TYPES: dict[Content, set[type]] = {"id": {int}, "text": {str}, "time": {int}, "number": {int, float}}


def _are_of(types: set[type], values: Sequence[Any], expected: pa.DataType) -> bool:
    """Whether the values of a column, or the entries of its lists, have certain types or are None."""
    have = set(map(type, values)) - {type(None)}
    if not pa.types.is_list(expected):
        return have <= types
    # Of no other sequences: Arrow takes text for a list of letters, and bytes for one of integers.
    if not have <= {list, tuple}:
        return False
    entries = list(chain.from_iterable(value for value in values if value is not None))
    return _are_of(types, entries, expected.value_type)


def _value(value: Any, expected: pa.DataType, content: Content, nullable: bool) -> pa.Array:
    """A value of one request, of any type, as a column of one row."""
    if content != "number" and (mixed := _mixed_kinds(value)):
        raise MisfitError(0, f"has entries of several types, {mixed}")
    try:
        array = pa.array([_seconds_of_numpy(value)])
    except (ValueError, TypeError, NotImplementedError, OverflowError) as error:
        raise MisfitError(0, f"cannot be read ({one_line(error)})") from error
    return typed(pa.chunked_array([array]), expected, content, rounded=True, finite=False, nullable=nullable)


def _seconds_of_numpy(value: Any) -> Any:
    """Numpy's times in whole seconds: Arrow does not take all of their units, nor several in one list."""
    if isinstance(value, np.datetime64) or (isinstance(value, np.ndarray) and value.dtype.kind == "M"):
        return value.astype("datetime64[s]")
    if isinstance(value, list | tuple) and value and all(isinstance(entry, np.datetime64) for entry in value):
        return np.array([entry.astype("datetime64[s]") for entry in value])
    return value


# Arrow takes a boolean among floats for 1, a number among times for ticks, and cuts a datetime among dates.
_KINDS_APART = (bool, np.bool_, datetime, date, time, timedelta)


def _mixed_kinds(value: Any) -> str:
    """The types of the entries of a list, if Arrow would take some of them for what they are not."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return ""
    types = set(map(type, value))
    if types <= {list, tuple}:
        return next((mixed for entry in value if (mixed := _mixed_kinds(entry))), "")
    kinds = {next((kind for kind in _KINDS_APART if issubclass(t, kind)), None) for t in types - {type(None)}}
    return ", ".join(sorted(t.__name__ for t in types)) if len(kinds) > 1 else ""
