"""A server of the Open Inference Protocol that answers as a test tells it to, over gRPC and HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Semaphore, Thread
from typing import Any

import grpc
import numpy as np
import pyarrow as pa

from torchrec_amort.serving.server.messages import SERVICE, message

# Logits [C, T] of the candidates of all requests.
Score = Callable[[pa.Table], np.ndarray]
STATUS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class Refusal(Exception):
    """What a test has the server say in place of an answer."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


def echo(table: pa.Table) -> np.ndarray:
    """Two logits of each candidate: its item, and its request's user."""
    rows = table.to_pylist()
    return np.array([[item, row["user"]] for row in rows for item in row["candidate_item"]], np.float32)


@contextmanager
def grpc_server(
    score: Score = echo, seen: list[tuple[Any, dict[str, str]]] | None = None, *, raw: bool = True
) -> Iterator[str]:
    """Serve, and tell the address.

    Args:
        score: called by many threads; may raise `Refusal`.
        seen: gets each request, and its metadata.
        raw: whether logits come as bytes or as numbers.
    """

    def infer(request: Any, context: grpc.ServicerContext) -> Any:
        if seen is not None:
            seen.append((request, dict(context.invocation_metadata())))
        table = table_of(request)
        try:
            logits_CT = score(table)
        except Refusal as refusal:
            context.abort(refusal.code, refusal.details)
        return answer_of(table, logits_CT, raw)

    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=message("ModelInferRequest").FromString,
        response_serializer=message("ModelInferResponse").SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def table_of(request: Any) -> pa.Table:
    (tensor,), (raw,) = request.inputs, request.raw_input_contents
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("arrow", "BYTES", [1])
    assert int.from_bytes(raw[:4], "little") == len(raw) - 4
    batches = list(pa.ipc.open_stream(raw[4:]))
    assert len(batches) == 1
    return pa.Table.from_batches(batches)


def answer_of(table: pa.Table, logits_CT: np.ndarray, raw: bool) -> Any:
    response = message("ModelInferResponse")(model_name="films", model_version="3")
    num_candidates = np.array([len(row) for row in table["candidate_item"].to_pylist()], np.int64)
    logits = response.outputs.add(name="logits", datatype="FP32", shape=logits_CT.shape)
    counts = response.outputs.add(name="num_candidates", datatype="INT64", shape=num_candidates.shape)
    if raw:
        response.raw_output_contents.extend([logits_CT.astype("<f4").tobytes(), num_candidates.tobytes()])
    else:
        logits.contents.fp32_contents.extend(logits_CT.ravel().tolist())
        counts.contents.int64_contents.extend(num_candidates.tolist())
    return response


@contextmanager
def http_server(
    answer: Callable[[str, dict[str, Any]], dict[str, Any]],
    seen: list[tuple[str, dict[str, str], bytes]] | None = None,
    closed: Semaphore | None = None,
) -> Iterator[str]:
    """Serve, and tell the address.

    Args:
        answer: of a path and the body there; may raise `Refusal`.
        seen: gets the path, headers and body of each request.
        closed: if given, each connection is closed after its first answer, which does not tell, and released here.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if seen is not None:
                seen.append((self.path, dict(self.headers), body))
            try:
                status, record = 200, answer(self.path, json.loads(body))
            except Refusal as refusal:
                status, record = STATUS[refusal.code], {"error": refusal.details}
            told = json.dumps(record).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)
            self.close_connection = self.close_connection or closed is not None

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def shutdown_request(self, request: Any) -> None:
            super().shutdown_request(request)
            if closed is not None:
                closed.release()

    server = Server(("localhost", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
