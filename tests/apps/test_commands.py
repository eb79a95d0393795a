import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch, torchrun
from torchrec_amort.apps import benchmark, cli, evaluate, pilot, prepare, train
from torchrec_amort.bench.methods import METHODS
from torchrec_amort.data.counts import unknown_in_words
from torchrec_amort.training.metrics import MORE_IS_BETTER

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
MODEL = ["--model.embedding_dim=8", "--model.history_length=8"]


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    train.main(["--data", str(data_folder), "--run_folder", str(run), "--loop.epochs=1", *MODEL])
    return run


def test_the_benchmark_compares_all_ways_to_score_with_the_same_weights(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [method for method in METHODS if method not in ("compiled", "exported")]
    args = ["--run_folder", str(trained), "--history_lengths=[5]", "--candidates=[6]", "--threads=1", "--turns=3"]
    benchmark.main([*args, f"--methods={json.dumps(methods)}", "--warmup=1", "--load.seconds=0.5", "--busy=1"])
    record = json.loads((trained / "benchmark.json").read_text())
    assert record["threads"] == 1
    (case,) = record["cases"]
    assert (case["history_length"], case["candidates"], case["batch"]) == (5, 6, 1)
    assert case["gemm_gflops"] > 0
    assert case["gemm_bf16_gflops"] > 0
    assert {"impressions", "amortized", "cached", "encoder", "encoder_cached"} <= set(case["methods"])
    for name, result in case["methods"].items():
        assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"], name
        assert result.get("max_difference", 0) <= (2e-2 if "bf16" in name else 1e-5), name
    for rate in record["load"]["rates"]:
        assert rate["sent"] == rate["answered"] + rate["refused"]
        assert rate["wrong"] == rate["failed"] == rate["lost"] == 0
    assert record["busy"]["processes"] == 1
    (beside,) = record["busy"]["cases"]
    for machine in ("idle", "busy"):
        assert set(beside[machine]) == {"1", "2"}
        for name, result in beside[machine].items():
            assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"], name
            assert result["mean_ms"] > 0
    assert (trained / "benchmark.png").exists()
    shown = capsys.readouterr().out
    assert "one request of 5 events and 6 candidates" in shown
    assert "with 1 other busy processes and without" in shown
    assert "busy, 2 threads" in shown
    assert "Load: 8 clients" in shown


def test_a_random_model_is_benchmarked_over_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--history_lengths=[2,4,9]", "--candidates=[1,3]", "--batches=[1,2]", "--embedding_dims=[16]"]
    size = ["--model.history_heads=2", "--model.over_layers=[8]", "--model.dense_layers=[4]", "--memory=false"]
    few = ["--turns=2", "--slow_turns=1", "--warmup=1", "--methods=[impressions,amortized,microbatched]"]
    benchmark.main(["--out", str(tmp_path), *sweep, *size, *few, "--microbatch_size=2"])
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(record["cases"]) == 12
    # Without a method in bfloat16 its product, which may take seconds, is not timed.
    assert not any("gemm_bf16_gflops" in case for case in record["cases"])
    assert all(case["methods"]["microbatched"]["max_difference"] <= 1e-5 for case in record["cases"])
    assert {model["method"] for model in record["cost"]} == {"impressions", "amortized", "microbatched"}
    assert "twice n costs" in capsys.readouterr().out


def test_a_benchmark_of_longer_histories_than_there_are_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--run_folder", str(trained), "--history_lengths=[9]"])
    assert stop.value.code == 2
    assert "history_lengths has 9, but the model of" in capsys.readouterr().err


@pytest.mark.parametrize("command", [benchmark, pilot])
def test_a_command_leaves_the_threads_of_the_process(command: Any, tmp_path: Path) -> None:
    runs = {benchmark: ["--run_folder"], pilot: ["--out=out", "--treatment.run_folder=none", "--control.run_folder"]}
    before = torch.get_num_threads()
    with pytest.raises(SystemExit):
        command.main([f"--threads={before + 1}", *runs[command], str(tmp_path / "none")])
    assert torch.get_num_threads() == before


def test_evaluation_with_shorter_histories_keeps_the_latest_events(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for length in (8, 2):
        evaluate.main(["--run_folder", str(trained), "--split=test", f"--history_length={length}"])
        record = json.loads((trained / "evaluate-test.json").read_text())
        assert record["history_length"] == length
        found[length] = record["tasks"]["liked"]["log_loss"]
    assert found[8] != found[2]
    with pytest.raises(SystemExit):
        evaluate.main(["--run_folder", str(trained), "--history_length=9"])
    assert "history_length is 9, but the model" in capsys.readouterr().err


def test_evaluation_says_what_was_measured_and_on_what(
    data_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slices = ["history_length", "unknown_candidates", "user_id", "hour"]
    evaluate.main(["--run_folder", str(trained), "--split=validation", f"--slice_by=[{','.join(slices)}]"])
    record: dict[str, Any] = json.loads((trained / "evaluate-validation.json").read_text())
    counts = json.loads((data_folder / "counts.json").read_text())["validation"]
    for name in ("requests", "candidates", "users", "unknown_ids"):
        assert record[name] == counts[name]
    assert set(record["tasks"]) == {"liked", "bought"}
    assert set(record["tasks"]["liked"]) == {*MORE_IS_BETTER, "calibration", "positive_rate"} - {"mse"}
    shown = capsys.readouterr().out
    assert f"(60 requests, {counts['candidates']} candidates), bought: AUC" in shown
    bought = record["tasks"]["bought"]
    assert f"NDCG@10 {bought['ndcg_at_10']:.4f}, MRR {bought['mrr']:.4f}, NE {bought['ne']:.4f}" in shown
    assert list(record["slices"]) == slices
    assert sum(one["candidates"] for one in record["slices"]["user_id"]) == counts["candidates"]
    assert sum(one["candidates"] for one in record["calibration"]["bought"]) == counts["candidates"]
    assert (trained / "calibration-validation.png").read_bytes().startswith(b"\x89PNG")
    assert f"unknown ids: {unknown_in_words(counts['unknown_ids'])}" in shown


def test_a_config_file_and_the_command_line_give_the_config(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"data: {data_folder}\nrun_folder: {tmp_path / 'run'}\nmodel:\n  embedding_dim: 64\n  dropout: 0.1\n"
    )
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(file), "--model.embedding_dim=16", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for line in ("embedding_dim: 16", "dropout: 0.1", f"data: {data_folder}", "table_lr:"):
        assert line in printed
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(file), "--model.embedding_dim=wide"])
    assert stop.value.code == 2


def test_bad_data_ends_every_command_with_one_line(tmp_path: Path) -> None:
    done = launch(
        "torchrec-amort", "train", "--data", str(tmp_path), "--run_folder", str(tmp_path / "run"), check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/schema.json: no such file: prepare the data")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_commands_that_tests_launch_see_no_gpu() -> None:
    assert not torch.cuda.is_available()
    assert launch("python", "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))").stdout == "''\n"


@pytest.mark.gpu
def test_commands_of_tests_that_are_marked_see_the_gpus_of_the_host() -> None:
    shown = launch("python", "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))").stdout
    assert shown == f"{VISIBLE_GPUS}\n"


def test_bad_data_ends_all_ranks(data_folder: Path, tmp_path: Path) -> None:
    args = ["--data", str(data_folder), "--run_folder", str(tmp_path / "run"), "--batch_size=1"]
    done = torchrun(2, "train", *args, check=False)
    assert done.returncode != 0
    assert "in batches of 1 and 12 lanes cannot be shared by 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


def test_prepare_refuses_options_of_other_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["mind", "--out", str(tmp_path / "out"), "--histories=separate"])
    assert "error: histories is 'separate', but mind has no such option: leave it out" in capsys.readouterr().err


def test_prepare_refuses_what_is_not_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, message in ((tmp_path / "nothing.zip", "no such file"), (tmp_path, "is missing")):
        with pytest.raises(SystemExit) as stop:
            prepare.main(["movielens-1m", "--source", str(source), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["movielens-1m", "--out", str(tmp_path / "out"), "--history_length=0"])
    assert "history_length is 0, not 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        prepare.main(["movielens-20m"])


def test_the_console_command_lists_and_finds_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, code in (["--help"], 0), ([], 2), (["fly"], 2), (["train", "--help"], 0):
        monkeypatch.setattr(sys, "argv", ["torchrec-amort", *argv])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code, argv
    captured = capsys.readouterr()
    assert "no command 'fly'" in captured.err
    for command in cli.COMMANDS:
        assert command in captured.out
    assert "--model.embedding_dim" in captured.out
