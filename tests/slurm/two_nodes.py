"""What docs/launching.md submits to Slurm, run on two nodes. `make test-slurm` starts a Slurm and this.

It is not named as tests are, so that pytest collects it only where it is asked to.
"""

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.launch import launch
from tests.pages import blocks, commands, small_clone
from tests.training.test_training import FEW_STEPS, ROUNDING, losses, up_to

PAGE = "docs/launching.md"
SMALL = ["--model.embedding_dim=8", "--loop.epochs=4", "--loop.log_every=1"]


@pytest.fixture(scope="module")
def clone(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clone(tmp_path_factory.mktemp("clone"), data_folder)


@pytest.fixture(scope="module")
def one_rank(clone: Path) -> Path:
    (command,) = [command for command in commands(PAGE) if command.startswith("torchrec-amort train ")]
    launch(*shlex.split(command), *SMALL, cwd=clone)
    return clone / "runs" / "one-rank"


def submit(clone: Path, *more: str, options: Sequence[str] = ()) -> str:
    """Submit the page's command with more arguments for training, and more options of the component."""
    (command,) = [command for command in commands(PAGE) if "-s slurm" in command]
    command = command.replace(" -- ", f" {shlex.join(options)} -- ")
    # It ends with an error after it has submitted the job: this Slurm keeps no accounts.
    submitted = launch(*shlex.split(command), *SMALL, *more, cwd=clone, check=False)
    handle = re.fullmatch(r"slurm://torchx/(\d+)\n", submitted.stdout)
    assert handle, submitted.stderr
    return handle.group(1)


def wait_until(happened: Callable[[], object], clone: Path) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, output(clone)
        time.sleep(0.2)


def output(clone: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-4000:]}" for path in sorted(clone.glob("slurm-*")))


def finish(job: str, clone: Path) -> str:
    """Wait for a job that must succeed; gives what Slurm knows of it."""
    wait_until(lambda: not launch("squeue", "--noheader", f"--jobs={job}", check=False).stdout, clone)
    known = launch("scontrol", "show", "job", job).stdout
    assert set(re.findall(r"JobState=(\w+)", known)) == {"COMPLETED"}, output(clone)
    return known


def result(run: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((run / "train.json").read_text())
    return record


@pytest.fixture(scope="module")
def two_nodes(clone: Path) -> Path:
    """A job that nothing disturbed."""
    finish(submit(clone), clone)
    return clone / "runs" / "two-nodes"


def check(run: Path, two_nodes: Path) -> None:
    """Two ranks, and the losses of the undisturbed job; that a loss is finite, training checks."""
    assert result(run)["world_size"] == 2
    assert losses(run) == losses(two_nodes)
    steps = len(losses(two_nodes))
    assert steps == 96
    assert (run / "checkpoints" / f"step-{steps:09d}").is_dir()


def test_two_nodes_train_as_one_rank_does(two_nodes: Path, one_rank: Path) -> None:
    check(two_nodes, two_nodes)
    first = up_to(FEW_STEPS, losses(two_nodes))
    assert first == pytest.approx(up_to(FEW_STEPS, losses(one_rank)), rel=ROUNDING)
    assert result(two_nodes)["candidates"] == result(one_rank)["candidates"]


def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(clone: Path, two_nodes: Path) -> None:
    run = clone / "runs" / "stopped"
    job = submit(clone, f"--run_folder={run}")
    wait_until(lambda: (run / "metrics.jsonl").exists() and losses(run), clone)
    launch("scancel", "--signal=TERM", job)
    assert set(re.findall(r"Restarts=(\d)", finish(job, clone))) == {"1"}
    check(run, two_nodes)
    # Only those since it went on.
    assert 0 < result(run)["candidates"] < result(two_nodes)["candidates"]  # type: ignore[operator]


def test_ranks_start_again_when_one_is_killed(clone: Path, two_nodes: Path) -> None:
    run = clone / "runs" / "killed"
    job = submit(clone, f"--run_folder={run}", "--loop.checkpoint_every=5", options=["--max_restarts", "1"])
    wait_until(lambda: list(run.glob("checkpoints/step-*")), clone)
    # Both nodes are on this host. Only ranks have python's -u, the launchers do not.
    ranks = launch("pgrep", "--full", "--", f"-u -m torchrec_amort.apps.train .*{run}").stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert set(re.findall(r"Restarts=(\d)", finish(job, clone))) == {"0"}
    check(run, two_nodes)
    assert 0 < result(run)["candidates"] < result(two_nodes)["candidates"]  # type: ignore[operator]


def test_the_script_without_torchx_does_the_same(clone: Path, two_nodes: Path) -> None:
    (script,) = blocks(PAGE, "sh")
    (clone / "train.sbatch").write_text(script.replace("--resume true", shlex.join(["--resume=true", *SMALL])))
    finish(launch("sbatch", "--parsable", "train.sbatch", cwd=clone).stdout.strip(), clone)
    check(clone / "runs" / "sbatch", two_nodes)
