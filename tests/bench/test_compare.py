import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch import torchrun
from tests.training.test_training import ROUNDING
from torchrec_amort.apps import compare, evaluate
from torchrec_amort.training.metrics import SHOWN, auc

SIZES = ["--model.embedding_dim=8", "--model.history_length=8", "--loop.epochs=1", "--bootstrap_samples=20"]
SIZES += ["--batch_size=100"]  # 6 steps
SPEED = ["--speed.train_steps=2", "--speed.requests=3", "--speed.candidates=4", "--speed.history_length=5"]
GRID = "--grid=[{optimizer.dense_lr: 0.001}, {optimizer.dense_lr: 0.01}]"
CONTROLS = "--controls={short: none}"
VARIANTS = "--variants={short: {model.history: append_cross, model.history_length: 2}}"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    common = ["--data", str(data), "--out", str(out), "--seeds=[0, 1]", "--encoders=[none,append_cross,concatenation]"]
    return [*common, *SIZES, *SPEED, GRID, VARIANTS, CONTROLS, *more]


@pytest.fixture(scope="module")
def compared(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "films"
    compare.main(arguments(data_folder, out))
    return out


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return record


def test_every_arm_is_tuned_on_validation_and_tested_with_every_seed(compared: Path) -> None:
    record = record_of(compared)
    assert list(record["arms"]) == ["none", "append_cross", "concatenation", "short"]
    for name, arm in record["arms"].items():
        best = int(np.argmin(arm["validation_ne"]))
        assert arm["setting"] == ({"optimizer.dense_lr": 0.01} if best else {})
        for setting in (0, 1):
            validation = compared / name / f"setting-{setting}" / "seed-0" / "evaluate-validation.json"
            tasks = json.loads(validation.read_text())["tasks"]
            assert arm["validation_ne"][setting] == pytest.approx(np.mean([tasks[task]["ne"] for task in tasks]))
        for seed in (0, 1):
            run = compared / name / f"setting-{best}" / f"seed-{seed}"
            predictions = np.load(run / "predictions-test.npz")
            expected = auc(predictions["logits"][:, 1], predictions["labels"][:, 1])
            assert arm["test"][seed]["bought"]["auc"] == pytest.approx(expected, rel=1e-12)
            assert arm["slices"][seed] == json.loads((run / "evaluate-test.json").read_text())["slices"]
        # Nothing of the test split is looked at before a setting is chosen.
        assert not (compared / name / f"setting-{1 - best}" / "seed-0" / "evaluate-test.json").exists()


def test_the_table_says_what_the_record_says(compared: Path) -> None:
    record, table = record_of(compared), (compared / "compare.md").read_text()
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| concatenation")]
    assert len(rows) == 5
    for task, quality, versus in (("liked", *rows[:2]), ("bought", *rows[2:4])):
        for place, metric in enumerate(SHOWN, 1):
            arms = [record["arms"][name]["test"] for name in ("concatenation", "append_cross")]
            values, others = ([run[task][metric] for run in runs] for runs in arms)
            assert quality[place] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
            difference = record["differences"][task]["concatenation"][metric]
            assert difference["difference"] == pytest.approx(np.mean(values) - np.mean(others), abs=1e-9)
            assert versus[place].startswith(f"{difference['difference']:+.4f} [")
    controlled = [part.splitlines()[2] for part in table.split("| less its control |")[1:]]
    for task, row in zip(("liked", "bought"), controlled, strict=True):
        of_arm = {name: [run[task]["mrr"] for run in record["arms"][name]["test"]] for name in ("short", "none")}
        difference = record["differences_from_controls"][task]["short"]["mrr"]["difference"]
        assert difference == pytest.approx(np.mean(of_arm["short"]) - np.mean(of_arm["none"]), abs=1e-9)
        assert row.startswith("| short | ") and f"| {difference:+.4f} [" in row
    speed = record["speed"]["training"]["concatenation"]
    assert rows[4][1:3] == [f"{speed['requests']:,.0f}", f"{speed['padded']:,.0f}"]
    assert (rows[4][3], rows[4][-1]) == ("-", "no")


def test_speed_is_measured_for_every_way_there_is(compared: Path) -> None:
    speed = record_of(compared)["speed"]
    ways = {name: set(speeds) for name, speeds in speed["training"].items()}
    assert ways["none"] == {"requests"}
    assert ways["append_cross"] == ways["short"] == {"requests", "padded", "impressions"}
    assert ways["concatenation"] == {"requests", "padded"}
    assert set(speed["scoring"]["median_ms"]["append_cross"]) == {"requests_ms", "impressions_ms"}
    assert set(speed["scoring"]["median_ms"]["concatenation"]) == {"requests_ms"}
    assert all(value > 0 for speeds in speed["training"].values() for value in speeds.values())


def test_a_comparison_goes_on_where_it_stopped_and_takes_no_results_of_another_evaluation(
    data_folder: Path, compared: Path
) -> None:
    before = record_of(compared)
    trained = {path: path.stat().st_mtime_ns for path in compared.rglob("train.json")}
    (compared / "short" / "setting-0" / "seed-0" / "train.json").unlink()
    for arm in ("append_cross", "none"):
        run = sorted(compared.glob(f"{arm}/*/seed-1"))[0]
        evaluate.main(["--run_folder", str(run), "--split=test", "--history_length=2"])
    (run / "predictions-test.npz").unlink()
    # As an earlier version left it.
    earlier = sorted(compared.glob("short/*/seed-1"))[0] / "evaluate-test.json"
    record = json.loads(earlier.read_text())
    del record["slices"], record["tasks"]["liked"]["mrr"]
    earlier.write_text(json.dumps(record))
    compare.main(arguments(data_folder, compared))
    again = {path for path in compared.rglob("train.json") if path.stat().st_mtime_ns != trained[path]}
    assert again == {compared / "short" / "setting-0" / "seed-0" / "train.json"}
    assert record_of(compared)["arms"] == before["arms"]


def test_two_ranks_compare_as_one(data_folder: Path, compared: Path, tmp_path: Path) -> None:
    fewer = ("--encoders=[none,append_cross]", "--variants={}", "--controls={}", "--choose_by=mrr")
    torchrun(2, "compare", *arguments(data_folder, tmp_path / "two", *fewer))
    one, two = record_of(compared), record_of(tmp_path / "two")
    assert list(two["arms"]) == ["none", "append_cross"]
    for name, arm in two["arms"].items():
        assert arm["setting"] == ({"optimizer.dense_lr": 0.01} if np.argmax(arm["validation_mrr"]) else {})
        for mine, other in zip(one["arms"][name]["test"], arm["test"], strict=True):
            assert other["liked"]["ne"] == pytest.approx(mine["liked"]["ne"], rel=ROUNDING)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reference=mean_pooling"], "'mean_pooling' is none of the arms"),
        (["--controls={short: nothing}"], "controls: 'nothing' is none of the arms"),
        (["--variants={none: {}}"], "'none' is an encoder's name"),
        (["--variants={x: {model.histori: none}}"], "model.histori: no such field"),
        (["--variants={x: {model.history_length: many}}"], "many"),
        (
            ["--variants={x: {model.history: mean_pooling, model.positions: rotary}}", "--controls={}"],
            "which has no model.positions",
        ),
        (["--seeds=[]"], "one entry at least"),
        (["--choose_by=mse"], "has mse on the validation split: choose another"),
        (["--speed.history_length=9", "--seeds=[7]"], "0 requests have 9 events or more, not 3"),
        (["--batch_size=5"], "was trained with batch_size=100, the comparison asks for 5"),
        (
            ["--loss.tasks={liked: {kind: listwise}}"],
            "with loss.tasks.liked.kind=None, the comparison asks for listwise",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    data_folder: Path, compared: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments(data_folder, compared, *more))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
