"""The figures on the pages of results and benchmarks are those of the records beside them."""

import json
from pathlib import Path

import pytest

from tests.launch import ROOT
from torchrec_amort.bench.benchmark_report import table
from torchrec_amort.bench.compare_report import markdown

PAGE = (ROOT / "docs" / "results.md").read_text()
RECORDS = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_table_is_that_of_its_record(path: Path) -> None:
    assert markdown(json.loads(path.read_text())) in PAGE
    assert f"results/{path.stem}.png" in PAGE
    assert path.with_suffix(".png").exists()
    assert f"examples/compare_{path.stem}.yaml" in PAGE


@pytest.mark.parametrize("name", ["methods", "sweep", "memory", "load", "mind"])
def test_every_benchmark_is_that_of_its_record(name: str) -> None:
    record = json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())
    assert table(record) in (ROOT / "docs" / "benchmarks.md").read_text()
