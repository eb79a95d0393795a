import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torchrec_amort import InputError
from torchrec_amort.errors import place_of
from torchrec_amort.serving.histories import TierUnreachable
from torchrec_amort.serving.rollout import Stage
from torchrec_amort.serving.server import fleet as fleet_module
from torchrec_amort.serving.server.fleet import Fleet, Link, Started
from torchrec_amort.serving.server.loaded import Loaded, RolledOut

OWN = Path(__file__).name


def line_of(text: str) -> int:
    """The first line of this file that has it."""
    return next(line for line, code in enumerate(Path(__file__).read_text().splitlines(), 1) if text in code)


def run(folder: Path, link: Link, before: Started | None, loaded: Loaded) -> None:
    """A process that writes down what it does, and asks for what it finds in a file."""
    packages = loaded.packages
    if packages == ("damaged",):
        raise InputError("damaged: is no package")
    if packages == ("stuck",):
        threading.Event().wait()
    own = folder / f"{link.place}"
    is_over = threading.Event()

    def write(*told: Any) -> int:
        with own.open("a") as file:
            file.write(" ".join(map(str, told)) + "\n")
        return link.place

    def prepare(package: str) -> None:
        write("prepare", package)
        if package == "other" and link.place == 1:
            raise InputError("other: has other features")
        if package == "fault":
            raise KeyError("secret")
        if package == "shared":
            raise TierUnreachable("shared: does not answer")

    def commit(package: str) -> int:
        if package == "friday" and link.place == 1:
            raise InputError("friday: is not loaded")
        return write("commit", package)

    def roll_out(rolled_out: RolledOut) -> int:
        if rolled_out.folder == "sunday" and link.place == 1:
            raise InputError("sunday: is not loaded")
        return write("roll_out", rolled_out.folder)

    actions: dict[str, Callable[..., Any]] = {
        "prepare": prepare,
        "commit": commit,
        "roll_out": roll_out,
        **{name: lambda *args, name=name: write(name, *args) for name in ("discard", "roll_back", "forget")},
    }
    write("started", os.getpid(), before and before.http_port, *loaded.folders)
    link.started(Started(8001 + link.place, 8000 + link.place), actions, is_over.set)
    asked = folder / f"ask-{link.place}"
    while not is_over.wait(0.01):
        if asked.is_file():
            order, *args = asked.read_text().split()
            asked.unlink()
            of_rollout = [RolledOut(name, name, Stage("films-1", share=0.1)) for name in args]
            try:
                answer = str(link.all(order, *(of_rollout if order == "roll_out" else args)))
            except Exception as error:  # noqa: BLE001 - the test reads it
                answer = f"{place_of(error)}: {error}"
            (folder / f"part-{link.place}").write_text(answer)
            (folder / f"part-{link.place}").rename(folder / f"answer-{link.place}")
    write("over")


class Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, place: int, order: str) -> str:
        """What a process gets that asks for something."""
        (self.folder / "part").write_text(order)
        (self.folder / "part").rename(self.folder / f"ask-{place}")
        answer = self.folder / f"answer-{place}"
        wait_until(answer.is_file)
        told = answer.read_text()
        answer.unlink()
        return told

    def done(self, place: int) -> list[str]:
        return (self.folder / f"{place}").read_text().splitlines()


def wait_until(is_so: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


class Bound:
    """`run` of a folder: processes are given it by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, link: Link, before: Started | None, loaded: Loaded) -> None:
        run(self.folder, link, before, loaded)


@contextmanager
def watched(folder: Path, packages: list[str]) -> Iterator[tuple[Fleet, Files, list[list[str]]]]:
    loaded: list[list[str]] = []
    with Fleet(2, Bound(folder), [], Loaded(tuple(packages)), lambda one: loaded.append(one.folders)) as fleet:
        is_over = threading.Event()
        watching = threading.Thread(target=fleet.watch, args=(is_over,))
        watching.start()
        try:
            yield fleet, Files(folder), loaded
        finally:
            is_over.set()
            watching.join()


def test_what_one_process_is_asked_for_all_do_and_one_that_ends_is_started_anew(tmp_path: Path) -> None:
    with watched(tmp_path, ["monday"]) as (fleet, files, loaded):
        assert fleet.started == [Started(8001, 8000), Started(8002, 8001)]
        assert files.ask(1, "forget 7") == "[0, 1]"
        assert [files.done(place)[1:] for place in (0, 1)] == [["forget 7"]] * 2
        # None answers by what one of them refuses, and those that took it let it go.
        assert files.ask(0, "prepare other") == f"InputError ({OWN}:{line_of('other: has')}): other: has other features"
        assert [files.done(place)[2:] for place in (0, 1)] == [["prepare other", "discard"]] * 2
        # Of a fault, no more is told than where it is.
        place = f"KeyError ({OWN}:{line_of('KeyError(')})"
        assert files.ask(0, "prepare fault") == f"{place}: {place}"
        place = f"TierUnreachable ({OWN}:{line_of('shared: does')})"
        assert files.ask(0, "prepare shared") == f"{place}: shared: does not answer"
        assert loaded == []
        assert files.ask(0, "commit tuesday") == "[0, 1]"
        assert loaded == [["monday", "tuesday"]]

        killed = fleet.pids[1]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: sum("started" in line for line in files.done(1)) == 2)
        (again,) = [line for line in files.done(1)[1:] if "started" in line]
        assert again == f"started {fleet.pids[1]} 8001 monday tuesday" and fleet.pids[1] != killed
        assert files.ask(1, "roll_back") == "[0, 1]"
        assert files.ask(0, "commit wednesday") == "[0, 1]"
        assert files.ask(0, "commit thursday") == "[0, 1]"
        assert loaded[1:] == [["monday"], ["monday", "wednesday"], ["wednesday", "thursday"]]
        # One that has not loaded what the others answer by is started anew with it.
        assert files.ask(0, "commit friday") == "[0]"
        wait_until(lambda: sum("started" in line for line in files.done(1)) == 3)
        assert files.done(1)[-1] == f"started {fleet.pids[1]} 8001 thursday friday"
        assert files.ask(0, "roll_out saturday") == "[0, 1]"
        assert files.ask(0, "roll_out sunday") == "[0]"
        wait_until(lambda: sum("started" in line for line in files.done(1)) == 4)
        assert files.done(1)[-1] == f"started {fleet.pids[1]} 8001 thursday friday sunday"
        assert files.ask(1, "roll_back") == "[0, 1]"
        assert loaded[-1] == ["thursday", "friday"]


def test_a_process_that_cannot_start_ends_the_others_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged: is no package"), watched(tmp_path, ["damaged"]):
        pass


def test_a_process_that_never_answers_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_MOST_SECONDS_TO_START", 0.2)
    with pytest.raises(InputError, match="process 0 does not answer after 0.2 s"), watched(tmp_path, ["stuck"]):
        pass


def test_processes_end_with_their_supervisor(tmp_path: Path) -> None:
    with Fleet(2, Bound(tmp_path), [], Loaded(), lambda _: None) as fleet:
        # As if it were killed.
        for worker in fleet._workers:
            worker.orders.close()
            worker.asks.close()
        files = Files(tmp_path)
        wait_until(lambda: all(files.done(place)[-1] == "over" for place in (0, 1)))
