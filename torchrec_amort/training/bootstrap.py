"""How much of a difference between two models is chance: paired bootstrap over users.

Shape suffixes: R rows (impressions) of a split; Q requests; U users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from torchrec_amort.training.metrics import Ranking, metrics_of, sums_of_requests

PERCENTILES = (50, 95, 99)


class UserWeighted(Protocol):
    """Figures that are known for any number of times that each user counts."""

    def at(self, weights_U: np.ndarray) -> dict[str, float]:
        """The figures with these weights of users; NaN where there is none."""


class UserWeightedMetrics:
    """AUC, GAUC and what `metrics_of` tells of one task when each user counts some number of times.

    What does not depend on those numbers is worked out once.

    Args:
        logits: [R].
        labels: [R], 0 or 1.
        users: [R], places of users from 0 to U - 1.
        requests: [R], places of requests from 0, each of one user.

    Raises:
        ValueError: a logit is not finite.

    Example::

        metrics = UserWeightedMetrics(logits, labels, users, requests)
        metrics.at(np.ones(num_users))  # the metrics of the split itself
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, users: np.ndarray, requests: np.ndarray) -> None:
        order = np.argsort(logits, kind="stable")
        scores = logits[order]
        self._users, self._positive = users[order], labels[order].astype(np.float64)
        self._tie_starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
        num_users = int(users.max()) + 1
        _, first_rows, requests = np.unique(requests, return_index=True, return_inverse=True)
        users_Q = users[first_rows]
        of_requests = sums_of_requests(logits, labels, requests)
        self._sums = {name: np.bincount(users_Q, sums_Q, num_users) for name, sums_Q in of_requests.items()}
        of_users = Ranking(logits, labels, users)
        self._has_auc = of_users.has_both_Q
        self._user_auc = of_users.auc()[self._has_auc]
        self._user_rows = of_users.rows_Q[self._has_auc].astype(np.float64)
        self._none = dict.fromkeys(("auc", "gauc", *metrics_of(of_requests)), np.nan)

    def at(self, weights_U: np.ndarray) -> dict[str, float]:
        """The split's metrics with these weights of users; NaN where the labels that are left do not tell."""
        values = self._none | metrics_of({name: sums_U @ weights_U for name, sums_U in self._sums.items()})
        if np.isnan(values.get("ne", np.nan)):
            return values
        weights, user_weights = weights_U[self._users], weights_U[self._has_auc] * self._user_rows
        return values | {
            "auc": _auc(weights * self._positive, weights * (1 - self._positive), self._tie_starts),
            "gauc": float(user_weights @ self._user_auc / user_weights.sum()) if user_weights.any() else np.nan,
        }


class UserWeightedCosts:
    """Percentiles and mean of what requests cost when each user counts a given number of times.

    Args:
        costs: [Q], such as the seconds of each request.
        users: [Q], places of users from 0 to U - 1.

    Example::

        UserWeightedCosts(seconds, users).at(np.ones(num_users))["p99"]
    """

    def __init__(self, costs: np.ndarray, users: np.ndarray) -> None:
        order = np.argsort(costs, kind="stable")
        self._costs, self._users = costs[order], users[order]

    def at(self, weights_U: np.ndarray) -> dict[str, float]:
        """The smallest cost that so many percent of the requests do not exceed, and the mean."""
        weights_Q = weights_U[self._users]
        below_Q = np.cumsum(weights_Q)
        total = below_Q[-1]
        if not total:
            return dict.fromkeys((*(f"p{percent}" for percent in PERCENTILES), "mean"), np.nan)
        places = np.searchsorted(below_Q, np.array(PERCENTILES) / 100 * total)
        values = {f"p{percent}": float(self._costs[k]) for percent, k in zip(PERCENTILES, places, strict=True)}
        return values | {"mean": float(weights_Q @ self._costs / total)}


def _auc(positives: np.ndarray, negatives: np.ndarray, tie_starts: np.ndarray) -> float:
    """AUC of rows in order of their scores, from the weights of their positives and negatives."""
    positives, negatives = np.add.reduceat(positives, tie_starts), np.add.reduceat(negatives, tie_starts)
    below = np.cumsum(negatives) - negatives / 2
    return float(positives @ below / (positives.sum() * negatives.sum()))


def paired_differences(
    first: Sequence[UserWeighted],
    others: Mapping[str, Sequence[UserWeighted]],
    *,
    num_users: int,
    samples: int,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """How each model differs from the first, in the mean over seeds, and between which bounds by chance of users.

    Args:
        first: the model to compare with, once for each seed.
        others: the other models, by name.
        num_users: U.
        samples: bootstrap samples: each draws U users with replacement, the same ones for all models.
        seed: of the draws.

    Returns:
        dict: for each model and metric that all of them have, the `difference` on the split itself, and `low` and
        `high`, the bounds of the central 95% of the bootstrap samples.

    Example::

        paired_differences(ours, {"mean_pooling": theirs}, num_users=1209, samples=1000, seed=0)
    """
    weights = list(_weights(num_users, samples, seed))
    base = _means(first, weights)
    record: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in others.items():
        means = _means(model, weights)
        record[name] = {
            metric: _bounds(values - base[metric], "difference")
            for metric, values in means.items()
            if metric in base and not np.isnan(values[0])
        }
    return record


def paired_ratios(
    first: UserWeighted, other: UserWeighted, *, num_users: int, samples: int, seed: int
) -> dict[str, dict[str, float]]:
    """How many times the figures of a model are those of the first, and between which bounds by chance of users.

    Args:
        first: the model to compare with.
        other: the other model.
        num_users: U.
        samples: bootstrap samples, as of `paired_differences`.
        seed: of the draws.

    Returns:
        dict: for each figure, the `ratio` on the split itself, and its bounds `low` and `high`.

    Example::

        paired_ratios(UserWeightedCosts(s, users), UserWeightedCosts(t, users), num_users=9, samples=1000, seed=0)
    """
    weights = list(_weights(num_users, samples, seed))
    base, means = _means([first], weights), _means([other], weights)
    return {figure: _bounds(means[figure] / base[figure], "ratio") for figure in means}


def _weights(num_users: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user counts, [U]: once in the split itself, which comes first, and as drawn in each sample."""
    draws = np.random.default_rng(seed)
    yield np.ones(num_users)
    for _ in range(samples):
        yield np.bincount(draws.integers(num_users, size=num_users), minlength=num_users).astype(np.float64)


def _means(model: Sequence[UserWeighted], weights: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """For each metric that all have, its mean over seeds, or days, for each vector of weights."""
    rows = [[one.at(weights_U) for one in model] for weights_U in weights]
    metrics = [metric for metric in rows[0][0] if all(metric in one for one in rows[0])]
    return {metric: np.array([np.mean([one[metric] for one in row]) for row in rows]) for metric in metrics}


def _bounds(values: np.ndarray, name: str) -> dict[str, float]:
    """The value of the split itself, which is the first one, and the bounds of the central 95% of the others."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {name: float(values[0]), "low": float(low), "high": float(high)}
