import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import SCHEMA, make_table
from tests.launch import ROOT
from tests.training.test_training import MODEL, losses, refused
from torchrec_amort.apps import backtest
from torchrec_amort.apps.command import parse
from torchrec_amort.bench.backtest import BacktestConfig
from torchrec_amort.config import load_config
from torchrec_amort.data.writer import write_requests
from torchrec_amort.training.metrics import auc, log_losses
from torchrec_amort.training.run import TrainConfig

# Later than all events; a request each hour.
START, REQUESTS = 1_200_000, 120
SIZES = [*MODEL, "--loop.epochs=1", "--batch_size=20", "--bootstrap_samples=20"]


def at(hour: int) -> str:
    return datetime.fromtimestamp(START + 3600 * hour, timezone.utc).isoformat()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of requests whose days are not theirs."""
    folder = tmp_path_factory.mktemp("data") / "films"
    splits = {}
    for seed, (split, first, count) in enumerate((("train", 0, 70), ("test", 70, REQUESTS - 70))):
        table = make_table(count, seed, first)
        times = pa.array([START + 3600 * (first + row) for row in range(count)])
        splits[split] = [table.set_column(table.column_names.index("time"), "time", times)]
    write_requests(folder, SCHEMA, splits)
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    cuts = ",".join(at(hour) for hour in (40, 80, REQUESTS))
    return ["--data", str(data), "--out", str(out), f"--cuts=[{cuts}]", *SIZES, *more]


@pytest.fixture(scope="module")
def tested(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backtest") / "films"
    backtest.main(arguments(data, out, "--warm={warm_start_optimizer: 0.5}"))
    return out


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "backtest.json").read_text())
    return record


def test_each_arm_is_trained_until_a_day_and_tested_on_it(tested: Path) -> None:
    record = record_of(tested)
    configs = {
        str(path.parent.relative_to(tested)): load_config(path.parent, TrainConfig, "train")
        for path in tested.rglob("config.yaml")
    }
    spans = {name: (config.since, config.until, config.warm_start) for name, config in configs.items()}
    assert spans == {
        "first": (None, at(40), None),
        "cold/day-001": (None, at(80), None),
        "warm/day-001": (at(40), at(80), str(tested / "first")),
    }
    assert configs["warm/day-001"].warm_start_optimizer == 0.5
    steps = {name: max(losses(tested / name)) for name in configs}
    assert steps == {"first": 2, "cold/day-001": 4, "warm/day-001": 2}
    assert [(day["since"], day["until"], day["requests"]) for day in record["days"]] == [
        (at(40), at(80), 40),
        (at(80), at(REQUESTS), 40),
    ]
    trained = {arm: of_arm["trained"]["candidates"] for arm, of_arm in record["arms"].items()}
    first, second = (sum(day["arms"][arm]["trained"]["candidates"] for arm in ("warm",)) for day in record["days"])
    assert trained["stale"] == first
    assert trained["warm"] == first + second
    assert trained["cold"] == first + (first + second)


def test_the_report_says_what_the_predictions_say(tested: Path) -> None:
    record, table = record_of(tested), (tested / "backtest.md").read_text()
    assert (tested / "backtest.png").read_bytes().startswith(b"\x89PNG")
    day = START + 3600 * 80
    runs = {"cold": "cold/day-001", "warm": "warm/day-001", "stale": "first"}
    predictions = {arm: np.load(tested / run / f"test-{day}.npz") for arm, run in runs.items()}
    loss = {}
    for arm, one in predictions.items():
        logits, labels = one["logits"][:, 0], one["labels"][:, 0]
        values = record["days"][1]["arms"][arm]["tasks"]["liked"]
        assert values["auc"] == pytest.approx(auc(logits, labels))
        loss[arm] = float(log_losses(logits, labels).mean())
        of_days = [of_day["arms"][arm]["tasks"]["liked"]["auc"] for of_day in record["days"]]
        assert record["arms"][arm]["tasks"]["liked"]["auc"] == pytest.approx(np.mean(of_days))
    assert record["drift"]["liked"] == pytest.approx([0, loss["stale"] - loss["warm"]])
    for arm in ("warm", "stale"):
        assert record["days"][0]["differences"]["liked"][arm]["auc"]["difference"] == 0
        means = [record["arms"][name]["tasks"]["liked"]["auc"] for name in (arm, "cold")]
        difference = record["differences"]["liked"][arm]["auc"]
        assert difference["difference"] == pytest.approx(means[0] - means[1])
        assert f"{difference['difference']:+.4f} [{difference['low']:+.4f}" in table
    assert f"| mean | {record['arms']['cold']['tasks']['liked']['ne']:.4f} |" in table


def test_a_backtest_that_was_stopped_goes_on_where_it_was(data: Path, tested: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tested, tmp_path / "films"))
    (out / "backtest.json").unlink()
    for path in (out / "warm" / "day-001").glob("te*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("train.json")}
    # What a run starts with is named by its folder: the copy is the run's own.
    for path in out.rglob("config.yaml"):
        path.write_text(path.read_text().replace(str(tested), str(out)))
    backtest.main(arguments(data, out, "--warm={warm_start_optimizer: 0.5}"))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("train.json")} == before
    first, again = record_of(tested), record_of(out)
    assert again["days"] == first["days"]
    assert again["differences"] == first["differences"]


def test_what_cannot_be_backtested_is_refused_before_training(
    data: Path, tested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "films"
    for more, told in (
        (["--cuts=[1970-01-20]"], "give the end of the first window and that of a day, at least"),
        (["--cuts=[1970-01-20,1970-01-19]"], "which is not later: give a later time"),
        (
            ["--cuts=[1970-01-17,1971-01-01,1972-01-01]"],
            "no request of split 'all' is from 1971-01-01 until 1972-01-01",
        ),
        (["--cuts=[1970-01-20,soon]"], "until is 'soon', not a time such as 2023-05-24 07:00"),
        (["--arms=[warm,stale]"], "reference: 'cold' is none of the arms warm, stale"),
    ):
        assert told in refused(capsys, backtest.main, arguments(data, out, *more))
        assert not out.exists()
    line = refused(capsys, backtest.main, arguments(data, tested, "--optimizer.table_lr=0.5"))
    assert (
        "was trained with optimizer.table_lr=0.05, the config says 0.5: use the same, or choose another folder" in line
    )


@pytest.mark.parametrize(("example", "days"), [("ebnerd", 4), ("kuairand", 10)])
def test_the_examples_are_configs_of_days_in_order(example: str, days: int) -> None:
    config = parse(BacktestConfig, "backtest", ["--config", str(ROOT / "examples" / f"backtest_{example}.yaml")])
    assert {day.stop - day.start for day in config.days} == {24 * 3600}
    assert len(config.days) == days
