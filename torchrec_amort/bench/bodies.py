"""Requests as bodies of a protocol, and answers read back: the Open Inference Protocol over gRPC and in JSON, and ours.

Shape suffixes: m candidates of one request; T tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_amort.errors import InputError
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.server.client import infer_request, read_answer, split_logits
from torchrec_amort.serving.server.messages import message
from torchrec_amort.serving.server.tensors import COUNTS, DATATYPE_OF_COLUMN, LENGTHS

Protocol = Literal["grpc", "rest", "score"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


Answer = tuple[list[np.ndarray], str]


def path_of(protocol: Protocol, model: str) -> str:
    """The path that requests of a protocol of HTTP are posted to."""
    return "/v1/score" if protocol == "score" else f"/v2/models/{quote(model, safe='')}/infer"


def bodies_of(
    requests: pa.Table, schema: RequestSchema, protocol: Protocol, *, model: str, timeout: float | None
) -> list[bytes]:
    """The body that has each request scored.

    Args:
        requests: with columns of the schema, in its types.
        schema: what they are made of.
        protocol: which.
        model: name of the model; of `score` none.
        timeout: seconds that the answer may take; any number if None.

    Raises:
        InputError: a request has a null, which tensors in JSON cannot have.

    Example::

        table = pa.table({"candidate_item": [[5, 6, 9]]})
        bodies = bodies_of(table, schema, "rest", model="films", timeout=0.1)
    """
    rows = [requests.slice(row, 1) for row in range(requests.num_rows)]
    if protocol == "grpc":
        return [infer_request(row, model=model, timeout=timeout).SerializeToString() for row in rows]
    parameters = {} if timeout is None else {"parameters": {"timeout_ms": max(1, round(1e3 * timeout))}}
    if protocol == "score":
        return [json.dumps({"requests": row.to_pylist(), **parameters}).encode() for row in rows]
    sizes = {feature.source: feature.size for feature in schema.features if feature.kind == "vector"}
    return [json.dumps({"inputs": _tensors(row, sizes), **parameters}).encode() for row in rows]


def reader_of(protocol: Protocol) -> Callable[[bytes], Answer]:
    """What reads the answers of a protocol: logits [m, T] of each request, and the version of the model.

    Example::

        logits, version = reader_of("score")(b'{"model": "films", "version": "1", "scores": [[[0.5], [0.25]]]}')
    """
    return {"grpc": _read_grpc, "rest": _read_rest, "score": _read_score}[protocol]


def _tensors(request: pa.Table, sizes: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """One request as tensors of the Open Inference Protocol's JSON."""
    tensors = []
    for name in request.column_names:
        array = request[name].combine_chunks()
        shape: list[int | None] = [1]
        counts: list[dict[str, Any]] = []
        while pa.types.is_list(array.type):
            lengths = pc.list_value_length(array).to_pylist()
            array = array.flatten()
            if len(shape) == 1:
                shape = [1, len(array)]
            elif name in sizes:
                shape = [*shape, sizes[name]]
            else:
                num_entries = {"name": name + LENGTHS, "datatype": "INT64", "shape": [1], "data": [len(lengths)]}
                num_ids = {"name": name + COUNTS, "datatype": "INT64", "shape": [len(lengths)], "data": lengths}
                counts, shape = [num_entries, num_ids], [len(array)]
        if array.null_count:
            raise InputError(f"requests: {name} has a null, which tensors in JSON cannot have: use grpc or score")
        tensor = {"name": name, "datatype": DATATYPE_OF_COLUMN[array.type], "shape": shape, "data": array.to_pylist()}
        tensors += [tensor, *counts]
    return tensors


def _read_grpc(answer: bytes) -> Answer:
    return read_answer(message("ModelInferResponse").FromString(answer))


def _read_rest(answer: bytes) -> Answer:
    record = json.loads(answer)
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in record["outputs"]}
    return split_logits(outputs["logits"], outputs["num_candidates"]), str(record.get("model_version", ""))


def _read_score(answer: bytes) -> Answer:
    record = json.loads(answer)
    return [np.array(logits_mT, np.float32) for logits_mT in record["scores"]], str(record["version"])
