import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort.training.bootstrap import UserWeightedMetrics, paired_differences
from torchrec_amort.training.metrics import auc, grouped_auc, normalized_entropy

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
    found = UserWeightedMetrics(logits, labels, users).at(np.array(times, dtype=np.float64))
    repeats = [(user, copy) for user, count in enumerate(times) for copy in range(count)]
    rows = [np.flatnonzero(users == user) for user, _ in repeats]
    if not rows or len(set(labels[np.concatenate(rows)])) < 2:
        assert np.isnan(found["auc"])
        return
    chosen = np.concatenate(rows)
    # Every copy of a user is a user of its own.
    groups = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    assert found["auc"] == pytest.approx(auc(logits[chosen], labels[chosen]), abs=1e-12)
    assert found["ne"] == pytest.approx(normalized_entropy(logits[chosen], labels[chosen]), abs=1e-12)
    if any(len(set(labels[r])) == 2 for r in rows):
        assert found["gauc"] == pytest.approx(grouped_auc(logits[chosen], labels[chosen], groups), abs=1e-12)


def test_a_model_does_not_differ_from_itself_and_a_worse_one_does() -> None:
    good = [make_predictions(seed, 3000, bias=2.0) for seed in (0, 1)]
    metrics = [UserWeightedMetrics(*predictions) for predictions in good]
    worse = [
        UserWeightedMetrics(np.random.default_rng(9).normal(size=3000) + logits / 2, labels, users)
        for logits, labels, users in good
    ]
    found = paired_differences(metrics, {"same": metrics, "worse": worse}, num_users=NUM_USERS, samples=200, seed=0)
    for metric in ("auc", "gauc", "ne"):
        assert found["same"][metric] == {"difference": 0.0, "low": 0.0, "high": 0.0}
        difference = found["worse"][metric]
        assert difference["low"] <= difference["difference"] <= difference["high"]
        assert difference["low"] > 0 if metric == "ne" else difference["high"] < 0
    expected = np.mean([auc(np.random.default_rng(9).normal(size=3000) + x / 2, y) - auc(x, y) for x, y, _ in good])
    assert found["worse"]["auc"]["difference"] == pytest.approx(expected)
