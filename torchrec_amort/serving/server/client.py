"""A client of servers of scores, over gRPC of the Open Inference Protocol.

Shape suffixes: m candidates of one request; T tasks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import xxhash

from torchrec_amort.columns import typed_table
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.server.messages import SERVICE, message
from torchrec_amort.serving.service import DeadlineExceeded, Overloaded

INFER = f"/{SERVICE}/ModelInfer"
# Of calls that find a queue full. Each that fails takes one of the tokens, one that is answered gives a tenth back:
# with less than half of them, as when a server has more to do than it can, no call is sent again.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE, "method": "ModelInfer"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.4s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 1000, "tokenRatio": 0.1},
}
CHANNEL_OPTIONS = (
    # A message is as large as the requests in it.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", json.dumps(_RETRIES)),
)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a server answered.

    Args:
        logits: of each request, float32 [m, T].
        versions: of each request, the version of the model that scored it; requests of one call may have gone to
            several servers. During a rollout it is both, joined by a comma, if a server scored some by each.
    """

    logits: list[np.ndarray]
    versions: list[str]


class ScoringClient:
    """Has requests scored by one server or several; any number of threads may call it.

    With several servers, all requests of a user go to the same one, whose cache has that user's history. If a server
    is added, it takes its share of the users of each of the others, and no other user moves.

    What a server refuses since its queue is full is sent again up to four times, after 50 to 400 ms, within the
    timeout; not while most calls are refused.

    Args:
        addresses: `host:port` of each server, written alike in all clients.
        model: name of the model; the data set of the schema unless given.
        token: what the servers want to be shown, if anything.
        tls: as `grpc.ssl_channel_credentials` makes them; plain text unless given.
        schema: gives columns their types; those that Arrow infers unless given, which servers convert.

    Raises:
        InputError: there is no address.

    Example::

        with ScoringClient(["localhost:8001"], model="films", schema=schema) as client:
            scored = client.score([request], timeout=0.05)
        scored.logits[0]  # [m, T]
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        model: str = "",
        token: str | None = None,
        tls: grpc.ChannelCredentials | None = None,
        schema: RequestSchema | None = None,
    ) -> None:
        if not addresses:
            raise InputError("addresses is empty: give host:port of 1 server or more")
        self._model = model or ("" if schema is None else schema.dataset)
        self._schema = schema
        self._metadata = authorization(token)
        self._channels = {address: channel(address, tls) for address in addresses}
        self._infer = {
            address: of_server.unary_unary(
                INFER,
                request_serializer=message("ModelInferRequest").SerializeToString,
                response_deserializer=message("ModelInferResponse").FromString,
            )
            for address, of_server in self._channels.items()
        }

    def score(
        self, requests: pa.Table | Iterable[Mapping[str, Any]], *, timeout: float | None = None, priority: int = 0
    ) -> Scores:
        """Score every candidate of every request.

        Args:
            requests: one mapping per request from column to value, or a table with one row per request.
            timeout: seconds from now to the answer; any number unless given.
            priority: of requests that wait for a server, those of lower numbers are served first.

        Raises:
            InputError: a request is malformed, or does not tell its `user` where there are several servers.
            Overloaded: a server refused requests: send them later.
            DeadlineExceeded: there was no answer in time.
            grpc.RpcError: any other status, such as of a server that cannot be reached.

        Example::

            client.score([{"user": 7, "history_item": [3, 4], "candidate_item": [5, 6, 9]}], timeout=0.05)
        """
        return self.submit(requests, timeout=timeout, priority=priority).result()

    def submit(
        self, requests: pa.Table | Iterable[Mapping[str, Any]], *, timeout: float | None = None, priority: int = 0
    ) -> Future[Scores]:
        """Send requests, and do not wait for the answer.

        Args:
            requests: see `score`.
            timeout: see `score`.
            priority: see `score`.

        Returns:
            Future: of what `score` returns or raises. It cannot be cancelled.

        Raises:
            InputError: the requests cannot be sent.

        Example::

            answers = [client.submit([request]) for request in requests]
        """
        table = _table_of(requests, self._schema)
        rows_by_address = self._rows_by_address(table)
        parts = _Parts(table.num_rows, len(rows_by_address))
        for address, rows in rows_by_address.items():
            of_server = table.take(rows) if len(rows) < table.num_rows else table
            body = infer_request(of_server, model=self._model, timeout=timeout, priority=priority)
            call = self._infer[address].future(body, timeout=timeout, metadata=self._metadata)
            call.add_done_callback(partial(parts.add, rows))
        return parts.scored

    def close(self) -> None:
        """Give up what is not answered."""
        for of_server in self._channels.values():
            of_server.close()

    def __enter__(self) -> ScoringClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows_by_address(self, table: pa.Table) -> dict[str, list[int]]:
        addresses = list(self._infer)
        if len(addresses) == 1:
            return {addresses[0]: list(range(table.num_rows))}
        rows: dict[str, list[int]] = {}
        for row, user in enumerate(users_of(table)):
            rows.setdefault(address_of(user, addresses), []).append(row)
        return rows


class _Parts:
    """The answers of several servers, put together when the last one is there."""

    def __init__(self, num_requests: int, num_parts: int) -> None:
        self.scored: Future[Scores] = Future()
        self.scored.set_running_or_notify_cancel()
        self._answer = Scores([np.empty(0)] * num_requests, [""] * num_requests)
        self._missing = num_parts
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def add(self, rows: Sequence[int], call: Any) -> None:
        """Take the answer to the requests of some rows."""
        try:
            if call.code() != grpc.StatusCode.OK:
                raise error_of(call)
            logits, version = read_answer(call.result())
            for row, of_request in zip(rows, logits, strict=True):
                self._answer.logits[row], self._answer.versions[row] = of_request, version
        except Exception as error:  # noqa: BLE001 - it is the sender's, who would wait forever
            self._error = error
        with self._lock:
            self._missing -= 1
            is_last = self._missing == 0
        if is_last and self._error is not None:
            self.scored.set_exception(self._error)
        elif is_last:
            self.scored.set_result(self._answer)


def address_of(user: int, addresses: Sequence[str]) -> str:
    """The server that a user's requests go to.

    It is the one whose hash together with the user is highest (rendezvous hashing: Thaler and Ravishankar, *Using
    Name-Based Mappings to Increase Hit Rates*, 1998): XXH64 of the user's 8 bytes, the lowest first, with the XXH64 of
    the address' UTF-8 bytes as its seed.

    Args:
        user: an int64.
        addresses: of all servers, in any order.

    Example::

        address_of(7, ["one:8001", "two:8001"])
    """
    key = user.to_bytes(8, "little", signed=True)
    return max(addresses, key=lambda one: (xxhash.xxh64_intdigest(key, seed=xxhash.xxh64_intdigest(one.encode())), one))


def users_of(table: pa.Table) -> list[int]:
    """The user of each request.

    Raises:
        InputError: one is missing, or no int64.

    Example::

        users_of(pa.table({"user": [7, 9]}))
    """
    if "user" not in table.column_names:
        raise InputError("requests: user is missing: several servers share the requests by it; give one address, or it")
    column = table["user"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(f"requests: user is {column.type} with {column.null_count} nulls: give an int64 to each")
    users: list[int] = column.cast(pa.int64()).to_pylist()
    return users


def channel(address: str, tls: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A channel to a server.

    Args:
        address: `host:port`.
        tls: see `ScoringClient`.

    Example::

        channel("localhost:8001").close()
    """
    if tls is None:
        return grpc.insecure_channel(address, CHANNEL_OPTIONS)
    return grpc.secure_channel(address, tls, CHANNEL_OPTIONS)


def authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata, or the headers, that show a token to a server."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def infer_request(table: pa.Table, *, model: str = "", timeout: float | None = None, priority: int = 0) -> Any:
    """The message that has requests scored.

    They are one tensor, `arrow`: one element of type BYTES, which is an Arrow IPC stream of one record batch.

    Args:
        table: one row per request.
        model: name of the model.
        timeout: seconds that the answer may take; any number unless given.
        priority: see `ScoringClient.score`.

    Returns:
        The message `ModelInferRequest` of the Open Inference Protocol.

    Example::

        body = infer_request(pa.table({"candidate_item": [[5, 6, 9]]}), model="films", timeout=0.05)
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    stream = sink.getvalue().to_pybytes()
    request = message("ModelInferRequest")(model_name=model)
    request.inputs.add(name="arrow", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(stream).to_bytes(4, "little") + stream)
    if timeout is not None:
        request.parameters["timeout_ms"].int64_param = max(1, round(1e3 * timeout))
    if priority:
        request.parameters["priority"].int64_param = priority
    return request


def read_answer(response: Any) -> tuple[list[np.ndarray], str]:
    """The logits of each request, float32 [m, T], and the version of the model.

    Args:
        response: the message `ModelInferResponse` of the Open Inference Protocol.

    Raises:
        InputError: it is no answer of a server of scores.

    Example::

        response = message("ModelInferResponse")(model_version="1")
        response.outputs.add(name="logits", datatype="FP32", shape=[3, 1]).contents.fp32_contents.extend([0.5, 0, 1])
        response.outputs.add(name="num_candidates", datatype="INT64", shape=[2]).contents.int64_contents.extend([2, 1])
        read_answer(response)  # [2, 1] and [1, 1], version 1
    """
    outputs = {}
    for place, output in enumerate(response.outputs):
        if response.raw_output_contents:
            dtype = {"FP32": "<f4", "INT64": "<i8"}.get(output.datatype, "u1")
            values = np.frombuffer(response.raw_output_contents[place], dtype)
        else:
            values = np.array(output.contents.fp32_contents or output.contents.int64_contents)
        outputs[output.name] = values, list(output.shape)
    if missing := {"logits", "num_candidates"} - outputs.keys():
        raise InputError(f"answer: no output {min(missing)}, but {sorted(outputs)}: is it a server of scores?")
    (logits, shape), (num_candidates, _) = outputs["logits"], outputs["num_candidates"]
    return split_logits(logits.reshape(shape), num_candidates), response.model_version


def split_logits(logits_CT: np.ndarray, num_candidates: np.ndarray) -> list[np.ndarray]:
    """The logits of each request.

    Args:
        logits_CT: of all candidates of all requests, in order.
        num_candidates: of each request.

    Raises:
        InputError: there are not as many candidates as logits.

    Example::

        split_logits(np.zeros((3, 1)), np.array([2, 1]))  # [2, 1] and [1, 1]
    """
    if len(logits_CT) != num_candidates.sum():
        total = int(num_candidates.sum())
        raise InputError(f"answer: logits have {len(logits_CT)} rows, but num_candidates adds up to {total}")
    return np.split(logits_CT.astype(np.float32), np.cumsum(num_candidates)[:-1])


def error_of(call: Any) -> Exception:
    """What a call that failed raises."""
    code, details = call.code(), call.details()
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(details)
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(details)
    error: grpc.RpcError = call
    return error


def _table_of(requests: pa.Table | Iterable[Mapping[str, Any]], schema: RequestSchema | None) -> pa.Table:
    """Requests as a table, in the types of the schema if there is one."""
    if not isinstance(requests, pa.Table):
        listed: list[Mapping[str, Any]] = list(requests)
        columns = {}
        for name in dict.fromkeys(name for request in listed for name in request):
            try:
                columns[name] = pa.array([request.get(name) for request in listed])
            except (ValueError, TypeError, OverflowError) as error:
                told = f"requests: {name} cannot be read ({one_line(error)})"
                raise InputError(f"{told}: give values of one type") from error
        requests = pa.table(columns)
    if not requests.num_rows:
        raise InputError("requests: none of them has a column, or there are 0: send 1 or more")
    return requests if schema is None else typed_table(requests, schema)
