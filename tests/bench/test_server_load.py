"""`torchrec-amort load` against servers that answer, refuse, are late or wrong: what is sent, and what is told."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import SCHEMA
from tests.oip_server import Refusal, echo, grpc_server, http_server, table_of
from torchrec_amort.apps import export, load, train
from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.bodies import bodies_of
from torchrec_amort.bench.open_loop import ENDINGS, Call, SystemClock
from torchrec_amort.bench.senders import GrpcSender, HttpSender
from torchrec_amort.bench.server_load import ServerLoadConfig
from torchrec_amort.errors import InputError
from torchrec_amort.schema import Feature, RequestSchema
from torchrec_amort.training.run import load_model

SHORT = ["--seconds=0.5", "--warmup=0.1"]


def rows_of(folder: Path, split: str = "test") -> dict[int, dict[str, Any]]:
    """The requests of a split without their labels, by their ids."""
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((folder / split).glob("*.parquet"))]).to_pylist()
    return {row["request_id"]: {k: v for k, v in row.items() if k not in ("liked", "bought")} for row in rows}


def loaded(out: Path, *options: str) -> dict[str, Any]:
    load.main([f"--out={out}", *options])
    record: dict[str, Any] = json.loads((out / "load.json").read_text())
    for rate in record["rates"]:
        assert rate["sent"] == sum(rate[ending] for ending in ENDINGS)
    return record


def echo_rows(rows: list[dict[str, Any]]) -> list[list[list[float]]]:
    return [[[item, row["user"]] for item in row["candidate_item"]] for row in rows]


def request_of(body: dict[str, Any]) -> dict[str, Any]:
    """The one request that the tensors of a body of `rest` have, as a row of the data."""
    tensors = {tensor["name"]: tensor for tensor in body["inputs"]}
    for tensor in tensors.values():
        assert len(tensor["data"]) == math.prod(tensor["shape"])
    row = {}
    for name, tensor in tensors.items():
        if name.partition(".")[2]:
            continue
        if f"{name}.counts" in tensors:
            ids, counts = iter(tensor["data"]), tensors[f"{name}.counts"]["data"]
            assert tensors[f"{name}.lengths"]["data"] == [len(counts)]
            row[name] = [[next(ids) for _ in range(count)] for count in counts]
            assert not list(ids)
        else:
            row[name] = np.array(tensor["data"]).reshape(tensor["shape"]).tolist()[0]
    return row


def answer_rest(_: str, body: dict[str, Any]) -> dict[str, Any]:
    logits = np.array(echo_rows([request_of(body)])[0])
    counts = {"name": "num_candidates", "datatype": "INT64", "shape": [1], "data": [len(logits)]}
    scores = {"name": "logits", "datatype": "FP32", "shape": list(logits.shape), "data": logits.ravel().tolist()}
    return {"model_name": "films", "model_version": "3", "outputs": [counts, scores]}


def answer_score(_: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"model": "films", "version": "3", "scores": echo_rows(body["requests"])}


def test_requests_of_the_data_are_sent_at_each_rate_and_all_is_told(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Any, dict[str, str]]] = []
    token = tmp_path / "token"
    token.write_text("secret\n")
    out = tmp_path / "load"
    with grpc_server(seen=seen) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--rates=[60,120]"]
        record = loaded(out, *options, *SHORT, f"--token_file={token}", "--timeout_ms=20000")
    assert [rate["rate"] for rate in record["rates"]] == [60, 120]
    for rate in record["rates"]:
        assert rate["answered"] == rate["sent"] > 0
        assert rate["goodput"] == rate["answered"] / 0.5
        assert 0 < rate["p50_ms"] <= rate["p90_ms"] <= rate["p99_ms"] <= rate["p99.9_ms"] <= rate["max_ms"]
        assert 0 <= rate["late_p99_ms"] <= rate["late_max_ms"]
    # Those that warm up are sent, and not counted.
    assert len(seen) > sum(rate["sent"] for rate in record["rates"])
    rows = rows_of(data_folder)
    for request, metadata in seen:
        (row,) = table_of(request).to_pylist()
        assert row == rows[row["request_id"]]
        assert request.model_name == "films"
        assert request.parameters["timeout_ms"].int64_param == 20_000
        assert metadata["authorization"] == "Bearer secret"
    assert "secret" not in (out / "load.json").read_text()
    assert (out / "load.png").exists()
    captured = capsys.readouterr()
    assert (out / "load.md").read_text() in captured.out
    assert "load: 100%" in captured.err


@pytest.mark.parametrize("protocol", ["grpc", "rest", "score"])
def test_each_request_has_its_own_answer_in_every_protocol(protocol: str, data_folder: Path, tmp_path: Path) -> None:
    answer = answer_rest if protocol == "rest" else answer_score
    seen: list[tuple[str, dict[str, str], bytes]] = []
    with grpc_server() if protocol == "grpc" else http_server(answer, seen) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--requests=20", *SHORT, "--timeout_ms=20000"]
        file = tmp_path / "answers.npz"
        record = loaded(tmp_path, *options, f"--protocol={protocol}", f"--save_answers={file}", "--connections=4")
    (rate,) = record["rates"]
    assert rate["answered"] == rate["sent"] > 0
    answers, rows = np.load(file), rows_of(data_folder)
    assert len(answers["request_id"]) == rate["answered"]
    assert 1 < len(set(answers["request_id"].tolist())) <= 20
    expected = echo_rows([rows[row] for row in answers["request_id"].tolist()])
    assert answers["num_candidates"].tolist() == [len(logits_mT) for logits_mT in expected]
    assert answers["logits"].tolist() == [logits_T for logits_mT in expected for logits_T in logits_mT]
    assert set(answers["version"].tolist()) == {"3"}
    assert set(answers["rate"].tolist()) == {100}
    paths = {"grpc": set(), "rest": {"/v2/models/films/infer"}, "score": {"/v1/score"}}
    assert {path for path, _, _ in seen} == paths[protocol]
    for _, _, body in seen:
        parsed = json.loads(body)
        assert parsed["parameters"] == {"timeout_ms": 20_000}
        (row,) = [request_of(parsed)] if protocol == "rest" else parsed["requests"]
        assert row == rows[row["request_id"]]


@pytest.mark.parametrize("protocol", ["grpc", "score"])
def test_requests_that_are_not_answered_are_counted_by_what_was_said(
    protocol: str, data_folder: Path, tmp_path: Path
) -> None:
    codes = {
        "refused": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
        "invalid": grpc.StatusCode.INVALID_ARGUMENT,
        "failed": grpc.StatusCode.UNAVAILABLE,
    }
    said: Counter[str] = Counter()

    def refuse_most(users: list[int]) -> None:
        ending = ["answered", *codes][users[0] % 5]
        said[ending] += 1
        if ending in codes:
            raise Refusal(codes[ending], f"says {ending}")

    def score(table: pa.Table) -> np.ndarray:
        refuse_most(table["user"].to_pylist())
        return echo(table)

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        refuse_most([request["user"] for request in body["requests"]])
        return answer_score(path, body)

    with grpc_server(score) if protocol == "grpc" else http_server(answer) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--seconds=0.5", "--warmup=0"]
        (rate,) = loaded(tmp_path, *options, f"--protocol={protocol}")["rates"]
    if protocol == "grpc":
        # Each was sent again four times.
        said["refused"] //= 5
    assert {ending: rate[ending] for ending in ENDINGS} == said
    assert rate["details"].keys() == said.keys() - {"answered"} == set(codes)
    for ending, detail in rate["details"].items():
        assert f"says {ending}" in detail
        assert detail in (tmp_path / "load.md").read_text()


def test_calls_of_grpc_end_at_their_deadline(data_folder: Path, tmp_path: Path) -> None:
    over = threading.Event()

    def stall(table: pa.Table) -> np.ndarray:
        over.wait()
        return echo(table)

    with grpc_server(stall) as address:
        try:
            options = [f"--addresses=[{address}]", f"--data={data_folder}", "--timeout_ms=50", "--give_up=600", *SHORT]
            (rate,) = loaded(tmp_path, *options)["rates"]
        finally:
            over.set()
    assert rate["deadline"] == rate["sent"] > 0
    assert rate["goodput"] == 0


def test_a_server_that_is_not_there_is_told(data_folder: Path, tmp_path: Path) -> None:
    for protocol in ("grpc", "score"):
        options = ["--addresses=[localhost:1]", f"--data={data_folder}", "--seconds=0.2", "--warmup=0"]
        (rate,) = loaded(tmp_path, *options, f"--protocol={protocol}")["rates"]
        assert rate["failed"] == rate["sent"] > 0
        assert "refused" in rate["details"]["failed"]
        assert "p50_ms" not in rate


def test_a_body_is_sent_as_it_is_to_any_of_the_servers(tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text('{"inputs": [ {"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 4]}]}\n')
    seen: list[list[tuple[str, dict[str, str], bytes]]] = [[], []]

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"outputs": []}

    with http_server(answer, seen[0]) as one, http_server(answer, seen[1]) as other:
        options = [f"--addresses=[{one},{other}]", f"--body={body}", "--protocol=rest", "--model=a model", *SHORT]
        (rate,) = loaded(tmp_path / "load", *options)["rates"]
    assert rate["answered"] == rate["sent"] > 0
    for of_server in seen:
        assert {(path, sent) for path, _, sent in of_server} == {("/v2/models/a%20model/infer", body.read_bytes())}


def test_candidates_and_events_are_as_many_as_asked_for(data_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[Any, dict[str, str]]] = []
    with grpc_server(seen=seen) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--requests=10", *SHORT]
        loaded(tmp_path, *options, "--candidates=9", "--history_length=3")
    rows = rows_of(data_folder)
    assert seen
    for request, _ in seen:
        (sent,) = table_of(request).to_pylist()
        row = rows[sent["request_id"]]
        assert len(row["history_item"]) >= 3
        for name in ("history_item", "history_action", "history_time"):
            assert sent[name] == row[name][-3:]
        assert {len(sent[name]) for name in ("candidate_item", "genres", "price")} == {9}
        assert sent["interests"] == row["interests"]


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    small = ["--model.embedding_dim=8", "--model.history_length=4", "--loop.epochs=1"]
    train.main([f"--data={data_folder}", f"--run_folder={run}", *small])
    return run


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("of", ["run", "package"])
def test_wrong_answers_are_counted(of: str, trained: Path, data_folder: Path, tmp_path: Path) -> None:
    model, config, schema = load_model(str(trained))
    wrong: Counter[bool] = Counter()

    def score(table: pa.Table) -> np.ndarray:
        batch = RequestBatch.from_arrow(table, schema, config.model.history_lengths(schema))
        with torch.inference_mode():
            logits_CT: np.ndarray = model(batch).numpy()
        is_wrong = table["user"].to_pylist()[0] < 3
        wrong[is_wrong] += 1
        logits_CT[0, 1] += 1e-3 * is_wrong
        return logits_CT

    folder = trained
    if of == "package":
        folder = tmp_path / "package"
        export.main([f"--run_folder={trained}", f"--out={folder}", "--tables=float32"])
    with grpc_server(score) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--seconds=0.5", "--warmup=0", "--rates=[60]"]
        (rate,) = loaded(tmp_path / "load", *options, f"--check_{of}={folder}")["rates"]
    assert wrong[True] > 0 < wrong[False]
    assert (rate["answered"], rate["wrong"]) == (wrong.total(), wrong[True])


def test_vectors_are_tensors_of_one_dimension_more_and_nulls_none() -> None:
    schema = RequestSchema(
        "films",
        (
            Feature("mood", "request", "vector", size=2),
            Feature("cover", "candidate", "vector", size=3),
            Feature("scene", "event", "vector", size=2),
            Feature("film", "candidate", "id", table_size=9, vocabulary="hash", text=True, nullable=True),
        ),
    )
    request = {"mood": [1, 2], "cover": [[1, 2, 3], [4, 5, 6]], "scene": [], "film": ["one", "two"]}
    table = pa.Table.from_pylist([request], pa.schema([f for f in schema.arrow_schema() if f.name in request]))
    (body,) = bodies_of(table, schema, "rest", model="films", timeout=0.25)
    sent = json.loads(body)
    assert sent["parameters"] == {"timeout_ms": 250}
    shapes = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in sent["inputs"]}
    assert shapes == {
        "mood": ("FP32", [1, 2]),
        "cover": ("FP32", [1, 2, 3]),
        "scene": ("FP32", [1, 0, 2]),
        "film": ("BYTES", [1, 2]),
    }
    assert request_of(sent) == request
    without = table.set_column(table.column_names.index("film"), "film", pa.array([["one", None]]))
    with pytest.raises(InputError, match="film has a null"):
        bodies_of(without, schema, "rest", model="films", timeout=None)


def test_a_connection_that_the_server_has_closed_is_opened_again() -> None:
    closed = threading.Semaphore(0)
    with http_server(answer_score, closed=closed) as address:
        body = json.dumps({"requests": []}).encode()
        sender = HttpSender([body], [address], "/v1/score", connections=1, token=None, ca=None, give_up=60)
        for _ in range(3):
            call = Call(0, 0, SystemClock())
            sender.send(call)
            call.wait()
            assert call.ending == "answered"
            closed.acquire()
        sender.close()


@pytest.mark.parametrize("protocol", ["grpc", "score"])
def test_what_is_not_answered_is_given_up(protocol: str) -> None:
    over, arrived = threading.Event(), threading.Event()

    def stall(*_: Any) -> Any:
        arrived.set()
        over.wait()
        raise Refusal(grpc.StatusCode.UNAVAILABLE, "over")

    def sender_to(address: str, give_up: float) -> GrpcSender | HttpSender:
        if protocol == "grpc":
            (body,) = bodies_of(pa.table({"candidate_item": [[1]]}), SCHEMA, "grpc", model="", timeout=None)
            return GrpcSender([body], [address], token=None, ca=None, give_up=give_up)
        return HttpSender([b"{}"], [address], "/", connections=1, token=None, ca=None, give_up=give_up)

    with grpc_server(stall) if protocol == "grpc" else http_server(stall) as address:
        try:
            late, closed = Call(0, 0, SystemClock()), Call(0, 0, SystemClock())
            sender_to(address, 0.05).send(late)
            late.wait()
            arrived.clear()
            sender = sender_to(address, 600)
            sender.send(closed)
            arrived.wait()
            sender.close()
            closed.wait()
        finally:
            over.set()
    assert (late.ending, closed.ending) == ("deadline", "failed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data is None and body None"),
        ({"data": "data", "body": "body", "protocol": "rest"}, "data is data and body body"),
        ({"body": "body", "model": "m"}, "protocol is grpc, but body is one of rest"),
        ({"body": "body", "protocol": "rest", "model": "m", "check_run": "run"}, "check_run is run, but body is sent"),
        ({"body": "body", "protocol": "rest"}, "model is ''"),
        ({"data": "data", "check_run": "run", "check_package": "package"}, "check_run is run, check_package package"),
        ({"data": "data", "addresses": ["localhost"]}, "'localhost' is not host:port"),
        ({"data": "data", "addresses": []}, "addresses or rates are empty"),
        ({"data": "data", "rates": [0.0]}, "rates is .0.0.: give a number above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerLoadConfig(**({"addresses": ["localhost:1"], "out": "out"} | options))


def test_an_answer_that_is_none_of_scores_is_told(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_server(lambda path, body: {"outputs": []}) as address:
        options = [f"--addresses=[{address}]", f"--data={data_folder}", "--protocol=rest", *SHORT]
        with pytest.raises(SystemExit) as stop:
            load.main([*options, f"--out={tmp_path}", f"--save_answers={tmp_path / 'answers.npz'}"])
    assert stop.value.code == 2
    assert "answer: cannot be read" in capsys.readouterr().err
