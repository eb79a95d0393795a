"""The commands of docs/pilot.md are run here, on small data; its summary is that of the record beside it."""

import json
import shlex
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.pages import blocks, commands, run_here, small_clone
from torchrec_amort.bench.pilot_report import page, summary

pytestmark = pytest.mark.docs


def test_the_commands_run(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = small_clone(tmp_path, data_folder)
    monkeypatch.chdir(clone)
    lines = commands("docs/pilot.md")
    for line in lines:
        run_here(line)
        (_, name, *_, out) = shlex.split(line)
        assert (clone / out / f"{name}.json").is_file()
        if name == "pilot":
            assert (clone / out / "pilot.txt").read_text() in capsys.readouterr().out
    assert [line.split()[1] for line in lines].count("pilot") >= 4


def test_summary_and_page_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "docs" / "pilot" / "movielens.json").read_text())
    (shown,) = blocks("docs/pilot.md", "text")
    assert shown.strip() == summary(record).strip()
    # Pictures may differ from one version of matplotlib to the next.
    told = (ROOT / "docs" / "pilot" / "movielens.html").read_text()
    without_pictures = [line for line in page(record).splitlines() if "<img" not in line]
    assert [line for line in told.splitlines() if "<img" not in line] == without_pictures
