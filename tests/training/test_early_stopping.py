"""Validations while a run trains: the best model's checkpoint, and the end when none is better."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.conftest import SCHEMA, make_table
from tests.training.test_failures import flip
from tests.training.test_training import arguments, checkpoints, cut_back, losses, quality, refused, weights
from torchrec_amort.apps import evaluate, train
from torchrec_amort.data.writer import write_requests
from torchrec_amort.training import loop
from torchrec_amort.training.checkpoint import Best
from torchrec_amort.training.run import load_model
from torchrec_amort.training.sharding import ShardedModel

# Labels are drawn at random: what is learned of the training requests makes the validation worse soon.
STOPPED = (
    "--loop.epochs=4",
    "--loop.validate_every=5",
    "--loop.patience=3",
    "--loop.checkpoint_every=5",
    "--loop.keep_checkpoints=1",
    "--optimizer.table_lr=0.5",
    "--model.dropout=0.2",
)


def values(run: Path, metric: str = "ne") -> dict[int, float]:
    """The value of each validation."""
    records = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    name = f"validation/{metric}"
    return {record["step"]: record[name] for record in records if name in record}


def result(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "train.json").read_text())
    return record


@pytest.fixture(scope="module")
def stopped(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended early; all of its checkpoints are there."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    train.main(arguments(data_folder, run, *STOPPED, "--loop.keep_checkpoints=99"))
    return run


def test_the_best_value_is_kept_by_its_direction_and_validations_after_it_are_counted() -> None:
    for more_is_better, sign in ((False, 1), (True, -1)):
        best = Best()
        for step, value in enumerate([0.9, 0.8, 0.8, 0.85, 0.7, 0.71], 1):
            best = best.after(step, sign * value, more_is_better=more_is_better)
        assert best == Best(step=5, value=sign * 0.7, since=1)


def test_a_run_ends_when_validations_find_no_better_model(stopped: Path) -> None:
    found, record = values(stopped), result(stopped)
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(5, best + 16, 5))
    assert record["steps"] == best + 15 < 100
    assert record["best_checkpoint"] == f"step-{best:09d}"
    assert (record["best_value"], record["stopped_early"]) == (found[best], True)


def test_evaluation_and_export_take_the_best_model_and_going_on_the_last(
    data_folder: Path, stopped: Path, tmp_path: Path
) -> None:
    run, best = tmp_path / "run", result(stopped)["best_checkpoint"]
    train.main(arguments(data_folder, run, *STOPPED))
    last = f"step-{result(run)['steps']:09d}"
    assert checkpoints(run) == [best, last]
    evaluate.main(["--run_folder", str(run), "--split", "validation"])
    record = quality(run, "validation")
    assert record["checkpoint"] == best
    entropies = [task["ne"] for task in record["tasks"].values()]
    assert sum(entropies) / len(entropies) == pytest.approx(result(run)["best_value"], rel=1e-6)
    expected = weights(data_folder, cut_back(stopped, int(best.removeprefix("step-")), tmp_path / "best"))
    ranker = {f"model.{name}": weight for name, weight in load_model(str(run))[0].state_dict().items()}
    assert all(torch.equal(ranker[name], weight) for name, weight in expected.items())
    before = losses(run)
    train.main(arguments(data_folder, run, *STOPPED, "--resume=true"))
    assert losses(run) == before
    flip(run / "checkpoints" / best / "__0_0.distcp")
    evaluate.main(["--run_folder", str(run)])
    assert quality(run)["checkpoint"] == last


def test_a_run_goes_on_with_the_best_value_and_the_patience_that_is_left(
    data_folder: Path, stopped: Path, tmp_path: Path
) -> None:
    best = int(result(stopped)["best_checkpoint"].removeprefix("step-"))
    run = cut_back(stopped, best + 10, tmp_path / "run")
    train.main(arguments(data_folder, run, *STOPPED, "--resume=true"))
    assert losses(run) == losses(stopped)
    assert values(run) == values(stopped)
    names = ("steps", "best_checkpoint", "best_value", "stopped_early")
    assert [result(run)[name] for name in names] == [result(stopped)[name] for name in names]


def test_validations_do_not_change_what_is_learned_whatever_pipeline_reads_ahead(
    data_folder: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [word for word in STOPPED if "validate" not in word and "patience" not in word]
    train.main(arguments(data_folder, tmp_path / "plain", *plain, "--loop.epochs=1"))
    of_plain, of_stopped = losses(tmp_path / "plain"), losses(stopped)
    both = of_plain.keys() & of_stopped.keys()
    assert len(both) >= 20
    assert all(of_plain[step] == of_stopped[step] for step in both)

    def ahead(model: ShardedModel, device: torch.device) -> Any:
        return TrainPipelineSparseDist(model.module, model.optimizer, device)

    monkeypatch.setattr(loop, "_pipeline", ahead)
    train.main(arguments(data_folder, tmp_path / "ahead", *STOPPED))
    assert losses(tmp_path / "ahead") == of_stopped
    assert values(tmp_path / "ahead") == values(stopped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_validates_between_the_batches_that_its_pipeline_has_sent(data_folder: Path, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("validated", ["--loop.validate_every=5"])):
        train.main(arguments(data_folder, tmp_path / name, *options))
    assert losses(tmp_path / "validated") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert list(values(tmp_path / "validated")) == [5, 10, 15, 20, 25]


def test_the_average_is_what_is_validated_by_any_metric_with_the_ids_that_it_knows(
    data_folder: Path, tmp_path: Path
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    options = ["--loop.average_decay=0.8", "--tables.item={rows: 20, vocabulary: managed}"]
    options += ["--model.eviction_interval=4"]
    train.main(arguments(data_folder, plain, *options))
    train.main(arguments(data_folder, run, *options, "--loop.validate_every=10", "--loop.validate_metric=request_auc"))
    assert losses(run) == losses(plain)
    found = values(run, "request_auc")
    assert list(found) == [10, 20]
    assert result(run)["best_value"] == max(found.values())
    assert not result(run)["stopped_early"]
    evaluate.main(["--run_folder", str(run), "--split", "validation"])
    tasks = quality(run, "validation")["tasks"].values()
    assert sum(task["request_auc"] for task in tasks) / len(tasks) == pytest.approx(max(found.values()))


def test_validations_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    of_one_kind = make_table(3).to_pylist()
    for request in of_one_kind:
        request["bought"] = [0.0] * len(request["bought"])
    validation = pa.Table.from_pylist(of_one_kind, SCHEMA.arrow_schema())
    write_requests(data, SCHEMA, {"train": [make_table(24)], "validation": [validation]})
    for option, message in (
        ("--loop.patience=2", "loop.patience is 2, but nothing is validated: give loop.validate_every"),
        ("--loop.validate_every=0", "loop.validate_every is 0: give 1 or more"),
        (
            "--loop.validate_every=1",
            "bought: all 6 labels are 0: AUC and normalized entropy need both kinds: 3 ",
        ),
    ):
        assert message in refused(capsys, train.main, arguments(data, run, option))
    write_requests(tmp_path / "no_validation", SCHEMA, {"train": [make_table(24)]})
    command = arguments(tmp_path / "no_validation", tmp_path / "other", "--loop.validate_every=1")
    assert "no_validation/validation: " in refused(capsys, train.main, command)


def test_a_run_does_not_go_on_by_another_metric(
    data_folder: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data_folder, stopped, *STOPPED, "--resume=true", "--loop.validate_metric=auc")
    line = refused(capsys, train.main, command)
    assert "its best model is that of loop.validate_metric=ne, the config says auc: use the same" in line
