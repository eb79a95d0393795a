"""The example of Ray Serve, on two nodes of a Ray cluster that is on this machine."""

import importlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import SCHEMA
from tests.serving.server.test_server import unlabelled
from tests.serving.server.test_trouble import asked_all_the_time
from tests.serving.test_scorer import make_model
from torchrec_amort import AmortizedScorer, RequestBatch, export_package, load_package

pytest.importorskip("ray.serve")
import ray
from ray import serve
from ray.cluster_utils import Cluster

# A name that the cluster's processes find it by.
EXAMPLE: Any = importlib.import_module("examples.serve_ray")
pytestmark = pytest.mark.slow

NAME = "films"
# Of the nodes, which see this machine alone; Ray takes 127.0.0.1 for the machine's address in its network.
HOSTS = ("127.0.0.2", "127.0.0.3")
# Of a node; a replica takes one.
CPUS = 2
SECONDS = 180


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two packages of other weights."""
    folders = [tmp_path_factory.mktemp("packages") / day for day in ("monday", "tuesday")]
    for seed, folder in enumerate(folders):
        export_package(make_model(seed), folder, SCHEMA)
    return folders


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "node_ip_address": HOSTS[0]})
    nodes.add_node(num_cpus=CPUS, node_ip_address=HOSTS[1])
    ray.init(nodes.address, _node_ip_address=HOSTS[0], log_to_driver=False)
    with socket.socket() as free:
        free.bind((HOSTS[0], 0))
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": HOSTS[0], "port": port})
    nodes.url = f"http://{HOSTS[0]}:{port}"
    yield nodes
    serve.shutdown()
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        yield client
    serve.delete(NAME)


def run(package: Path, min_replicas: int, max_replicas: int) -> None:
    scaling = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_period_s": 3,
    }
    settings = EXAMPLE.Settings(package=str(package), cache_bytes=2**20)
    serve.run(EXAMPLE.Scores.options(autoscaling_config=scaling).bind(settings), name=NAME)
    wait_for(lambda: num_running() == min_replicas)


def num_running() -> int:
    return int(serve.status().applications[NAME].deployments["Scores"].replica_states.get("RUNNING", 0))


def wait_for(is_so: Callable[[], bool]) -> float:
    """Seconds until something is so."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < SECONDS
        time.sleep(0.05)
    return time.monotonic() - started


def one(user: int) -> dict[str, Any]:
    return unlabelled()[0] | {"user": user}


def score(http: httpx.Client, user: int) -> httpx.Response:
    return http.post("/v1/score", json={"requests": [one(user)]}, headers={"x-session-id": str(user)})


def expected(package: Path) -> np.ndarray:
    scored = AmortizedScorer(load_package(package)).score(RequestBatch.from_requests([one(0)], SCHEMA))
    return np.asarray(scored.numpy())


class Callers:
    """Ask for scores of other users again and again, compare them, and note how long it took or when it failed."""

    def __init__(self, http: httpx.Client, packages: list[Path]) -> None:
        self._http = http
        self._right = {package.name: expected(package) for package in packages}
        self._users = threading.local()
        self.seconds: list[float] = []
        self.failed: list[float] = []

    def __call__(self) -> str:
        self._users.last = getattr(self._users, "last", threading.get_ident()) + 1
        started = time.monotonic()
        try:
            reply = score(self._http, self._users.last % 1000)
        except httpx.HTTPError as error:
            self.failed.append(started)
            return type(error).__name__
        self.seconds.append(time.monotonic() - started)
        if reply.status_code != 200:
            self.failed.append(started)
            return f"{reply.status_code}"
        told = reply.json()
        np.testing.assert_allclose(told["scores"][0], self._right[told["version"]], atol=1e-5)
        return str(told["version"])


def test_scores_are_those_of_the_package_and_each_user_has_one_replica(
    http: httpx.Client, packages: list[Path]
) -> None:
    run(packages[0], 4, 4)
    right = expected(packages[0])
    users = range(20)
    for user in 3 * [*users]:
        told = score(http, user).json()
        assert (told["model"], told["version"]) == ("films", "monday")
        np.testing.assert_allclose(told["scores"][0], right, atol=1e-5)
    reply = http.post("/v1/score", json={"requests": [{"user": 7}]})
    assert reply.status_code == 400 and "user_id" in reply.json()["error"]

    replicas = serve.get_app_handle(NAME)
    found = np.array([replicas.broadcast("act", "forget", user).results() for user in users[:10]])
    assert found.shape == (10, 4) and (found.sum(axis=1) == 1).all()
    for user in users[10:]:
        told = [http.post("/v1/forget", json={"user": user}).json() for _ in range(2)]
        assert told == [{"found": True}, {"found": False}]


def test_replicas_come_and_go_with_the_load(http: httpx.Client, packages: list[Path]) -> None:
    run(packages[0], 1, 4)
    ask = Callers(http, packages)
    with asked_all_the_time(ask, num_callers=12) as told:
        up = wait_for(lambda: num_running() == 4)
    down = wait_for(lambda: num_running() == 1)
    print(f"1 to 4 replicas in {up:.1f} s, back in {down:.1f} s; {dict(told)}")
    assert told.keys() == {"monday"}


def test_another_package_takes_over_without_a_failed_request(http: httpx.Client, packages: list[Path]) -> None:
    run(packages[0], 2, 2)
    ask = Callers(http, packages)
    with asked_all_the_time(ask) as told:
        wait_for(lambda: told["monday"] > 20)
        started = time.monotonic()
        run(packages[1], 2, 2)
        seconds = time.monotonic() - started
        before = told["tuesday"]
        wait_for(lambda: told["tuesday"] > before + 20)
    print(f"other version in {seconds:.1f} s; {dict(told)}; longest {max(ask.seconds):.2f} s")
    assert told.keys() == {"monday", "tuesday"}


def test_a_node_that_is_killed_fails_at_most_one_request_of_each_caller(
    cluster: Cluster, http: httpx.Client, packages: list[Path]
) -> None:
    run(packages[0], 4, 4)
    ask, num_callers = Callers(http, packages), 6
    with asked_all_the_time(ask, num_callers) as told:
        wait_for(lambda: told["monday"] > 100)
        (victim,) = cluster.worker_nodes
        killed = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        wait_for(lambda: num_running() == 2)
        noticed = time.monotonic() - killed
        before = told["monday"]
        wait_for(lambda: told["monday"] > before + 100)
        cluster.add_node(num_cpus=CPUS, node_ip_address=HOSTS[1])
        back = wait_for(lambda: num_running() == 4)
    failed = [round(started - killed, 2) for started in ask.failed]
    print(
        f"noticed after {noticed:.1f} s, requests of {failed} s failed, 4 replicas {back:.1f} s after a new node; "
        f"{dict(told)}; longest {max(ask.seconds):.2f} s"
    )
    assert told.total() - told["monday"] <= num_callers
