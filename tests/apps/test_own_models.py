"""A ranker that a user's function makes is trained, evaluated, piloted and benchmarked by the commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.apps.built import PLACES
from tests.conftest import SCHEMA
from tests.launch import launch, torchrun
from tests.pages import blocks
from tests.training.test_training import refused
from torchrec_amort import InputError, ModelConfig, build_model
from torchrec_amort.apps import benchmark, compare, evaluate, pilot, train
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.schema import TableConfig
from torchrec_amort.training.run import load_model

BUILD = "tests.apps.built.build"
FEW = ["--candidates=[2,3,4]", "--turns=2", "--warmup=1", "--bootstrap_samples=10", "--rates=[100]", "--requests=30"]


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    size = [f"--model.history_length={PLACES}", "--batch_size=300", "--loop.epochs=1"]
    return ["--data", str(data), "--run_folder", str(run), f"--model.build={BUILD}", *size, *more]


def record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mmoe"
    torchrun(2, "train", *arguments(data_folder, run))
    return run


def test_two_ranks_train_it_and_its_run_loads_evaluates_and_resumes(data_folder: Path, trained: Path) -> None:
    assert record_of(trained / "train.json")["steps"] == 2
    model, config, _ = load_model(str(trained))
    assert isinstance(model, ModelRanker)
    assert (type(model.model).__name__, config.model.build) == ("MMoE", BUILD)
    evaluate.main(["--run_folder", str(trained)])
    assert set(record_of(trained / "evaluate-test.json")["tasks"]) == {"liked", "bought"}
    train.main(arguments(data_folder, trained, "--resume=true"))
    assert record_of(trained / "train.json")["steps"] == 2


def test_a_run_of_it_is_not_mixed_with_another_model(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = arguments(data_folder, trained, "--resume=true", "--model.build=null")
    assert f"is of a model with model.build={BUILD}, the config says None" in refused(capsys, train.main, other)


@pytest.mark.parametrize("serving", ["model", "impressions"])
def test_arms_of_a_pilot_score_alike_however_it_is_served(serving: str, trained: Path, tmp_path: Path) -> None:
    arms = ["--control.run_folder", str(trained), f"--control.serving={serving}"]
    pilot.main([*arms, "--treatment.run_folder", str(trained), "--out", str(tmp_path), *FEW])
    record = record_of(tmp_path / "pilot.json")
    assert record["largest_difference"] <= 1e-6
    assert record["arms"]["treatment"]["history"] == BUILD


def test_a_benchmark_of_it_says_which_methods_it_does_not_have(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["impressions", "concatenation", "model", "amortized", "microbatched", "cached", "encoder"]
    shape = ["--history_lengths=[5]", "--candidates=[6]", "--microbatch_size=4", "--turns=2", "--warmup=1"]
    command = ["--run_folder", str(trained), *shape, "--memory=false", "--load.seconds=0.2", "--load.requests=5"]
    benchmark.main([*command, f"--methods={json.dumps(methods)}"])
    record = record_of(trained / "benchmark.json")
    (case,) = record["cases"]
    assert set(case["methods"]) == {"impressions", "model", "amortized", "microbatched", "cached"}
    assert all(result["max_difference"] <= 1e-6 for result in case["methods"].values())
    assert set(case["left_out"]) == {"concatenation", "encoder"}
    assert all(rate["wrong"] == rate["failed"] == 0 for rate in record["load"]["rates"])
    shown = capsys.readouterr().out
    assert "6 candidates, MMoE (GEMM" in shown
    assert "concatenation     it puts another encoder into an AmortizedDLRM" in shown


def test_a_benchmark_says_why_an_encoder_that_cannot_be_amortized_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model.history=append_self", "--model.embedding_dim=8", "--model.over_layers=[8]"]
    shape = ["--history_lengths=[3]", "--candidates=[2]", "--turns=1", "--slow_turns=1", "--warmup=1", "--memory=false"]
    benchmark.main(["--out", str(tmp_path), *model, *shape, "--methods=[impressions,model,amortized]"])
    (case,) = record_of(tmp_path / "benchmark.json")["cases"]
    assert set(case["methods"]) == {"impressions", "model"}
    assert "score with the model itself" in case["left_out"]["amortized"]


def test_its_module_may_be_in_the_current_folder(data_folder: Path, tmp_path: Path) -> None:
    """The one of docs/training.md, by the config that is there."""
    (tmp_path / "own_model.py").write_text("\n".join(blocks("docs/training.md", "python")))
    (config,) = [block for block in blocks("docs/training.md", "yaml") if "build:" in block]
    (tmp_path / "config.yaml").write_text(config)
    few = ["--batch_size=600", "--loop.epochs=1", "--data", str(data_folder)]
    launch("torchrec-amort", "train", "--config", "config.yaml", *few, cwd=tmp_path)
    assert record_of(tmp_path / "runs" / "own" / "train.json")["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"build": "build"}, "model.build is 'build': give package.module.function"),
        ({"build": "no_such.module.build"}, "no_such.module cannot be imported: No module named 'no_such': start in"),
        ({"build": "tests.apps.built.bild"}, "tests.apps.built has no function 'bild'"),
        ({"build": "tests.apps.built.PLACES"}, "tests.apps.built has no function 'PLACES'"),
        ({"build": "tests.apps.built.build_dlrm"}, r"returned a DLRM, which is no Ranker: return ModelRanker\(model"),
        ({"build": "tests.apps.built.build_nothing"}, "model: no weights for this"),
        ({"build": "tests.apps.built.build_of_other_tables"}, "movie_id has 40 rows, but the table for it of .* has 3"),
        ({"build": BUILD, "history_length": 9}, "model.history_length is 9, but the model of .* has places for 8"),
        ({"build": BUILD, "history": "none"}, "which does not read model.history=none: leave one of the two out"),
        ({"build": BUILD, "over_layers": [8]}, r"which does not read model.over_layers=\[8\]"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        build_model(SCHEMA, ModelConfig(**{"history_length": PLACES, **options}))
    assert "\n" not in str(refusal.value)


def test_a_module_that_is_no_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("def build(\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="torn cannot be imported: '\\(' was never closed"):
        build_model(SCHEMA, ModelConfig(build="torn.build"))


def test_a_table_of_managed_ids_needs_a_managed_collection() -> None:
    managed = SCHEMA.with_tables({"item": TableConfig(rows=40, vocabulary="managed")})
    with pytest.raises(InputError, match="is managed, but the model of .* has no ManagedCollection"):
        build_model(managed, ModelConfig(build=BUILD, history_length=PLACES))


def test_features_are_left_out_before_it_is_built() -> None:
    model = build_model(SCHEMA, ModelConfig(build=BUILD, history_length=PLACES, leave_out=["genres"]))
    assert not any("genres" in name for name in model.state_dict())


def test_its_arm_of_a_comparison_is_a_variant(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data_folder), "--out", str(tmp_path / "out"), "--seeds=[0]", "--loop.epochs=1"]
    few = ["--batch_size=300", f"--model.history_length={PLACES}", "--bootstrap_samples=5", "--reference=mine"]
    speed = ["--speed.train_steps=1", "--speed.requests=2", "--speed.candidates=3", "--speed.history_length=4"]
    assert "encoders differ in model.history" in refused(
        capsys, compare.main, [*command, *few, *speed, f"--model.build={BUILD}"]
    )
    variants = f"--variants={{mine: {{model.build: {BUILD}}}}}"
    compare.main([*command, *few, *speed, "--encoders=[append_cross]", variants])
    record = record_of(tmp_path / "out" / "compare.json")
    assert record["arms"]["mine"]["is_amortizable"]
    assert set(record["speed"]["training"]["mine"]) == {"requests", "padded", "impressions"}
