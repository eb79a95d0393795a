"""What a server goes through in production, and what its callers see of it."""

import gc
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from tests.conftest import SCHEMA
from tests.launch import start
from tests.serving.server.test_malformed import resident
from tests.serving.server.test_server import of_tensor, scores_of, serving, unlabelled, version
from tests.serving.test_scorer import make_model
from torchrec_amort import AmortizedScorer, RequestBatch, export_package, load_package
from torchrec_amort.serving.server.client import ScoringClient
from torchrec_amort.serving.versions import Version, Versions

pytestmark = pytest.mark.slow


@contextmanager
def asked_all_the_time(ask: Callable[[], str], num_callers: int = 3) -> Iterator[Counter[str]]:
    """What callers are told, who ask again and again."""
    told: Counter[str] = Counter()
    is_over, errors = threading.Event(), list[BaseException]()

    def call() -> None:
        while not is_over.is_set():
            try:
                told[ask()] += 1
            except BaseException as error:  # noqa: BLE001 - the test raises it
                errors.append(error)
                return

    callers = [threading.Thread(target=call) for _ in range(num_callers)]
    for caller in callers:
        caller.start()
    try:
        yield told
    finally:
        is_over.set()
        for caller in callers:
            caller.join()
    if errors:
        raise errors[0]


def test_a_hundred_switches_fail_no_request_and_mix_no_versions() -> None:
    # A version of an odd number has other weights.
    expected = [scores_of(unlabelled(), seed) for seed in (0, 1)]

    def load(folder: str) -> Version:
        return version(folder, seed=int(folder) % 2)

    with serving(Versions(version("0")), load=load) as client:

        def ask() -> str:
            answer = client.infer(unlabelled())
            right = expected[int(answer.model_version) % 2]
            np.testing.assert_allclose(of_tensor(answer, "logits", "<f4"), right, atol=1e-5)
            return str(answer.model_version)

        before = 0
        with asked_all_the_time(ask) as told:
            for number in range(1, 101):
                assert client.http.post("/v1/versions", json={"folder": str(number)}).status_code == 200
                asked = told.total()
                while told.total() < asked + 3:
                    time.sleep(0.001)
                if number == 20:
                    gc.collect()
                    before = resident()
        gc.collect()
        assert len(told) > 50 and resident() - before < 20e6


def test_callers_that_stall_or_hang_up_keep_no_other_one_waiting() -> None:
    expected = scores_of(unlabelled())
    started = (b"", b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{", b"PRI * HTTP/2.0")
    with serving(Versions(version("monday"))) as client:
        stalled = []
        for port in (client.server.http_port, client.server.grpc_port):
            for sent in 20 * started:
                stalled.append(socket.create_connection(("127.0.0.1", port)))
                stalled[-1].sendall(sent)

        def ask() -> str:
            answer = client.infer(unlabelled(), timeout=20)
            np.testing.assert_allclose(of_tensor(answer, "logits", "<f4"), expected, atol=1e-5)
            reply = client.http.post("/v1/score", json={"requests": unlabelled()}, timeout=20)
            return str(reply.status_code)

        with asked_all_the_time(ask) as told:
            for connection in stalled:
                connection.close()
                time.sleep(0.01)
        assert told.keys() == {"200"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "monday"
    export_package(make_model(), folder, SCHEMA)
    return folder


def test_a_process_that_is_killed_again_and_again_is_back_in_seconds(
    package: Path, request: pytest.FixtureRequest
) -> None:
    command = ("torchrec-amort", "serve", "--package", str(package), "--processes", "2")
    server = start(*command, "--grpc_port", "0", "--http_port", "0")
    request.addfinalizer(server.kill)
    assert server.stdout is not None
    ports: list[tuple[str, str]] = []
    while len(ports) < 2:
        ports += re.findall(r"gRPC on 127.0.0.1:(\d+), HTTP on 127.0.0.1:(\d+)", server.stdout.readline())
    threading.Thread(target=lambda: list(server.stdout or ()), daemon=True).start()
    one = unlabelled()[:1]
    right = AmortizedScorer(load_package(package)).score(RequestBatch.from_requests(one, SCHEMA)).numpy()
    seconds = []
    with ScoringClient([f"127.0.0.1:{grpc_port}" for grpc_port, _ in ports], schema=SCHEMA) as client:

        def ask() -> str:
            user = threading.get_ident() * 7919 + time.monotonic_ns()
            try:
                scored = client.score([one[0] | {"user": user % 1000}], timeout=5)
            except grpc.RpcError as error:
                failed: Any = error
                return str(failed.code().name)
            np.testing.assert_allclose(scored.logits[0], right, atol=1e-5)
            return "OK"

        with asked_all_the_time(ask) as told:
            for round_ in range(6):
                time.sleep(3)
                forkserver = _children(server.pid, "forkserver")[0]
                victim = _children(forkserver)[round_ % 2]
                before = set(_children(forkserver))
                killed = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                while not all(_is_ready(http) for _, http in ports) or set(_children(forkserver)) == before:
                    assert time.monotonic() - killed < 60
                    time.sleep(0.02)
                seconds.append(time.monotonic() - killed)
    print(f"back after {sorted(round(second, 2) for second in seconds)} s; {dict(told)}")
    assert told.keys() <= {"OK", "UNAVAILABLE"} and told["OK"] > 100
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0


def _children(pid: int, name: str = "") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", name], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def _is_ready(port: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
