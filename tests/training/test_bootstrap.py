import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort.training.bootstrap import (
    UserWeightedCosts,
    UserWeightedMetrics,
    paired_differences,
    paired_ratios,
)
from torchrec_amort.training.metrics import auc, grouped_auc, metrics_of, sums_of_requests

NUM_USERS = 7


def make_predictions(seed: int, rows: int = 60, bias: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with ties, labels of both kinds, and users who all appear."""
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=rows).astype(np.float32)
    labels[:2] = 0, 1
    logits = np.round(random.normal(size=rows) + bias * labels, 1).astype(np.float32)
    return logits, labels, np.append(random.integers(NUM_USERS, size=rows - NUM_USERS), np.arange(NUM_USERS))


@given(st.integers(0, 1000), st.lists(st.integers(0, 3), min_size=NUM_USERS, max_size=NUM_USERS))
def test_weighing_users_is_repeating_their_rows(seed: int, times: list[int]) -> None:
    logits, labels, users = make_predictions(seed)
    # Each user has two requests, some of them perhaps empty.
    requests = np.unique(2 * users + np.random.default_rng(seed).integers(2, size=len(users)), return_inverse=True)[1]
    found = UserWeightedMetrics(logits, labels, users, requests).at(np.array(times, dtype=np.float64))
    repeats = [(user, copy) for user, count in enumerate(times) for copy in range(count)]
    rows = [np.flatnonzero(users == user) for user, _ in repeats]
    if not rows or len(set(labels[np.concatenate(rows)])) < 2:
        assert np.isnan(found["auc"])
        return
    chosen = np.concatenate(rows)
    # Every copy of a user is a user of its own.
    groups = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    assert found["auc"] == pytest.approx(auc(logits[chosen], labels[chosen]), abs=1e-12)
    copies = np.unique(groups * 1000 + requests[chosen], return_inverse=True)[1]
    for name, value in metrics_of(sums_of_requests(logits[chosen], labels[chosen], copies)).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    if any(len(set(labels[r])) == 2 for r in rows):
        assert found["gauc"] == pytest.approx(grouped_auc(logits[chosen], labels[chosen], groups), abs=1e-12)


def test_a_model_does_not_differ_from_itself_and_a_worse_one_does() -> None:
    good = [make_predictions(seed, 3000, bias=2.0) for seed in (0, 1)]
    # Requests of one candidate each.
    places = np.arange(3000)
    metrics = [UserWeightedMetrics(*predictions, places) for predictions in good]
    worse = [
        UserWeightedMetrics(np.random.default_rng(9).normal(size=3000) + logits / 2, labels, users, places)
        for logits, labels, users in good
    ]
    found = paired_differences(metrics, {"same": metrics, "worse": worse}, num_users=NUM_USERS, samples=200, seed=0)
    for metric in ("auc", "gauc", "ne"):
        assert found["same"][metric] == {"difference": 0.0, "low": 0.0, "high": 0.0}
        difference = found["worse"][metric]
        assert difference["low"] <= difference["difference"] <= difference["high"]
        assert difference["low"] > 0 if metric == "ne" else difference["high"] < 0
    assert not found["worse"].keys() & {"request_auc", "mrr", "request_ne"}
    expected = np.mean([auc(np.random.default_rng(9).normal(size=3000) + x / 2, y) - auc(x, y) for x, y, _ in good])
    assert found["worse"]["auc"]["difference"] == pytest.approx(expected)


@given(st.integers(0, 1000), st.lists(st.integers(0, 3), min_size=NUM_USERS, max_size=NUM_USERS).filter(any))
def test_weighing_users_is_repeating_their_requests(seed: int, times: list[int]) -> None:
    random = np.random.default_rng(seed)
    costs, users = random.random(40), np.append(random.integers(NUM_USERS, size=33), np.arange(NUM_USERS))
    repeated = np.repeat(costs, np.array(times)[users])
    found = UserWeightedCosts(costs, users).at(np.array(times, dtype=np.float64))
    assert found["mean"] == pytest.approx(repeated.mean())
    for percent in (50, 95, 99):
        assert found[f"p{percent}"] == np.percentile(repeated, percent, method="inverted_cdf")


def test_ratios_of_like_requests_lie_around_1_and_of_slower_ones_above() -> None:
    random = np.random.default_rng(0)
    users = np.arange(4000) % 50
    first, same = (UserWeightedCosts(random.gamma(9.0, size=4000), users) for _ in range(2))
    slower = UserWeightedCosts(2 * random.gamma(9.0, size=4000), users)
    ratios = paired_ratios(first, same, num_users=50, samples=300, seed=0)
    assert all(ratios[figure]["low"] <= 1 <= ratios[figure]["high"] for figure in ("p50", "p95", "mean"))
    ratios = paired_ratios(first, slower, num_users=50, samples=300, seed=0)
    assert all(1.5 < bounds["low"] < bounds["ratio"] < bounds["high"] < 2.5 for bounds in ratios.values())


def test_a_metric_that_one_of_several_splits_has_not_is_left_out() -> None:
    logits, labels, users = make_predictions(0)
    # In the second one no request has a candidate that another one could be put before.
    several, alone = (
        UserWeightedMetrics(logits, labels, users, places) for places in (2 * users + users % 2, np.arange(len(users)))
    )
    assert "request_ne" in several.at(np.ones(NUM_USERS)) and "request_ne" not in alone.at(np.ones(NUM_USERS))
    for first, other in (([several, alone], [several, alone]), ([alone], [several]), ([several], [alone])):
        found = paired_differences(first, {"other": other}, num_users=NUM_USERS, samples=5, seed=0)["other"]
        assert "auc" in found and "request_ne" not in found
