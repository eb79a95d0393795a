"""The figures on the page of results are those of the records beside it."""

import json
from pathlib import Path

import pytest

from tests.launch import ROOT
from torchrec_amort.apps.compare_report import markdown

PAGE = (ROOT / "docs" / "results.md").read_text()
RECORDS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_table_is_that_of_its_record(path: Path) -> None:
    assert markdown(json.loads(path.read_text())) in PAGE
    assert f"results/{path.stem}.png" in PAGE
    assert path.with_suffix(".png").exists()
    assert f"examples/compare_{path.stem}.yaml" in PAGE
