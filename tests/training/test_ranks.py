"""Two and three ranks train as one does, and go on after each other, whatever ended them."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import SCHEMA, make_table
from tests.launch import start, torchrun, torchrun_command
from tests.training.test_failures import flip, wait_for
from tests.training.test_training import (
    FEW_STEPS,
    ROUNDING,
    arguments,
    checkpoints,
    cut_back,
    losses,
    quality,
    up_to,
    weights,
)
from torchrec_amort.apps import evaluate, train
from torchrec_amort.data.writer import write_requests

# 50 steps. Every tenth checkpoint is between two reports.
SAVED_OFTEN = (
    "--loop.epochs=2",
    "--loop.log_every=4",
    "--loop.checkpoint_every=10",
    "--loop.keep_checkpoints=9",
)


@pytest.fixture(scope="module")
def run_of_one_rank(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in this process that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train.main(arguments(data_folder, run, *SAVED_OFTEN))
    return run


@pytest.fixture(scope="module")
def run_of_two_ranks(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks of torchrun."""
    run = tmp_path_factory.mktemp("runs") / "two"
    torchrun(2, "train", *arguments(data_folder, run, *SAVED_OFTEN))
    return run


def test_two_ranks_train_as_one_on_the_same_global_batches(
    tmp_path: Path, data_folder: Path, run_of_one_rank: Path, run_of_two_ranks: Path
) -> None:
    plan = (run_of_two_ranks / "plan.txt").read_text()
    assert "row_wise" in plan or "table_wise" in plan
    for metric in ("loss", "ne/liked", "ne/bought"):
        one, two = (up_to(FEW_STEPS, losses(run, metric)) for run in (run_of_one_rank, run_of_two_ranks))
        assert list(one) == [4, 8]
        assert two == pytest.approx(one, rel=ROUNDING)
    for run in (run_of_one_rank, run_of_two_ranks):
        assert max(losses(run)) == 50
        assert losses(run)[50] < losses(run)[4]
    records = [json.loads((run / "train.json").read_text()) for run in (run_of_one_rank, run_of_two_ranks)]
    counts = json.loads((data_folder / "counts.json").read_text())
    assert [record["candidates"] for record in records] == [2 * counts["train"]["candidates"]] * 2
    first, second = (cut_back(run, FEW_STEPS, tmp_path / run.name) for run in (run_of_one_rank, run_of_two_ranks))
    whole = weights(data_folder, first)
    for name, value in weights(data_folder, second).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-4)
    evaluate.main(["--run_folder", str(first)])
    torchrun(2, "evaluate", "--run_folder", str(second))
    one_rank, two_ranks = quality(first), quality(second)
    assert (one_rank["world_size"], two_ranks["world_size"]) == (1, 2)
    for count in ("requests", "candidates", "users"):
        assert one_rank[count] == two_ranks[count]
    for task in ("liked", "bought"):
        # Two candidates that change places are 1e-4 of an AUC.
        assert two_ranks["tasks"][task] == pytest.approx(one_rank["tasks"][task], rel=1e-3)
    assert {file.name for file in first.iterdir()} >= {
        "config.yaml",
        "schema.json",
        "plan.txt",
        "train.json",
        "tensorboard",
    }


def test_uneven_data_trains_on_three_ranks_as_on_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_requests(data, SCHEMA, {split: [make_table(31, seed)] for seed, split in enumerate(("train", "test"))})
    # Five steps of 6 or 7 requests; of the 7 lanes one rank has three and the others two.
    one, three = (arguments(data, tmp_path / name, "--batch_size=7") for name in ("one", "three"))
    train.main(one)
    torchrun(3, "train", *three)
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=ROUNDING)


def test_a_killed_rank_starts_the_job_again_from_the_last_checkpoint(
    data_folder: Path, tmp_path: Path, run_of_two_ranks: Path
) -> None:
    run = tmp_path / "run"
    command = ("is_killed", *arguments(data_folder, run, *SAVED_OFTEN))
    torchrun(2, "tests.training.failing_rank", *command, max_restarts=1)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["restarts"], environment["world_size"]) == (1, 2)
    # Trained on since the restart: all but the 10 steps before the checkpoint.
    killed, undisturbed = (json.loads((folder / "train.json").read_text()) for folder in (run, run_of_two_ranks))
    assert undisturbed["candidates"] / 2 < killed["candidates"] < undisturbed["candidates"]
    assert losses(run) == losses(run_of_two_ranks)
    expected = weights(data_folder, run_of_two_ranks)
    assert all(value.equal(expected[name]) for name, value in weights(data_folder, run).items())
    assert checkpoints(run) == checkpoints(run_of_two_ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends_the_job(
    ranks: int, data_folder: Path, tmp_path: Path, run_of_one_rank: Path, run_of_two_ranks: Path
) -> None:
    run, undisturbed = tmp_path / "run", {1: run_of_one_rank, 2: run_of_two_ranks}[ranks]
    command = arguments(data_folder, run, *SAVED_OFTEN, "--loop.epochs=8")
    process = start(*(("torchrec-amort", "train", *command) if ranks == 1 else torchrun_command(2, "train", *command)))
    wait_for(lambda: (run / "metrics.jsonl").exists() and losses(run), process)
    process.terminate()
    output, _ = process.communicate(timeout=300)
    step = int(checkpoints(run)[-1].removeprefix("step-"))
    assert f"terminated: {run}: stopped after step {step}, which has a checkpoint" in output
    assert step % 10 == 0
    if ranks == 1:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in output
    assert step - 4 < max(losses(run)) <= step < 200
    assert up_to(step, losses(run)) == up_to(step, losses(undisturbed))
    train.main(arguments(data_folder, run, *SAVED_OFTEN, "--resume=true"))
    assert max(losses(run)) == 50
    if ranks == 1:
        assert losses(run) == losses(undisturbed)
    else:
        more = step + FEW_STEPS
        assert up_to(more, losses(run)) == pytest.approx(up_to(more, losses(undisturbed)), rel=ROUNDING)


def test_two_ranks_skip_a_checkpoint_that_one_finds_damaged(
    data_folder: Path, tmp_path: Path, run_of_two_ranks: Path
) -> None:
    run = Path(shutil.copytree(run_of_two_ranks, tmp_path / "run"))
    flip(run / "checkpoints" / "step-000000050" / "__1_0.distcp")
    again = torchrun(2, "train", *arguments(data_folder, run, *SAVED_OFTEN, "--resume=true"))
    assert "__1_0.distcp is not what was written" in again.stderr
    assert losses(run) == losses(run_of_two_ranks)


def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_three(
    data_folder: Path, tmp_path: Path, run_of_two_ranks: Path
) -> None:
    # In mid-epoch and between two reports.
    runs = {ranks: cut_back(run_of_two_ranks, 10, tmp_path / str(ranks)) for ranks in (1, 3)}
    train.main(arguments(data_folder, runs[1], *SAVED_OFTEN, "--loop.epochs=1", "--resume=true"))
    torchrun(3, "train", *arguments(data_folder, runs[3], *SAVED_OFTEN, "--loop.epochs=1", "--resume=true"))
    expected = cut_back(run_of_two_ranks, 20, tmp_path / "2")
    evaluate.main(["--run_folder", str(expected)])
    for run in runs.values():
        assert max(losses(run)) == 25
        for metric in ("loss", "ne/liked"):
            found = up_to(20, losses(run, metric))
            assert found == pytest.approx(up_to(20, losses(expected, metric)), rel=ROUNDING)
        evaluate.main(["--run_folder", str(cut_back(run, 20, tmp_path / f"{run.name} of 20"))])
    for run in tmp_path.glob("* of 20"):
        for task, values in quality(expected)["tasks"].items():
            assert quality(run)["tasks"][task] == pytest.approx(values, rel=1e-3)
