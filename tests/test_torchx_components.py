import json
import runpy
from pathlib import Path

import pytest
from torchx.components.component_test_base import ComponentTestCase

from tests.launch import ROOT, launch

COMPONENTS = ROOT / "torchx_components" / "amort.py"


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "benchmark"])
def test_torchx_accepts_the_component(name: str) -> None:
    case = ComponentTestCase()
    case.setUp()
    functions = runpy.run_path(str(COMPONENTS))
    module = type("components", (), {"__file__": str(COMPONENTS), name: functions[name]})
    case.validate(module, name)


def test_a_dry_run_says_what_will_run() -> None:
    command = ["torchx", "run", "--dryrun", "-s", "local_cwd", f"{COMPONENTS}:train", "-j", "2x3", "--max_retries", "4"]
    shown = launch(*command, "--", "--run_folder", "runs/x", "--data", "data/x").stdout
    for part in ("--nnodes 2", "--nproc_per_node 3", "-m torchrec_amort.apps.train", "--run_folder runs/x"):
        assert part in shown, shown
    assert "'max_retries': 4" in shown


def test_trains_and_evaluates_on_two_local_ranks(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    local = ["torchx", "run", "-s", "local_cwd"]
    args = ["--data", str(data_folder), "--run_folder", str(run), "--loop.epochs", "1", "--model.embedding_dim", "8"]
    output = launch(*local, f"{COMPONENTS}:train", "-j", "1x2", "--", *args)
    assert "train: 100%" in output.stdout + output.stderr
    launch(*local, f"{COMPONENTS}:evaluate", "-j", "1x2", "--", "--run_folder", str(run))
    assert json.loads((run / "evaluate-test.json").read_text())["world_size"] == 2
    assert json.loads((run / "train.json").read_text())["world_size"] == 2
