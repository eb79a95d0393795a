import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launch import torchrun
from tests.training import scored
from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.modules.losses import LossConfig, TaskLossConfig
from torchrec_amort.training import spill
from torchrec_amort.training.calibration import draw_calibration
from torchrec_amort.training.evaluation import EvaluateResult, Evaluation, score_of, sortable
from torchrec_amort.training.metrics import auc, grouped_auc, metrics_of, sums_of_requests
from torchrec_amort.training.predictions import PredictionFile
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.spill import Spill

# Score, label and user of each candidate, by request; scores tie.
Requests = list[tuple[int, list[tuple[float, bool]]]]
requests = st.lists(
    st.tuples(
        st.integers(-2, 4),
        st.lists(st.tuples(st.sampled_from([-2.5, -0.0, 0.0, 0.5, 3.0]), st.booleans()), min_size=1, max_size=6),
    ),
    min_size=2,
    max_size=12,
).filter(lambda found: len({label for _, rows in found for _, label in rows}) == 2)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_group():
        yield


def evaluated(found: Requests, in_batch: int = 3) -> EvaluateResult:
    evaluation = Evaluation(["liked"])
    for first in range(0, len(found), in_batch):
        part = found[first : first + in_batch]
        rows = np.array([row for _, rows in part for row in rows], dtype=np.float32)
        sizes, users = np.array([len(rows) for _, rows in part]), np.array([user for user, _ in part])
        evaluation.add(rows[:, :1], scored.batch_of(sizes, rows[:, 1:], users))
    return evaluation.result()


def auc_by_pairs(rows: list[tuple[float, bool]]) -> float | None:
    pairs = [(a > b) + (a == b) / 2 for a, yes in rows if yes for b, other in rows if not other]
    return sum(pairs) / len(pairs) if pairs else None


@settings(max_examples=20)
@given(requests, st.integers(1, 40), st.integers(1, 5))
def test_auc_and_gauc_equal_counting_pairs_however_much_is_in_memory(
    found: Requests, most_rows: int, in_batch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "MOST_ROWS", most_rows)
        result = evaluated(found, in_batch)
    metrics = result.tasks["liked"]
    assert metrics["auc"] == pytest.approx(auc_by_pairs([row for _, rows in found for row in rows]), abs=1e-12)
    of_users: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for user, rows in found:
        of_users[user] += rows
    aucs = [(value, len(rows)) for rows in of_users.values() if (value := auc_by_pairs(rows)) is not None]
    if aucs:
        expected = sum(value * rows for value, rows in aucs) / sum(rows for _, rows in aucs)
        assert metrics["gauc"] == pytest.approx(expected, abs=1e-12)
    else:
        assert "gauc" not in metrics
    assert (result.requests, result.users) == (len(found), len(of_users))
    assert result.candidates == sum(len(rows) for _, rows in found)


@given(requests, st.randoms())
def test_the_order_of_requests_and_candidates_does_not_matter(found: Requests, random: Any) -> None:
    shuffled = [(user, random.sample(rows, len(rows))) for user, rows in random.sample(found, len(found))]
    one, other = evaluated(found), evaluated(shuffled, 2)
    assert one.tasks["liked"] == pytest.approx(other.tasks["liked"], abs=1e-12)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2))
def test_whole_numbers_stand_for_scores_in_their_order(scores: list[float]) -> None:
    array = np.array(scores, dtype=np.float32)
    order = sortable(array)
    signs, expected = (np.sign(np.subtract.outer(each, each)) for each in (order, array.astype(np.float64)))
    assert (signs == expected).all()
    for fine in order >> 16:
        assert sortable(np.array([score_of(int(fine))], dtype=np.float32))[0] >> 16 == fine


def test_rows_come_back_by_bucket_from_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MOST_ROWS", 5)
    rows = Spill(np.dtype(np.int64), num_buckets=3)
    for start in range(0, 20, 2):
        rows.add(np.arange(start, start + 2) % 3, np.arange(start, start + 2))
    assert rows.counts().tolist() == [7, 7, 6]
    pieces = list(rows.rows(1, 3))
    assert sorted(np.concatenate(pieces)) == [number for number in range(20) if number % 3]
    assert max(map(len, pieces)) <= 5


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(folder / "predictions.npz") as arrays:
        return json.loads((folder / "result.json").read_text()), dict(arrays)


def exact_auc(folder: Path) -> float:
    """Of the tally of all scores."""
    negatives, positives = np.load(folder / "tally.npy")
    scores = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")
    wins = below = 0
    for yes, no in zip(positives[order].tolist(), negatives[order].tolist(), strict=True):
        wins, below = wins + yes * (2 * below + no), below + no
    return wins / (2 * below * int(positives.sum()))


def test_any_number_of_ranks_folds_what_memory_would_hold(tmp_path: Path) -> None:
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
    scored.main(tmp_path / "1", 100_000, save=True)
    torchrun(2, "tests.training.scored", str(tmp_path / "2"), "100000", "--save")
    results = {}
    for ranks in (1, 2):
        result, arrays = read(tmp_path / str(ranks))
        logits, labels = arrays["logits"][:, 0], arrays["labels"][:, 0]
        assert result["candidates"] == len(logits) == 100_000
        assert result["requests"] == arrays["requests"][-1] + 1 == len(np.unique(arrays["requests"]))
        assert result["users"] == len(np.unique(arrays["users"]))
        expected = metrics_of(sums_of_requests(logits, labels, arrays["requests"]))
        expected |= {"auc": auc(logits, labels), "gauc": grouped_auc(logits, labels, arrays["users"])}
        assert result["tasks"]["liked"] == pytest.approx(expected, rel=1e-12)
        errors = arrays["logits"][:, 1].astype(np.float64) - arrays["labels"][:, 1]
        assert result["tasks"]["watched"] == pytest.approx({"mse": np.mean(errors**2)}, rel=1e-12)
        assert result["tasks"]["liked"]["auc"] == pytest.approx(exact_auc(tmp_path / str(ranks)), abs=1e-15)
        slices = result["slices"]["user"]
        assert [one["slice"] for one in slices] == [*map(str, range(7)), "others"]
        of_others = np.isin(arrays["users"] % 10, (7, 8, 9))
        places = np.unique(arrays["requests"][of_others], return_inverse=True)[1]
        part = metrics_of(sums_of_requests(logits[of_others], labels[of_others], places))
        assert slices[-1]["tasks"]["liked"] == pytest.approx(part, rel=1e-12)
        for size in ("requests", "candidates"):
            assert sum(one[size] for one in slices) == result[size]
        weighted = [one["tasks"]["liked"]["log_loss"] * one["candidates"] for one in slices]
        assert sum(weighted) == pytest.approx(result["tasks"]["liked"]["log_loss"] * 100_000, rel=1e-12)
        results[ranks] = result
    for key in ("requests", "users", "candidates"):
        assert results[1][key] == results[2][key]
    for task, metrics in results[1]["tasks"].items():
        assert results[2]["tasks"][task] == pytest.approx(metrics, rel=1e-12)
    for one, other in zip(results[1]["calibration"]["liked"], results[2]["calibration"]["liked"], strict=True):
        assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.slow
def test_a_hundred_million_candidates_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    torchrun(2, "tests.training.scored", str(tmp_path), "100000000")
    result = json.loads((tmp_path / "result.json").read_text())
    assert all(peak < 2**20 for _, peak in result["peak_kb"])
    found = result["tasks"]["liked"]
    assert result["candidates"] >= 100_000_000
    assert found["auc"] == pytest.approx(exact_auc(tmp_path), abs=1e-12)
    for metric in ("auc", "gauc", "request_auc"):
        assert found[metric] == pytest.approx(scored.AUC, abs=1e-3)
    assert found["calibration"] == pytest.approx(1, abs=1e-3)


def test_a_curve_has_as_many_candidates_in_each_bin_and_says_what_came_true(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(-1, 1, size=(50_000, 1)).astype(np.float32)
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    # Twice as many as predicted, where that is less than a half.
    labels = (random.random((50_000, 1)) < np.where(chances < 0.5, 2 * chances, chances)).astype(np.float32)
    evaluation = Evaluation(["liked"])
    evaluation.add(logits, scored.batch_of(np.full(5000, 10), labels, np.zeros(5000, dtype=np.int64)))
    curve = evaluation.result().calibration
    bins = curve["liked"]
    assert len(bins) == 20
    assert sum(one["candidates"] for one in bins) == 50_000
    order = np.argsort(logits[:, 0])
    first = 0
    for one in bins:
        assert one["candidates"] == pytest.approx(2500, rel=0.1)
        rows = order[first : first + int(one["candidates"])]
        assert one["predicted"] == pytest.approx(chances[rows].mean(), rel=1e-9)
        assert one["observed"] == pytest.approx(labels[rows].mean(), rel=1e-9)
        assert one["observed"] / one["predicted"] == pytest.approx(2 if one["predicted"] < 0.49 else 1, rel=0.3)
        first += int(one["candidates"])
    draw_calibration(tmp_path / "calibration.png", curve)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


@given(requests)
def test_predicted_and_observed_of_all_bins_are_those_of_all(found: Requests) -> None:
    result = evaluated(found)
    bins, metrics = result.calibration["liked"], result.tasks["liked"]
    observed, predicted = (sum(one[name] * one["candidates"] for one in bins) for name in ("observed", "predicted"))
    assert observed / result.candidates == pytest.approx(metrics["positive_rate"], abs=1e-12)
    assert predicted / observed == pytest.approx(metrics["calibration"], rel=1e-12)


def one_batch(labels: list[float]) -> RequestBatch:
    return scored.batch_of(np.array([len(labels)]), np.array(labels, dtype=np.float32)[:, None], np.array([7]))


def test_what_has_no_metrics_is_refused_in_one_line() -> None:
    evaluation = Evaluation(["liked"])
    evaluation.add(np.zeros((3, 1), dtype=np.float32), one_batch([0.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="liked: all 3 labels are 0: AUC and normalized entropy need both"):
        evaluation.result()
    evaluation.add(np.full((2, 1), math.nan, dtype=np.float32), one_batch([0.0, 1.0]))
    with pytest.raises(InputError, match="2 logits of the split's candidates are not finite"):
        evaluation.result()


def test_labels_between_0_and_1_have_losses_and_no_ranking() -> None:
    evaluation = Evaluation(["liked"])
    evaluation.add(np.arange(2, dtype=np.float32)[:, None], one_batch([0.25, 1.0]))
    expected = {"log_loss", "positive_rate", "calibration", "ne", "request_ne"}
    assert evaluation.result().tasks["liked"].keys() == expected


def test_predictions_of_counts_are_exponentials() -> None:
    evaluation = Evaluation(["seen"], LossConfig(tasks={"seen": TaskLossConfig(kind="poisson")}))
    evaluation.add(np.log(np.array([[2.0], [4.0]], dtype=np.float32)), one_batch([0.0, 1.0]))
    result = evaluation.result()
    assert result.tasks == {"seen": {"mse": pytest.approx((4 + 9) / 2, rel=1e-6)}}
    assert (result.calibration, asdict(result)["slices"]) == ({}, {})


def test_predictions_are_a_file_that_numpy_reads_of_all_that_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_amort.training.predictions.MOST_ROWS", 2)
    predictions = PredictionFile(num_tasks=2)
    labels = np.array([[0, 1], [1, 0], [0, 0]], dtype=np.float32)
    for user in (5, 6):
        predictions.add(labels + user, scored.batch_of(np.array([2, 1]), labels, np.array([user, 0])))
    predictions.write(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert set(arrays) == {"logits", "labels", "users", "requests"}
        assert torch.from_numpy(arrays["logits"]).equal(torch.from_numpy(np.concatenate([labels + 5, labels + 6])))
        assert (arrays["labels"].dtype, arrays["labels"].tolist()) == (np.float32, [*labels.tolist()] * 2)
        assert arrays["users"].tolist() == [5, 5, 0, 6, 6, 0]
        assert (arrays["requests"].dtype, arrays["requests"].tolist()) == (np.int64, [0, 0, 1, 2, 2, 3])
