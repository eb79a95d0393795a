"""Every command on data of several histories, with vectors, times, lists, text, nulls, weights and shared tables."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.schemas import THREE, make_requests
from torchrec_amort import AmortizedScorer, Feature, RequestBatch, load_package
from torchrec_amort.apps import benchmark, compare, evaluate, export, migrate, pilot, throughput, train
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.sample import sample_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.hashing import Vocabulary
from torchrec_amort.training.run import load_model

SCHEMA = replace(
    THREE,
    features=(
        *THREE.features,
        Feature("share", "candidate", "weight"),
        Feature("country", "request", "id", 11, vocabulary="hash", text=True, nullable=True),
        Feature("topic", "candidate", "id", 16, vocabulary="file", text=True),
        Feature("clicks_words", "event", "ids", 5, vocabulary="unknown", nullable=True, history="clicks"),
    ),
    vocabularies={"topic": Vocabulary.of(pa.array([f"wörd {number}" for number in range(12)]))},
)
SMALL = ["--model.embedding_dim=8", "--model.history_layers=1", "--model.dense_layers=[4]", "--model.over_layers=[8]"]
# Each history has a length of its own, one is not read, and of a table that sides share only one is.
TOWERS = ["--model.towers", json.dumps({"clicks": {"length": 3}, "buys": {"length": 2, "encoder": "mean_pooling"}})]
NARROW = [*TOWERS, "--model.leave_out=[clicks_tags,clicks_content,user_id]", "--unknown_rate", '{"country": 0.5}']
TURNS = ["--turns=2", "--warmup=1", "--candidates=[2,3,4]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    splits = {}
    for place, (split, count) in enumerate({"train": 100, "validation": 30, "test": 60}.items()):
        shapes = [(random.integers(0, 7, size=3).tolist(), int(random.integers(1, 5))) for _ in range(count)]
        requests = make_requests(SCHEMA, shapes, place)
        rows = [{**request, "request_id": 1000 * place + row} for row, request in enumerate(requests)]
        splits[split] = [pa.Table.from_pylist(rows, SCHEMA.arrow_schema())]
    folder = tmp_path_factory.mktemp("data") / "films"
    write_requests(folder, SCHEMA, splits)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"whole": ["--model.history_length=6"], "narrow": NARROW}.items():
        train.main(["--data", str(data), "--run_folder", str(folder / name), "--loop.epochs=1", *SMALL, *options])
    return folder


def refused(command: Any, args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(args)
    return capsys.readouterr().err.splitlines()[-1]


def test_migrate_writes_them_as_impressions_and_back(data: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    migrate.main(["impressions", "--data", str(data), "--out", str(there)])
    logs = [f"--log.{split}={there / split}" for split in ("train", "validation", "test")]
    migrate.main(["requests", *logs, "--schema", str(there / "schema.json"), "--out", str(back)])
    for split in ("train", "validation", "test"):
        assert pq.read_table(back / split).equals(pq.read_table(data / split))
    # Who trains on the one may go on with the other.
    assert (back / "schema.json").read_text() == (data / "schema.json").read_text()
    assert pq.read_table(back / "vocabulary-topic.parquet").equals(pq.read_table(data / "vocabulary-topic.parquet"))


def test_evaluate_cuts_each_history_to_what_its_tower_keeps(
    data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for length in (None, 3, 1):
        evaluate.main(["--run_folder", str(runs / "narrow"), *([f"--history_length={length}"] if length else [])])
        record = json.loads((runs / "narrow" / "evaluate-test.json").read_text())
        assert record["history_length"] == (length or 3)
        losses[length] = record["tasks"]["liked"]["log_loss"]
    assert losses[None] == losses[3] != losses[1]
    message = refused(evaluate, ["--run_folder", str(runs / "narrow"), "--history_length=4"], capsys)
    assert "was trained with up to 3 events: ask for 0 to 3" in message


@pytest.mark.slow
def test_the_benchmark_scores_them_in_all_ways(data: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = json.dumps(["impressions", "model", "amortized", "microbatched", "cached", "concatenation", "encoder"])
    for run, events in {"whole": 5, "narrow": 3}.items():
        args = ["--run_folder", str(runs / run), f"--history_lengths=[{events}]", "--candidates=[3]", "--turns=2"]
        benchmark.main(
            [*args, "--warmup=1", "--slow_turns=1", "--memory=false", "--load.seconds=0.1", "--methods", methods]
        )
        record = json.loads((runs / run / "benchmark.json").read_text())
        (case,) = record["cases"]
        assert set(case["methods"]) == {"impressions", "model", "amortized", "microbatched", "cached"}
        assert all(result["max_difference"] <= 1e-5 for result in case["methods"].values())
        assert set(case["left_out"]) == {"concatenation", "encoder"}
        assert all(rate["wrong"] == rate["failed"] == 0 for rate in record["load"]["rates"])
    message = refused(benchmark, ["--run_folder", str(runs / "narrow"), "--history_lengths=[4]"], capsys)
    assert "history_lengths has 4, but the model of" in message
    assert "give the run_folder of a model that was trained on such data" in refused(benchmark, ["--data=data"], capsys)


def test_the_pilot_replays_them(data: Path, runs: Path, tmp_path: Path) -> None:
    arms = ["--control.serving=impressions", "--control.run_folder", str(runs / "narrow")]
    args = ["--out", str(tmp_path), "--bootstrap_samples=20", "--rates=[100]", "--requests=20", *TURNS]
    pilot.main([*arms, "--treatment.run_folder", str(runs / "narrow"), *args, "--history_lengths=[0,1,2,3]"])
    record = json.loads((tmp_path / "pilot.json").read_text())
    assert record["largest_difference"] < 1e-5
    assert [arm["history_length"] for arm in record["arms"].values()] == [3, 3]
    assert {point["history_length"] for point in record["shapes"]} == {0, 1, 2, 3}
    assert [point["history_length"] for point in record["shorter_histories"]][-1] == 3
    # The model of costs is fitted to events of each history, so it is asked for those.
    assert all(row["history_length"] <= 3 for row in record["sizing"]["rows"])
    # All histories together.
    assert record["by_history_length"][-1]["largest"] > 6


def test_the_pilot_asks_for_no_longer_histories_than_all_of_a_request_are(
    data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [f"--{arm}.run_folder={runs / 'whole'}" for arm in ("control", "treatment")]
    message = refused(pilot, [*arms, "--out", str(tmp_path), "--turns=20", "--history_lengths=[6]"], capsys)
    assert "history_lengths has 6, but 20 requests of at least that many events are needed" in message
    with pytest.raises(ValueError, match=r"requests have 6 events or more in each of clicks, buys, views, not 20: ask"):
        sample_requests(data, "test", num_requests=20, num_candidates=1, history_length=6, seed=0)


def test_compare_trains_arms_that_read_different_features(data: Path, tmp_path: Path) -> None:
    variants = {"narrow": {"model.towers": {"clicks": {"length": 9}}, "model.leave_out": ["clicks_content", "user_id"]}}
    arms = ["--encoders=[mean_pooling]", "--variants", json.dumps(variants), "--reference=mean_pooling"]
    budget = ["--seeds=[0]", "--loop.epochs=1", "--bootstrap_samples=20", '--unknown_rate={"user_id": 0.1}']
    speed = [f"--speed.{name}=2" for name in ("requests", "candidates", "history_length", "train_steps", "warmup")]
    args = ["--data", str(data), "--out", str(tmp_path), *arms, *budget, *speed, *SMALL, "--model.history_length=6"]
    compare.main(args)
    record = json.loads((tmp_path / "compare.json").read_text())
    assert set(record["arms"]) == set(record["speed"]["training"]) == {"mean_pooling", "narrow"}
    assert record["config"]["variants"] == variants
    # A second call finds all that there is.
    trained = (tmp_path / "narrow" / "setting-0" / "seed-0" / "evaluate-test.json").stat().st_mtime_ns
    compare.main(args)
    assert (tmp_path / "narrow" / "setting-0" / "seed-0" / "evaluate-test.json").stat().st_mtime_ns == trained


def test_the_unknown_id_of_text_is_null(data: Path) -> None:
    (batch,) = RequestDataset(data, "test", batch_size=60, seed=0, unknown_rate={"country": 1.0})
    assert batch.request_sparse["country"].values().tolist() == [0] * 60


def test_throughput_times_training_on_them(data: Path, tmp_path: Path) -> None:
    steps = ["--steps=2", "--warmup=1", "--reading_steps=2"]
    throughput.main(["--data", str(data), "--run_folder", str(tmp_path), *steps, *SMALL, *NARROW])
    record = json.loads((tmp_path / "throughput.json").read_text())
    assert set(record["candidates_per_second"]) == {"reading", "requests", "impressions", "padded"}
    assert record["history_length"] == 3


@pytest.mark.usefixtures("uncompiled")
def test_an_exported_package_scores_them_as_the_model(data: Path, runs: Path, tmp_path: Path) -> None:
    export.main(["--run_folder", str(runs / "narrow"), "--out", str(tmp_path / "package"), "--tables=float32"])
    model, trained, schema = load_model(str(runs / "narrow"))
    read = schema.without(trained.model.leave_out)
    table = pq.read_table(data / "test").slice(0, 8)
    package = load_package(tmp_path / "package")
    assert package.schema == read
    batch = RequestBatch.from_arrow(table, package.schema, trained.model.history_lengths(read))
    with torch.no_grad():
        torch.testing.assert_close(AmortizedScorer(package).score(batch), model(batch), rtol=0, atol=2e-6)
