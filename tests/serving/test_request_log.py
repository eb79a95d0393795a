"""What is logged of requests is what was sent and answered, leaves when it has to, and never stands in the way."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bench.test_pilot import arguments, record_of, train_run
from tests.bench.test_server_load import SHORT, loaded
from tests.conftest import SCHEMA
from tests.serving.server.test_server import LABELS, scores_of, serving, unlabelled, version
from torchrec_amort import AmortizedScorer, InputError, ScoringService
from torchrec_amort.apps import pilot
from torchrec_amort.data.reader import pieces_of, read_piece
from torchrec_amort.data.sample import first_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.histories import HistoryStore
from torchrec_amort.serving.request_log import LOGITS, VERSION, RequestLog
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.versions import Version, Versions
from torchrec_amort.training.run import load_model

DAY = 86_400
LIMITS: dict[str, Any] = {"share": 1.0, "days": 7}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def requests_of(num_requests: int) -> list[dict[str, Any]]:
    """Requests of users 0, 1 and so on, and with ids like theirs."""
    found = [request for seed in range(-(-num_requests // 3)) for request in unlabelled(seed)]
    return [request | {"user": row, "request_id": row} for row, request in enumerate(found[:num_requests])]


@contextmanager
def answering(log: RequestLog | None, versions: Versions | None = None, **options: Any) -> Iterator[Endpoint]:
    versions = versions or Versions(version("monday"))
    with ScoringService(versions, num_workers=2, max_waiting=64) as service:
        yield Endpoint("films", versions, service, Metrics(), request_log=log, **options)


def send(endpoint: Endpoint, requests: list[dict[str, Any]], **parameters: Any) -> None:
    """One call for each, one after the other."""
    for request in requests:
        endpoint.submit([request], parameters).result(60)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/test/*"))


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [row for file in files_in(folder) for row in pq.read_table(file).to_pylist()]


def users_in(folder: Path) -> list[int]:
    return sorted(row["user"] for row in rows_in(folder))


def test_what_is_logged_is_what_was_sent_and_scores_as_it_was_answered(tmp_path: Path) -> None:
    """Of both forms of requests, several in one call, and with a version that is switched to meanwhile."""
    log = RequestLog(tmp_path / "log", **LIMITS)
    requests = requests_of(9)
    versions = Versions(version("monday"))
    with answering(log, versions) as endpoint:
        endpoint.submit(requests[:3], {}).result(60)
        table = pa.Table.from_pylist(
            requests[3:6], pa.schema([f for f in SCHEMA.arrow_schema() if f.name in requests[0]])
        )
        endpoint.submit(table, {}).result(60)
        versions.switch(version("tuesday", seed=1))
        endpoint.submit(requests[6:], {}).result(60)
        assert files_in(tmp_path) == []
        log.close()
        log.close()
    assert log.counters()["written"] == 9
    # Both versions read the same.
    (folder,) = (tmp_path / "log").iterdir()
    schema = RequestSchema.load(folder)
    assert not schema.labels and schema.arrow_schema().names == [
        n for n in SCHEMA.arrow_schema().names if n not in LABELS
    ]
    (piece,) = {piece.path: piece for piece in pieces_of(folder, "test", schema)}.values()
    expected = pa.Table.from_pylist(requests, schema.arrow_schema())
    assert read_piece(piece, schema).to_pylist() == expected.to_pylist()
    assert first_requests(folder, "test", 100).num_rows == 9
    rows = rows_in(tmp_path / "log")
    assert [row[VERSION] for row in rows] == ["monday"] * 6 + ["tuesday"] * 3
    for part, seed in ((slice(6), 0), (slice(6, 9), 1)):
        logits = np.concatenate([row[LOGITS] for row in rows[part]])
        np.testing.assert_allclose(logits, scores_of(requests[part], seed), atol=1e-5)
    modes = {path.relative_to(tmp_path).parts[-1]: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    (file,) = files_in(tmp_path / "log")
    assert (modes["log"], modes[folder.name], modes["test"], modes[file.name]) == (0o700, 0o700, 0o700, 0o600)


def test_each_request_is_drawn_by_itself(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", share=0.3, days=7, seed=5)
    requests = requests_of(60)
    with answering(log) as endpoint:
        endpoint.submit(requests[:20], {}).result(60)
        send(endpoint, requests[20:])
    log.close()
    draws = random.Random(5)
    drawn = [row for row in range(60) if draws.random() < 0.3]
    assert 5 < len(drawn) < 30
    assert users_in(tmp_path / "log") == drawn
    # Whichever of a call are drawn, they have their own scores.
    logits = np.concatenate([row[LOGITS] for row in rows_in(tmp_path / "log")])
    np.testing.assert_allclose(logits, scores_of([requests[row] for row in drawn]), atol=1e-5)


def test_without_a_log_nothing_is_written_and_half_of_its_options_are_refused(tmp_path: Path) -> None:
    with answering(None) as endpoint:
        send(endpoint, requests_of(2))
    assert list(tmp_path.iterdir()) == []
    config = ServeConfig(package="films")
    assert (config.request_log, config.request_log_share, config.request_log_days) == (None, None, None)
    for given in ({"request_log": "log", "request_log_share": 0.01}, {"request_log": "log", "request_log_days": 7},
                  {"request_log_share": 0.01, "request_log_days": 7}):  # fmt: skip
        with pytest.raises(InputError, match="requests are personal data"):
            ServeConfig(package="films", **given)
    for name, value in (("request_log_share", 0), ("request_log_share", 1.5), ("request_log_days", 0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            ServeConfig(
                package="films",
                **({"request_log": "log", **{f"request_log_{k}": v for k, v in LIMITS.items()}} | {name: value}),
            )
    tmp_path.chmod(0o755)
    with pytest.raises(InputError, match="has mode 755"):
        RequestLog(tmp_path, **LIMITS)


def test_histories_are_logged_whole_and_those_encoded_ahead_are_not(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", **LIMITS)
    store = HistoryStore(SCHEMA, max_bytes=2**20)
    events = ("history_item", "history_action", "history_time")
    request = requests_of(3)[2]
    with answering(log, histories=store) as endpoint:
        send(endpoint, [request | {name: request[name][:-2] for name in events}])
        send(endpoint, [request | {name: request[name][-2:] for name in events}], history="append")
        send(
            endpoint,
            [{k: v for k, v in request.items() if k not in ("candidate_item", "genres", "price")}],
            encode=True,
        )
    log.close()
    first, second = rows_in(tmp_path / "log")
    assert len(first["history_item"]) == 6
    assert {name: second[name] for name in events} == {name: request[name] for name in events}


def test_requests_without_their_user_or_id_are_counted_and_not_logged(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", **LIMITS)
    versions = Versions(Version("monday", AmortizedScorer(version("monday").scorer._served, schema=SCHEMA)))
    with answering(log, versions) as endpoint:
        for name in ("user", "request_id"):
            send(endpoint, [{k: v for k, v in requests_of(1)[0].items() if k != name}])
    log.close()
    assert log.counters()["unfit"] == 2 and files_in(tmp_path / "log") == []


def test_a_user_is_forgotten_in_files_of_all_processes_and_in_what_waits(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    other = RequestLog(folder, **LIMITS, place=1, num_places=2, rows_per_file=2)
    log = RequestLog(folder, **LIMITS, place=0, num_places=2, rows_per_file=4)
    requests = [request | {"user": row % 3} for row, request in enumerate(requests_of(9))]
    with answering(other) as endpoint:
        send(endpoint, requests[:2])
        send(endpoint, [requests[1]] * 2)
    other.close()
    with answering(log) as endpoint:
        send(endpoint, requests[2:])
        log.look()
        # Three of these are in no file yet.
        assert users_in(folder) == [0, 0, 1, 1, 1, 1, 2, 2] and log.counters()["written"] == 4
        assert len(files_in(folder)) == 3
        assert endpoint.forget(1)
        assert users_in(folder) == [0, 0, 2, 2]
        # Of a file of this user alone, nothing is left.
        assert len(files_in(folder)) == 2
        assert {path.stat().st_mode & 0o777 for path in files_in(folder)} == {0o600}
        log.close()
        assert users_in(folder) == [0, 0, 0, 2, 2, 2]
        # After the end, too.
        assert log.forget(0) and not log.forget(0)
    assert users_in(folder) == [2, 2, 2]
    assert log.counters()["forgotten"] == 3


def test_a_file_that_cannot_be_written_without_the_user_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, requests = Clock(), requests_of(4)
    log = RequestLog(tmp_path / "log", **LIMITS, rows_per_file=1, clock=clock)
    with answering(log) as endpoint:
        for together in (requests[:1], requests[1:3], requests[3:]):
            endpoint.submit(together, {}).result(60)
            log.look()
            clock.now += 1
        files_in(tmp_path / "log")[0].write_bytes(b"no Parquet")
        monkeypatch.setattr(pq, "write_table", fails)
        assert endpoint.forget(1)
        assert users_in(tmp_path / "log") == [3]
        with monkeypatch.context() as broken:
            broken.setattr(Path, "unlink", fails)
            # Nobody is told that it is done.
            files_in(tmp_path / "log")[0].write_bytes(b"no Parquet")
            with pytest.raises(OSError, match="No space"):
                endpoint.forget(3)
    log.close()
    assert len([told for told in caplog.messages if "it has to go" in told]) == 3


def fails(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device: user 7")


def test_files_go_when_their_time_is_over(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "log"
    log = RequestLog(folder, **LIMITS, seconds_per_file=600, clock=clock)
    foreign = folder / "mine" / "test" / "part-00000.parquet"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    with answering(log) as endpoint:
        send(endpoint, requests_of(2))
        # Its thread has them, by the clock of now.
        log.look()
        clock.now += 599
        log.look()
        assert files_in(folder) == [foreign]
        clock.now += 1
        log.look()
        (own,) = [path for path in files_in(folder) if path != foreign]
        # What is written anew is kept no longer.
        clock.now += 3 * DAY
        endpoint.forget(1)
        clock.now = 1_000_000 + 7 * DAY - 1
        log.look()
        assert [row["user"] for row in pq.read_table(own).to_pylist()] == [0]
        clock.now += 61
        log.look()
        assert files_in(folder) == [foreign] and log.counters()["expired"] == 1
    log.close()
    # With nobody to look, the next one to start does.
    own.touch()
    RequestLog(folder, **LIMITS, clock=clock)
    assert files_in(folder) == [foreign]


def test_a_clock_that_is_set_back_keeps_no_file_and_no_request_longer(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "log"
    log = RequestLog(folder, **LIMITS, seconds_per_file=600, clock=clock)
    with answering(log) as endpoint:
        clock.now += 30 * DAY
        send(endpoint, requests_of(2))
        log.look()
        clock.now -= 30 * DAY
        log.look()
        (written,) = files_in(folder)
        old = written.with_name(written.name.replace(written.name.split("-")[1], f"{int(clock.now - 8 * DAY):010d}"))
        written.rename(old)
        clock.now += 61
        log.look()
        assert files_in(folder) == []


def test_what_a_killed_process_was_writing_is_removed_when_its_place_is_taken(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "log"
    with answering(log := RequestLog(folder, **LIMITS, clock=clock)) as endpoint:
        send(endpoint, requests_of(1))
        log.close()
    (whole,) = files_in(folder)
    parts = [whole.with_name(f".part-0001000000-{place}-00000000.01234567.parquet") for place in (0, 1, 2)]
    for part in parts:
        part.touch()
    # The third place is not there any more, and the second one may be writing.
    RequestLog(folder, **LIMITS, place=0, num_places=2, clock=clock)
    assert files_in(folder) == [parts[1], whole]


def test_a_full_disk_is_counted_and_told_once_and_serving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = RequestLog(tmp_path / "log", **LIMITS, rows_per_file=1)
    requests = requests_of(5)
    with monkeypatch.context() as full, answering(log) as endpoint:
        full.setattr(pq, "write_table", fails)
        for request in requests[:3]:
            scored = endpoint.submit([request], {}).result(60)
            np.testing.assert_allclose(scored.logits_CT.numpy(), scores_of([request]), atol=1e-5)
        log.look()
    assert log.counters() == {"written": 0, "dropped": 0, "unfit": 0, "failed": 3, "forgotten": 0, "expired": 0}
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "OSError" in told and "28" in told and "7" not in told.split(")")[-1] and "user" not in told
    assert files_in(tmp_path / "log") == []
    with answering(log) as endpoint:
        send(endpoint, requests[3:])
    log.close()
    assert users_in(tmp_path / "log") == [3, 4]


def test_what_comes_while_too_much_waits_is_dropped_and_no_answer_waits(tmp_path: Path) -> None:
    go_on, is_held = threading.Event(), threading.Event()

    def clock() -> float:
        if is_held.is_set():
            go_on.wait()
        return 1_000_000.0

    log = RequestLog(tmp_path / "log", **LIMITS, max_waiting=2, clock=clock)
    is_held.set()
    with answering(log) as endpoint:
        send(endpoint, requests_of(5))
        assert log.counters()["dropped"] == 3
        go_on.set()
        log.close()
        send(endpoint, requests_of(1))
    assert users_in(tmp_path / "log") == [0, 1]
    assert log.counters() == {"written": 2, "dropped": 4, "unfit": 0, "failed": 0, "forgotten": 0, "expired": 0}


def test_metrics_tell_what_became_of_it(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log", **LIMITS)
    metrics = Metrics()
    metrics.collect("request_log", log.counters)
    assert b"amort_request_log_dropped_total 0.0" in metrics.text()


def test_a_log_is_replayed_by_load_as_it_is_and_by_pilot_with_its_labels(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(data_folder, tmp_path / "run")
    model, _, schema = load_model(str(run))
    requests = first_requests(data_folder, "test", 90)
    log = RequestLog(tmp_path / "log", **LIMITS)
    versions = Versions(Version("run", AmortizedScorer(model, schema=schema)))
    with answering(log, versions) as endpoint:
        for row in range(90):
            endpoint.submit(requests.slice(row, 1).drop_columns(list(LABELS)), {}).result(60)
    log.close()
    (folder,) = (tmp_path / "log").iterdir()

    with serving(versions) as client:
        address = f"--addresses=[127.0.0.1:{client.server.grpc_port}]"
        checked = ["--rates=[60]", f"--check_run={run}", *SHORT]
        (rate,) = loaded(tmp_path / "load", address, f"--data={folder}", *checked)["rates"]
    assert rate["answered"] == rate["sent"] > 0 and rate["wrong"] == 0

    with pytest.raises(SystemExit):
        pilot.main(arguments(tmp_path / "refused", run, run, f"--data={folder}"))
    assert "'liked'" in capsys.readouterr().err
    labels = {row["request_id"]: row for row in requests.to_pylist()}
    logged = pa.concat_tables(pq.read_table(file) for file in files_in(tmp_path / "log"))
    for name in LABELS:
        logged = logged.append_column(name, pa.array([labels[i][name] for i in logged["request_id"].to_pylist()]))
    write_requests(tmp_path / "labelled", SCHEMA, {"test": [logged]})
    pilot.main(arguments(tmp_path / "replayed", run, run, f"--data={tmp_path / 'labelled'}"))
    pilot.main(arguments(tmp_path / "as-prepared", run, run))
    replayed, prepared = record_of(tmp_path / "replayed"), record_of(tmp_path / "as-prepared")
    assert replayed["requests"] == 90 and replayed["quality"] == prepared["quality"]
