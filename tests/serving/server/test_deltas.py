"""A server takes deltas as they are: it answers as the packages would that they make."""

import gc
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.conftest import SCHEMA
from tests.serving.server.test_fleet import wait_until
from tests.serving.server.test_server import serving, unlabelled
from tests.serving.test_mapped import mappings_of
from tests.serving.test_scorer import make_model
from tests.serving.test_signing import change_a_byte
from torchrec_amort import AmortizedScorer, InputError, RequestSchema, TableConfig, export_package, load_package
from torchrec_amort.jobs.serve import _of_package, _serve_as_one, serve_until_told
from torchrec_amort.serving.delta import write_delta
from torchrec_amort.serving.package import (
    DELTA_FILE,
    MANIFEST_FILE,
    TABLES_FILE,
    checksum,
    read_manifest,
    tables_checksum,
    write_manifest,
)
from torchrec_amort.serving.samples import SAMPLES_FILE
from torchrec_amort.serving.server import memory
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.fleet import Fleet, Link, Started
from torchrec_amort.serving.server.loaded import Loaded
from torchrec_amort.serving.server.opener import clear
from torchrec_amort.serving.server.watch import Watch
from torchrec_amort.serving.versions import Versions

WIDE = SCHEMA.with_tables({"user_id": TableConfig(rows=20_000)})
GROWN = SCHEMA.with_tables({"user_id": TableConfig(rows=20_001)})
LESS = replace(WIDE, features=tuple(feature for feature in WIDE.features if feature.name != "bought"))


def save_uncompiled(program: torch.export.ExportedProgram, package_path: str) -> None:
    torch.export.save(program, package_path)


def load_uncompiled(path: str) -> Any:
    return torch.export.load(path).module()


@pytest.fixture(scope="module", autouse=True)
def uncompiled_here() -> Iterator[None]:
    """As `uncompiled`, for the packages of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", save_uncompiled)
        patch.setattr(torch._inductor, "aoti_load_package", load_uncompiled)
        yield


def export(folder: Path, seed: int, changed: list[int], schema: RequestSchema = WIDE) -> Path:
    """A package of dense weights of its own, and tables of which these rows are other ones than in all others."""
    model, first = make_model(seed, schema), dict(make_model(0, WIDE).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embedding" in name:
                weight[: len(first[name])] = first[name]
                weight[[row for row in changed if row < len(weight)]] += seed
    export_package(model, folder, schema)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, uncompiled_here: None) -> Path:
    """Monday's package; Tuesday's and Wednesday's, in `whole`, and the deltas of these, each since the day before."""
    folder = tmp_path_factory.mktemp("packages")
    monday = export(folder / "monday", 0, [])
    tuesday = export(folder / "whole" / "tuesday", 1, [1, 2, 3])
    wednesday = export(folder / "whole" / "wednesday", 2, [1, 4, 5])
    write_delta(tuesday, monday, folder / "tuesday")
    write_delta(wednesday, tuesday, folder / "wednesday")
    return folder


REQUESTS = unlabelled()


def scores_of(package: Path) -> np.ndarray:
    return AmortizedScorer(load_package(package)).score(REQUESTS).numpy()


class Server:
    """What answers on a port."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def scores(self) -> tuple[str, np.ndarray]:
        answer = self.http.post("/v1/score", json={"requests": REQUESTS}).json()
        return answer["version"], np.concatenate(answer["scores"]).astype(np.float32)

    def answers_by(self, package: Path, name: str) -> None:
        version, found = self.scores()
        assert version == name
        np.testing.assert_array_equal(found, scores_of(package))

    def switch(self, folder: Path) -> tuple[int, str]:
        reply = self.http.post("/v1/versions", json={"folder": str(folder)})
        return reply.status_code, reply.json().get("error") or reply.json()["version"]


def loading(versions: Callable[[], Versions], config: ServeConfig) -> Callable[[str], Any]:
    return lambda folder: _of_package(config, folder, None, versions().current)


@pytest.fixture
def one(folder: Path) -> Iterator[tuple[Server, Versions, Any]]:
    """A server of one process that answers by Monday's package."""
    config = ServeConfig(package=str(folder / "monday"))
    versions = Versions(_of_package(config, str(folder / "monday"), None))
    with serving(versions, load=loading(lambda: versions, config)) as client:
        yield Server(client.http), versions, client.server._endpoint


def weights_of(versions: Versions) -> torch.Tensor:
    """Those of the users, which the version that answers reads."""
    lookups: Any = versions.current.scorer._served.lookups
    weights: torch.Tensor = lookups.request_bags._bags._emb_modules[0].weights_host
    return weights


def test_deltas_follow_one_another_and_share_what_has_not_changed(
    folder: Path, one: tuple[Server, Versions, Any]
) -> None:
    server, versions, _ = one
    monday = weights_of(versions)
    server.answers_by(folder / "monday", "monday")
    for name in ("tuesday", "wednesday"):
        assert server.switch(folder / name) == (200, name)
        server.answers_by(folder / "whole" / name, name)
        (mapped, _), (sizes, copied) = mappings_of(monday), mappings_of(weights_of(versions))
        assert copied == 0 and sizes[next(iter(mapped))] > 0.9 * monday.numel()
    assert server.http.post("/v1/roll_back").json() == {"version": "tuesday"}
    server.answers_by(folder / "whole" / "tuesday", "tuesday")
    # Once more, since what came before.
    assert server.switch(folder / "wednesday") == (200, "wednesday")
    server.answers_by(folder / "whole" / "wednesday", "wednesday")
    # Once whole packages have taken the place of both versions, nothing of them stays in memory.
    (inode,) = mapped
    for name in ("tuesday", "wednesday"):
        assert f" {inode} " in Path("/proc/self/maps").read_text()
        assert server.switch(folder / "whole" / name) == (200, name)
    del monday
    gc.collect()
    assert f" {inode} " not in Path("/proc/self/maps").read_text()


def test_tables_that_have_grown_are_copied(folder: Path, tmp_path: Path, one: tuple[Server, Versions, Any]) -> None:
    server, _, _ = one
    grown = export(tmp_path / "grown", 1, [1, 15, 20_000], GROWN)
    write_delta(grown, folder / "monday", tmp_path / "thursday")
    assert server.switch(tmp_path / "thursday") == (200, "thursday")
    server.answers_by(grown, "thursday")


def test_what_is_not_fit_leaves_all_as_it_was(
    folder: Path, tmp_path: Path, one: tuple[Server, Versions, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, _ = one
    other_scores = Path(shutil.copytree(folder / "whole" / "tuesday", tmp_path / "package"))
    shutil.copy(folder / "monday" / SAMPLES_FILE, other_scores)
    write_manifest(other_scores, read_manifest(folder / "whole" / "tuesday"))
    write_delta(other_scores, folder / "monday", tmp_path / "other scores")
    write_delta(export(tmp_path / "less", 1, [0], LESS), folder / "monday", tmp_path / "other tasks")
    for name in ("rows.pt", "candidates.pt2", MANIFEST_FILE):
        change_a_byte(Path(shutil.copytree(folder / "tuesday", tmp_path / f"damaged {name}")) / name)
    refused = {
        folder
        / "wednesday": "wednesday: is since a package with manifest .*, but that of 'monday', which answers, is ",
        tmp_path / "damaged rows.pt": "rows.pt: checksum is .*: the file is damaged",
        tmp_path / "damaged candidates.pt2": "candidates.pt2: checksum is .*: the file is damaged",
        tmp_path / f"damaged {MANIFEST_FILE}": f"{MANIFEST_FILE}: checksum is .*: the file is damaged",
        tmp_path / "other scores": "other scores: sample 0: a probability differs",
        tmp_path / "other tasks": r"version 'other tasks': scores \['liked'\], but 'monday' \['liked', 'bought'\]",
    }
    for delta, told in refused.items():
        status, error = server.switch(delta)
        assert status == 400
        with pytest.raises(InputError, match=told):
            raise InputError(error)
        server.answers_by(folder / "monday", "monday")
    # A delta needs no room for rows that have not changed.
    files = sum(path.stat().st_size for path in (folder / "tuesday").iterdir())
    monkeypatch.setattr(memory, "available_bytes", lambda: int(1.5 * files) + 4096)
    assert "beside the version that answers" in server.switch(folder / "whole" / "tuesday")[1]
    assert server.switch(folder / "tuesday")[0] == 200
    monkeypatch.setattr(memory, "available_bytes", lambda: 4096)
    status, error = server.switch(folder / "wednesday")
    assert status == 400 and "beside the version that answers, but 0 MB are left" in error
    server.answers_by(folder / "whole" / "tuesday", "tuesday")


def test_a_file_that_has_not_changed_is_needed_of_the_base(
    folder: Path, tmp_path: Path, one: tuple[Server, Versions, Any]
) -> None:
    server, versions, _ = one
    monday = Path(shutil.copytree(folder / "monday", tmp_path / "monday"))
    config = ServeConfig(package=str(monday))
    versions = Versions(_of_package(config, str(monday), None))
    with serving(versions, load=loading(lambda: versions, config)) as client:
        server = Server(client.http)
        assert not (folder / "tuesday" / "schema.json").exists()
        (monday / "schema.json").write_text("{}")
        status, error = server.switch(folder / "tuesday")
        assert status == 400 and f"{monday}/schema.json: checksum is" in error
        server.answers_by(folder / "monday", "monday")
        # Tables are not read again.
        shutil.copy(folder / "monday" / "schema.json", monday)
        (monday / TABLES_FILE).unlink()
        assert server.switch(folder / "tuesday") == (200, "tuesday")
        server.answers_by(folder / "whole" / "tuesday", "tuesday")


def test_a_package_does_not_read_tables_that_a_wrong_delta_has_made(folder: Path, tmp_path: Path) -> None:
    load = partial(_of_package, ServeConfig(package=str(folder / "monday")), mapped=tmp_path / "mapped")
    wrong = Path(shutil.copytree(folder / "tuesday", tmp_path / "wrong"))
    rows = torch.load(wrong / "rows.pt")
    # No sample has such a user.
    rows["request.embedding_bags.user_id.weight"]["rows"][:] = 0
    torch.save(rows, wrong / "rows.pt")
    record = json.loads((wrong / DELTA_FILE).read_text())
    record["sha256"]["rows.pt"] = checksum(wrong / "rows.pt")
    (wrong / DELTA_FILE).write_text(json.dumps(record))
    monday = load(str(folder / "monday"))
    of_wrong = load(str(wrong), current=monday).scorer.score(REQUESTS).numpy()
    right = load(str(folder / "whole" / "tuesday"), current=monday).scorer.score(REQUESTS).numpy()
    assert not np.array_equal(of_wrong, scores_of(folder / "whole" / "tuesday"))
    np.testing.assert_array_equal(right, scores_of(folder / "whole" / "tuesday"))


def test_a_server_does_not_start_with_a_delta(folder: Path) -> None:
    with pytest.raises(InputError, match="tuesday: is since a package .*, and none answers yet: start the server with"):
        serve_until_told(ServeConfig(package=str(folder / "tuesday"), processes=1))


def test_deltas_that_are_put_into_a_watched_folder_are_taken_in_their_order(
    folder: Path, tmp_path: Path, one: tuple[Server, Versions, Any]
) -> None:
    server, _, endpoint = one
    watch = Watch(tmp_path, folder / "monday", endpoint.switch)
    for place, name in enumerate(("wednesday", "tuesday")):
        shutil.copytree(folder / name, tmp_path / name)
        os.utime(tmp_path / name / MANIFEST_FILE, (2**32 - place, 2**32 - place))
    watch.look()
    server.answers_by(folder / "whole" / "wednesday", "wednesday")


def test_a_delta_is_rolled_out_and_the_next_is_since_it(folder: Path, one: tuple[Server, Versions, Any]) -> None:
    server, versions, _ = one
    stage = {"folder": str(folder / "tuesday"), "experiment": "tuesday-1", "share": 1, "sample_rate": 1}
    assert server.http.post("/v1/rollout", json=stage).status_code == 200
    server.answers_by(folder / "whole" / "tuesday", "tuesday")
    assert versions.rollout is not None
    versions.rollout.drain()
    assert versions.rollout.switched_back is None and versions.rollout.counters()["compared"] == len(REQUESTS)
    assert server.switch(folder / "tuesday") == (200, "tuesday")
    assert server.switch(folder / "wednesday") == (200, "wednesday")
    server.answers_by(folder / "whole" / "wednesday", "wednesday")


def run(config: ServeConfig, mapped: str, link: Link, before: Started | None, loaded: Loaded) -> None:
    """A process of several, whose packages are not compiled."""
    torch._inductor.aoti_load_package = load_uncompiled  # type: ignore[assignment]
    _serve_as_one(config, mapped, link, before, loaded)


def test_processes_share_a_delta_and_come_back_by_it(folder: Path, tmp_path: Path) -> None:
    config = ServeConfig(package=str(folder / "monday"), processes=2, grpc_port=0, http_port=0, workers=1)
    mapped, is_over = tmp_path / "mapped", threading.Event()
    mapped.mkdir()
    of = {name: tables_checksum(folder / name) or "" for name in ("monday", "tuesday", "wednesday")}
    loaded = Loaded((str(folder / "monday"),))
    with Fleet(2, partial(run, config, str(mapped)), [run.__module__], loaded, partial(clear, mapped)) as fleet:
        watching = threading.Thread(target=fleet.watch, args=(is_over,))
        watching.start()
        urls = [f"http://127.0.0.1:{started.http_port}" for started in fleet.started]
        servers = [Server(httpx.Client(base_url=url, timeout=60)) for url in urls]

        def kill(place: int) -> None:
            killed = fleet.pids[place]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: fleet.pids[place] != killed and is_ready(servers[place]))

        try:
            for place, name in ((0, "tuesday"), (1, "wednesday")):
                assert servers[place].switch(folder / name) == (200, name)
                for server in servers:
                    server.answers_by(folder / "whole" / name, name)
            assert folders_in(mapped) == set(of.values())
            for name in ("tuesday", "wednesday"):
                users = mapped / of[name] / "request_0"
                assert not users.exists() and users.with_name("request_0.pages").stat().st_size == 4096
            kill(1)
            servers[1].answers_by(folder / "whole" / "wednesday", "wednesday")
            assert servers[1].http.post("/v1/roll_back").json() == {"version": "tuesday"}
            assert folders_in(mapped) == {of["monday"], of["tuesday"]}
            kill(0)
            for server in servers:
                server.answers_by(folder / "whole" / "tuesday", "tuesday")
                assert server.http.post("/v1/roll_back").status_code == 400
            # Tables that are not there any more are made anew, of the package and the delta.
            shutil.rmtree(mapped / of["monday"])
            shutil.rmtree(mapped / of["tuesday"])
            kill(0)
            servers[0].answers_by(folder / "whole" / "tuesday", "tuesday")
            assert servers[0].switch(folder / "whole" / "wednesday") == (200, "wednesday")
            assert servers[0].switch(folder / "monday") == (200, "monday")
            assert folders_in(mapped) == {tables_checksum(folder / "whole" / "wednesday"), of["monday"]}
        finally:
            is_over.set()
            watching.join()


def folders_in(mapped: Path) -> set[str]:
    return {path.name for path in mapped.iterdir() if path.is_dir()}


def is_ready(server: Server) -> bool:
    try:
        return server.http.get("/v2/health/ready").status_code == 200
    except httpx.HTTPError:
        return False
