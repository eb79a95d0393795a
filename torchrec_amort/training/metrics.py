"""Exact ranking metrics over all predictions of a split.

TorchRec's AUC puts equal scores in the order in which they came, and its grouped AUC weighs every group the
same; a report needs ties counted as half, and users weighted by their impressions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

# Those that say which of two models is better, and whether it is the one with more of it.
Metric = Literal["ne", "log_loss", "mse", "auc", "gauc", "request_auc", "ndcg"]
MORE_IS_BETTER: dict[Metric, bool] = {
    "ne": False,
    "log_loss": False,
    "mse": False,
    "auc": True,
    "gauc": True,
    "request_auc": True,
    "ndcg": True,
}


def normalized_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Log loss as a share of the log loss of always predicting the positive rate (He et al., ADKDD 2014, 3).

    Args:
        logits: [R].
        labels: [R], 0 or 1.

    Returns:
        float: 0 is perfect, 1 is no better than the positive rate.

    Raises:
        ValueError: all labels are the same: their entropy is 0.

    Example::

        normalized_entropy(np.array([2.0, -2.0]), np.array([1.0, 0.0]))  # 0.18
    """
    rate = float(labels.mean(dtype=np.float64))
    if rate in (0.0, 1.0):
        raise ValueError(f"all {len(labels)} labels are {rate:.0f}: normalized entropy needs both kinds")
    return log_loss(logits, labels) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross entropy, in nats."""
    return float(np.mean(log_losses(logits, labels)))


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
    aucs, rows = _auc_of_groups(scores, labels, np.unique(groups, return_inverse=True)[1])
    both = ~np.isnan(aucs)
    if not both.any():
        raise ValueError(f"none of {len(rows)} groups has both labels: there is no AUC to report")
    return float(np.average(aucs[both], weights=rows[both]))


def auc_of_requests(scores: np.ndarray, labels: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """AUC of each request's candidates, ties counted as half.

    Args:
        scores: [R].
        labels: [R], 0 or 1.
        requests: [R], places of requests from 0.

    Returns:
        np.ndarray: float64, one for each request; NaN where labels are all the same.

    Raises:
        ValueError: a score is not finite.

    Example::

        auc_of_requests(np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.zeros(3, dtype=np.int64))  # [0.5]
    """
    return _auc_of_groups(scores, labels, requests)[0]


def _auc_of_groups(scores: np.ndarray, labels: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of each group, NaN where its labels are all the same, and its number of rows."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
    order = np.lexsort((scores, group))
    group, scores, positive = group[order], scores[order], labels[order].astype(np.float64)
    rows = np.bincount(group)
    starts = np.cumsum(rows) - rows
    is_new = np.append(True, (scores[1:] != scores[:-1]) | (group[1:] != group[:-1]))
    ties = np.bincount(np.cumsum(is_new) - 1)
    # Rows of one score share the mean of their ranks, 1 for the lowest of the group.
    ranks = np.repeat(np.flatnonzero(is_new) + (ties + 1) / 2, ties) - starts[group]
    positives = np.bincount(group, positive)
    pairs = positives * (rows - positives)
    wins = np.bincount(group, ranks * positive) - positives * (positives + 1) / 2
    return np.divide(wins, pairs, out=np.full(len(rows), np.nan), where=pairs > 0), rows


def calibration(logits: np.ndarray, labels: np.ndarray) -> float:
    """Positives that were predicted for each that there was: 1 is neither too many nor too few (He et al., 3).

    Args:
        logits: [R].
        labels: [R], 0 or 1.

    Raises:
        ValueError: there is no positive.

    Example::

        calibration(np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0]))  # 1.5
    """
    if not labels.any():
        raise ValueError(f"none of {len(labels)} labels is positive: there is nothing to predict")
    return float(probabilities(logits).sum() / labels.sum(dtype=np.float64))


def mean_squared_error(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the squared differences of predictions and targets, [R] each."""
    return float(np.mean(np.square(predicted.astype(np.float64) - targets)))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The logistic function of each logit: float64 [R]."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def ndcg_of_requests(scores: np.ndarray, labels: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """Normalized discounted cumulative gain of each request's candidates, over the whole list.

    A positive at rank k gains 1 / log2(k + 1), and the sum is divided by that of the best order (Järvelin and
    Kekäläinen, TOIS 2002, 2.2). Candidates of one score share the mean of their ranks' gains (McSherry and Najork,
    ECIR 2008, 3).

    Args:
        scores: [R].
        labels: [R], 0 or 1.
        requests: [R], places of requests from 0.

    Returns:
        np.ndarray: float64, one for each request; NaN where labels are all the same, which every order ranks alike.

    Example::

        ndcg_of_requests(np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.zeros(3, dtype=np.int64))  # [0.63]
    """
    order = np.lexsort((-scores, requests))
    request, scores, positive = requests[order], scores[order], labels[order].astype(np.float64)
    rows = np.bincount(request)
    ranks = np.arange(len(request)) - (np.cumsum(rows) - rows)[request]
    gains = 1 / np.log2(2.0 + ranks)
    is_new = np.append(True, (scores[1:] != scores[:-1]) | (request[1:] != request[:-1]))
    tie = np.cumsum(is_new) - 1
    shared = (np.bincount(tie, gains) / np.bincount(tie))[tie]
    positives = np.bincount(request, positive).astype(np.int64)
    best = np.append(0.0, np.cumsum(1 / np.log2(2.0 + np.arange(rows.max()))))[positives]
    both = (positives > 0) & (positives < rows)
    return np.divide(np.bincount(request, positive * shared), best, out=np.full(len(rows), np.nan), where=both)
