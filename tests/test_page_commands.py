"""What the README and docs/launching.md tell people to run is run here, on small data."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.launch import BIN, launch, torchrun, torchrun_command
from tests.pages import SMALL, commands, local_commands, run_here, small_clone


def named(command: str) -> list[str]:
    """The commands of ours in a line."""
    return re.findall(r"(?:torchrec-amort |apps\.|amort\.py:)(\w+)", command)


@pytest.fixture(scope="module")
def launched(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A clone in which the local commands of docs/launching.md ran, and what each of ours showed."""
    clone, shown = small_clone(tmp_path_factory.mktemp("clone"), data_folder), []
    # Settings first.
    for command in sorted(local_commands(), key=lambda line: not line.startswith(("cp ", "mkdir "))):
        words, names = shlex.split(command), named(command)
        small = [option for name in names for option in SMALL[name]]
        if words[0] == "torchrun":
            arguments = words[len(torchrun_command(2, *names)) :]
            assert tuple(words) == torchrun_command(2, *names, *arguments)
            done = torchrun(2, *names, *arguments, *small, cwd=clone)
        else:
            done = launch(*words, *small, cwd=clone)
        shown += [(name, done.stdout + done.stderr) for name in names]
    return clone, shown


def test_the_local_commands_run(launched: tuple[Path, list[tuple[str, str]]]) -> None:
    clone, shown = launched
    assert len(shown) == 5
    for name, output in shown:
        assert f"{name}: 100%" in output
    results = {path.parent.name: json.loads(path.read_text()) for path in clone.glob("runs/*/train.json")}
    assert {run: result["world_size"] for run, result in results.items()} == {
        "one-rank": 1,
        "two-ranks": 2,
        "torchrun": 2,
    }
    two_ranks = clone / "runs" / "two-ranks"
    assert json.loads((two_ranks / "evaluate-test.json").read_text())["world_size"] == 2
    assert (two_ranks / "benchmark.json").exists()
    (job,) = re.findall(r"local_cwd://\S+/train-\S+", launch("torchx", "tracker", "list", "jobs", cwd=clone).stdout)
    tracked = launch("torchx", "tracker", "list", "metadata", job, cwd=clone).stdout
    assert re.search(r"world_size +2\n", tracked)


@pytest.mark.usefixtures("uncompiled")
def test_every_other_command_of_the_readme_runs(
    launched: tuple[Path, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, _ = launched
    monkeypatch.chdir(clone)
    ran = set(local_commands())
    for command in commands("README.md"):
        if command.startswith(("make ", "git ", "cd ", "pip ", "torchrec-amort prepare")):
            continue
        if "tensorboard" in command:
            assert (BIN / "tensorboard").exists()
        elif command not in ran:
            assert command.startswith("torchrec-amort ")
            run_here(command)
            ran.add(command)
    assert {"torchx", "torchrun", "torchrec-amort"} <= {command.split()[0] for command in ran}
