"""Ranking metrics and losses: which there are, and what they are of a split's predictions.

TorchRec's AUC puts equal scores in the order in which they came, and its grouped AUC weighs every group the same; a
report needs ties counted as half, and users weighted by their impressions.

A metric of requests is a mean over the requests that have both labels. Where scores tie, it is the mean over all
orders that the scores allow (McSherry and Najork, *Computing Information Retrieval Performance Measures Efficiently in
the Presence of Tied Scores*, ECIR 2008), so that it does not depend on the order in which candidates came.

Shape suffixes: R rows (candidates); Q requests; E ties, which are the rows of a group that have one score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import numpy as np

# Those that say which of two models is better.
Metric = Literal[
    "ne",
    "log_loss",
    "mse",
    "auc",
    "gauc",
    "request_auc",
    "ndcg",
    "ndcg_at_5",
    "ndcg_at_10",
    "mrr",
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "request_ne",
]
# Whether it is the model with more of it.
_LOSSES: tuple[Metric, ...] = ("ne", "log_loss", "mse", "request_ne")
MORE_IS_BETTER: dict[Metric, bool] = {metric: metric not in _LOSSES for metric in get_args(Metric)}
# What reports call them, and what else they tell.
NAMES = {
    "ne": "NE",
    "log_loss": "log loss",
    "mse": "mean squared error",
    "auc": "AUC",
    "gauc": "GAUC",
    "request_auc": "AUC of requests",
    "ndcg": "NDCG",
    "ndcg_at_5": "NDCG@5",
    "ndcg_at_10": "NDCG@10",
    "mrr": "MRR",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "request_ne": "request NE",
    "calibration": "calibration",
}
# Of them, those that a line or a table has room for.
SHOWN: tuple[Metric, ...] = ("auc", "gauc", "request_auc", "ndcg_at_10", "mrr", "ne")


def log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Binary cross entropy of each row, in nats: float64 [R]."""
    logits, labels = logits.astype(np.float64), labels.astype(np.float64)
    return np.logaddexp(0.0, logits) - labels * logits


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counted as half.

    Args:
        scores: [R].
        labels: [R], 0 or 1.

    Raises:
        ValueError: all labels are the same.

    Example::

        auc(np.array([0.1, 0.5, 0.5]), np.array([0.0, 1.0, 0.0]))  # 0.75
    """
    return grouped_auc(scores, labels, np.zeros(len(scores), dtype=np.int64))


def grouped_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """AUC of each group, averaged with the groups' numbers of rows as weights.

    Groups whose labels are all the same have no AUC and no weight (GAUC: Zhou et al., arXiv 1706.06978, 5.2).

    Args:
        scores: [R].
        labels: [R], 0 or 1.
        groups: [R], whose row it is.

    Raises:
        ValueError: no group has both labels, or a score is not finite.

    Example::

        grouped_auc(scores, labels, users)
    """
    ranking = Ranking(scores, labels, np.unique(groups, return_inverse=True)[1])
    aucs = ranking.auc()
    both = ~np.isnan(aucs)
    if not both.any():
        raise ValueError(f"none of {len(aucs)} groups has both labels: there is no AUC to report")
    return float(np.average(aucs[both], weights=ranking.rows_Q[both]))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The logistic function of each logit: float64 [R]."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


class Ranking:
    """The candidates of each request, or the rows of each group, from the highest score to the lowest.

    Args:
        scores: [R].
        labels: [R], 0 or 1.
        requests: [R], places of requests from 0.

    Raises:
        ValueError: a score is not finite.

    Example::

        Ranking(np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.zeros(3, dtype=np.int64)).ndcg()  # [0.63]
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, requests: np.ndarray) -> None:
        if not np.isfinite(scores).all():
            raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
        order = np.lexsort((-scores, requests))
        requests, scores = requests[order], scores[order]
        self.rows_Q = np.bincount(requests)
        starts_Q = np.cumsum(self.rows_Q) - self.rows_Q
        self.highest_Q = scores[np.minimum(starts_Q, len(scores) - 1)]
        is_new = np.append(True, (scores[1:] != scores[:-1]) | (requests[1:] != requests[:-1]))
        starts_E = np.flatnonzero(is_new)
        self._requests_E = requests[starts_E]
        self._rows_E = np.diff(starts_E, append=len(scores))
        self._positives_E = np.add.reduceat(labels[order].astype(np.float64), starts_E)
        self._before_E = starts_E - starts_Q[self._requests_E]
        self.positives_Q = self._of_requests(self._positives_E)
        self.has_both_Q = (self.positives_Q > 0) & (self.positives_Q < self.rows_Q)

    def _of_requests(self, values_E: np.ndarray) -> np.ndarray:
        return np.bincount(self._requests_E, values_E, len(self.rows_Q))

    def _ratio(self, values_Q: np.ndarray, best_Q: np.ndarray) -> np.ndarray:
        """NaN where labels are all the same, which every order ranks alike."""
        return np.divide(values_Q, best_Q, out=np.full(len(values_Q), np.nan), where=self.has_both_Q)

    def auc(self) -> np.ndarray:
        """The chance that a positive of the request scores above a negative, ties counted as half.

        Returns:
            np.ndarray: float64 [Q]; NaN where labels are all the same, as of all metrics here.
        """
        negatives_E = self._rows_E - self._positives_E
        seen_E = np.cumsum(negatives_E)
        negatives_Q = self.rows_Q - self.positives_Q
        below_E = np.cumsum(negatives_Q)[self._requests_E] - seen_E
        wins_Q = self._of_requests(self._positives_E * (below_E + negatives_E / 2))
        return self._ratio(wins_Q, self.positives_Q * negatives_Q)

    def _gained(self, gains: np.ndarray) -> np.ndarray:
        """What the positives of each request gain, [Q], by the gain of each rank."""
        up_to = np.append(0.0, np.cumsum(gains))
        of_tie_E = up_to[self._before_E + self._rows_E] - up_to[self._before_E]
        return self._of_requests(self._positives_E * of_tie_E / self._rows_E)

    def _ranks(self) -> np.ndarray:
        return np.arange(1, self.rows_Q.max() + 1)

    def ndcg(self, first: int | None = None) -> np.ndarray:
        """Normalized discounted cumulative gain.

        A positive at rank k gains 1 / log2(k + 1), and the sum is divided by that of the best order (Järvelin and
        Kekäläinen, TOIS 2002, 2.2).

        Args:
            first: ranks after this one gain nothing; the whole list if None.

        Returns:
            np.ndarray: float64 [Q].
        """
        ranks = self._ranks()
        gains = np.where(ranks <= (first or len(ranks)), 1 / np.log2(ranks + 1.0), 0.0)
        best_Q = np.append(0.0, np.cumsum(gains))[self.positives_Q.astype(np.int64)]
        return self._ratio(self._gained(gains), best_Q)

    def recall(self, first: int) -> np.ndarray:
        """The share of the positives that are among the first candidates.

        Args:
            first: how many candidates count.

        Returns:
            np.ndarray: float64 [Q].
        """
        return self._ratio(self._gained((self._ranks() <= first).astype(np.float64)), self.positives_Q)

    def reciprocal_rank(self) -> np.ndarray:
        """1 / rank of the first positive; where it ties, the mean of that over the orders.

        Returns:
            np.ndarray: float64 [Q].
        """
        with_positive = np.flatnonzero(self._positives_E > 0)
        requests, places = np.unique(self._requests_E[with_positive], return_index=True)
        ties = with_positive[places]
        rows, positives, before = self._rows_E[ties], self._positives_E[ties], self._before_E[ties]
        values_Q, none_yet = np.zeros(len(self.rows_Q)), np.ones(len(ties))
        for place in range(int(rows.max(initial=0))):
            # Of the tie's rows that are left, those that are positive.
            hit = np.minimum(1.0, positives / np.maximum(1, rows - place))
            values_Q[requests] += none_yet * hit / (before + place + 1)
            none_yet *= 1 - hit
            if not none_yet.any():
                break
        return self._ratio(values_Q, np.ones(len(values_Q)))


# Means over the requests that have both labels.
METRICS_OF_REQUESTS: dict[Metric, Callable[[Ranking], np.ndarray]] = {
    "request_auc": Ranking.auc,
    "ndcg": Ranking.ndcg,
    "ndcg_at_5": partial(Ranking.ndcg, first=5),
    "ndcg_at_10": partial(Ranking.ndcg, first=10),
    "mrr": Ranking.reciprocal_rank,
    "recall_at_1": partial(Ranking.recall, first=1),
    "recall_at_5": partial(Ranking.recall, first=5),
    "recall_at_10": partial(Ranking.recall, first=10),
}


def sums_of_requests(logits: np.ndarray, labels: np.ndarray, requests: np.ndarray) -> dict[str, np.ndarray]:
    """What metrics are made of, by request: `metrics_of` takes the sums over any requests.

    Args:
        logits: [R].
        labels: [R], from 0 to 1.
        requests: [R], places of requests from 0.

    Returns:
        dict: float64 [Q] each: the numbers of `rows`, of `positives`, and of labels that are `neither` 0 nor 1; the
        `loss`, and the `predicted` positives; whether the request is `ranked`, as it has both labels, and then each
        metric of requests; the `request_loss` of its positives, and that of equal logits, `request_entropy`.

    Raises:
        ValueError: a logit is not finite.

    Example::

        sums_of_requests(np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.zeros(3, dtype=np.int64))["mrr"]
    """
    ranking = Ranking(logits, labels, requests)
    logits, labels = logits.astype(np.float64), labels.astype(np.float64)
    shifted_R = logits - ranking.highest_Q[requests]

    def summed(values_R: np.ndarray) -> np.ndarray:
        return np.bincount(requests, values_R, len(ranking.rows_Q))

    log_sums_Q = np.log(np.where(ranking.rows_Q > 0, summed(np.exp(shifted_R)), 1.0))
    return {
        "rows": ranking.rows_Q.astype(np.float64),
        "positives": ranking.positives_Q,
        "neither": summed(((labels != 0) & (labels != 1)).astype(np.float64)),
        "loss": summed(log_losses(logits, labels)),
        "predicted": summed(probabilities(logits)),
        "ranked": ranking.has_both_Q.astype(np.float64),
        **{name: np.where(ranking.has_both_Q, metric(ranking), 0.0) for name, metric in METRICS_OF_REQUESTS.items()},
        "request_loss": summed(labels * (log_sums_Q[requests] - shifted_R)),
        "request_entropy": ranking.positives_Q * np.log(np.maximum(ranking.rows_Q, 1)),
    }


def sums_of_targets(predicted: np.ndarray, targets: np.ndarray, requests: np.ndarray) -> dict[str, np.ndarray]:
    """What the metric of a target is made of, by request, as `sums_of_requests`.

    Args:
        predicted: [R].
        targets: [R].
        requests: [R], places of requests from 0.

    Returns:
        dict: float64 [Q] each: the number of `rows`, and the sum of their squared errors, `squared_error`.

    Example::

        metrics_of(sums_of_targets(np.array([2.0]), np.array([4.0]), np.array([0])))["mse"]  # 4.0
    """
    errors = np.square(predicted.astype(np.float64) - targets)
    return {"rows": np.bincount(requests).astype(np.float64), "squared_error": np.bincount(requests, errors)}


def metrics_of(sums: Mapping[str, float | np.ndarray]) -> dict[str, float]:
    """The metrics that are made of sums over requests.

    Args:
        sums: of `sums_of_requests` or `sums_of_targets`, added up or by request.

    Returns:
        dict: `log_loss`, `positive_rate`, `calibration` (positives that were predicted for each that there was; He et
        al., ADKDD 2014, 3) and `ne`, the log loss as a share of that of always predicting the positive rate (the same);
        the metrics of requests, means over the ranked ones; and `request_ne`, the mean over positives of -log softmax
        of the request's logits, as a share of that of equal logits. Those that the labels do not tell are left out;
        labels other than 0 and 1 rank nothing. Of targets, `mse`.

    Example::

        metrics_of(sums_of_requests(logits, labels, requests))["ne"]
    """
    total = {name: float(np.sum(values)) for name, values in sums.items()}
    rows = total["rows"]
    if not rows:
        return {}
    if "squared_error" in total:
        return {"mse": total["squared_error"] / rows}
    rate = total["positives"] / rows
    metrics = {"log_loss": total["loss"] / rows, "positive_rate": rate}
    if rate:
        metrics["calibration"] = total["predicted"] / total["positives"]
    if 0 < rate < 1:
        metrics["ne"] = metrics["log_loss"] / -float(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    if total["request_entropy"]:
        metrics["request_ne"] = total["request_loss"] / total["request_entropy"]
    if total["ranked"] and not total["neither"]:
        metrics |= {name: total[name] / total["ranked"] for name in METRICS_OF_REQUESTS}
    return metrics
