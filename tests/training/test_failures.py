"""What goes wrong on a cluster: ranks that die, jobs that are told to stop, checkpoints and disks that fail."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch import launch, torchrun, torchrun_command
from tests.training.failing_rank import full_disk
from tests.training.test_training import (
    arguments,
    checkpoints,
    losses,
    quality,
    refused,
    weights,
)
from torchrec_amort.apps import evaluate, train
from torchrec_amort.errors import InputError
from torchrec_amort.training.loop import LoopConfig
from torchrec_amort.training.processes import process_group


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Watch for what a process is to do; it must still be at work then."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_a_restart_does_not_take_up_the_run_of_another_job(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main(arguments(data_folder, run))
    refused_twice = torchrun(2, "train", *arguments(data_folder, run), max_restarts=1, check=False)
    assert refused_twice.returncode != 0
    refusals = [
        line
        for line in refused_twice.stderr.splitlines()
        if line.startswith("error") and "has a checkpoint already" in line
    ]
    # Once by each rank of the first start and of the second.
    assert sorted(line.split(":")[0] for line in refusals) == ["error"] * 2 + ["error (rank 1)"] * 2
    assert losses(run).keys() == set(range(1, 26))


def test_restarts_on_several_nodes_are_refused_where_ranks_would_wait_for_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (node | torchrun).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), process_group():
        pass


def test_a_rank_that_raises_shows_its_own_traceback_first(data_folder: Path, tmp_path: Path) -> None:
    command = ("raises", *arguments(data_folder, tmp_path / "run"))
    failed = launch(*torchrun_command(2, "tests.training.failing_rank", *command), check=False)
    assert failed.returncode != 0
    assert failed.stderr.count("Traceback") > 1
    first = failed.stderr.split("Traceback")[1]
    assert "RuntimeError: a cosmic ray" in first
    root_cause = failed.stderr.split("Root Cause (first observed failure):")[1]
    assert "rank      : 1" in root_cause
    assert "RuntimeError: a cosmic ray" in root_cause


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit flipped": lambda folder: flip(folder / "__0_0.distcp"),
    "half a file": lambda folder: halve(folder / "__0_0.distcp"),
    "half the index": lambda folder: halve(folder / ".metadata"),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "no file": lambda folder: (folder / "__0_0.distcp").unlink(),
}


@pytest.fixture(scope="module")
def two_epochs(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "two_epochs"
    train.main(arguments(data_folder, run, "--loop.epochs=2"))
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    damage: str, data_folder: Path, tmp_path: Path, two_epochs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(two_epochs, tmp_path / "run"))
    assert checkpoints(run) == ["step-000000025", "step-000000050"]
    DAMAGES[damage](run / "checkpoints" / "step-000000050")
    # What a rank left that died while it wrote.
    (run / "checkpoints" / ".step-000000051.tmp").mkdir()
    evaluate.main(["--run_folder", str(run)])
    assert quality(run)["checkpoint"] == "step-000000025"
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("torchrec_amort")]
    assert "step-000000050: the checkpoint is damaged or does not fit the model" in warning
    assert "step-000000025 is used instead" in warning
    train.main(arguments(data_folder, run, "--loop.epochs=2", "--resume=true"))
    assert losses(run) == losses(two_epochs)
    expected = weights(data_folder, two_epochs)
    assert all(value.equal(expected[name]) for name, value in weights(data_folder, run).items())
    assert checkpoints(run) == ["step-000000025", "step-000000050"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    ranks: int, data_folder: Path, tmp_path: Path, two_epochs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(two_epochs, tmp_path / "run"))
    command = arguments(data_folder, run, "--loop.epochs=3", "--resume=true")
    if ranks == 1:
        with full_disk():
            output = refused(capsys, train.main, command)
    else:
        failed = torchrun(ranks, "tests.training.failing_rank", "has_a_full_disk", *command, check=False)
        assert failed.returncode == 1
        output = failed.stderr
    assert "a checkpoint could not be written (" in output
    assert "File too large" in output
    assert "go on from the last one with --resume true" in output
    assert checkpoints(run) == ["step-000000025", "step-000000050"]
    train.main(command)
    assert checkpoints(run) == ["step-000000050", "step-000000075"]


@pytest.mark.parametrize("field", ["log_every", "checkpoint_every", "keep_checkpoints"])
def test_a_loop_that_never_saves_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"loop.{field} is 0: give 1 or more"):
        LoopConfig(**{field: 0})  # type: ignore[arg-type]


@pytest.fixture
def closed_folder(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    yield folder
    folder.chmod(0o700)


def test_a_folder_that_may_not_be_written_is_refused(
    data_folder: Path, closed_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, train.main, arguments(data_folder, closed_folder / "run"))
    assert "Permission denied" in line
    assert "choose a folder that can be written" in line


def test_a_file_where_the_run_should_be_is_refused(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = refused(capsys, train.main, arguments(data_folder, tmp_path / "file" / "run"))
    assert "Not a directory" in line
