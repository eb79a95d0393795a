"""How much of a difference between two models is chance: paired bootstrap over users.

Shape suffixes: R rows (impressions) of a split; U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from torchrec_amort.training.metrics import log_losses


class UserWeightedMetrics:
    """AUC, GAUC and NE of one task when each user counts a given number of times.

    What does not depend on those numbers is worked out once.

    Args:
        logits: [R].
        labels: [R], 0 or 1.
        users: [R], places of users from 0 to U - 1.

    Example::

        metrics = UserWeightedMetrics(logits, labels, users)
        metrics.at(np.ones(num_users))  # the metrics of the split itself
    """

    def __init__(self, logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> None:
        order = np.argsort(logits, kind="stable")
        scores = logits[order]
        self._users, self._positive = users[order], labels[order].astype(np.float64)
        self._tie_starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
        num_users = int(users.max()) + 1
        self._loss = np.bincount(users, log_losses(logits, labels), num_users)
        self._rows = np.bincount(users, minlength=num_users).astype(np.float64)
        self._positives = np.bincount(users, labels.astype(np.float64), num_users)
        self._user_auc = self._auc_of_each_user(num_users)

    def _auc_of_each_user(self, num_users: int) -> np.ndarray:
        """[U], NaN for users whose labels are all the same."""
        order = np.argsort(self._users, kind="stable")
        tie = np.repeat(np.arange(len(self._tie_starts)), np.diff(self._tie_starts, append=len(self._users)))
        auc = np.full(num_users, np.nan)
        for rows in np.split(order, np.flatnonzero(np.diff(self._users[order])) + 1):
            positive, ties = self._positive[rows], np.flatnonzero(np.diff(tie[rows], prepend=-1))
            if 0 < positive.sum() < len(positive):
                auc[self._users[rows[0]]] = _auc(positive, 1 - positive, ties)
        return auc

    def at(self, weights_U: np.ndarray) -> dict[str, float]:
        """AUC, GAUC and NE with these weights of users; NaN where only one kind of label is left."""
        weights = weights_U[self._users]
        rows, positives = weights_U @ self._rows, weights_U @ self._positives
        has_auc = ~np.isnan(self._user_auc)
        user_weights = (weights_U * self._rows)[has_auc]
        rate = positives / rows if rows else np.nan
        if not 0 < rate < 1 or not user_weights.sum():
            return {"auc": np.nan, "gauc": np.nan, "ne": np.nan}
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return {
            "auc": _auc(weights * self._positive, weights * (1 - self._positive), self._tie_starts),
            "gauc": float(user_weights @ self._user_auc[has_auc] / user_weights.sum()),
            "ne": float(weights_U @ self._loss / rows / entropy),
        }


def _auc(positives: np.ndarray, negatives: np.ndarray, tie_starts: np.ndarray) -> float:
    """AUC of rows in order of their scores, from the weights of their positives and negatives."""
    positives, negatives = np.add.reduceat(positives, tie_starts), np.add.reduceat(negatives, tie_starts)
    below = np.cumsum(negatives) - negatives / 2
    return float(positives @ below / (positives.sum() * negatives.sum()))


def paired_differences(
    first: Sequence[UserWeightedMetrics],
    others: Mapping[str, Sequence[UserWeightedMetrics]],
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
        dict: for each model and metric, the `difference` on the split itself, and `low` and `high`, the bounds of the
        central 95% of the bootstrap samples.

    Example::

        paired_differences(ours, {"mean_pooling": theirs}, num_users=1209, samples=1000, seed=0)
    """
    draws = np.random.default_rng(seed)
    weights = [np.ones(num_users)]
    for _ in range(samples):
        weights.append(np.bincount(draws.integers(num_users, size=num_users), minlength=num_users).astype(np.float64))
    base = _means(first, weights)
    record: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in others.items():
        means = _means(model, weights)
        record[name] = {}
        for metric, values in means.items():
            differences = values - base[metric]
            low, high = np.nanpercentile(differences[1:], [2.5, 97.5])
            record[name][metric] = {"difference": float(differences[0]), "low": float(low), "high": float(high)}
    return record


def _means(model: Sequence[UserWeightedMetrics], weights: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """For each metric, its mean over seeds for each vector of weights."""
    rows = [[one.at(weights_U) for one in model] for weights_U in weights]
    return {metric: np.array([np.mean([one[metric] for one in row]) for row in rows]) for metric in rows[0][0]}
