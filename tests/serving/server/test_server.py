import datetime
import gc
import ipaddress
import json
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SCHEMA, make_requests
from tests.pages import blocks
from tests.serving.server.test_tensors import as_tensors
from tests.serving.test_scorer import make_model
from torchrec_amort import AmortizedScorer, HistoryCache, InputError, RequestBatch, ScoringService
from torchrec_amort.jobs import serve
from torchrec_amort.ops.cores import usable_cores
from torchrec_amort.serving.histories import HistoryStore
from torchrec_amort.serving.server.access import Access
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.memory import available_bytes, refuse_without_room
from torchrec_amort.serving.server.messages import METHODS, SERVICE, message
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.server.rest import HEADER_LENGTH
from torchrec_amort.serving.server.run import ScoringServer
from torchrec_amort.serving.versions import Version, Versions

SHAPES = [(3, 2), (0, 1), (8, 4)]
LABELS = ("liked", "bought")
MAX_BYTES = 100_000


def version(name: str, seed: int = 0) -> Version:
    cache = HistoryCache(max_bytes=2**20)
    return Version(name, AmortizedScorer(make_model(seed), cache=cache, schema=SCHEMA, backend="eager"))


def unlabelled(seed: int = 0) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in LABELS} for r in make_requests(SHAPES, seed)]


def scores_of(requests: list[dict[str, Any]], seed: int = 0) -> np.ndarray:
    """By impressions, of the model itself."""
    with torch.no_grad():
        logits: np.ndarray = make_model(seed)(RequestBatch.from_requests(requests, SCHEMA).to_impressions()).numpy()
    return logits


class Client:
    """Calls of both protocols, written out."""

    def __init__(self, server: ScoringServer, channel: grpc.Channel, http: httpx.Client) -> None:
        self.server, self.channel, self.http = server, channel, http

    def call(self, method: str, metadata: Any = (), timeout: float = 60, **fields: Any) -> Any:
        assert method in METHODS
        call = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=message(f"{method}Request").SerializeToString,
            response_deserializer=message(f"{method}Response").FromString,
        )
        return call(message(f"{method}Request")(**fields), metadata=metadata, timeout=timeout)

    def infer(self, requests: list[dict[str, Any]], **fields: Any) -> Any:
        data = arrow_of(requests)
        raw = [len(data).to_bytes(4, "little") + data]
        inputs = [{"name": "arrow", "datatype": "BYTES", "shape": [1]}]
        return self.call("ModelInfer", model_name="films", inputs=inputs, raw_input_contents=raw, **fields)


def arrow_of(requests: list[dict[str, Any]]) -> bytes:
    names = [name for name in SCHEMA.arrow_schema().names if name in requests[0]]
    kinds = pa.schema([SCHEMA.arrow_schema().field(name) for name in names])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, kinds) as stream:
        stream.write_table(pa.Table.from_pylist(requests, kinds))
    made: bytes = sink.getvalue().to_pybytes()
    return made


@contextmanager
def serving(
    versions: Any,
    access: Access | None = None,
    timeout_ms: float | None = None,
    load: Any = None,
    histories: Any = None,
    trace: Any = None,
    request_log: Any = None,
    shared_ports: tuple[int, int] = (0, 0),
    **options: Any,
) -> Iterator[Client]:
    service = ScoringService(versions, **({"num_workers": 2, "max_waiting": 9} | options))
    metrics = Metrics()
    metrics.collect("service", service.counters)
    endpoint = Endpoint(
        "films", versions, service, metrics, timeout_ms, load, histories, trace=trace, request_log=request_log
    )
    ports: Any = {"grpc_port": 0, "http_port": 0, "num_threads": 12, "max_bytes": MAX_BYTES, "access": access}
    with (
        ScoringServer(endpoint, "127.0.0.1", shared_ports=shared_ports, **ports) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
        httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=60) as http,
    ):
        yield Client(server, channel, http)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(Versions(version("monday"))) as client:
        yield client


def of_tensor(response: Any, name: str, dtype: Any) -> np.ndarray:
    place = [output.name for output in response.outputs].index(name)
    return np.frombuffer(response.raw_output_contents[place], dtype).reshape(tuple(response.outputs[place].shape))


@pytest.mark.parametrize("seed", range(3))
def test_all_ways_to_ask_have_the_models_scores(client: Client, seed: int) -> None:
    requests = unlabelled(seed)
    expected = scores_of(requests)
    counts = [len(request["candidate_item"]) for request in requests]

    response = client.infer(requests, id="71")
    assert (response.model_name, response.model_version, response.id) == ("films", "monday", "71")
    np.testing.assert_allclose(of_tensor(response, "logits", "<f4"), expected, atol=1e-5)
    assert of_tensor(response, "num_candidates", "<i8").tolist() == counts

    tensors = as_tensors(requests, SCHEMA, is_raw=False, columns=list(requests[0]))
    inputs = [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors]
    raw = [t.values.tobytes() for t in tensors]
    response = client.call("ModelInfer", model_name="films", inputs=inputs, raw_input_contents=raw)
    np.testing.assert_allclose(of_tensor(response, "logits", "<f4"), expected, atol=1e-5)
    contents = {"INT64": "int64_contents", "FP32": "fp32_contents"}
    told = [given | {"contents": {contents[t.datatype]: t.values}} for given, t in zip(inputs, tensors, strict=True)]
    response = client.call("ModelInfer", model_name="films", inputs=told, outputs=[{"name": "logits"}])
    assert [output.name for output in response.outputs] == ["logits"]
    np.testing.assert_allclose(of_tensor(response, "logits", "<f4"), expected, atol=1e-5)

    body: dict[str, Any] = {
        "id": "72",
        "inputs": [given | {"data": t.values.tolist()} for given, t in zip(inputs, tensors, strict=True)],
    }
    answer = client.http.post("/v2/models/films/infer", json=body).json()
    logits, num_candidates = answer["outputs"]
    assert (answer["model_version"], answer["id"], num_candidates["data"]) == ("monday", "72", counts)
    assert logits["shape"] == list(expected.shape)
    np.testing.assert_allclose(np.array(logits["data"]).reshape(expected.shape), expected, atol=1e-5)

    body["inputs"] = [
        given | {"parameters": {"binary_data_size": len(part)}} for given, part in zip(inputs, raw, strict=True)
    ]
    body["parameters"] = {"binary_data_output": True}
    header = json.dumps(body).encode()
    path = "/v2/models/films/versions/monday/infer"
    reply = client.http.post(path, content=header + b"".join(raw), headers={HEADER_LENGTH: str(len(header))})
    size = int(reply.headers[HEADER_LENGTH])
    logits = json.loads(reply.content[:size])["outputs"][0]
    found = np.frombuffer(reply.content[size:][: logits["parameters"]["binary_data_size"]], "<f4")
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)

    answer = client.http.post("/v1/score", json={"requests": requests}).json()
    assert [len(scores) for scores in answer["scores"]] == counts
    np.testing.assert_allclose(np.concatenate(answer["scores"]), expected, atol=1e-5)


def test_it_tells_what_it_is_and_what_it_reads(client: Client) -> None:
    assert client.call("ServerLive").live and client.call("ServerReady").ready
    assert client.call("ModelReady", name="films", version="monday").ready
    about = client.call("ModelMetadata", name="films")
    inputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in about.inputs}
    assert inputs["user_id"] == ("INT64", [-1]) and inputs["genres"] == ("INT64", [-1, -1, -1])
    assert inputs["price"] == ("FP32", [-1, -1]) and not inputs.keys() & {*LABELS, "request_id"}
    told = client.http.get("/v2/models/films").json()
    assert [tensor["name"] for tensor in told["inputs"]] == list(inputs)
    assert told["versions"] == list(about.versions) == ["monday"]
    assert told["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 2]}
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/films/ready"):
        assert client.http.get(path).status_code == 200
    assert client.http.get("/v2").json()["name"] == client.call("ServerMetadata").name == "torchrec_amort"
    check = health_pb2_grpc.HealthStub(client.channel).Check
    for service in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING


def status_of(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code().name, error.details()


def test_what_is_refused_is_told_by_status_and_reason(client: Client) -> None:
    spoilt = unlabelled()
    spoilt[1]["user_id"] = 99
    reason = "request 1: .*'user_id'.* has id 99"
    answers = [
        status_of(lambda: client.infer(spoilt)),
        status_of(lambda: client.call("ModelInfer", model_name="films")),
        status_of(lambda: client.infer(unlabelled(), parameters={"speed": {"int64_param": 3}})),
        status_of(lambda: client.infer(unlabelled(), parameters={"timeout_ms": {"string_param": "soon"}})),
        status_of(lambda: client.infer(unlabelled(), outputs=[{"name": "scores"}])),
        status_of(lambda: client.channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff", timeout=60)),
        status_of(
            lambda: client.call(
                "ModelInfer", model_name="films", inputs=[{"name": "a"}], raw_input_contents=[b"", b""]
            )
        ),
    ]  # fmt: skip
    assert {code for code, _ in answers} == {"INVALID_ARGUMENT"}
    for (_, told), expected in zip(
        answers,
        [reason, "there is no tensor", "parameter 'speed': is unknown", "'timeout_ms': is 'soon', not a number",
         "output 'scores': is unknown: there are", "message: is none of the protocol",
         "raw_input_contents: has 2 tensors, but inputs 1"],
        strict=True,
    ):  # fmt: skip
        assert re.search(expected, told), told
    assert status_of(lambda: client.call("ModelInfer", model_name="books"))[0] == "NOT_FOUND"
    assert status_of(lambda: client.infer(unlabelled(), model_version="sunday"))[0] == "NOT_FOUND"
    assert (
        status_of(lambda: client.infer(unlabelled(), parameters={"timeout_ms": {"double_param": 0}}))[0]
        == "DEADLINE_EXCEEDED"
    )
    large = [request | {"price": request["price"] * 20_000} for request in unlabelled()]
    assert status_of(lambda: client.infer(large))[0] == "RESOURCE_EXHAUSTED"

    def post(path: str, body: Any) -> tuple[int, str]:
        reply = client.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())
        return reply.status_code, reply.json()["error"]

    status, told = post("/v1/score", {"requests": spoilt})
    assert status == 400 and re.search(reason, told)
    for body in (b"", b"{", b'{"requests": 3}', b"\xff", b"[" * 50_000, b'{"requests": [], "parameters": 3}'):
        assert post("/v1/score", body)[0] == 400
    assert post("/v2/models/books/infer", {"inputs": []})[0] == 404
    assert post("/v2/models/films/versions/sunday/infer", {"inputs": []})[0] == 404
    assert post("/v1/score", {"requests": unlabelled(), "parameters": {"timeout_ms": 0}})[0] == 504
    assert post("/v1/score", b" " * (MAX_BYTES + 1)) == (
        413, f"the message has {MAX_BYTES + 1} bytes or more, and the limit is {MAX_BYTES}",
    )  # fmt: skip
    assert client.http.get("/v3").status_code == 404
    np.testing.assert_allclose(
        of_tensor(client.infer(unlabelled()), "logits", "<f4"), scores_of(unlabelled()), atol=1e-5
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_is_answered_or_refused(client: Client, data: st.DataObject) -> None:
    whole = message("ModelInferRequest")(
        model_name="films",
        inputs=[{"name": "arrow", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[len(arrow_of(unlabelled())).to_bytes(4, "little") + arrow_of(unlabelled())],
    ).SerializeToString()
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    spoilt = spoilt[: data.draw(st.integers(0, len(spoilt)))] if data.draw(st.booleans()) else spoilt
    call = client.channel.unary_unary(f"/{SERVICE}/ModelInfer")
    try:
        call(bytes(spoilt), timeout=60)
    except grpc.RpcError as error:
        told: Any = error
        assert told.code().name in ("INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"), told.details()
    body = data.draw(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | st.from_type(type(None)))
    tree = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["inputs", "name", "shape", "datatype", "data", "parameters"]), inner)
        ),
        max_leaves=8,
    )
    if body is None:
        body = json.dumps({"inputs": [data.draw(tree)]}).encode()
    for path in ("/v2/models/films/infer", "/v1/score"):
        assert client.http.post(path, content=body).status_code == 400


class Held:
    """Versions whose scores wait until they may go on."""

    def __init__(self) -> None:
        self._versions = Versions(version("monday"))
        self.current = self._versions.current
        self.go_on, self.started = threading.Event(), threading.Semaphore(0)

    def score(self, requests: Any) -> Any:
        self.started.release()
        self.go_on.wait()
        return self._versions.score(requests)


def test_a_full_queue_refuses_at_once_and_a_drained_server_answers_what_came() -> None:
    held = Held()
    with serving(held, timeout_ms=60_000, num_workers=1, max_waiting=1) as client:
        results: list[Any] = []
        threads = []
        for _ in range(2):
            threads.append(threading.Thread(target=lambda: results.append(client.infer(unlabelled()))))
            threads[-1].start()
            if len(threads) == 1:
                assert held.started.acquire(timeout=60)
        while client.server._endpoint.service.num_waiting < 1:
            threading.Event().wait(0.001)
        assert status_of(lambda: client.infer(unlabelled())) == (
            "RESOURCE_EXHAUSTED",
            "1 requests are waiting: the limit",
        )
        reply = client.http.post("/v1/score", json={"requests": unlabelled()})
        assert (reply.status_code, reply.json()["error"]) == (429, "1 requests are waiting: the limit")
        client.server._endpoint.drain()
        assert not client.call("ServerReady").ready
        assert client.http.get("/v2/health/ready").status_code == 503
        held.go_on.set()
        for thread in threads:
            thread.join(60)
        assert len(results) == 2
        text = client.http.get("/metrics").text
        assert 'amort_request_seconds_count{protocol="grpc",result="overloaded"} 1.0' in text
        assert "amort_service_refused_total 2.0" in text and 'amort_scored_total{version="monday"} 2.0' in text


def test_a_message_that_is_none_is_counted() -> None:
    with serving(Versions(version("monday"))) as client:
        status_of(lambda: client.channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"\xff", timeout=60))
        assert 'amort_request_seconds_count{protocol="grpc",result="bad_input"} 1.0' in client.http.get("/metrics").text


def test_tokens_guard_each_role() -> None:
    tokens: Any = {"score": "s" * 16, "admin": "a" * 16}
    with serving(Versions(version("monday")), Access(tokens=tokens)) as client:
        assert status_of(lambda: client.infer(unlabelled()))[0] == "UNAUTHENTICATED"
        fields: Any = {"model_name": "films", "inputs": [{"name": "arrow", "datatype": "BYTES", "shape": [1]}]}
        data = arrow_of(unlabelled())
        fields["raw_input_contents"] = [len(data).to_bytes(4, "little") + data]
        shown = [("authorization", f"Bearer {'s' * 16}")]
        assert client.call("ModelInfer", metadata=shown, **fields).model_version == "monday"
        for token, path, body, status in (
            ("s", "/v1/score", {"requests": unlabelled()}, 200),
            ("a", "/v1/score", {"requests": unlabelled()}, 401),
            ("s", "/v1/forget", {"user": 3}, 401),
            ("a", "/v1/forget", {"user": 3}, 200),
        ):
            headers = {"authorization": f"Bearer {token * 16}"}
            assert client.http.post(path, json=body, headers=headers).status_code == status
        assert client.http.post("/v1/score", json={"requests": unlabelled()}).status_code == 401
        assert client.http.get("/v2/health/live").status_code == 200


def test_versions_are_switched_and_users_forgotten() -> None:
    monday, tuesday = version("monday"), version("tuesday", seed=1)
    versions = Versions(monday)
    with serving(versions) as client:
        requests = unlabelled()
        before = client.http.post("/v1/score", json={"requests": requests}).json()
        versions.switch(tuesday)
        after = client.http.post("/v1/score", json={"requests": requests}).json()
        assert (before["version"], after["version"]) == ("monday", "tuesday")
        np.testing.assert_allclose(np.concatenate(after["scores"]), scores_of(requests, seed=1), atol=1e-5)
        user = requests[0]["user"]
        assert client.http.post("/v1/forget", json={"user": user}).json() == {"found": True}
        assert all(user not in [key[0] for key in v.scorer.cache._entries] for v in (monday, tuesday) if v.scorer.cache)
        assert client.http.post("/v1/forget", json={"user": user}).json() == {"found": False}
        assert client.http.post("/v1/roll_back").json() == {"version": "monday"}
        assert client.http.post("/v1/roll_back").status_code == 400
        assert client.http.post("/v1/score", json={"requests": requests}).json()["scores"] == before["scores"]


def test_a_package_is_switched_to_if_it_can_be_loaded() -> None:
    def load(folder: str) -> Version:
        if folder == "sunday":
            raise InputError("sunday: no such package")
        return version(folder, seed=1)

    with serving(Versions(version("monday")), load=load) as client:
        reply = client.http.post("/v1/versions", json={"folder": "sunday"})
        assert (reply.status_code, reply.json()["error"]) == (400, "sunday: no such package")
        assert client.infer(unlabelled()).model_version == "monday"
        assert client.http.post("/v1/versions", json={"folder": "tuesday"}).json() == {"version": "tuesday"}
        response = client.infer(unlabelled())
        assert response.model_version == "tuesday"
        np.testing.assert_allclose(of_tensor(response, "logits", "<f4"), scores_of(unlabelled(), seed=1), atol=1e-5)
        assert client.http.post("/v1/versions", json={"folder": "tuesday"}).status_code == 400
        text = client.http.get("/metrics").text
        assert 'amort_switches_total{result="ok"} 1.0' in text and 'result="refused"} 2.0' in text
    with serving(Versions(version("monday"))) as client:
        assert "start it with a package" in client.http.post("/v1/versions", json={"folder": "a"}).json()["error"]


def test_a_package_larger_than_what_is_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tables.pt").write_bytes(b"0" * 2_000_000)
    refuse_without_room(tmp_path, available=3_000_000)
    with pytest.raises(InputError, match="needs 3 MB beside the version that answers, but 2 MB are left"):
        refuse_without_room(tmp_path, available=2_000_000)
    assert (available_bytes() or 10**9) > 10**6


def test_the_commands_of_the_page_run() -> None:
    commands = [command for block in blocks("docs/server.md", "sh") for command in block.split("curl -s ")[1:]]
    with serving(Versions(version("monday")), load=lambda folder: version(Path(folder).name, seed=1)) as client:
        answers = []
        for command in commands:
            line = f"curl -s {command}".replace("localhost:8000", f"localhost:{client.server.http_port}")
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60)
            answers.append(json.loads(done.stdout or "null"))
    scored, ready, about, inferred, switched, rolled_back, rolled_out, rollout, encoded, forgotten = answers
    assert encoded["scores"] == [[]]
    assert ready is None and about["name"] == "films"
    np.testing.assert_allclose(np.ravel(scored["scores"]), inferred["outputs"][0]["data"], atol=1e-6)
    assert rolled_out == rollout and (rollout["treatment"], rollout["share"]) == ("tuesday", 0.1)
    assert (switched, rolled_back, forgotten) == ({"version": "tuesday"}, {"version": "monday"}, {"found": True})


EVENTS = ("history_item", "history_action", "history_time")
CANDIDATES = ("candidate_item", "genres", "price")


def test_new_events_are_put_after_those_that_are_kept() -> None:
    store = HistoryStore(SCHEMA, max_bytes=2**20)
    requests = [request | {"user": row} for row, request in enumerate(unlabelled())]
    start = [request | {name: request[name][:-1] for name in EVENTS} for request in requests]
    news = [request | {name: request[name][-1:] for name in EVENTS} for request in requests]
    append: Any = {"history": {"string_param": "append"}}
    with serving(Versions(version("monday")), histories=store) as client:
        code, told = status_of(lambda: client.infer(news, parameters=append))
        assert (code, told) == ("FAILED_PRECONDITION", "user 0: the history is not kept here: send it whole")
        client.infer(start)
        logits = of_tensor(client.infer(news, parameters=append), "logits", "<f4")
        np.testing.assert_allclose(logits, scores_of(requests), atol=1e-5)
        bare = [{name: value for name, value in request.items() if name not in EVENTS} for request in requests]
        body = {"requests": bare, "parameters": {"history": "append"}}
        scores = client.http.post("/v1/score", json=body).json()["scores"]
        np.testing.assert_allclose(np.concatenate(scores), scores_of(requests), atol=1e-5)
        assert client.http.post("/v1/forget", json={"user": 1}).json() == {"found": True}
        reply = client.http.post("/v1/score", json=body)
        assert (reply.status_code, reply.json()["error"]) == (
            409,
            "user 1: the history is not kept here: send it whole",
        )
        assert client.http.post("/v1/score", json={**body, "requests": "no"}).status_code == 400
    with serving(Versions(version("monday"))) as client:
        assert "keeps no histories" in client.http.post("/v1/score", json=body).json()["error"]


def test_histories_are_encoded_before_candidates_are_known() -> None:
    versions = Versions(version("monday"))
    cache = versions.current.scorer.cache
    assert cache is not None
    requests = [request | {"user": row} for row, request in enumerate(unlabelled())]
    early = [{name: value for name, value in request.items() if name not in CANDIDATES} for request in requests]
    with serving(versions) as client:
        response = client.infer(early, parameters={"encode": {"bool_param": True}})
        assert of_tensor(response, "num_candidates", "<i8").tolist() == [0, 0, 0]
        assert of_tensor(response, "logits", "<f4").shape == (0, 2)
        assert cache.counters()["misses"] == 3
        answer = client.http.post("/v1/score", json={"requests": requests}).json()
        np.testing.assert_allclose(np.concatenate(answer["scores"]), scores_of(requests), atol=1e-5)
        assert (cache.counters()["misses"], cache.counters()["hits"]) == (3, 3)
        body = {"requests": early, "parameters": {"encode": True}}
        assert client.http.post("/v1/score", json=body).json()["scores"] == [[], [], []]
        told = client.http.post("/v1/score", json={**body, "requests": requests}).json()["error"]
        assert told == "requests: 'candidate_item' is of candidates, which come later: leave it out, or score them"


def certificate(folder: Path) -> tuple[str, str]:
    """A certificate of this machine that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize("is_mutual", [False, True])
def test_connections_are_private_with_a_certificate(tmp_path: Path, is_mutual: bool) -> None:
    pem, key = certificate(tmp_path)
    access = Access(certificate=pem, private_key=key, client_ca=pem if is_mutual else None)
    with serving(Versions(version("monday")), access) as client:
        own = (Path(key).read_bytes(), Path(pem).read_bytes()) if is_mutual else (None, None)
        credentials = grpc.ssl_channel_credentials(Path(pem).read_bytes(), *own)
        with grpc.secure_channel(f"127.0.0.1:{client.server.grpc_port}", credentials) as channel:
            private = Client(client.server, channel, client.http)
            assert private.infer(unlabelled()).model_version == "monday"
        assert status_of(lambda: client.call("ServerLive", timeout=5))[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        url = f"https://127.0.0.1:{client.server.http_port}/v2/health/live"
        context = ssl.create_default_context(cafile=pem)
        if is_mutual:
            with pytest.raises(httpx.HTTPError):
                httpx.get(url, verify=context)
            context.load_cert_chain(pem, key)
        assert httpx.get(url, verify=context).status_code == 200


def test_senseless_access_is_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"certificate": "a.pem"}, "certificate and private_key go together"),
        ({"client_ca": "a.pem"}, "client_ca is of TLS"),
        ({"certificate": "a.pem", "private_key": "b.key"}, "certificate: a.pem: no such file"),
    ]
    for options, told in refused:
        with pytest.raises(InputError, match=told):
            Access(**options)


def test_what_is_imported_is_not_looked_at_by_garbage_collection_while_requests_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[int] = []

    def load(*_: Any, **__: Any) -> Any:
        looked_at.append(len(gc.get_objects()))
        raise InputError("packages/films: no such folder")

    monkeypatch.setattr(serve, "_of_package", load)
    with pytest.raises(InputError, match="no such folder"):
        serve.serve_until_told(ServeConfig(package="packages/films", processes=1))
    # As before, once it has ended.
    assert looked_at[0] < 0.01 * len(gc.get_objects())


def test_processes_are_forked_where_there_is_no_compiler(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "import torchrec_amort.serving.server.forked"]
    subprocess.run(command, env=environment, check=True)


def test_there_are_as_many_processes_as_cpus_unless_one_keeps_what_is_of_users() -> None:
    assert ServeConfig(package="packages/films").num_processes == usable_cores()
    for options in ({"cache_bytes": 1}, {"history_bytes": 1}, {"package": None, "run_folder": "runs/films"}):
        assert ServeConfig(**({"package": "packages/films"} | options)).num_processes == 1
    config = ServeConfig(package="packages/films", processes=2, cache_bytes=1, grpc_port=0)
    assert config.num_processes == 2
    assert [config.ports_of(place) for place in (0, 1)] == [(0, 8002), (0, 8004)]


def test_ports_of_processes_that_would_meet_or_are_none_are_told() -> None:
    with pytest.raises(InputError, match="grpc_port is 8004 and http_port 8000: each of 2 .* an even and an odd"):
        ServeConfig(package="packages/films", processes=2, grpc_port=8004)
    for grpc_port in (8001, 8006, 0):
        ServeConfig(package="packages/films", processes=2, grpc_port=grpc_port)
    ServeConfig(package="packages/films", processes=1, grpc_port=8004)
    with pytest.raises(InputError, match="http_port is 65532, and 65536 is the last one of 2 processes"):
        ServeConfig(package="packages/films", processes=2, http_port=65532)
    with pytest.raises(InputError, match="grpc_port is 70000"):
        ServeConfig(package="packages/films", processes=1, grpc_port=70000)


def test_who_connects_to_a_shared_port_gets_any_server() -> None:
    shared = free_port(), free_port()
    with ExitStack() as stack:
        own = [
            stack.enter_context(serving(Versions(version(name)), shared_ports=shared)) for name in ("monday", "tuesday")
        ]
        answered: set[tuple[str, str]] = set()
        until = time.monotonic() + 60
        while len(answered) < 4:
            assert time.monotonic() < until, answered
            # A connection stays with one of them.
            with grpc.insecure_channel(f"127.0.0.1:{shared[0]}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
                answered.add(("gRPC", Client(own[0].server, channel, own[0].http).infer(unlabelled()).model_version))
            reply = httpx.post(f"http://127.0.0.1:{shared[1]}/v1/score", json={"requests": unlabelled()}, timeout=60)
            answered.add(("HTTP", reply.json()["version"]))
        assert answered == {(protocol, name) for protocol in ("gRPC", "HTTP") for name in ("monday", "tuesday")}
        # Their own ports are theirs.
        assert [client.infer(unlabelled()).model_version for client in own] == ["monday", "tuesday"]
        taken: Any = {"grpc_port": own[0].server.grpc_port, "http_port": own[0].server.http_port}
        nothing: Any = None
        with pytest.raises(InputError, match="cannot be listened on"):
            ScoringServer(nothing, "127.0.0.1", num_threads=1, shared_ports=shared, **taken)


def free_port(*further: int) -> int:
    """A port that is free, as those are that are so much further on."""
    while True:
        # Below those that the system gives to whoever asks for any.
        port = random.randrange(10_000, 30_000)
        with ExitStack() as taken:
            try:
                for more in (0, *further):
                    taken.enter_context(socket.socket()).bind(("127.0.0.1", port + more))
            except OSError:
                continue
            return port


def test_a_port_that_is_taken_is_told(client: Client) -> None:
    endpoint: Any = None
    of_client: list[Any] = [
        {"grpc_port": client.server.grpc_port, "http_port": 0},
        {"grpc_port": 0, "http_port": client.server.http_port},
    ]
    for ports in of_client:
        with pytest.raises(InputError, match="cannot be listened on"):
            ScoringServer(endpoint, "127.0.0.1", num_threads=1, **ports)


def test_versions_that_do_not_take_the_same_requests_do_not_answer() -> None:
    versions = Versions(version("monday"))
    with pytest.raises(InputError, match="version 'monday': is the one that answers"):
        versions.switch(version("monday", seed=1))
    with pytest.raises(InputError, match="there is none before it"):
        versions.roll_back()
