import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.schemas import Shapes, make_requests, schemas, shapes
from torchrec_amort import Feature, InputError, RequestBatch, RequestSchema
from torchrec_amort.serving.server.tensors import InputTensor, table_of

SCHEMA = RequestSchema(
    "films",
    (
        Feature("user_id", "request", "id", 100),
        Feature("likes", "request", "ids", 20),
        Feature("film", "candidate", "id", 50),
        Feature("genres", "candidate", "ids", 9),
        Feature("content", "candidate", "vector", size=2),
        Feature("word", "candidate", "id", 9, vocabulary="hash", text=True),
        Feature("clicks_film", "event", "id", 50, history="clicks", table="film"),
        Feature("liked", "candidate", "label"),
    ),
)
NUMBERS = {"INT64": "<q", "FP32": "<f"}


def flat(values: Any) -> list[Any]:
    return [one for value in values for one in flat(value)] if isinstance(values, list) else [values]


def as_tensors(
    requests: list[dict[str, Any]], schema: RequestSchema, is_raw: bool, columns: Sequence[str] | None = None
) -> list[InputTensor]:
    """What a client sends, told in loops."""
    tensors = []

    def add(name: str, datatype: str, shape: list[int], values: list[Any]) -> None:
        data: Any = values
        if is_raw and datatype == "BYTES":
            data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in values)
        elif is_raw:
            data = b"".join(struct.pack(NUMBERS[datatype], value) for value in values)
        tensors.append(InputTensor.of(name, datatype, shape, data))

    for field in schema.arrow_schema():
        if columns is not None and field.name not in columns:
            continue
        column = [request[field.name] for request in requests]
        depth = str(field.type).count("list")
        scalar = "FP32" if "float" in str(field.type) else "BYTES" if "string" in str(field.type) else "INT64"
        add(field.name, scalar, [len(flat(column))], flat(column))
        if depth:
            add(f"{field.name}.lengths", "INT64", [len(column)], [len(value) for value in column])
        if depth == 2:
            counts = [len(entry) for value in column for entry in value]
            add(f"{field.name}.counts", "INT64", [len(counts)], counts)
    return tensors


@settings(max_examples=40, deadline=None)
@given(schema=schemas(), sizes=shapes(), seed=st.integers(0, 99), is_raw=st.booleans())
def test_tensors_say_what_the_requests_of_any_schema_have(
    schema: RequestSchema, sizes: Shapes, seed: int, is_raw: bool
) -> None:
    requests = make_requests(schema, sizes, seed)
    assume(None not in flat([list(request.values()) for request in requests]))
    table = table_of(as_tensors(requests, schema, is_raw), schema)
    expected = pa.Table.from_pylist(requests, schema.arrow_schema())
    assert table.to_pylist() == expected.to_pylist()
    RequestBatch.from_arrow(table, schema)


def test_lists_of_one_size_need_no_lengths() -> None:
    tensors = [
        InputTensor.of("user_id", "INT32", [2, 1], [[7], [8]]),
        InputTensor.of("likes", "INT64", [2, 2], [1, 2, 3, 4]),
        InputTensor.of("film", "INT64", [2, 2], [[1, 2], [3, 4]]),
        InputTensor.of("genres", "INT64", [3], [5, 6, 7]),
        InputTensor.of("genres.counts", "INT64", [2, 2], [[1, 0], [2, 0]]),
        InputTensor.of("content", "FP64", [2, 2, 2], np.arange(8.0).tolist()),
        InputTensor.of("word", "BYTES", [2, 2], [["a", "b"], ["ø", ""]]),
    ]
    assert table_of(tensors, SCHEMA).to_pylist() == [
        {
            "user_id": 7,
            "likes": [1, 2],
            "film": [1, 2],
            "genres": [[5], []],
            "content": [[0, 1], [2, 3]],
            "word": ["a", "b"],
        },
        {
            "user_id": 8,
            "likes": [3, 4],
            "film": [3, 4],
            "genres": [[6, 7], []],
            "content": [[4, 5], [6, 7]],
            "word": ["ø", ""],
        },
    ]


def test_one_tensor_may_have_a_table_of_arrow() -> None:
    table = pa.table({"user_id": [7, 8], "film": [[1], [2, 3]]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue().to_pybytes()
    raw = struct.pack("<I", len(data)) + data
    assert table_of([InputTensor.of("arrow", "BYTES", [1], raw)], SCHEMA).equals(table)
    for spoilt in (data[:-9], data[8:], b"", bytes(range(256))):
        with pytest.raises(InputError, match="tensor 'arrow': not an Arrow IPC stream"):
            table_of([InputTensor.of("arrow", "BYTES", [1], [spoilt])], SCHEMA)


def tensor(name: str, shape: list[int], data: Any, datatype: str = "INT64") -> InputTensor:
    return InputTensor.of(name, datatype, shape, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [tensor("film", [2], [1])], r"tensor 'film': has 1 values, but its shape \[2\] has 2"),
        (lambda: [tensor("film", [-1], [1])], r"tensor 'film': shape is \[-1\]: give sizes of 0 or more"),
        (lambda: [tensor("film", [1], [1], "INT65")], "tensor 'film': datatype is 'INT65', not one of BOOL"),
        (lambda: [tensor("film", [1], b"1234567")], "tensor 'film': has 7 bytes, and a value of INT64 has 8"),
        (lambda: [tensor("film", [1], b"\x05\0\0\0abc", "BYTES")], "value 0 has 5 bytes, but 3 follow"),
        (lambda: [tensor("film", [1], b"\x05", "BYTES")], "value 0 has 5 bytes, but 0 follow"),
        (lambda: [tensor("film", [1], [1.5])], "tensor 'film': datatype INT64 cannot hold 1.5"),
        (lambda: [tensor("film", [1], [300], "INT8")], "tensor 'film': datatype INT8 cannot hold 300"),
        (lambda: [tensor("film", [1], [1e300], "FP32")], "tensor 'film': datatype FP32 cannot hold 1e"),
        (lambda: [tensor("film", [2], [[1], [2, 3]])], "tensor 'film': cannot be read"),
        (lambda: [tensor("film", [1], ["a"])], "tensor 'film': datatype is INT64, but its data are not all numbers"),
        (lambda: [tensor("word", [1], [1], "BYTES")], "tensor 'word': datatype is BYTES, but has 1: give text"),
        (lambda: [tensor("word", [1, 1], b"\x01\0\0\0\xff", "BYTES")], "tensor 'word': has bytes that are no UTF-8"),
        (lambda: [tensor("films", [1], [1])], "tensor 'films': no such column: there are"),
        (lambda: [tensor("film", [1, 1], [1])] * 2, "tensor 'film': is there twice"),
        (lambda: [], "there is no tensor of a column"),
        (lambda: [tensor("arrow", [1], [1]), tensor("film", [1], [1])], "tensor 'film': all columns are in 'arrow'"),
        (lambda: [tensor("arrow", [1], [1])], r"tensor 'arrow': is INT64 \[1\], not BYTES \[1\]"),
        (lambda: [tensor("film", [3], [1, 2, 3])], r"tensor 'film': shape is \[3\]: give 'film.lengths', too"),
        (
            lambda: [tensor("film", [3], [1, 2, 3]), tensor("film.lengths", [2], [1, 1])],
            "tensor 'film.lengths': adds up to 2, but there are 3 entries",
        ),
        (
            lambda: [tensor("film", [1, 3], [1, 2, 3]), tensor("film.lengths", [2], [1, 2])],
            r"tensor 'film': shape is \[1, 3\] beside 'film.lengths': give \[3\]",
        ),
        (
            lambda: [tensor("film", [3], [1, 2, 3]), tensor("film.lengths", [2], [4, -1])],
            "tensor 'film.lengths': has -1: give sizes of 0 or more",
        ),
        (
            lambda: [tensor("film", [1], [1]), tensor("film.lengths", [1], [1.0], "FP32")],
            "tensor 'film.lengths': is FP32: give integers",
        ),
        (
            lambda: [tensor("film", [1, 1], [1]), tensor("film.counts", [1], [1])],
            "tensor 'film.counts': 'film' has no such lists",
        ),
        (lambda: [tensor("film", [1, 1, 1], [1])], r"tensor 'film': shape is \[1, 1, 1\]: give 2 dimensions"),
        (
            lambda: [tensor("user_id", [2], [1, 2]), tensor("film", [1, 1], [1])],
            "tensor 'film': is of 1 requests, but 'user_id' of 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_tensors_name(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table_of(make(), SCHEMA)
