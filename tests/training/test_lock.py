"""One process at a time writes into a run's folder: who comes later is refused, and the dead hold nothing."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import start
from tests.training.test_failures import wait_for
from tests.training.test_training import arguments, checkpoints, refused
from torchrec_amort.apps import train
from torchrec_amort.errors import InputError
from torchrec_amort.lock import LOCK_FILE, SECONDS_TO_DEATH, FolderLock, Owner
from torchrec_amort.training.checkpoint import CheckpointWriter

ELSEWHERE = Owner(host="node7", pid=12, space="another host's", job="job-5", since="2026-01-01T00:00:00Z")


def never(_: float) -> None:
    raise AssertionError("it waits")


def leave_lock(folder: Path, owner: Owner) -> None:
    """A lock as a process leaves it that dies without a word."""
    lock = FolderLock(folder / "other", owner)
    with lock:
        (folder / LOCK_FILE).write_bytes((folder / "other" / LOCK_FILE).read_bytes())
    assert not (folder / "other").exists()


class Clock:
    """A clock that only waiting moves; something may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[float], None] = lambda _: None) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


def sign_of_life(folder: Path) -> None:
    path = folder / LOCK_FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "alive": f"{record['alive']}+"}))


def test_a_folder_that_is_held_is_refused_with_who_holds_it_and_since_when(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"):
        record = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
        with pytest.raises(InputError) as refusal, FolderLock(tmp_path / "run", sleep=never):
            pass
        said = (
            f"process {os.getpid()} on {record['host']}, since {record['since']}, last sign of life {record['alive']}"
        )
        assert said in str(refusal.value)
        assert (tmp_path / "run" / LOCK_FILE).exists()
    with FolderLock(tmp_path / "run", sleep=never):
        pass


def test_a_lock_leaves_no_trace_but_what_was_written(tmp_path: Path) -> None:
    for name in ("kept.txt", None):
        with FolderLock(tmp_path / "runs" / "first"):
            if name:
                (tmp_path / "runs" / "first" / name).touch()
        assert (tmp_path / "runs").exists() == (name is not None)
        if name:
            assert [path.name for path in (tmp_path / "runs" / "first").iterdir()] == [name]
            (tmp_path / "runs" / "first" / name).unlink()
            (tmp_path / "runs" / "first").rmdir()
            (tmp_path / "runs").rmdir()


def hold_and_die(folder: Path) -> None:
    FolderLock(folder).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_this_host_holds_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    # Dead, but not waited for: its process id is there still.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[arg-type]
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == process.pid
    with FolderLock(tmp_path, sleep=never):
        pass
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_later_process_with_the_id_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    leave_lock(tmp_path, Owner(started=1))
    with FolderLock(tmp_path, sleep=never):
        pass


@pytest.mark.parametrize("modified", [0, 4_000_000_000], ids=["long ago", "ahead of us"])
def test_a_process_of_another_host_is_dead_when_it_shows_no_sign_of_life_by_our_clock(
    modified: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_lock(tmp_path, ELSEWHERE)
    os.utime(tmp_path / LOCK_FILE, (modified, modified))
    clock = Clock()
    with FolderLock(tmp_path, clock=clock, sleep=clock.sleep):
        assert clock.now == pytest.approx(SECONDS_TO_DEATH, abs=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is held by process 12 on node7, job job-5, since 2026-01-01T00:00:00Z" in line


def test_a_process_of_another_host_that_shows_a_sign_of_life_holds_its_folder(tmp_path: Path) -> None:
    leave_lock(tmp_path, ELSEWHERE)
    clock = Clock(lambda now: sign_of_life(tmp_path) if now == 5 else None)
    with pytest.raises(InputError, match="is written by process 12 on node7, job job-5"):
        FolderLock(tmp_path, clock=clock, sleep=clock.sleep).__enter__()
    assert clock.now == 5


def test_a_lock_whose_owner_died_while_it_was_made_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    clock = Clock()
    with FolderLock(tmp_path, clock=clock, sleep=clock.sleep) as lock:
        assert clock.now == pytest.approx(SECONDS_TO_DEATH, abs=1)
        lock.refuse_lost()


def test_a_restart_waits_for_the_earlier_start_of_its_job_to_end(tmp_path: Path) -> None:
    def ends_at_12(now: float) -> None:
        if now < 12:
            sign_of_life(tmp_path)
        else:
            (tmp_path / LOCK_FILE).unlink(missing_ok=True)

    for is_restart, job in ((True, "job-5"), (True, "job-6"), (False, "job-5")):
        leave_lock(tmp_path, ELSEWHERE)
        clock = Clock(ends_at_12)
        lock = FolderLock(tmp_path, Owner(job=job), is_restart=is_restart, clock=clock, sleep=clock.sleep)
        if is_restart and job == "job-5":
            with lock:
                assert clock.now == 12
        else:
            with pytest.raises(InputError, match="is written by process 12"):
                lock.__enter__()


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_that_want_a_folder_at_once_one_gets_it(is_stale: bool, tmp_path: Path) -> None:
    for turn in range(10):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if is_stale:
            leave_lock(folder, Owner(started=1))
        locks = [FolderLock(folder, Owner(job=str(k)), sleep=lambda _: time.sleep(1e-3)) for k in range(6)]
        together = threading.Barrier(len(locks))
        holders: list[FolderLock] = []

        def want(lock: FolderLock, together: threading.Barrier = together, won: list[FolderLock] = holders) -> None:
            together.wait()
            with contextlib.suppress(InputError):
                won.append(lock.__enter__())

        threads = [threading.Thread(target=want, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (holder,) = holders
        holder.refuse_lost()
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        holder.__exit__()


def test_a_run_whose_lock_was_taken_writes_no_checkpoint(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, original = tmp_path / "run", CheckpointWriter.save

    def save(writer: CheckpointWriter, *state: Any) -> None:
        original(writer, *state)
        writer.wait()
        leave_lock(run, ELSEWHERE)

    monkeypatch.setattr(CheckpointWriter, "save", save)
    line = refused(capsys, train.main, arguments(data_folder, run, "--loop.checkpoint_every=10"))
    assert "is of process 12 on node7, job job-5" in line
    assert checkpoints(run) == ["step-000000010"]
    assert json.loads((run / LOCK_FILE).read_text())["host"] == "node7"


def test_of_two_trainings_into_one_folder_one_runs_and_the_other_is_refused(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, environment = tmp_path / "run", f"PAUSED_TRAIN={tmp_path}"
    command = arguments(data_folder, run)
    winner = start("env", environment, sys.executable, "-m", "tests.training.paused_train", *command)
    wait_for((tmp_path / f"{winner.pid}.waits").exists, winner)
    line = refused(capsys, train.main, command)
    assert line.startswith(f"error: {run}: is written by process {winner.pid} on ")
    (tmp_path / "goes_on").touch()
    output, _ = winner.communicate(timeout=300)
    assert winner.returncode == 0, output
    assert checkpoints(run) == ["step-000000025"]
    assert not (run / LOCK_FILE).exists()
