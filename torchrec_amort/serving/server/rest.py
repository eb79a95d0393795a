"""The Open Inference Protocol over HTTP, with its extension for binary tensors, and plain JSON for people."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from torchrec_amort.errors import InputError
from torchrec_amort.serving.rollout import Stage
from torchrec_amort.serving.server.access import Access, Role
from torchrec_amort.serving.server.call import Call
from torchrec_amort.serving.server.endpoint import LOGITS, PLATFORM, Answer, Endpoint, failure_of, told
from torchrec_amort.serving.server.tensors import DATATYPE_OF, InputTensor, table_of
from torchrec_amort.serving.versions import Requests, Scored
from torchrec_amort.versions import installed_versions

# Where the JSON of a message ends, after which its binary tensors come.
HEADER_LENGTH = "inference-header-content-length"
BINARY, BINARY_SIZE = "binary_data", "binary_data_size"
# Of the largest message, what is read of a larger one, and thrown away.
_TIMES_HEARD = 4


class TooLarge(Exception):
    """A message has more bytes than the server reads."""


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Inference(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


class _Scoring(msgspec.Struct):
    requests: list[dict[str, Any]]
    parameters: dict[str, Any] = {}


class _User(msgspec.Struct):
    user: int


class _Package(msgspec.Struct):
    folder: str


class _Rollout(msgspec.Struct):
    folder: str
    experiment: str
    share: float
    sample_rate: float = Stage.sample_rate
    threshold: float = Stage.threshold


_INFERENCE, _SCORING, _USER, _FOLDER, _ROLLOUT = (
    msgspec.json.Decoder(kind) for kind in (_Inference, _Scoring, _User, _Package, _Rollout)
)


def rest_app(endpoint: Endpoint, access: Access, max_bytes: int) -> Starlette:
    """The application that answers over HTTP.

    Args:
        endpoint: what answers.
        access: who may call.
        max_bytes: of a message; larger ones are refused.

    Example::

        uvicorn.run(rest_app(endpoint, Access(), max_bytes=2**24), host="127.0.0.1", port=8000)
    """
    return Starlette(routes=_Rest(endpoint, access, max_bytes).routes())


Handler = Callable[[Request], Awaitable[Response]]


class _Rest:
    """Answers calls of each path."""

    def __init__(self, endpoint: Endpoint, access: Access, max_bytes: int) -> None:
        self._endpoint, self._access, self._max_bytes = endpoint, access, max_bytes

    def routes(self) -> list[Route]:
        model = "/v2/models/{name}"
        paths: list[tuple[str, str, Role | None, Handler]] = [
            ("GET", "/v2", None, self._server),
            ("GET", "/v2/health/live", None, self._live),
            ("GET", "/v2/health/ready", None, self._ready),
            ("GET", "/metrics", None, self._metrics),
            ("POST", "/v1/score", "score", self._score),
            ("POST", "/v1/forget", "admin", self._forget),
            ("POST", "/v1/versions", "admin", self._switch),
            ("POST", "/v1/rollout", "admin", self._roll_out),
            ("GET", "/v1/rollout", "admin", self._rollout),
            ("POST", "/v1/roll_back", "admin", self._roll_back),
        ]
        for path in (model, model + "/versions/{version}"):
            paths += [
                ("GET", path, None, self._model),
                ("GET", path + "/ready", None, self._model_ready),
                ("POST", path + "/infer", "score", self._infer),
            ]
        return [Route(path, self._guarded(handler, role), methods=[method]) for method, path, role, handler in paths]

    def _guarded(self, handler: Handler, role: Role | None) -> Handler:
        async def handle(request: Request) -> Response:
            try:
                if role is not None:
                    self._access.refuse_other(request.headers.get("authorization"), role)
                return await handler(request)
            except ClientDisconnect:
                # Nobody reads it.
                return Response(status_code=499)
            except TooLarge as error:
                return JSONResponse({"error": str(error)}, 413, {"connection": "close"})
            except Exception as error:  # noqa: BLE001 - it is the caller's, and the server goes on
                return JSONResponse({"error": told(error)}, failure_of(error).http)

        return handle

    async def _live(self, _: Request) -> Response:
        return Response()

    async def _ready(self, _: Request) -> Response:
        return Response(status_code=200 if self._endpoint.is_ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._endpoint.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _server(self, _: Request) -> Response:
        version = installed_versions()["torchrec-amort"]
        return JSONResponse({"name": PLATFORM, "version": version, "extensions": ["binary_tensor_data"]})

    async def _model(self, request: Request) -> Response:
        self._refuse_other(request)
        return JSONResponse(self._endpoint.metadata())

    async def _model_ready(self, request: Request) -> Response:
        self._refuse_other(request)
        return await self._ready(request)

    async def _infer(self, request: Request) -> Response:
        self._refuse_other(request)
        body = await self._body(request)
        with self._endpoint.call("rest", request.headers) as call:
            asked, tensors = _read(body, request.headers.get(HEADER_LENGTH))
            parameters = dict(asked.parameters)
            # Triton's clients say here that they take binary tensors.
            all_binary = bool(parameters.pop("binary_data_output", False))
            self._endpoint.refuse_early(parameters, num_bytes=len(body))
            table = table_of(tensors, self._endpoint.versions.current.schema)
            scored = await self._scored(table, parameters, call, table.nbytes)
            answer = Answer.of(scored, [output.name for output in asked.outputs])
            binary = {output.name for output in asked.outputs if output.parameters.get(BINARY, all_binary)}
            return _response(self._endpoint.name, asked.id, answer, set(answer.tensors) if all_binary else binary)

    async def _score(self, request: Request) -> Response:
        body = await self._body(request)
        with self._endpoint.call("score", request.headers) as call:
            asked = _decoded(_SCORING, body)
            scored = await self._scored(asked.requests, asked.parameters, call, len(body))
            logits = Answer.of(scored, [LOGITS]).tensors[LOGITS]
            parts = np.split(logits, np.cumsum(scored.num_candidates)[:-1])
            scores = [part.tolist() for part in parts]
            told_of = {"model": self._endpoint.name, "version": scored.version, "scores": scores}
            return Response(msgspec.json.encode(told_of), media_type="application/json")

    async def _forget(self, request: Request) -> Response:
        user = _decoded(_USER, await self._body(request)).user
        # It waits for what came before.
        return JSONResponse({"found": await asyncio.to_thread(self._endpoint.forget, user)})

    async def _switch(self, request: Request) -> Response:
        folder = _decoded(_FOLDER, await self._body(request)).folder
        return JSONResponse({"version": await asyncio.to_thread(self._endpoint.switch, folder)})

    async def _roll_out(self, request: Request) -> Response:
        asked: _Rollout = _decoded(_ROLLOUT, await self._body(request))
        stage = Stage(asked.experiment, asked.share, asked.sample_rate, asked.threshold)
        return _told_of(await asyncio.to_thread(self._endpoint.roll_out, asked.folder, stage))

    async def _rollout(self, _: Request) -> Response:
        return _told_of(self._endpoint.rollout())

    async def _roll_back(self, _: Request) -> Response:
        return JSONResponse({"version": await asyncio.to_thread(self._endpoint.roll_back)})

    async def _body(self, request: Request) -> bytes:
        """The message, refused if it is too large."""
        declared = request.headers.get("content-length", "0")
        told, size = int(declared) if declared.isdecimal() else 0, 0
        parts: list[bytes] = []
        # A client that sends a little too much is heard to the end, or it would not read why it is refused.
        most = _TIMES_HEARD * self._max_bytes
        if told <= most:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    break
                if size <= self._max_bytes:
                    parts.append(part)
        if max(told, size) > self._max_bytes:
            limit = self._max_bytes
            raise TooLarge(f"the message has {max(told, size)} bytes or more, and the limit is {limit}")
        return b"".join(parts)

    async def _scored(self, requests: Requests, parameters: Mapping[str, Any], call: Call, num_bytes: int) -> Scored:
        submit = partial(self._endpoint.submit, requests, parameters, call=call, num_bytes=num_bytes)
        return await asyncio.wrap_future(await asyncio.to_thread(submit) if self._endpoint.waits else submit())

    def _refuse_other(self, request: Request) -> None:
        self._endpoint.refuse_other(request.path_params["name"], request.path_params.get("version", ""))


def _told_of(rollout: Mapping[str, Any]) -> Response:
    # Not by Starlette's: a difference may be infinite, which is null in JSON.
    return Response(msgspec.json.encode(rollout), media_type="application/json")


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes | memoryview) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"body: {error}") from error


def _read(body: bytes, header_length: str | None) -> tuple[_Inference, list[InputTensor]]:
    """A message of the protocol, and its tensors."""
    json_size = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > len(body):
            raise InputError(f"{HEADER_LENGTH}: is {header_length!r}, but the message has {len(body)} bytes")
        json_size = int(header_length)
    asked: _Inference = _decoded(_INFERENCE, body[:json_size])
    tensors, place = [], json_size
    for tensor in asked.inputs:
        data, size = tensor.data, tensor.parameters.get(BINARY_SIZE)
        if size is not None:
            if not isinstance(size, int) or not 0 <= size <= len(body) - place:
                left = len(body) - place
                raise InputError(f"tensor {tensor.name!r}: {BINARY_SIZE} is {size!r}, but {left} bytes are left")
            data, place = body[place : place + size], place + size
        elif data is None:
            raise InputError(f"tensor {tensor.name!r}: has neither data nor {BINARY_SIZE}")
        tensors.append(InputTensor.of(tensor.name, tensor.datatype, tensor.shape, data))
    if place != len(body):
        raise InputError(f"body: has {len(body) - place} bytes after those of its tensors")
    return asked, tensors


def _response(model: str, request_id: str, answer: Answer, binary: set[str]) -> Response:
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, values in answer.tensors.items():
        output: dict[str, Any] = {"name": name, "datatype": DATATYPE_OF[values.dtype], "shape": list(values.shape)}
        if name in binary:
            parts.append(values.tobytes())
            output["parameters"] = {BINARY_SIZE: len(parts[-1])}
        else:
            output["data"] = values.reshape(-1).tolist()
        outputs.append(output)
    told_of = {"model_name": model, "model_version": answer.version, "id": request_id, "outputs": outputs}
    header = msgspec.json.encode(told_of)
    if not parts:
        return Response(header, media_type="application/json")
    return Response(
        header + b"".join(parts), headers={HEADER_LENGTH: str(len(header))}, media_type="application/octet-stream"
    )
