"""A package that a server rolls out by share of users."""

import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq

from tests.serving.server.test_fleet import wait_until
from tests.serving.server.test_server import Client, of_tensor, serving, status_of
from tests.serving.server.test_trouble import asked_all_the_time
from tests.serving.test_rollout import place
from tests.serving.test_version_rollout import (
    OTHER,
    SCHEMAS,
    TREATED,
    Held,
    Scorer,
    by_itself,
    named,
    requests_of,
)
from torchrec_amort import InputError, ScoringService
from torchrec_amort.jobs import serve as serve_job
from torchrec_amort.serving.request_log import VERSION, RequestLog
from torchrec_amort.serving.rollout import Stage
from torchrec_amort.serving.server.access import Access
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.fleet import Fleet, Link, Started
from torchrec_amort.serving.server.loaded import Loaded
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.versions import Version, Versions

HALF = {"folder": "packages/tuesday", "experiment": "tuesday-1", "share": 0.5, "sample_rate": 1.0}
BOTH = requests_of([TREATED, OTHER, TREATED + 40, OTHER + 40])


def load(folder: str) -> Version:
    """A version by the name of its folder; those of others than monday have other weights and tables."""
    name = Path(folder).name
    if name not in ("monday", "tuesday", "wednesday", "wrong"):
        raise InputError(f"{folder}: no such package")
    of = "monday" if name == "monday" else "tuesday"
    return Version(name, Scorer(of, lambda logits_CT: logits_CT + (name == "wrong"), lambda: None))


def expected_of(requests: list[dict[str, Any]], names: list[str]) -> np.ndarray:
    return np.concatenate([by_itself(name, request) for name, request in zip(names, requests, strict=True)])


def sides(requests: list[dict[str, Any]], share: float = 0.5) -> list[str]:
    return ["tuesday" if place(request["user"], "tuesday-1") < share else "monday" for request in requests]


def rollout_of(client: Client, **changes: Any) -> tuple[int, dict[str, Any]]:
    reply = client.http.post("/v1/rollout", json=HALF | changes)
    return reply.status_code, reply.json()


def test_a_package_answers_its_share_of_the_users(tmp_path: Path) -> None:
    versions, log = Versions(load("monday")), RequestLog(tmp_path / "log", share=1, days=1)
    with serving(versions, load=load, request_log=log) as client:
        client.server._endpoint.metrics.collect("rollout", lambda: serve_job._rollout_counters(versions))
        status, about = rollout_of(client)
        assert status == 200 and about == client.http.get("/v1/rollout").json()
        assert [about[name] for name in ("treatment", "control", "share", "sample_rate", "threshold")] == [
            "tuesday", "monday", 0.5, 1.0, 1e-4,
        ]  # fmt: skip
        names = sides(BOTH)
        assert set(names) == {"monday", "tuesday"}
        response = client.infer(BOTH)
        assert response.model_version == "monday,tuesday"
        np.testing.assert_allclose(of_tensor(response, "logits", "<f4"), expected_of(BOTH, names), atol=1e-5)
        answer = client.http.post("/v1/score", json={"requests": BOTH[:1]}).json()
        assert answer["version"] == "tuesday"
        np.testing.assert_allclose(answer["scores"][0], by_itself("tuesday", BOTH[0]), atol=1e-5)
        # Either may be asked for; whose the user is answers.
        for version in ("monday", "tuesday"):
            assert client.infer(BOTH, model_version=version).model_version == "monday,tuesday"
        assert status_of(lambda: client.infer(BOTH, model_version="sunday")) == (
            "NOT_FOUND", "model 'films': version 'sunday' does not answer: ['monday', 'tuesday'] do",
        )  # fmt: skip
        assert client.http.get("/v2/models/films").json()["versions"] == ["monday", "tuesday"]
        bare = [{name: value for name, value in BOTH[0].items() if name != "user"}]
        assert "column 'user' is missing" in client.http.post("/v1/score", json={"requests": bare}).json()["error"]

        assert versions.rollout is not None
        versions.rollout.drain()
        counters = client.http.get("/v1/rollout").json()["counters"]
        treated, others = 3 * names.count("tuesday") + 1, 3 * names.count("monday")
        assert [counters[name] for name in ("treatment", "control", "compared")] == [treated, others, treated]
        text = client.http.get("/metrics").text
        assert f"amort_rollout_compared_total {treated}.0" in text and "amort_rollout_share 0.5" in text
        assert "amort_rollout_switched_back 0.0" in text
        # Three calls of both, and one of the treatment alone.
        assert 'amort_scored_total{version="monday"} 3.0' in text and 'version="tuesday"} 4.0' in text
    log.close()
    logged = [row for file in (tmp_path / "log").glob("*/test/*") for row in pq.read_table(file).to_pylist()]
    assert Counter((row["user"], row[VERSION]) for row in logged) == Counter(
        {(request["user"], name): 3 + (request is BOTH[0]) for request, name in zip(BOTH, names, strict=True)}
    )


def test_stages_and_completion_load_nothing_and_what_is_refused_changes_nothing() -> None:
    loads: Counter[str] = Counter()

    def counted(folder: str) -> Version:
        loads[folder] += 1
        return load(folder)

    def refused(path: str, told: str, **changes: Any) -> None:
        reply = client.http.post(path, json=HALF | changes)
        assert reply.status_code == 400 and re.search(told, reply.json()["error"]), reply.json()

    with serving(Versions(load("monday")), load=counted) as client:
        assert client.http.get("/v1/rollout").status_code == 404
        refused("/v1/rollout", "packages/sunday: no such package", folder="packages/sunday")
        refused("/v1/rollout", "version 'monday': is the one that answers", folder="packages/monday")
        refused("/v1/rollout", "share is 1.5, not from 0 to 1", share=1.5)
        refused("/v1/rollout", "threshold is 0.0, not a finite number above 0", threshold=0)
        refused("/v1/rollout", r"Expected `float`, got `str` - at `\$.share`", share="all")
        assert client.infer(BOTH).model_version == "monday" and client.http.get("/v1/rollout").status_code == 404

        assert rollout_of(client)[0] == 200
        refused("/v1/rollout", "experiment is 'tuesday-2', but 'tuesday-1' is on", experiment="tuesday-2")
        for path in ("/v1/rollout", "/v1/versions"):
            refused(path, "'tuesday' is being rolled out: complete it", folder="packages/wednesday")
        assert rollout_of(client, share=0.9)[1]["share"] == 0.9
        logits = of_tensor(client.infer(BOTH), "logits", "<f4")
        np.testing.assert_allclose(logits, expected_of(BOTH, sides(BOTH, 0.9)), atol=1e-5)
        assert client.http.post("/v1/versions", json={"folder": "packages/tuesday"}).json() == {"version": "tuesday"}
        assert loads == {"packages/sunday": 1, "packages/monday": 1, "packages/tuesday": 1}
        assert client.infer(BOTH).model_version == "tuesday" and client.http.get("/v1/rollout").status_code == 404
        assert client.http.post("/v1/roll_back").json() == {"version": "monday"}

        assert rollout_of(client)[0] == 200
        assert client.http.post("/v1/roll_back").json() == {"version": "monday"}
        assert client.infer(BOTH).model_version == "monday"
        assert client.http.post("/v1/roll_back").status_code == 400


def test_who_may_roll_out_is_the_admin() -> None:
    tokens: Any = {"score": "s" * 16, "admin": "a" * 16}
    with serving(Versions(load("monday")), Access(tokens=tokens), load=load) as client:
        for token, statuses in (("s", (401, 401)), ("a", (200, 200))):
            headers = {"authorization": f"Bearer {token * 16}"}
            posted = client.http.post("/v1/rollout", json=HALF, headers=headers).status_code
            assert (posted, client.http.get("/v1/rollout", headers=headers).status_code) == statuses
    with serving(Versions(load("monday"))) as client:
        assert "start it with a package" in client.http.post("/v1/rollout", json=HALF).json()["error"]


def test_no_request_fails_while_stages_change_and_each_has_the_scores_of_the_versions_it_names() -> None:
    requests = [requests_of([user], seed=user)[0] for user in range(16)]
    expected = {(name, user): by_itself(name, requests[user]) for name in SCHEMAS for user in range(16)}
    expected |= {("wrong", user): expected["tuesday", user] + 1 for user in range(16)}
    draw = random.Random(0)

    def ask() -> str:
        users = draw.choices(range(16), k=draw.randint(1, 3))
        answer = client.infer([requests[user] for user in users])
        names = answer.model_version.split(",")
        logits = np.split(
            of_tensor(answer, "logits", "<f4"), np.cumsum(of_tensor(answer, "num_candidates", "<i8"))[:-1]
        )
        by = [
            next((name for name in names if np.allclose(part, expected[name, user], atol=1e-4)), "none")
            for user, part in zip(users, logits, strict=True)
        ]
        assert set(by) == set(names)
        return str(answer.model_version)

    def asked_more() -> None:
        asked = told.total()
        wait_until(lambda: told.total() >= asked + 10)

    with (
        serving(Versions(load("monday")), load=load, num_workers=2, max_waiting=64) as client,
        asked_all_the_time(ask) as told,
    ):
        for _ in range(3):
            for share in (0.0, 0.2, 0.6, 1.0):
                assert rollout_of(client, share=share, sample_rate=0.2)[0] == 200
                asked_more()
            assert client.http.post("/v1/versions", json={"folder": "packages/tuesday"}).status_code == 200
            asked_more()
            assert client.http.post("/v1/roll_back").status_code == 200
            assert rollout_of(client, folder="packages/wrong", experiment="wrong-1", sample_rate=0.3)[0] == 200
            wait_until(lambda: client.http.get("/v1/rollout").json()["switched_back"])
            asked_more()
            assert client.http.post("/v1/roll_back").status_code == 200
    assert {"monday", "tuesday", "monday,tuesday"} <= told.keys()


def test_a_fault_that_is_found_while_all_processes_wait_for_this_one_holds_none_up() -> None:
    held, supervisor = Held(), Lock()
    tuesday = named("tuesday", lambda logits_CT: logits_CT + 1, held)
    versions, metrics = Versions(load("monday")), Metrics()

    def everywhere(action: str, *args: Any) -> list[Any]:
        # As a fleet's supervisor does.
        with supervisor:
            return [endpoint.actions[action](*args)]

    with ScoringService(versions, num_workers=1, max_waiting=9) as service, ThreadPoolExecutor(1) as pool:
        endpoint = Endpoint("films", versions, service, metrics, load=lambda _: tuesday, everywhere=everywhere)
        endpoint.roll_out("tuesday", Stage("tuesday-1", share=1, sample_rate=1))
        endpoint.submit(BOTH[:1], {}).result(60)
        assert held.started.acquire(timeout=60)
        forgetting = pool.submit(endpoint.forget, TREATED)
        wait_until(supervisor.locked)
        held.go_on.set()
        assert forgetting.result(60)
        assert versions.rollout is not None and versions.rollout.switched_back is not None


class Rehearsed:
    """What a process of a server runs, but packages are models by their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, link: Link, before: Started | None, loaded: Loaded) -> None:
        serve_job._of_package = lambda config, package, mapped, current=None: load(package)  # type: ignore
        config = ServeConfig(package="packages/monday", name="films", grpc_port=0, http_port=0, processes=2, workers=1)
        serve_job._serve_as_one(config, str(self.folder), link, before, loaded)


@contextmanager
def two_processes(folder: Path) -> Iterator[tuple[Fleet, list[httpx.Client]]]:
    is_over = Event()
    with Fleet(2, Rehearsed(folder), [__name__], Loaded(("packages/monday",)), lambda _: None) as fleet:
        watching = Thread(target=fleet.watch, args=(is_over,))
        watching.start()
        urls = [f"http://127.0.0.1:{started.http_port}" for started in fleet.started]
        try:
            yield fleet, [httpx.Client(base_url=url, timeout=60) for url in urls]
        finally:
            is_over.set()
            watching.join()


def killed(fleet: Fleet, http: httpx.Client, place: int) -> None:
    """Return when another process answers in place of one that is killed."""
    before = fleet.pids[place]
    os.kill(before, signal.SIGKILL)

    def is_there() -> bool:
        try:
            return fleet.pids[place] != before and http.get("/v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(is_there)


def test_processes_roll_out_and_switch_back_as_one_and_one_that_is_killed_comes_back_as_it_was(tmp_path: Path) -> None:
    with two_processes(tmp_path) as (fleet, (one, other)):

        def refuse_other_sides(names: list[str]) -> None:
            for http in (one, other):
                answer = http.post("/v1/score", json={"requests": BOTH}).json()
                assert answer["version"] == ",".join(sorted(set(names)))
                np.testing.assert_allclose(np.concatenate(answer["scores"]), expected_of(BOTH, names), atol=1e-5)

        def reason_of(http: httpx.Client) -> str:
            reason: str = http.get("/v1/rollout").json()["switched_back"]
            return reason

        def posted(http: httpx.Client, path: str, **body: Any) -> Any:
            return http.post(path, json=body).json()

        assert "no such package" in posted(other, "/v1/rollout", **HALF | {"folder": "sunday"})["error"]
        refuse_other_sides(["monday"] * 4)
        # Started by one and found wrong by one, it is of all.
        assert posted(one, "/v1/rollout", **HALF | {"folder": "packages/wrong"})["treatment"] == "wrong"
        assert posted(other, "/v1/score", requests=BOTH[:1])["version"] == "wrong"
        for http in (one, other):
            wait_until(partial(reason_of, http))
            assert "differs from the reference by 1" in reason_of(http)
        wait_until(lambda: fleet._loaded.rollout is not None and fleet._loaded.rollout.switched_back)
        killed(fleet, one, 0)
        refuse_other_sides(["monday"] * 4)
        assert "differs from the reference by 1" in reason_of(one)
        for path in ("/v1/rollout", "/v1/versions"):
            refusal = posted(one, path, **HALF | {"folder": "packages/wrong"})["error"]
            assert "version 'wrong': was switched back" in refusal
        assert posted(other, "/v1/roll_back") == {"version": "monday"}

        assert posted(other, "/v1/rollout", **HALF)["share"] == 0.5
        refuse_other_sides(sides(BOTH))
        assert posted(one, "/v1/rollout", **HALF | {"share": 0.9})["share"] == 0.9
        killed(fleet, other, 1)
        refuse_other_sides(sides(BOTH, 0.9))
        assert [other.get("/v1/rollout").json()[name] for name in ("share", "switched_back")] == [0.9, None]
        told = other.get("/metrics").text
        assert "amort_rollout_share 0.9" in told and "amort_rollout_switched_back 0.0" in told
        assert re.search(r"^amort_rollout_cache_misses_total [1-4]\.0$", told, re.MULTILINE)
        assert posted(other, "/v1/forget", user=TREATED) == {"found": True}
        assert posted(other, "/v1/versions", folder="packages/tuesday") == {"version": "tuesday"}
        refuse_other_sides(["tuesday"] * 4)
        killed(fleet, one, 0)
        refuse_other_sides(["tuesday"] * 4)
        assert posted(one, "/v1/roll_back") == {"version": "monday"}
        refuse_other_sides(["monday"] * 4)
