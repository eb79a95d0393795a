"""What the README tells people to run is run here, on small data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_request
from tests.launch import ROOT, launch
from tests.pages import SMALL, blocks, commands
from torchrec_amort import RequestSchema

README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    made = [line.split()[1] for line in commands("README.md") if line.startswith("make ")]
    assert made[:2] == ["demo", "test"]
    for target in made:
        assert launch("make", "--dry-run", target).returncode == 0
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_python_code_runs(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "movielens-1m"
    train = ["--data", str(data_folder), "--run_folder", str(run), *SMALL["train"]]
    launch("torchrec-amort", "train", "--config", "examples/movielens.yaml", *train)
    schema = RequestSchema.load(data_folder)
    request = make_request(np.random.default_rng(0), 5, 3)
    given = {k: v for k, v in request.items() if k in schema.arrow_schema().names and k not in schema.labels}
    for block in blocks("README.md", "python"):
        code = block.replace("data/movielens-1m", str(data_folder)).replace("runs/movielens-1m", str(run))
        code = re.sub(r"requests = \[.*?\n\]\n", f"requests = [{given!r}]\n", code, flags=re.DOTALL)
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", ["encoders", "serving"])
def test_the_python_code_of_the_pages_runs(name: str) -> None:
    code = "\n".join(blocks(f"docs/{name}.md", "python"))
    exec(compile(code, f"{name}.md", "exec"), {"__name__": name})


def test_the_demos_output_in_the_readme_is_that_of_its_summary() -> None:
    summary = json.loads((ROOT / "docs" / "demo.json").read_text())
    for model in ("no_history", "history"):
        assert f"{summary[model]['auc']:.4f}" in README
    assert f"{summary['speedup_p50']:.1f} times faster" in README
    assert (ROOT / "docs" / "demo.png").exists()


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path: Path, shared_data: Path) -> None:
    source = str(shared_data / "ml-1m" / "ml-1m.zip")
    launch(
        "python",
        "examples/demo.py",
        "--source",
        source,
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["history"]["auc"] >= 0.792
    assert summary["history"]["ne"] <= 0.795
    assert abs(summary["no_history"]["auc"] - (0.7567 + 0.7529) / 2) <= 0.006
    assert summary["max_score_difference"] <= 1e-5
    assert summary["seconds"] <= 720
    assert (tmp_path / "out" / "summary.png").exists()
