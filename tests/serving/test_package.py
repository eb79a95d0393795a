import base64
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA
from tests.launch import start
from tests.serving.server.test_server import EVENTS, scores_of, unlabelled
from tests.serving.test_scorer import make_model
from tests.serving.valkey import Valkey, valkey
from torchrec_amort import AmortizedScorer, InputError, RequestBatch, export_package, load_package
from torchrec_amort.serving.history_tier import Sealed
from torchrec_amort.serving.package import MANIFEST_FILE, write_manifest
from torchrec_amort.serving.samples import SAMPLES_FILE
from torchrec_amort.serving.server.client import ScoringClient


@pytest.fixture
def tier() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "monday"
    export_package(make_model(), folder, SCHEMA)
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
    key = tmp_path / "key.txt"
    key.write_text(base64.b64encode(bytes(32)).decode())
    # Where other tests run, too, its answer may take longer than a server waits.
    url = f"{tier.url}?socket_timeout=30&socket_connect_timeout=30"
    shared = ["--shared_histories", url, "--shared_histories_key", str(key)]
    tuesday = tmp_path / "tuesday"
    shutil.copytree(package, tuesday)
    command = ("torchrec-amort", "serve", "--package", str(package), "--processes", "2")
    kept = ["--history_bytes", "1000000", "--cache_seconds", "3600", *shared]
    process = start(*command, "--grpc_port", "0", "--http_port", "0", *kept)
    request.addfinalizer(process.kill)
    ports = [re.findall(r":(\d+)", _line(process, "version monday")) for _ in range(2)]
    _line(process, "2 processes answer")
    requests = unlabelled()
    expected = AmortizedScorer(load_package(package)).score(RequestBatch.from_requests(requests, SCHEMA)).numpy()
    # int8 tables.
    np.testing.assert_allclose(expected, scores_of(requests), atol=1e-3)
    https = [httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=60) for _, http in ports]

    def refuse_other_scores(version: str) -> None:
        with ScoringClient([f"127.0.0.1:{grpc}" for grpc, _ in ports], schema=SCHEMA) as client:
            scored = client.score(requests)
        np.testing.assert_allclose(np.concatenate(scored.logits), expected, atol=1e-5)
        assert set(scored.versions) == {version}
        for http in https:
            answer = http.post("/v1/score", json={"requests": requests}).json()
            np.testing.assert_allclose(np.concatenate(answer["scores"]), expected, atol=1e-5)
            assert answer["version"] == version

    refuse_other_scores("monday")
    # New events alone, which any process takes.
    for place in (1, 0):
        bare = [{name: value for name, value in asked.items() if name not in EVENTS} for asked in requests]
        body = {"requests": bare, "parameters": {"history": "append"}}
        answer = https[place].post("/v1/score", json=body).json()
        np.testing.assert_allclose(np.concatenate(answer["scores"]), expected, atol=1e-5)
    assert https[1].post("/v1/versions", json={"folder": str(tmp_path / "none")}).status_code == 400
    refuse_other_scores("monday")
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

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


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
