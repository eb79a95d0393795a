"""The commands of docs/launching.md are run here, or dry-run where they need a cluster."""

import configparser
import importlib.util
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories

from tests.launch import ROOT, launch
from tests.pages import CLUSTERS, LAUNCHING, blocks, commands, scheduler_of, small_clone

ON_CLUSTERS = {scheduler_of(command): command for command in commands(LAUNCHING) if scheduler_of(command) in CLUSTERS}


def dry_run(scheduler: str, clone: Path) -> str:
    """What the scheduler would get for the page's command, on one line."""
    if package := CLUSTERS[scheduler]:
        pytest.importorskip(package)
    command = ON_CLUSTERS[scheduler].replace(" --dryrun", "").replace("torchx run", "torchx run --dryrun")
    _, request = launch(*shlex.split(command), cwd=clone).stdout.split("=== SCHEDULER REQUEST ===")
    return " ".join(request.split())


@pytest.fixture
def clone(data_folder: Path, tmp_path: Path) -> Path:
    return small_clone(tmp_path, data_folder)


@pytest.mark.parametrize("scheduler", [name for name in CLUSTERS if name != "slurm"])
def test_the_nodes_of_a_cluster_run_what_the_page_says(scheduler: str, clone: Path) -> None:
    request = dry_run(scheduler, clone)
    lines = [re.escape(" ".join(block.split())).replace("JOB", r"[\w-]+") for block in blocks(LAUNCHING, "text")]
    assert len(lines) == 3
    assert any(re.search(line, request) for line in lines), request


def test_the_script_for_slurm_asks_for_what_torchx_asks_for(clone: Path) -> None:
    """`make test-slurm` runs both."""
    request = dry_run("slurm", clone)
    (script,) = blocks(LAUNCHING, "sh")
    (options,) = re.findall("#SBATCH --nodes=2 (.*)", script)
    for option in options.split():
        assert request.count(f" {option} ") == 2, option
    assert "TORCHX_MAX_RETRIES=3" in request
    assert "-lt 3 ]" in script


def test_the_example_settings_are_those_of_torchx_and_of_the_component() -> None:
    settings = configparser.ConfigParser()
    settings.optionxform = str  # type: ignore[assignment, method-assign] # as TorchX does
    settings.read(ROOT / "examples" / "torchxconfig")
    for scheduler in ("local_cwd", *CLUSTERS):
        if scheduler != "ray" or importlib.util.find_spec("ray"):
            known = {name for name, _ in get_scheduler_factories()[scheduler]("test").run_opts()}
            assert settings[scheduler].keys() <= known
    component = settings["cli:run"]["component"]
    file, name = component.split(":")
    parameters = inspect.signature(runpy.run_path(str(ROOT / file))[name]).parameters
    assert settings[f"component:{component}"].keys() <= parameters.keys()


def test_the_example_settings_are_taken(clone: Path) -> None:
    launch("cp", "examples/torchxconfig", ".torchxconfig", cwd=clone)
    run = ("torchx", "run", "--dryrun")
    local = launch(*run, "--", "-j", "1x2", cwd=clone).stdout
    for part in ("--nproc_per_node 2", "'PET_MAX_RESTARTS': '1'", "'TORCHX_TRACKERS': 'fsspec'", "runs/logs"):
        assert part in local
    assert " --partition=all --time=04:00:00 " in launch(*run, "-s", "slurm", cwd=clone).stdout
