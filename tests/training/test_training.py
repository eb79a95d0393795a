import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchx.tracker.api import AppRun

from torchrec_amort import AmortizedDLRMTrain, ModelConfig, RequestBatch, RequestSchema, build_model
from torchrec_amort.apps import evaluate, train
from torchrec_amort.jobs.train import read_train_split
from torchrec_amort.training.checkpoint import load_weights
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.run import TrainConfig

# Other numbers of ranks or threads add up in another order. A sum then differs by some 2**-24 of it, and each step
# carries on the differences of those before: a few steps stay below this, on any processor. Many steps part by any
# amount, so what trained for longer is compared with what ran on as many ranks and threads, and is the same.
ROUNDING = 1e-5
FEW_STEPS = 10

MODEL = ["--model.embedding_dim=8", "--model.history_length=8", "--model.over_layers=[16]", "--model.dense_layers=[]"]


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    common = ["--data", str(data), "--run_folder", str(run), "--batch_size=24", "--loop.log_every=1", "--loop.epochs=1"]
    return [*common, *MODEL, *more]


def losses(run: Path, metric: str = "loss") -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record[metric] for record in map(json.loads, lines)}


def weights(data: Path, run: Path) -> dict[str, torch.Tensor]:
    config = ModelConfig(embedding_dim=8, history_length=8, over_layers=[16], dense_layers=[])
    model = AmortizedDLRMTrain(build_model(RequestSchema.load(data), config))
    load_weights(run, model)
    return model.state_dict()


def checkpoints(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def up_to(step: int, values: dict[int, float]) -> dict[int, float]:
    return {at: value for at, value in values.items() if at <= step}


def cut_back(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run without the checkpoints after a step."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def quality(run: Path, split: str = "test") -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / f"evaluate-{split}.json").read_text())
    return record


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = ["--loop.epochs=2", "--loop.checkpoint_every=10", "--unknown_rate.user_id=0.5"]
    more += ["--loop.log_every=7", "--model.dropout=0.2"]  # the checkpoint is between two reports
    train.main(arguments(data_folder, whole, *more))
    steps = iter(range(38))
    original = TrainPipelineBase.progress

    def progress(pipeline: Any, batches: Any) -> Any:
        if next(steps, None) is None:
            raise RuntimeError("the machine is gone")
        return original(pipeline, batches)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="is gone"):
        patch.setattr(TrainPipelineBase, "progress", progress)
        train.main(arguments(data_folder, stopped, *more))
    assert checkpoints(stopped) == ["step-000000025", "step-000000030"]
    train.main(arguments(data_folder, stopped, *more, "--resume=true"))
    assert losses(stopped) == losses(whole)
    assert list(losses(whole)) == [7, 14, 21, 25, 28, 35, 42, 49, 50]
    finished = weights(data_folder, stopped)
    assert all(torch.equal(value, finished[name]) for name, value in weights(data_folder, whole).items())


def test_a_run_reads_batches_of_equal_work_if_its_config_says_so(data_folder: Path, tmp_path: Path) -> None:
    def batches(**options: Any) -> list[RequestBatch]:
        config = TrainConfig(data=str(data_folder), run_folder=str(tmp_path), batch_size=100, **options)
        with process_group():
            return list(read_train_split(config, RequestSchema.load(data_folder)))

    def spread(found: list[RequestBatch]) -> int:
        work = [int(batch.num_candidates.sum()) + len(batch.sequences["history_item"].values()) for batch in found]
        return max(work) - min(work)

    assert spread(batches(balance_work=True)) < spread(batches()) / 4


def test_bfloat16_autocast_learns_what_float32_does(data_folder: Path, tmp_path: Path) -> None:
    # Six steps: bfloat16 rounds by 2**-8.
    for precision in ("float32", "bfloat16"):
        train.main(arguments(data_folder, tmp_path / precision, "--batch_size=100", f"--loop.precision={precision}"))
    low, full = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    assert low != full
    assert low == pytest.approx(full, rel=2**-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_the_same_with_embeddings_in_bfloat16_between_ranks(data_folder: Path, tmp_path: Path) -> None:
    for wire in ("float32", "bfloat16"):
        train.main(arguments(data_folder, tmp_path / wire, "--batch_size=100", f"--sharding.wire={wire}"))
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=2**-8)


def test_workers_and_the_control_train(data_folder: Path, tmp_path: Path) -> None:
    train.main(arguments(data_folder, tmp_path / "workers", "--num_workers=2"))
    train.main(arguments(data_folder, tmp_path / "no_workers"))
    assert losses(tmp_path / "workers") == losses(tmp_path / "no_workers")
    train.main(arguments(data_folder, tmp_path / "control", "--model.history=none", "--model.interaction=dcn"))
    assert losses(tmp_path / "control")[25] < losses(tmp_path / "control")[1]


def test_a_loss_that_is_not_finite_stops_the_run(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan: lower the learning rates"):
        train.main(arguments(data_folder, tmp_path / "run", "--optimizer.table_lr=1e30", "--optimizer.dense_lr=1e30"))


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    train.main(arguments(data_folder, run))
    return run


def refused(capsys: pytest.CaptureFixture[str], main: Any, args: list[str]) -> str:
    """The one line with which a command ends on bad input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_is_not_overwritten_nor_mixed_with_another(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, train.main, arguments(data_folder, trained))
    assert re.search(r"trained: has a checkpoint already: go on with --resume", line)
    other = arguments(data_folder, trained, "--resume=true", "--model.history_layers=3")
    line = refused(capsys, train.main, other)
    assert "model.history_layers=2, the config says 3" in line


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--batch_size=25", "batch_size=24, the config says 25"),
        ("--balance_work=true", "balance_work=False, the config says True"),
        ("--seed=7", "seed=0, the config says 7"),
    ],
)
def test_a_run_does_not_go_on_among_other_batches(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str], option: str, told: str
) -> None:
    line = refused(capsys, train.main, [*arguments(data_folder, trained, "--resume=true"), option])
    assert f"its checkpoint is of a run with {told}, which are other batches" in line


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main(arguments(data_folder, run))
    config = run / "config.yaml"
    original = config.read_text()
    for old, new in (
        ("embedding_dim: 8", "embedding_dim: 16"),
        ("history_layers: 2", "history_layers: 3"),
        ("history_layers: 2", "history_layers: 1"),
    ):
        assert old in original
        config.write_text(original.replace(old, new))
        line = refused(capsys, evaluate.main, ["--run_folder", str(run)])
        assert "step-000000025: the checkpoint is damaged or does not fit the model" in line
        assert "use the config it was trained with" in line
    assert not (run / "evaluate-test.json").exists()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (damaged,) = run.glob(f"checkpoints/*/{file}")
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    line = refused(capsys, evaluate.main, ["--run_folder", str(run)])
    assert "step-000000025: the checkpoint is damaged or does not fit" in line


def test_a_damaged_config_and_a_missing_run_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not the folder of a training run" in refused(capsys, evaluate.main, ["--run_folder", str(tmp_path)])
    config = (trained / "config.yaml").read_text()
    for text in (
        "model: 3\n",
        "model: {wide: true}\n",
        "{",
        config.replace("seed: 0", "seed: none"),
        config + "new: 1\n",
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert "not a config of this version" in refused(capsys, evaluate.main, ["--run_folder", str(tmp_path)])


def test_data_with_other_features_is_refused(
    data_folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = (data_folder / "schema.json").read_text()
    (tmp_path / "schema.json").write_text(schema.replace('"table_size": 20', '"table_size": 21'))
    line = refused(capsys, evaluate.main, ["--run_folder", str(trained), "--data", str(tmp_path)])
    assert "user_id has 21 rows" in line
    assert "the model's table for it has 20" in line


def test_ids_are_hashed_into_smaller_tables_by_config(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    tables = ["--tables.user_id={rows: 7, vocabulary: hash}", "--tables.item={rows: 11, vocabulary: hash}"]
    train.main(arguments(data_folder, run, *tables, "--sharding.tables.item={ways: [row_wise], pooling_factor: 9.5}"))
    schema = RequestSchema.load(run)
    assert [schema.table_sizes[name] for name in ("user_id", "candidate_item", "history_item")] == [7, 11, 11]
    evaluate.main(["--run_folder", str(run)])
    assert quality(run)["requests"] == 90
    train.main(arguments(data_folder, run, *tables, "--loop.epochs=2", "--resume=true"))
    assert len(losses(run)) == 50
    line = refused(capsys, train.main, arguments(data_folder, run, "--resume=true"))
    assert "its checkpoint is of a model with tables={'user_id': {'rows': 7, 'vocabulary': 'hash'}" in line


def test_a_run_says_where_it_was_made_and_tells_trackers(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers, run = tmp_path / "trackers", tmp_path / "run"
    trackers.mkdir()
    (tmp_path / "fsspec.conf").write_text(f"protocol=file\nroot_path={trackers}\n")
    monkeypatch.setenv("TORCHX_TRACKERS", "torchx.tracker.backend.fsspec:create")
    monkeypatch.setenv("TORCHX_TRACKER_TORCHX.TRACKER.BACKEND.FSSPEC:CREATE_CONFIG", str(tmp_path / "fsspec.conf"))
    monkeypatch.setenv("TORCHX_JOB_ID", "local://session/train-1")
    AppRun.run_from_env.cache_clear()
    train.main(arguments(data_folder, run))
    evaluate.main(["--run_folder", str(run)])
    job = AppRun.run_from_env()
    AppRun.run_from_env.cache_clear()
    (tracker,) = job.backends
    metadata = tracker.metadata(job.id)
    assert metadata["steps"] == 25
    assert metadata["tasks"] == quality(run)["tasks"]
    assert tracker.artifacts(job.id)["run_folder"].path == str(run)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert (environment["world_size"], environment["restarts"], environment["job"]) == (1, 0, None)
    assert all(0 <= share < 1 for share in losses(run, "waited_for_data").values())


def test_batches_may_be_large(data_folder: Path, tmp_path: Path) -> None:
    train.main([*arguments(data_folder, tmp_path / "run"), "--batch_size=300"])
    assert list(losses(tmp_path / "run")) == [1, 2]
