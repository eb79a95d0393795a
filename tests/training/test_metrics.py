import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort.training.metrics import (
    auc,
    auc_of_requests,
    calibration,
    grouped_auc,
    log_loss,
    ndcg_of_requests,
    normalized_entropy,
)

rows = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30
)


def auc_by_pairs(pairs: list[tuple[float, bool]]) -> float | None:
    wins = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive, is_positive in pairs
        if is_positive
        for negative, other in pairs
        if not other
    ]
    return sum(wins) / len(wins) if wins else None


@given(rows)
def test_equals_counting_pairs(data: list[tuple[float, bool, int]]) -> None:
    scores, labels, groups = (np.array(column) for column in zip(*data, strict=True))
    expected = auc_by_pairs([(score, label) for score, label, _ in data])
    if expected is None:
        for metric in (lambda: auc(scores, labels), lambda: grouped_auc(scores, labels, groups)):
            with pytest.raises(ValueError, match="has both labels"):
                metric()
        return
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-12)
    by_group = {group: auc_by_pairs([(s, y) for s, y, g in data if g == group]) for group in {g for _, _, g in data}}
    sizes = {group: sum(g == group for _, _, g in data) for group in by_group}
    places = np.searchsorted(sorted(by_group), groups)
    for found, group in zip(auc_of_requests(scores, labels, places), sorted(by_group), strict=True):
        assert found == pytest.approx(np.nan if by_group[group] is None else by_group[group], abs=1e-12, nan_ok=True)
    both = [group for group, value in by_group.items() if value is not None]
    if not both:
        with pytest.raises(ValueError, match="has both labels"):
            grouped_auc(scores, labels, groups)
        return
    weighted = sum(sizes[group] * (by_group[group] or 0.0) for group in both) / sum(sizes[group] for group in both)
    assert grouped_auc(scores, labels, groups) == pytest.approx(weighted, abs=1e-12)


@given(rows)
def test_normalized_entropy_equals_its_definition(data: list[tuple[float, bool, int]]) -> None:
    logits, labels, _ = (np.array(column) for column in zip(*data, strict=True))
    labels = labels.astype(np.float32)
    rate = labels.mean()
    if rate in (0, 1):
        with pytest.raises(ValueError, match="needs both kinds"):
            normalized_entropy(logits, labels)
        return
    losses = [
        -math.log(1 / (1 + math.exp(-x)) if y else 1 / (1 + math.exp(x))) for x, y in zip(logits, labels, strict=True)
    ]
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert log_loss(logits, labels) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert normalized_entropy(logits, labels) == pytest.approx(sum(losses) / len(losses) / entropy, rel=1e-6)


def test_sure_and_wrong_has_a_finite_loss_and_nan_is_refused() -> None:
    assert log_loss(np.array([-1000.0]), np.array([1.0])) == 1000.0
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        auc(np.array([0.0, np.nan]), np.array([0.0, 1.0]))


def ndcg_by_orders(candidates: list[tuple[float, bool]]) -> float:
    """The mean over all orders that do not put a lower score before a higher one, by the definition of NDCG."""
    orders = [
        order for order in itertools.permutations(candidates) if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
    ]
    gains = [sum(positive / math.log2(rank + 2) for rank, (_, positive) in enumerate(order)) for order in orders]
    best = sum(1 / math.log2(rank + 2) for rank in range(sum(positive for _, positive in candidates)))
    return sum(gains) / len(gains) / best


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 2.0]), st.booleans()), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.randoms(),
)
def test_ndcg_is_the_mean_over_the_orders_that_scores_allow(
    requests: list[list[tuple[float, bool]]], random: Random
) -> None:
    rows = [(score, label, place) for place, candidates in enumerate(requests) for score, label in candidates]
    random.shuffle(rows)
    scores, labels, places = (np.array(column) for column in zip(*rows, strict=True))
    for found, candidates in zip(ndcg_of_requests(scores, labels, places), requests, strict=True):
        if len({label for _, label in candidates}) == 2:
            assert found == pytest.approx(ndcg_by_orders(candidates), abs=1e-12)
        else:
            assert np.isnan(found)


def test_calibration_is_predicted_positives_over_real_ones() -> None:
    logits = np.log([0.2 / 0.8, 0.9 / 0.1, 0.4 / 0.6])
    assert calibration(logits, np.array([0.0, 1.0, 0.0])) == pytest.approx(1.5)
    assert calibration(np.array([-1000.0, 1000.0]), np.array([0.0, 1.0])) == 1.0
    with pytest.raises(ValueError, match="none of 2 labels is positive"):
        calibration(np.zeros(2), np.zeros(2))
