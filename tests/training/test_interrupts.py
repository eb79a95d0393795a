"""Signals that stop a process: what was half written is removed, what was trained is saved, and one line tells it."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.launch import start
from tests.training.test_failures import wait_for
from tests.training.test_training import arguments, checkpoints, losses
from torchrec_amort.apps import migrate, train
from torchrec_amort.apps.command import run_command
from torchrec_amort.data.impressions import to_impressions
from torchrec_amort.files import new_file, new_folder
from torchrec_amort.jobs import train as train_job
from torchrec_amort.training.processes import ignore_stop_signals, stop_signals

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def ends_with(command: Callable[[], None]) -> int | None:
    """The exit status of a process that runs a command, as a shell starts it: no signal is ignored."""

    def run() -> None:
        for number, handler in ((n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)):
            signal.signal(number, handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_a_writer_that_is_stopped_leaves_nothing_and_says_so_on_one_line(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        with new_folder(tmp_path / "films") as temporary, new_file(temporary / "users.csv") as file:
            file.write_text("histories")
            os.kill(os.getpid(), number)
            # What clean-up would be killed by, if it did not wait for it.
            os.kill(os.getpid(), number)
            raise AssertionError("it went on")

    assert ends_with(lambda: run_command(write)) == STATUS[number]
    assert list(tmp_path.iterdir()) == []
    kind = "interrupted" if number == signal.SIGINT else "terminated"
    assert capfd.readouterr().err == f"{kind}: by {number.name}\n"


def test_a_migration_that_is_stopped_leaves_nothing(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    to_impressions(data_folder, tmp_path / "log")
    write_table = pq.ParquetWriter.write_table

    def stop_after(*args: object, **options: object) -> None:
        write_table(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", stop_after)
    log = [f"--log.{split}={tmp_path / 'log' / split}" for split in ("train", "validation", "test")]
    command = ["requests", *log, f"--schema={data_folder / 'schema.json'}", f"--out={tmp_path / 'films'}"]
    assert ends_with(lambda: migrate.main(command)) == 143
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert capfd.readouterr().err.splitlines()[-1] == "terminated: by SIGTERM"


def test_signals_are_who_took_them_before_when_a_command_has_ended() -> None:
    before = [signal.getsignal(number) for number in STATUS]
    run_command(lambda: None)
    assert [signal.getsignal(number) for number in STATUS] == before


def test_one_ctrl_c_may_come_twice_and_a_second_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[signal.Signals] = []
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with stop_signals(taken.append):
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        now += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    taken: list[signal.Signals] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(taken.append):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert taken == []


def test_workers_leave_it_to_their_rank_when_to_stop() -> None:
    def work() -> None:
        ignore_stop_signals(0)
        for number in STATUS:
            os.kill(os.getpid(), number)
        sys.exit(7)

    assert ends_with(work) == 7


def as_a_shell_does() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_a_training_with_workers_saves_and_ends_with_one_line(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(data_folder, run, "--num_workers=2")
    paused = ("env", f"PAUSED_TRAIN={tmp_path}", sys.executable, "-m", "tests.training.paused_train")
    process = start(*paused, *command, start_new_session=True, preexec_fn=as_a_shell_does)
    wait_for((tmp_path / f"{process.pid}.waits").exists, process)
    # As a terminal does, to the workers too.
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "goes_on").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    lines = output.splitlines()
    assert lines[-1] == f"interrupted: {run}: stopped after step 10, which has a checkpoint"
    assert "Traceback" not in output
    assert checkpoints(run) == ["step-000000010"]
    train.main([*command, "--resume=true"])
    assert max(losses(run)) == 25


def test_ctrl_c_while_data_is_read_ends_with_one_line(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_job, "read_train_split", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert ends_with(lambda: train.main(arguments(data_folder, tmp_path / "runs" / "first"))) == 130
    assert capfd.readouterr().err == "interrupted: by SIGINT\n"
    assert list(tmp_path.iterdir()) == []
