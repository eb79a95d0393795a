import itertools
import math
from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_amort.training.metrics import (
    METRICS_OF_REQUESTS,
    MORE_IS_BETTER,
    NAMES,
    SHOWN,
    Ranking,
    auc,
    grouped_auc,
    metrics_of,
    sums_of_requests,
    sums_of_targets,
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
    both = [group for group, value in by_group.items() if value is not None]
    if not both:
        with pytest.raises(ValueError, match="has both labels"):
            grouped_auc(scores, labels, groups)
        return
    weighted = sum(sizes[group] * (by_group[group] or 0.0) for group in both) / sum(sizes[group] for group in both)
    assert grouped_auc(scores, labels, groups) == pytest.approx(weighted, abs=1e-12)


Request = list[tuple[float, bool]]
requests_of_few = st.lists(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def arrays(requests: list[Request]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [(score, float(label), place) for place, request in enumerate(requests) for score, label in request]
    scores, labels, places = (np.array(column) for column in zip(*rows, strict=True))
    return scores.astype(np.float32), labels.astype(np.float32), places.astype(np.int64)


def dcg(labels: list[bool], first: int) -> float:
    return sum(positive / math.log2(rank + 1) for rank, positive in enumerate(labels[:first], 1))


def ndcg(labels: list[bool], first: int = 99) -> float:
    return dcg(labels, first) / dcg(sorted(labels, reverse=True), first)


def recall(labels: list[bool], first: int) -> float:
    return sum(labels[:first]) / sum(labels)


# By the definitions, of labels in the order of their scores.
BY_DEFINITION: dict[str, Callable[[list[bool]], float]] = {
    "request_auc": lambda labels: (
        sum(a and not b for a, b in itertools.combinations(labels, 2)) / (sum(labels) * (len(labels) - sum(labels)))
    ),
    "mrr": lambda labels: 1 / (labels.index(True) + 1),
    "ndcg": ndcg,
    **{f"ndcg_at_{first}": partial(ndcg, first=first) for first in (5, 10)},
    **{f"recall_at_{first}": partial(recall, first=first) for first in (1, 5, 10)},
}


def of_all_orders(request: Request) -> dict[str, float]:
    """The mean of each metric over all orders that do not put a lower score before a higher one."""
    orders = [
        [label for _, label in order]
        for order in itertools.permutations(request)
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
    ]
    return {name: sum(map(metric, orders)) / len(orders) for name, metric in BY_DEFINITION.items()}


@given(requests_of_few, st.randoms())
def test_metrics_of_requests_are_means_over_the_orders_that_scores_allow(
    requests: list[Request], random: Random
) -> None:
    scores, labels, places = arrays(requests)
    order = random.sample(range(len(scores)), len(scores))
    sums = sums_of_requests(scores[order], labels[order], places[order])
    assert BY_DEFINITION.keys() == METRICS_OF_REQUESTS.keys()
    for place, request in enumerate(requests):
        is_ranked = len({label for _, label in request}) == 2
        assert sums["ranked"][place] == is_ranked
        for name, value in of_all_orders(request).items() if is_ranked else ():
            assert sums[name][place] == pytest.approx(value, abs=1e-12), name
        assert np.isnan(Ranking(scores, labels, places).auc()[place]) != is_ranked
    ranked = [of_all_orders(request) for request in requests if len({label for _, label in request}) == 2]
    found = metrics_of(sums)
    for name in METRICS_OF_REQUESTS:
        expected = pytest.approx(sum(one[name] for one in ranked) / len(ranked), abs=1e-12) if ranked else None
        assert found.get(name) == expected


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=12, max_size=40), st.randoms())
def test_cuts_and_first_positives_of_long_lists_with_ties(rows: list[tuple[int, bool]], random: Random) -> None:
    scores, labels, places = arrays([[(float(score), label) for score, label in rows]])
    if len(set(labels)) < 2:
        return
    sums = sums_of_requests(scores, labels, places)
    ordered = sorted(set(scores), reverse=True)
    ties = [labels[scores == score].astype(np.float64) for score in ordered]
    before = np.cumsum([0] + [len(tie) for tie in ties])
    for first in (5, 10):
        hits = sum(tie.mean() * min(max(first - start, 0), len(tie)) for tie, start in zip(ties, before, strict=False))
        assert sums[f"recall_at_{first}"][0] == pytest.approx(hits / labels.sum(), abs=1e-12)
    place, tie = next((place, tie) for place, tie in enumerate(ties) if tie.any())
    positives, size = int(tie.sum()), len(tie)
    # The first of the tie's positives is at place j if the others are among those behind it.
    chances = [math.comb(size - j, positives - 1) / math.comb(size, positives) for j in range(1, size + 1)]
    expected = sum(chance / (before[place] + j) for j, chance in enumerate(chances, 1))
    assert sums["mrr"][0] == pytest.approx(expected, abs=1e-12)


@given(requests_of_few, st.sampled_from([lambda x: 3 * x - 1, np.exp2, lambda x: x**3]))
def test_monotone_maps_of_scores_change_no_ranking(
    requests: list[Request], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    scores, labels, places = arrays(requests)
    before, after = (sums_of_requests(each, labels, places) for each in (scores, change(scores)))
    for name in METRICS_OF_REQUESTS:
        assert (before[name] == after[name]).all(), name


@given(requests_of_few, st.floats(-30, 30))
def test_losses_equal_their_definitions(requests: list[Request], shift: float) -> None:
    scores, labels, places = arrays(requests)
    rows = [row for request in requests for row in request]
    losses = [-math.log(1 / (1 + math.exp(-x if y else x))) for x, y in rows]
    rate = sum(y for _, y in rows) / len(rows)
    found = metrics_of(sums_of_requests(scores, labels, places))
    assert found["log_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert found["positive_rate"] == pytest.approx(rate, rel=1e-12)
    if 0 < rate < 1:
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        assert found["ne"] == pytest.approx(sum(losses) / len(losses) / entropy, rel=1e-12)
    else:
        assert "ne" not in found
    if rate:
        predicted = sum(1 / (1 + math.exp(-x)) for x, _ in rows)
        assert found["calibration"] == pytest.approx(predicted / (rate * len(rows)), rel=1e-12)
    of_softmax = [
        math.log(sum(math.exp(other) for other, _ in request)) - x for request in requests for x, y in request if y
    ]
    uniform = [math.log(len(request)) for request in requests for _, y in request if y]
    if sum(uniform):
        assert found["request_ne"] == pytest.approx(sum(of_softmax) / sum(uniform), rel=1e-9)
        # Logits of a listwise loss are no probabilities: what is added to all of a request changes nothing.
        shifted = metrics_of(sums_of_requests(scores.astype(np.float64) + shift * places, labels, places))
        assert shifted["request_ne"] == pytest.approx(found["request_ne"], rel=1e-9, abs=1e-12)
    else:
        assert "request_ne" not in found


def test_equal_logits_have_a_request_ne_of_1_and_impressions_have_none() -> None:
    labels, places = np.array([1.0, 0, 0, 1, 1, 0]), np.array([0, 0, 0, 1, 1, 1])
    assert metrics_of(sums_of_requests(np.full(6, 7.0), labels, places))["request_ne"] == pytest.approx(1)
    assert not metrics_of(sums_of_requests(np.full(6, 7.0), labels, np.arange(6))).keys() & {"request_ne", "mrr"}


def test_sure_and_wrong_has_a_finite_loss_and_nan_is_refused() -> None:
    one = np.zeros(1, dtype=np.int64)
    assert metrics_of(sums_of_requests(np.array([-1000.0]), np.array([1.0]), one))["log_loss"] == 1000.0
    sure = metrics_of(sums_of_requests(np.array([-1000.0, 1000.0]), np.array([0.0, 1.0]), np.zeros(2, dtype=np.int64)))
    assert (sure["calibration"], sure["request_ne"]) == (1.0, 0.0)
    for metric in (auc, lambda scores, labels: sums_of_requests(scores, labels, np.array([0, 0]))):
        with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
            metric(np.array([0.0, np.nan]), np.array([0.0, 1.0]))


def test_labels_between_0_and_1_have_losses_and_rank_nothing() -> None:
    sums = sums_of_requests(np.array([0.0, 1.0]), np.array([0.25, 1.0]), np.zeros(2, dtype=np.int64))
    assert metrics_of(sums).keys() == {"log_loss", "positive_rate", "calibration", "ne", "request_ne"}


def test_targets_have_their_mean_squared_error_alone() -> None:
    sums = sums_of_targets(np.array([2.0, 1.0]), np.array([4.0, 1.5]), np.array([0, 1]))
    assert metrics_of(sums) == {"mse": (4 + 0.25) / 2}


def test_every_metric_has_a_name_and_a_direction() -> None:
    assert set(NAMES) == {*MORE_IS_BETTER, "calibration"}
    assert set(SHOWN) <= set(MORE_IS_BETTER)
    losses = {metric for metric, more in MORE_IS_BETTER.items() if not more}
    assert losses == {"ne", "log_loss", "mse", "request_ne"}
