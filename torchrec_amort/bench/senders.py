"""Senders of an open loop: over gRPC, whose calls do not wait, and over HTTP, with a thread for each connection."""

from __future__ import annotations

import http.client
import json
import select
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from torchrec_amort.bench.open_loop import Call, Ending
from torchrec_amort.serving.server.client import INFER, authorization, channel

_ENDINGS_OF_GRPC: dict[Any, Ending] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
}
_ENDINGS_OF_HTTP: dict[int, Ending] = {429: "refused", 504: "deadline", 400: "invalid"}


class GrpcSender:
    """Sends messages over one connection to each server.

    Args:
        bodies: a `ModelInferRequest` for each row.
        addresses: the server of each row.
        token: what the servers want to be shown, if anything.
        ca: certificates of who vouches for the servers; plain text if None.
        give_up: seconds after which an answer is not waited for any more.
    """

    def __init__(
        self, bodies: Sequence[bytes], addresses: Sequence[str], *, token: str | None, ca: bytes | None, give_up: float
    ) -> None:
        tls = None if ca is None else grpc.ssl_channel_credentials(ca)
        self._bodies, self._addresses, self._give_up = bodies, addresses, give_up
        self._metadata = authorization(token)
        self._channels = {address: channel(address, tls) for address in dict.fromkeys(addresses)}
        # Bytes, as they are: the client's work is done before the clock starts.
        self._infer = {address: of_server.unary_unary(INFER) for address, of_server in self._channels.items()}

    def send(self, call: Call) -> None:
        """Send a request and do not wait for the answer."""
        infer = self._infer[self._addresses[call.row]]
        call.start()
        answer = infer.future(self._bodies[call.row], timeout=self._give_up, metadata=self._metadata)
        answer.add_done_callback(partial(self._end, call))

    def close(self) -> None:
        """Give up what is not answered."""
        for of_server in self._channels.values():
            of_server.close()

    def _end(self, call: Call, answer: Any) -> None:
        code = answer.code()
        if code == grpc.StatusCode.OK:
            call.end("answered", answer.result())
        else:
            call.end(_ENDINGS_OF_GRPC.get(code, "failed"), detail=f"{code.name}: {answer.details()}")


class HttpSender:
    """Posts bodies over connections that stay open; requests that find none free wait, and are late.

    Args:
        bodies: of each row, JSON.
        addresses: the server of each row.
        path: that they are posted to.
        connections: to each server, each with a thread.
        token: see `GrpcSender`.
        ca: see `GrpcSender`.
        give_up: see `GrpcSender`.
    """

    def __init__(
        self,
        bodies: Sequence[bytes],
        addresses: Sequence[str],
        path: str,
        *,
        connections: int,
        token: str | None,
        ca: bytes | None,
        give_up: float,
    ) -> None:
        self._bodies, self._addresses, self._path, self._give_up = bodies, addresses, path, give_up
        self._headers = {"Content-Type": "application/json", **dict(authorization(token))}
        self._tls = None if ca is None else ssl.create_default_context(cadata=ca.decode())
        # Each server has threads of its own: one that stalls does not keep requests from the others.
        self._threads = {a: ThreadPoolExecutor(connections) for a in dict.fromkeys(addresses)}
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def send(self, call: Call) -> None:
        """Have the next free connection send a request."""
        address = self._addresses[call.row]
        self._threads[address].submit(self._send, call, address)

    def close(self) -> None:
        """Give up what is not answered."""
        for of_server in self._threads.values():
            of_server.shutdown(wait=False, cancel_futures=True)
        for connection in self._connections:
            if connection.sock is not None:
                # It wakes the thread that reads; it may be closed already.
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _send(self, call: Call, address: str) -> None:
        connection = self._connection(address)
        call.start()
        try:
            connection.request("POST", self._path, self._bodies[call.row], self._headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except TimeoutError:
            connection.close()
            call.end("deadline", detail=f"no answer in {self._give_up} s")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            call.end("failed", detail=f"{type(error).__name__}: {error}")
        else:
            if status == http.client.OK:
                call.end("answered", answer)
            else:
                call.end(_ENDINGS_OF_HTTP.get(status, "failed"), detail=f"{status}: {_error_in(answer)}")

    def _connection(self, address: str) -> http.client.HTTPConnection:
        """This thread's connection, which is made if need be."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            if self._tls is None:
                connection = http.client.HTTPConnection(address, timeout=self._give_up)
            else:
                connection = http.client.HTTPSConnection(address, timeout=self._give_up, context=self._tls)
            self._own.connection = connection
            self._connections.append(connection)
        elif connection.sock is not None and _has_news(connection.sock):
            # Of a connection on which nothing is asked, the only news is that the server has closed it.
            connection.close()
        return connection


def _has_news(of_server: socket.socket) -> bool:
    poll = select.poll()
    poll.register(of_server, select.POLLIN)
    return bool(poll.poll(0))


def _error_in(answer: bytes) -> str:
    try:
        record = json.loads(answer)
    except ValueError:
        record = None
    if isinstance(record, Mapping) and "error" in record:
        return str(record["error"])
    return answer[:200].decode(errors="replace")
