"""A build that goes on gives the requests of one build of all logs, and what fails leaves what was there."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("duckdb")

from tests.data.test_builder import (
    NOW,
    buys,
    clicks,
    config_of,
    found_rows,
    prices,
    shown,
    small_config,
    with_source,
    write_logs,
)
from tests.launch import start
from tests.training.failing_rank import full_disk
from torchrec_amort.apps import build as app
from torchrec_amort.data.builder import folder as built_folder
from torchrec_amort.data.builder.config import BuildConfig, RequestsConfig, SourceConfig
from torchrec_amort.data.builder.run import build
from torchrec_amort.data.counts import read_counts
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.errors import InputError
from torchrec_amort.lock import FolderLock
from torchrec_amort.schema import RequestSchema


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Events are mapped from a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def at(second: float) -> str:
    return datetime.fromtimestamp(NOW + second, timezone.utc).isoformat()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that no build writes again."""
    again = ("counts.json", "events.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in again]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The requests of each split, with their events, however these are stored."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, count in read_counts(folder).items():
        rows[split] = []
        if count["requests"]:
            dataset = RequestDataset(folder, split, batch_size=999)
            for batch in dataset:
                keys = batch.sequences.keys()
                values = {key: jagged.values().tolist() for key, jagged in batch.sequences.to_dict().items()}
                lengths = {key: jagged.lengths().tolist() for key, jagged in batch.sequences.to_dict().items()}
                rows[split].append({key: (values[key], lengths[key]) for key in keys})
                rows[split].append({"candidates": (batch.candidate_dense.tolist(), batch.num_candidates.tolist())})
    return rows


@settings(
    max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(clicks, buys, shown, prices, st.lists(st.integers(10, 18), min_size=1, max_size=2, unique=True), st.booleans())
def test_builds_that_go_on_give_the_requests_of_one(
    clicks: Any, buys: Any, shown: Any, prices: Any, days: list[int], pointers: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Logs that go on until all labels are known.
        buys = [*buys, ("zoe", 40, 1)]
        write_logs(folder, clicks, buys, shown, prices)
        whole = config_of(folder)
        build(replace(whole, pointers=pointers))
        config = replace(whole, out=str(folder / "days"), pointers=pointers)
        ends = [*map(at, sorted(days)), None]
        build(replace(config, until=ends[0]))
        for since, until in itertools.pairwise(ends):
            before = contents(folder / "days")
            try:
                build(replace(config, since=since, until=until))
            except InputError as error:
                assert "there are no requests from then on" in str(error)
            after = contents(folder / "days")
            assert {file: after[file] for file in before} == before
        one, many = (read_counts(folder / out) for out in ("out", "days"))
        for split in one:
            del one[split]["files"], many[split]["files"]
        assert many == one
        assert read_rows(folder / "days") == read_rows(folder / "out")
        if not pointers:
            assert found_rows(folder / "days") == found_rows(folder / "out")
        assert RequestSchema.load(folder / "days").features == RequestSchema.load(folder / "out").features


@pytest.fixture
def begun(tmp_path: Path) -> BuildConfig:
    """A folder with requests until second 10, and the config to go on with."""
    write_logs(
        tmp_path,
        [("ann", 1, 2, 0), ("ann", 8, 4, 0)],
        [("ann", 2, 3), ("zoe", 40, 1)],
        [("ann", 5, [2, 3]), ("ann", 12, [1, 4]), ("bob", 16, [2])],
        {},
    )
    config = replace(config_of(tmp_path), pointers=True)
    build(replace(config, until=at(10)))
    return replace(config, since=at(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, since=at(9)), "since is .*, but there are requests until 2023-11-14T22:13:30.* already"),
        (lambda c: replace(c, out=f"{c.out} of nowhere"), "no such folder, so there is nothing to go on from"),
        (lambda c: replace(c, since=at(13)), "since: 2 candidates are after the last request that is there"),
        (lambda c: replace(c, since=at(30)), "since: 3 candidates are after"),
        (lambda c: replace(c, counts={}), "since: counts is {}, but the folder was built with"),
        (lambda c: replace(c, pointers=False), "since: pointers is False, but the folder was built with True"),
        (lambda c: with_source(c, "clicks", delay=3), "since: sources is .*, but the folder was built with"),
    ],
)
def test_what_would_not_be_one_build_is_refused(
    begun: BuildConfig, change: Callable[[BuildConfig], BuildConfig], message: str
) -> None:
    before = contents(Path(begun.out))
    with pytest.raises(InputError, match=message):
        build(change(begun))
    assert contents(Path(begun.out)) == before
    build(begun)
    assert read_counts(begun.out)["validation"]["requests"] == 1


def test_an_action_is_that_of_an_impression_which_is_built_later(tmp_path: Path) -> None:
    write_logs(tmp_path, [], [("ann", 11, 2), ("zoe", 40, 1)], [("ann", 9, [2]), ("ann", 10, [2])], {})
    config = config_of(tmp_path)
    build(replace(config, until=at(10)))
    build(replace(config, since=at(10)))
    labels = pq.read_table(tmp_path / "out" / "train", columns=["bought", "caused"]).to_pylist()
    labels += pq.read_table(tmp_path / "out" / "validation", columns=["bought", "caused"]).to_pylist()
    assert labels == [{"bought": [1.0], "caused": [0.0]}, {"bought": [1.0], "caused": [1.0]}]


@pytest.mark.parametrize("left", [[], ["train.parquet"]])
def test_a_build_that_left_no_record_goes(begun: BuildConfig, left: list[str]) -> None:
    folder = Path(begun.out) / "builds" / "0002"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    build(begun)
    assert (folder / "build.json").is_file()
    assert read_counts(begun.out)["validation"]["requests"] == 1


def test_labels_whose_time_was_not_up_are_not_built_on(tmp_path: Path) -> None:
    write_logs(tmp_path, [], [("ann", 6, 3)], [("ann", 5, [2, 3]), ("ann", 12, [1])], {})
    build(replace(config_of(tmp_path), until=at(10)))
    with pytest.raises(InputError, match="1 requests that are there were built before their time for label bought"):
        build(replace(config_of(tmp_path), since=at(10)))


@pytest.mark.parametrize("moment", ["_save", "save_histories", "write_counts"])
def test_a_build_that_is_cut_off_leaves_the_former_state(
    begun: BuildConfig, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(begun.out)
    rows, counts = read_rows(out), read_counts(out)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(built_folder, moment, die)
        with pytest.raises(KeyboardInterrupt):
            build(begun)
    assert read_rows(out) == rows
    assert read_counts(out) == counts
    build(begun)
    assert len(list((out / "builds").iterdir())) == 2
    assert {path.name for path in (out / "events").iterdir()} == {"0-0001.parquet", "0-0002.parquet"}
    whole = replace(begun, since=None, out=str(out.with_name("whole")))
    build(whole)
    assert read_rows(out) == read_rows(Path(whole.out))


def written_config(folder: Path) -> Path:
    """The config of one history, of logs of some thousand events."""
    places = range(20_000)
    table = pa.table({"who": [i % 97 for i in places], "ms": places, "item": [i % 13 for i in places]})
    pq.write_table(table, folder / "log.parquet")
    (folder / "build.yaml").write_text(
        f"""
        sources: {{log: {{files: {folder}/log.parquet, user: who, time: ms, unit: ms}}}}
        requests: {{source: log}}
        histories: {{seen: {{events: [{{source: log}}]}}}}
        train_until: 1970-01-01 00:00:10
        validation_until: 1970-01-01 00:00:15
        features:
          item: {{side: candidate, kind: id, table_size: 13}}
          before: {{side: event, history: seen, kind: id, of: item, table_size: 13}}
          liked: {{side: candidate, kind: label, of: "CASE WHEN item = 3 THEN 1.0 ELSE 0.0 END"}}
        """
    )
    return folder / "build.yaml"


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a build says that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        app.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_killed_or_out_of_space_or_twice_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left half-written, and what comes next needs no help."""
    out = tmp_path / "out"
    arguments = ["--config", str(written_config(tmp_path)), "--out", str(out)]
    killed = start("torchrec-amort", "build", *arguments)
    assert killed.stdout is not None
    # Told once requests are being written.
    while "train" not in killed.stdout.readline():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert not out.exists()
    assert hidden(tmp_path) == [".out.build"]
    with full_disk():
        assert refused(arguments, capsys).startswith("error: ")
    assert not out.exists()
    assert hidden(tmp_path) == []
    with FolderLock(tmp_path / ".out.build"):
        assert ".out.build: is written by process" in refused(arguments, capsys)
    app.main(arguments)
    assert sum(count["requests"] for count in read_counts(out).values()) == 20_000
    assert hidden(tmp_path) == []


def test_sources_that_cannot_be_one_table_are_told(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    text = pa.table({"who": ["ann"], "ms": pa.array([NOW * 1000], pa.int64()), "item": ["three"]})
    pq.write_table(text, tmp_path / "buys-3.parquet")
    with pytest.raises(InputError, match=r"buys: column 'item' is int64 in .*buys-1.parquet, but string in .*buys-3"):
        build(config)
    whole = (tmp_path / "buys-2.parquet").read_bytes()
    (tmp_path / "buys-3.parquet").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"buys-3.parquet: sources.buys: not a complete Parquet file"):
        build(config)
    # A whole footer, but damaged pages.
    (tmp_path / "buys-3.parquet").write_bytes(whole[:4] + bytes(byte ^ 255 for byte in whole[4:60]) + whole[60:])
    with pytest.raises(InputError) as refused:
        build(config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_csv_is_read_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.dat").write_text("".join(f"{i % 3}::00{i % 2}::{i}\n" for i in range(12)))
    config = BuildConfig(
        out=str(tmp_path / "out"),
        sources={
            "log": SourceConfig(
                files=str(tmp_path / "log.dat"),
                separator="::",
                names=["who", "item", "at"],
                types={"item": "VARCHAR"},
                user="who",
                time="at",
                unit="s",
            )
        },
        requests=RequestsConfig(source="log"),
        features={"item": replace(small_config(tmp_path).features["item"], of="item", text=True)},
        train_until="1970-01-01 00:00:20",
        validation_until="1970-01-01 00:00:20",
    )
    assert build(config) == {"train": 12, "validation": 0, "test": 0}
    assert pq.read_table(tmp_path / "out" / "vocabulary-item.parquet")["value"].to_pylist() == ["000", "001"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), min_size=1, max_size=25), st.integers(1, 6))
@settings(max_examples=10, deadline=None, phases=[Phase.generate])
def test_sessions_begin_after_a_gap(rows: list[tuple[str, int]], gap: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = pa.table(
            {"who": [who for who, _ in rows], "at": [second for _, second in rows], "item": range(len(rows))}
        )
        pq.write_table(table, folder / "log.parquet")
        config = BuildConfig(
            out=str(folder / "out"),
            sources={"log": SourceConfig(files=str(folder / "log.parquet"), user="who", time="at", unit="s")},
            requests=RequestsConfig(source="log", gap=gap, order=["item"]),
            features={
                "item": replace(small_config(folder).features["item"], of="item", vocabulary="hash", table_size=9)
            },
            train_until="1970-01-02",
            validation_until="1970-01-02",
        )
        build(config)
        expected: list[tuple[int, list[int]]] = []
        for who in sorted({who for who, _ in rows}):
            latest = None
            for second, item in sorted((second, item) for item, (owner, second) in enumerate(rows) if owner == who):
                if latest is None or second - latest > gap:
                    expected.append((second, []))
                expected[-1][1].append(item)
                latest = second
        found = pq.read_table(folder / "out" / "train" / "part-00000.parquet")
        got = list(zip(found["time"].to_pylist(), found["item"].to_pylist(), strict=True))
        assert sorted(got) == sorted((begin, sorted(items)) for begin, items in expected)
