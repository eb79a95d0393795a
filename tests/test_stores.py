"""What is on a store is read and built as what is on this machine: on a server of S3 in this process."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv, fs
from torch.utils.data import DataLoader

pytest.importorskip("duckdb")
pytest.importorskip("moto.server")

import boto3
from moto.core import set_initial_no_auth_action_count
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.conftest import HASHED, SCHEMA, make_table
from tests.data.test_builder import NOW, config_of, with_source, write_logs
from tests.training.test_training import arguments, losses
from torchrec_amort import InputError, RequestBatch, RequestSchema, load_package
from torchrec_amort.apps import evaluate, train
from torchrec_amort.bench.benchmark import run_benchmark
from torchrec_amort.bench.benchmark_source import BenchmarkConfig
from torchrec_amort.config import load_config
from torchrec_amort.data.builder.config import BuildConfig, SourceConfig
from torchrec_amort.data.builder.duckdb_engine import DuckDB
from torchrec_amort.data.builder.run import build
from torchrec_amort.data.counts import read_counts, unknown_ids
from torchrec_amort.data.events import Events
from torchrec_amort.data.impressions import to_impressions, to_requests
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.sample import first_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.files import new_file, new_folder
from torchrec_amort.lock import FolderLock
from torchrec_amort.stores import Location, Stored
from torchrec_amort.training.run import TrainConfig

BUCKET = "films"
ERROR = "<Error><Code>{}</Code><Message>Please try again.</Message></Error>"
DROP = "200 OK"
FAULTS = ["500 Internal Server Error", "503 Slow Down", DROP]


class Server:
    """moto's S3. A request may fail: `fault` tells how, by its method and path, and how often it came before."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.fault: Callable[[str, str, int], str | None] = lambda method, path, tries: None
        self.asked: list[tuple[str, str]] = []
        self.address = f"127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client("s3", endpoint_url=f"http://{self.address}", region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def uri(self, key: str, bucket: str = BUCKET, more: str = "") -> str:
        return f"s3://{bucket}/{key}?scheme=http&endpoint_override={self.address}{more}"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_folder(self, folder: Path, key: str) -> str:
        for name, content in contents(folder).items():
            self.put(f"{key}/{name}", content)
        return self.uri(key)

    def contents(self, key: str) -> dict[str, bytes]:
        """The files below a key, by their paths from there on."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{key}/").get("Contents", [])
        names = [one["Key"] for one in listed if not one["Key"].endswith("/")]
        return {
            name.removeprefix(f"{key}/"): self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
            for name in names
        }

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fault = self.fault(*asked, Counter(self.asked)[asked])
        self.asked.append(asked)
        if fault == DROP:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        if fault is not None:
            start_response(fault, [("Content-Type", "application/xml")])
            return [ERROR.format(fault.partition(" ")[2].replace(" ", "")).encode()]
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Credentials, none of this machine's; and events are mapped from a folder of the tests' own."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def server(surroundings: None) -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def failing(server: Server) -> Iterator[Server]:
    """The server, whose faults end with the test."""
    without = server.fault
    server.asked.clear()
    yield server
    server.fault = without


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def lists(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A prepared folder here, of several files and row groups, and the same on the store."""
    folder = tmp_path_factory.mktemp("lists") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchrec_amort.data.writer.ROWS_PER_GROUP", 32)
        patch.setattr("torchrec_amort.data.writer.ROWS_PER_FILE", 96)
        sizes = {"train": 160, "validation": 20, "test": 20}
        splits = {split: [make_table(n, seed, 1000 * seed)] for seed, (split, n) in enumerate(sizes.items())}
        write_requests(folder, SCHEMA, splits)
    return folder, server.put_folder(folder, "lists")


def config_with_logs(folder: Path) -> BuildConfig:
    """A build of small logs: a file, a pattern, a folder and a CSV."""
    (folder / "shown").mkdir(parents=True)
    shown = [("ann", 3, [1, 2]), ("bob", 6, [2, 3]), ("ann", 9, [3]), ("bob", 12, [1, 3]), ("ann", 17, [2])]
    clicks = [("ann", 1, 1, 0), ("bob", 2, 3, 1), ("ann", 4, 2, 0), ("bob", 7, 2, 0), ("ann", 10, 3, 1)]
    write_logs(folder, clicks, [("ann", 4, 2), ("bob", 8, 3)], shown, {(2, 1): 5, (3, 4): 7})
    (folder / "shown.parquet").rename(folder / "shown" / "part 1=2.parquet")
    (folder / "shown" / "_SUCCESS.parquet").touch()
    csv.write_csv(pq.read_table(folder / "prices.parquet"), folder / "prices.csv")
    (folder / "prices.csv.gz").write_bytes(gzip.compress((folder / "prices.csv").read_bytes()))
    config = with_source(config_of(folder), "shown", files=str(folder / "shown"))
    return with_source(config, "prices", files=str(folder / "prices.csv.gz"))


def moved(config: BuildConfig, uri: Callable[[str], str], folder: Path, **changes: Any) -> BuildConfig:
    """The config with the sources that are in a folder elsewhere."""
    sources = {
        name: replace(source, files=uri(str(Path(str(source.files)).relative_to(folder))))
        for name, source in config.sources.items()
    }
    return replace(config, sources=sources, **changes)


@pytest.fixture(scope="module")
def pointers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A built folder of events that are stored once, and of a vocabulary; and the same on the store."""
    folder = tmp_path_factory.mktemp("pointers")
    config = replace(config_with_logs(folder), pointers=True)
    build(config)
    return Path(config.out), server.put_folder(Path(config.out), "pointers")


def tensors(batch: RequestBatch) -> dict[str, list[torch.Tensor]]:
    parts = {name: value for name, value in vars(batch).items() if value is not None}
    return {
        name: [value] if isinstance(value, torch.Tensor) else [value.values(), value.lengths()]
        for name, value in parts.items()
        if isinstance(value, torch.Tensor) or hasattr(value, "lengths")
    }


def assert_read_alike(one: Location | str, other: Location | str, workers: int = 0, **options: Any) -> None:
    """The same batches, and some of them."""
    found = []
    for folder in (one, other):
        dataset = RequestDataset(folder, "train", **({"batch_size": 8, "seed": 0} | options))
        found.append([tensors(batch) for batch in DataLoader(dataset, batch_size=None, num_workers=workers)])
    assert found[0] and len(found[0]) == len(found[1])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=0)
        assert len(here) > 5


def test_a_folder_of_lists_on_a_store_is_read_as_here(lists: tuple[Path, str], tmp_path: Path) -> None:
    folder, uri = lists
    assert_read_alike(folder, uri, workers=2)
    assert RequestSchema.load(uri) == RequestSchema.load(folder)
    assert read_counts(uri) == read_counts(folder)
    # Counted again, since the tables are others.
    assert unknown_ids(uri, "test", HASHED) == unknown_ids(folder, "test", HASHED)
    assert first_requests(uri, "test", 5).equals(first_requests(folder, "test", 5))
    for name, data in {"here": str(folder), "there": uri}.items():
        to_impressions(data, tmp_path / name)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    reports = [json.loads(files.pop("migration.json")) for files in (here, there)]
    assert here == there
    assert reports[0]["file_bytes"] == reports[1]["file_bytes"]


def test_a_folder_of_pointers_on_a_store_is_read_as_here(pointers: tuple[Path, str]) -> None:
    folder, uri = pointers
    assert_read_alike(folder, uri, workers=2, batch_size=1)


def test_events_that_changed_on_the_store_are_not_those_of_the_cache(server: Server, tmp_path: Path) -> None:
    found = []
    for item in (7, 8):
        pq.write_table(pa.table({"item": [item]}), tmp_path / "events.parquet", compression="none")
        server.put("events.parquet", (tmp_path / "events.parquet").read_bytes())
        events = Events([server.uri("events.parquet")])
        found.append(events.lists(["item"], np.array([0]), np.array([1]))["item"].to_pylist())
    assert found == [[[7]], [[8]]]


def test_a_model_trains_on_a_store_as_here(lists: tuple[Path, str], tmp_path: Path) -> None:
    folder, uri = lists
    for name, data in {"here": str(folder), "there": uri}.items():
        train.main(arguments(Path(), tmp_path / name, "--data", data))
    assert losses(tmp_path / "here") == losses(tmp_path / "there")
    assert len(losses(tmp_path / "there")) > 3
    evaluate.main(["--run_folder", str(tmp_path / "there"), "--split", "validation"])
    report = json.loads((tmp_path / "there" / "evaluate-validation.json").read_text())
    assert (report["data"], report["requests"]) == (uri, 20)


def test_a_build_from_a_store_to_a_store_is_that_of_here(server: Server, tmp_path: Path) -> None:
    config = config_with_logs(tmp_path)
    build(config)
    here = contents(Path(config.out))
    server.put_folder(tmp_path, "logs")
    for name in ("schema.json", "train/part-00009.parquet"):
        server.put(f"built/{name}", b"of an earlier build")
    there = moved(config, lambda key: server.uri(f"logs/{key}"), tmp_path, out=server.uri("built"))
    with pytest.raises(InputError, match="built.*: is there already: choose another folder, or allow to overwrite"):
        build(there)
    server.asked.clear()
    build(replace(there, overwrite=True))
    assert server.contents("built") == here
    # Nobody reads a folder without a schema: it goes first, and comes last.
    changes = [(method, path) for method, path in server.asked if method in ("PUT", "DELETE") and path[-1] != "/"]
    schema = f"/{BUCKET}/built/schema.json"
    assert (changes[0], changes[-1]) == (("DELETE", schema), ("PUT", schema))
    assert len(changes) == 2 + len(here)


@pytest.mark.parametrize("pointers", [False, True])
def test_a_build_that_goes_on_adds_to_a_store(pointers: bool, server: Server, tmp_path: Path) -> None:
    config = replace(config_with_logs(tmp_path), pointers=pointers, labels={})
    middle = datetime.fromtimestamp(NOW + 10, timezone.utc).isoformat()
    for out in (config.out, server.uri("built")):
        build(replace(config, out=out, until=middle, overwrite=True))
    before = server.contents("built")
    server.asked.clear()
    for out in (config.out, server.uri("built")):
        build(replace(config, out=out, since=middle))
    assert server.contents("built") == contents(Path(config.out))
    changes = [path.removeprefix(f"/{BUCKET}/built/") for method, path in server.asked if method in ("PUT", "DELETE")]
    assert changes[-1] == "counts.json"
    again = {path for path in changes if path in before}
    assert again == {"counts.json", *(["events.json"] if pointers else [])}


def test_a_bucket_is_not_replaced_by_a_build(server: Server, tmp_path: Path) -> None:
    config = config_with_logs(tmp_path)
    with pytest.raises(InputError, match="a whole store or bucket would be replaced: give a folder in it"):
        build(replace(config, out=server.uri(""), overwrite=True))


def test_spark_reads_stores_by_its_own_connectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading:
        instant = DuckDB.instant

        def __enter__(self) -> Reading:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, name: str, files: dict[str, list[str]], source: SourceConfig) -> None:
            raise InputError(f"{name}: {files}")

    monkeypatch.setattr("torchrec_amort.data.builder.run._engine", lambda config, folder: Reading())
    config = replace(config_with_logs(tmp_path), engine="spark")
    pattern = "s3a://films/logs/*/clicks.parquet"
    with pytest.raises(InputError) as told:
        build(with_source(config, "clicks", files=pattern))
    assert str(told.value) == f"raw_clicks: {{'': [{pattern!r}]}}"


def test_requests_that_fail_at_first_change_nothing(failing: Server, pointers: tuple[Path, str]) -> None:
    folder, uri = pointers

    def fault(method: str, path: str, tries: int) -> str | None:
        return FAULTS[(len(method) + len(path)) % len(FAULTS)] if tries == 0 else None

    failing.fault = fault
    assert_read_alike(folder, uri, batch_size=1)
    put = Stored(failing.uri("put/schema.json"))
    put.put(folder / "schema.json")
    assert put.read_text() == (folder / "schema.json").read_text()
    tried = Counter(failing.asked)
    assert min(tried.values()) > 1
    assert {fault(*asked, 0) for asked in tried} == {*FAULTS}


def refusals(uri: str) -> list[str]:
    """What is told by all that reads a folder first."""
    told = []
    for read in (RequestSchema.load, read_counts, lambda uri: RequestDataset(uri, "train", batch_size=8)):
        with pytest.raises(InputError) as refused:
            read(uri)
        told.append(str(refused.value))
    assert all(message.startswith("s3://") and "\n" not in message for message in told)
    return told


ADVICE = "check the URI, the credentials in the environment (such as AWS_ACCESS_KEY_ID) and the network"


def test_a_bucket_that_is_not_there_is_told(server: Server) -> None:
    for told in refusals(server.uri("data", bucket="nothing")):
        assert "nothing" in told
        assert ADVICE in told


def test_a_folder_that_is_not_there_is_told(server: Server) -> None:
    assert "schema.json" in refusals(server.uri("nowhere"))[0]
    assert "no such file: prepare the data first" in refusals(server.uri("nowhere"))[0]


def test_wrong_credentials_are_told(server: Server, lists: tuple[Path, str]) -> None:
    for told in set_initial_no_auth_action_count(0)(refusals)(lists[1]):
        assert "ACCESS_DENIED" in told
        assert ADVICE in told


def test_a_server_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_amort.stores.ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = "{}:{}".format(*other.getsockname())
    for told in refusals(f"s3://{BUCKET}/data?scheme=http&endpoint_override={address}"):
        assert "Could not connect" in told
        assert ADVICE in told


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:200] + bytes(900) + whole[1100:]])
def test_a_damaged_object_is_told(server: Server, lists: tuple[Path, str], damage: Callable[[bytes], bytes]) -> None:
    folder, _ = lists
    uri = server.put_folder(folder, "damaged")
    part = "train/part-00000.parquet"
    server.put(f"damaged/{part}", damage((folder / part).read_bytes()))
    with pytest.raises(InputError, match="damaged/train/part-00000.parquet.*: copy .*again") as refused:
        list(RequestDataset(uri, "train", batch_size=8))
    assert ADVICE not in str(refused.value)


def test_a_source_that_the_store_does_not_give_is_told(
    failing: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_amort.stores.ATTEMPTS", 1)
    config = config_with_logs(tmp_path)
    failing.put_folder(tmp_path, "refused")
    failing.fault = lambda method, path, tries: FAULTS[0] if (method, path[-14:]) == ("GET", "clicks.parquet") else None
    # Other options, other connections.
    uri = failing.uri("refused/", more="&region=us-east-1")
    there = moved(config, lambda key: uri.replace("refused/", f"refused/{key}"), tmp_path, out=str(tmp_path / "out"))
    with pytest.raises(InputError) as refused:
        build(there)
    assert "clicks.parquet" in str(refused.value)
    assert str(refused.value).endswith(ADVICE)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="sources.clicks.files: .*nothing-.*: no such file, folder or pattern"):
        build(with_source(there, "clicks", files=uri.replace("refused/", "refused/nothing-*.parquet")))


@pytest.mark.parametrize(
    "uri", ["hdfs://namenode:8020/data?replication=2", "gs://films/data", "abfs://films@mine/data"]
)
def test_other_stores_are_opened_by_arrow(lists: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    folder, _ = lists
    asked = []

    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        asked.append(uri)
        return fs.LocalFileSystem(), str(folder.parent)

    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=from_uri))
    assert_read_alike(folder, uri)
    assert asked == [uri.replace("/data", "/")]


def test_a_source_of_two_options_is_told(server: Server, tmp_path: Path) -> None:
    config = config_with_logs(tmp_path)
    clicks = server.put_folder(tmp_path, "twice").replace("twice", "twice/clicks.parquet")
    with pytest.raises(InputError, match="twice/clicks.parquet.*: is read with other options, too"):
        build(with_source(config, "clicks", files={"one": clicks, "two": f"{clicks}&region=us-east-1"}))


@pytest.mark.parametrize("cut", [str, Path])
def test_what_has_to_be_here_is_no_uri(tmp_path: Path, cut: Callable[[str], str | Path]) -> None:
    uri: Any = cut("s3://films/run")
    for use in (
        lambda: TrainConfig(data=str(tmp_path), run_folder=uri),
        lambda: load_config(uri, TrainConfig, "train"),
        lambda: load_package(uri),
        lambda: FolderLock(uri),
        lambda: new_folder(uri).__enter__(),
        lambda: new_file(uri).__enter__(),
        lambda: write_requests(uri, SCHEMA, {}),
        lambda: to_requests(uri, SCHEMA, tmp_path / "out"),
        lambda: run_benchmark(BenchmarkConfig(out=uri)),
    ):
        with pytest.raises(InputError, match="s3://?films/run: has to be on this machine"):
            use()


def test_a_path_of_a_uri_is_refused_where_a_uri_may_be() -> None:
    with pytest.raises(InputError, match="s3:/films/data: a Path cuts a slash off a URI: give the URI as text"):
        RequestDataset(Path("s3://films/data"), "train", batch_size=8)


def test_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match="has a password, which configs and reports would show") as refused:
        RequestSchema.load("s3://someone:secret@films/data")
    assert "secret" not in str(refused.value)
