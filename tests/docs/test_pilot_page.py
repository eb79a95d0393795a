"""The commands of docs/pilot.md are run here, on small data; its summary is that of the record beside it."""

import json
import shlex
from pathlib import Path

import pytest

from tests.launch import ROOT, launch
from tests.pages import SMALL, blocks, commands, small_clone
from torchrec_amort.bench.pilot_report import page, summary

pytestmark = pytest.mark.docs


def test_the_commands_run(data_folder: Path, tmp_path: Path) -> None:
    clone = small_clone(tmp_path, data_folder)
    lines = [shlex.split(command) for command in commands("docs/pilot.md")]
    for line in lines:
        output = launch(*line, *SMALL[line[1]], cwd=clone).stdout
        folder = clone / line[-1]
        assert (folder / f"{line[1]}.json").is_file()
        if line[1] == "pilot":
            assert (folder / "pilot.txt").read_text() in output
    assert [line[1] for line in lines].count("pilot") >= 4


def test_summary_and_page_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "docs" / "pilot" / "movielens.json").read_text())
    (shown,) = blocks("docs/pilot.md", "text")
    assert shown.strip() == summary(record).strip()
    # Pictures may differ from one version of matplotlib to the next.
    told = (ROOT / "docs" / "pilot" / "movielens.html").read_text()
    without_pictures = [line for line in page(record).splitlines() if "<img" not in line]
    assert [line for line in told.splitlines() if "<img" not in line] == without_pictures
