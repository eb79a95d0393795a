"""The Open Inference Protocol over gRPC."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torchrec_amort.errors import InputError
from torchrec_amort.serving.server.access import Access
from torchrec_amort.serving.server.call import Call
from torchrec_amort.serving.server.endpoint import PLATFORM, Answer, Endpoint, failure_of, told
from torchrec_amort.serving.server.messages import METHODS, SERVICE, message
from torchrec_amort.serving.server.tensors import DATATYPE_OF, InputTensor, table_of
from torchrec_amort.versions import installed_versions

# Of each datatype, the field of the contents that has its values.
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class GrpcServer:
    """Answers over gRPC until it is stopped.

    Args:
        endpoint: what answers.
        address: `host:port`; with port 0 a free one is taken.
        access: who may call.
        num_threads: calls that are answered at the same time, those that wait for a worker among them.
        max_bytes: of a message; larger ones are refused before they are read.
        shared_address: another one, that more servers of this user listen on.

    Raises:
        InputError: the address cannot be had.

    Example::

        server = GrpcServer(endpoint, "127.0.0.1:8001", Access(), num_threads=66, max_bytes=2**24)
        server.start()
        server.stop(seconds=5)
    """

    def __init__(
        self,
        endpoint: Endpoint,
        address: str,
        access: Access,
        num_threads: int,
        max_bytes: int,
        *,
        shared_address: str | None = None,
    ) -> None:
        self._endpoint, self._access = endpoint, access
        # Health is asked for while all others wait.
        self._server = grpc.server(
            ThreadPoolExecutor(num_threads + 2, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.so_reuseport", int(shared_address is not None)),
                # A client that is gone without a word is found out.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
            # Others would wait for a thread, where neither deadline nor priority counts.
            maximum_concurrent_rpcs=num_threads + 2,
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                self._handler(getattr(self, f"_{method}")),
                request_deserializer=partial(_request, message(f"{method}Request")),
                response_serializer=message(f"{method}Response").SerializeToString,
            )
            for method in METHODS
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        self.port = self._listen(address)
        if shared_address is not None:
            self._listen(shared_address)

    def start(self) -> None:
        """Answer from now on."""
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def drain(self) -> None:
        """Tell who asks for its health that no more should be sent."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def stop(self, seconds: float) -> None:
        """Take no more calls, and return when those that came are answered.

        Args:
            seconds: how long they may take.
        """
        self._server.stop(seconds).wait()

    def _listen(self, address: str) -> int:
        credentials = self._access.server_credentials()
        try:
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise InputError(f"{address}: cannot be listened on: choose another port, or end what has it") from error

    def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE):
            self._health.set(service, status)

    def _handler(self, answer: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                if isinstance(request, DecodeError):
                    # Whatever it was to be, it is counted.
                    with self._endpoint.call("grpc", dict(context.invocation_metadata())):
                        raise InputError(f"message: is none of the protocol ({request})")
                return answer(request, context)
            except Exception as error:  # noqa: BLE001 - it is the caller's, and the server goes on
                context.abort(grpc.StatusCode[failure_of(error).grpc], told(error))

        return handle

    def _ServerLive(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return message("ServerLiveResponse")(live=True)

    def _ServerReady(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return message("ServerReadyResponse")(ready=self._endpoint.is_ready)

    def _ModelReady(self, request: Any, _context: grpc.ServicerContext) -> Any:
        self._endpoint.refuse_other(request.name, request.version)
        return message("ModelReadyResponse")(ready=self._endpoint.is_ready)

    def _ServerMetadata(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        version = installed_versions()["torchrec-amort"]
        return message("ServerMetadataResponse")(name=PLATFORM, version=version, extensions=[])

    def _ModelMetadata(self, request: Any, _context: grpc.ServicerContext) -> Any:
        self._endpoint.refuse_other(request.name, request.version)
        return message("ModelMetadataResponse")(**self._endpoint.metadata())

    def _ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._endpoint.call("grpc", dict(context.invocation_metadata())) as call:
            return self._infer(request, context, call)

    def _infer(self, request: Any, context: grpc.ServicerContext, call: Call) -> Any:
        self._access.refuse_other(call.headers.get("authorization"), "score")
        self._endpoint.refuse_other(request.model_name, request.model_version)
        parameters = {name: _value(parameter) for name, parameter in request.parameters.items()}
        self._endpoint.refuse_early(parameters, seconds_left=context.time_remaining(), num_bytes=request.ByteSize())
        table = table_of(_tensors(request), self._endpoint.versions.current.schema)
        future = self._endpoint.submit(
            table, parameters, call=call, seconds_left=context.time_remaining(), num_bytes=table.nbytes
        )
        # Who has hung up gives its place in the queue to others.
        context.add_callback(future.cancel)
        answer = Answer.of(future.result(), [output.name for output in request.outputs])
        return message("ModelInferResponse")(
            model_name=request.model_name,
            model_version=answer.version,
            id=request.id,
            outputs=[
                {"name": name, "datatype": DATATYPE_OF[values.dtype], "shape": values.shape}
                for name, values in answer.tensors.items()
            ],
            raw_output_contents=[values.tobytes() for values in answer.tensors.values()],
        )


def _request(kind: Any, body: bytes) -> Any:
    """A request, or why it is none: what is raised here, gRPC answers as a fault of the server's, and never frees."""
    try:
        return kind.FromString(body)
    except DecodeError as error:
        return error


def _tensors(request: Any) -> list[InputTensor]:
    """The tensors of a request, whose values are all in raw contents or all in contents."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"raw_input_contents: has {len(raw)} tensors, but inputs {len(request.inputs)}")
    tensors = []
    for place, tensor in enumerate(request.inputs):
        if raw:
            data: Any = raw[place]
        elif (contents := _CONTENTS.get(tensor.datatype)) is None:
            raise InputError(f"tensor {tensor.name!r}: datatype is {tensor.datatype!r}, which has no contents")
        else:
            data = list(getattr(tensor.contents, contents))
        tensors.append(InputTensor.of(tensor.name, tensor.datatype, tensor.shape, data))
    return tensors


def _value(parameter: Any) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)
