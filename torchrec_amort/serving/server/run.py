"""ScoringServer: both protocols before one endpoint, from start to drain."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time

import uvicorn

from torchrec_amort.errors import InputError
from torchrec_amort.serving.server.access import Access
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.grpc_server import GrpcServer
from torchrec_amort.serving.server.rest import rest_app

logger = logging.getLogger(__name__)


class ScoringServer:
    """Answers over gRPC and HTTP until it is closed.

    Args:
        endpoint: what answers.
        host: that it listens on: `127.0.0.1` is this machine alone.
        grpc_port: a free one if 0.
        http_port: a free one if 0.
        shared_ports: others, gRPC's first, that more servers of this user listen on: who connects there gets any of
            them. Where one is 0, there is none.
        access: who may call.
        num_threads: gRPC calls that are answered at the same time, those that wait for a worker among them.
        max_bytes: of a message.

    Raises:
        InputError: a port cannot be had, or a certificate is none.

    Example::

        with ScoringServer(endpoint, "127.0.0.1", grpc_port=0, http_port=0, num_threads=66) as server:
            print(server.grpc_port, server.http_port)
    """

    def __init__(
        self,
        endpoint: Endpoint,
        host: str,
        *,
        grpc_port: int,
        http_port: int,
        shared_ports: tuple[int, int] = (0, 0),
        access: Access | None = None,
        num_threads: int,
        max_bytes: int = 2**24,
    ) -> None:
        access = access or Access()
        self._endpoint = endpoint
        shared_grpc_port, shared_http_port = shared_ports
        # First: gRPC does not find out that another server has its port where ports are shared.
        self._sockets = [_listening(host, http_port)]
        if shared_http_port:
            self._sockets.append(_listening(host, shared_http_port, is_shared=True))
        self._grpc = GrpcServer(
            endpoint,
            f"{host}:{grpc_port}",
            access,
            num_threads,
            max_bytes,
            shared_address=f"{host}:{shared_grpc_port}" if shared_grpc_port else None,
        )
        config = uvicorn.Config(
            rest_app(endpoint, access, max_bytes),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2**16,
            ssl_certfile=access.certificate,
            ssl_keyfile=access.private_key,
            ssl_ca_certs=access.client_ca,
            ssl_cert_reqs=ssl.CERT_NONE if access.client_ca is None else ssl.CERT_REQUIRED,
        )
        self._http = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._http.run, args=(self._sockets,), name="http", daemon=True)
        self.grpc_port, self.http_port = self._grpc.port, int(self._sockets[0].getsockname()[1])

    def start(self) -> None:
        """Answer from now on."""
        self._grpc.start()
        self._thread.start()

    def close(self, seconds_unready: float = 0, seconds: float = 10) -> None:
        """Be not ready, then take no more calls, and return when those that came are answered.

        Args:
            seconds_unready: how long calls are still taken, so that who sends them learns of it.
            seconds: how long calls that came may take then.
        """
        self._endpoint.drain()
        self._grpc.drain()
        time.sleep(seconds_unready)
        self._http.should_exit = True
        self._grpc.stop(seconds)
        self._thread.join(seconds)
        self._endpoint.service.close()

    def __enter__(self) -> ScoringServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _listening(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol, or asyncio leaves it to Nagle's algorithm, and answers wait 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
        # At once: who was told of the port may be there before uvicorn is.
        listening.listen()
    except OSError as error:
        listening.close()
        raise InputError(f"{host}:{port}: cannot be listened on ({error}): choose another port") from error
    return listening
