import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA
from tests.launch import start
from tests.serving.server.test_server import EVENTS, free_port, scores_of, unlabelled
from tests.serving.test_scorer import make_model
from tests.serving.test_signing import make_key
from tests.serving.valkey import Valkey, valkey
from torchrec_amort import AmortizedScorer, InputError, RequestBatch, export_package, load_package
from torchrec_amort.serving.history_tier import Sealed
from torchrec_amort.serving.package import MANIFEST_FILE, SIGNATURE_FILE, write_manifest
from torchrec_amort.serving.samples import SAMPLES_FILE
from torchrec_amort.serving.server.client import ScoringClient


@pytest.fixture
def tier() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "monday"
    make_key(folder.parent)
    export_package(make_model(), folder, SCHEMA, signing_key=folder.parent / "signing.pem")
    return folder


def test_a_package_that_scores_otherwise_than_when_it_was_made_is_refused(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    load_package(folder)
    table = pq.read_table(folder / SAMPLES_FILE)
    logits = table["logits"].to_pylist()
    logits[7][2][1] += 0.01
    pq.write_table(table.set_column(table.num_columns - 1, "logits", pa.array(logits)), folder / SAMPLES_FILE)
    with pytest.raises(InputError, match="samples.parquet"):
        load_package(folder)
    # As if it had been made so.
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    write_manifest(folder, manifest)
    with pytest.raises(
        InputError, match=r"sample 7: a probability differs by [0-9.]+e-03 from when the package was made"
    ):
        load_package(folder)


def test_several_processes_answer_for_a_package_as_one_server(
    package: Path, tmp_path: Path, request: pytest.FixtureRequest, tier: Valkey
) -> None:
    tuesday, unsigned = tmp_path / "tuesday", tmp_path / "unsigned"
    for copy in (tuesday, unsigned):
        shutil.copytree(package, copy)
    (unsigned / SIGNATURE_FILE).unlink()
    shared = free_port(2, 4)
    command = ("torchrec-amort", "serve", "--package", str(package), "--processes", "2", "--http_port", str(shared))
    process = start(*command, "--grpc_port", "0", *_more_options(package, tmp_path, tier))
    request.addfinalizer(process.kill)
    ports = [re.findall(r":(\d+)", _line(process, "version monday")) for _ in range(2)]
    assert {int(http_port) for _, http_port in ports} == {shared + 2, shared + 4}
    assert _line(process, "2 processes answer").endswith(f": any of them by HTTP on 127.0.0.1:{shared}\n")
    requests = unlabelled()
    expected = AmortizedScorer(load_package(package)).score(RequestBatch.from_requests(requests, SCHEMA)).numpy()
    # int8 tables.
    np.testing.assert_allclose(expected, scores_of(requests), atol=1e-3)
    https = [httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=60) for _, http in ports]

    servers = [f"127.0.0.1:{grpc}" for grpc, _ in ports]
    urls = [f"http://127.0.0.1:{http}" for http in (*(http for _, http in ports), shared)]
    refuse_other_scores = partial(_refuse_other_scores, servers, urls, requests, expected)
    refuse_other_scores("monday")
    # New events alone, which any process takes.
    for place in (1, 0):
        bare = [{name: value for name, value in asked.items() if name not in EVENTS} for asked in requests]
        body = {"requests": bare, "parameters": {"history": "append"}}
        answer = https[place].post("/v1/score", json=body).json()
        np.testing.assert_allclose(np.concatenate(answer["scores"]), expected, atol=1e-5)
    for folder in (tmp_path / "none", unsigned):
        assert https[1].post("/v1/versions", json={"folder": str(folder)}).status_code == 400
    refuse_other_scores("monday")
    _roll_out(https, tuesday, unsigned, lambda: refuse_other_scores("tuesday"))
    assert https[0].post("/v1/versions", json={"folder": str(tuesday)}).json() == {"version": "tuesday"}
    refuse_other_scores("tuesday")
    assert https[1].post("/v1/forget", json={"user": requests[0]["user"]}).json() == {"found": True}
    assert [http.post("/v1/score", json=body).status_code for http in https] == [409, 409]
    assert tier.admin.hexists(Sealed("films", bytes(32)).name_of(requests[0]["user"]), "value") == 0

    children = subprocess.run(["pgrep", "-P", _forkserver_of(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _line(process, "version tuesday")
    refuse_other_scores("tuesday")
    assert https[1].post("/v1/roll_back").json() == {"version": "monday"}
    refuse_other_scores("monday")

    user = requests[0]["user"]
    assert "amort_request_log_dropped_total 0.0" in https[0].get("/metrics").text
    assert https[0].post("/v1/forget", json={"user": user}).json() == {"found": True}
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    logged = {file: pq.read_table(file).to_pylist() for file in (tmp_path / "log").glob("*/test/*")}
    assert {file.name.split("-")[2] for file in logged} == {"0", "1"}
    rows = [row for of_file in logged.values() for row in of_file]
    assert {row["user"] for row in rows} == {request["user"] for request in requests} - {user}
    assert {row["request_id"] for row in rows} <= {request["request_id"] for request in requests}


def _refuse_other_scores(
    servers: list[str], urls: list[str], requests: list[dict[str, Any]], expected: np.ndarray, version: str
) -> None:
    with ScoringClient(servers, schema=SCHEMA) as client:
        scored = client.score(requests)
    np.testing.assert_allclose(np.concatenate(scored.logits), expected, atol=1e-5)
    assert set(scored.versions) == {version}
    for url in urls:
        answer = httpx.post(f"{url}/v1/score", json={"requests": requests}, timeout=60).json()
        np.testing.assert_allclose(np.concatenate(answer["scores"]), expected, atol=1e-5)
        assert answer["version"] == version


def _roll_out(
    https: list[httpx.Client], package: Path, unsigned: Path, refuse_other_scores: Callable[[], None]
) -> None:
    """Samples are compared in each process, and none differs."""
    rollout = {"experiment": "tuesday-1", "share": 1, "sample_rate": 1}
    assert https[1].post("/v1/rollout", json=rollout | {"folder": str(unsigned)}).status_code == 400
    assert https[1].post("/v1/rollout", json=rollout | {"folder": str(package)}).json()["control"] == "monday"
    refuse_other_scores()
    for http in https:
        until = time.monotonic() + 60
        while not (about := http.get("/v1/rollout").json())["counters"]["compared"]:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert about["switched_back"] is None and about["counters"]["largest_difference"] < 1e-5


def _line(process: subprocess.Popen[str], told: str) -> str:
    """The next line that a process prints with some words in it."""
    assert process.stdout is not None
    for line in process.stdout:
        if told in line:
            return line
    raise AssertionError(f"it ended without {told!r}")


def _forkserver_of(pid: int) -> str:
    children = subprocess.run(["pgrep", "-P", str(pid), "-f", "forkserver"], capture_output=True, text=True, check=True)
    return children.stdout.split()[0]


def _more_options(package: Path, folder: Path, tier: Valkey) -> list[str]:
    """A log, signatures, and histories that are shared."""
    key = folder / "key.txt"
    key.write_text(base64.b64encode(bytes(32)).decode())
    # Where other tests run, too, its answer may take longer than a server waits.
    url = f"{tier.url}?socket_timeout=30&socket_connect_timeout=30"
    shared = ("--shared_histories", url, "--shared_histories_key", str(key))
    kept = ("--history_bytes", "1000000", "--cache_seconds", "3600", *shared)
    signed_by = ("--trusted_key", str(package.parent / "trusted.pem"))
    log = ("--request_log", str(folder / "log"), "--request_log_share", "1", "--request_log_days", "1")
    return [*signed_by, *log, *kept]
