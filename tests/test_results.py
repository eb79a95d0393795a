"""The figures on the pages of results and benchmarks are those of the records beside them."""

import json
from pathlib import Path

import pytest

from tests.launch import ROOT
from torchrec_amort.bench import backtest_report, server_load_report
from torchrec_amort.bench.benchmark_report import table
from torchrec_amort.bench.compare_report import markdown

PAGE = (ROOT / "docs" / "results.md").read_text()
SERVERS = [f"server_{name}" for name in ("grpc", "rest", "over", "half", "worker", "workers", "processes")]
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


@pytest.mark.parametrize("name", SERVERS)
def test_every_load_is_that_of_its_record(name: str) -> None:
    record = json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())
    lines = [line for line in server_load_report.markdown(record).splitlines() if line.startswith("|")]
    assert "\n".join(lines) in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "backtests").glob("*.json")), ids=lambda path: path.stem)
def test_every_backtest_is_that_of_its_record(path: Path) -> None:
    assert backtest_report.markdown(json.loads(path.read_text())) in PAGE
    assert f"backtests/{path.stem}.png" in PAGE
    assert f"examples/backtest_{path.stem}.yaml" in PAGE
