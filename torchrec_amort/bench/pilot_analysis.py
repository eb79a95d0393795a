"""From what two arms did with the same requests to what an engineering manager asks: quality, latency, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from torchrec_amort.bench.cost import CostModel, fit
from torchrec_amort.bench.replay import Log, Replayed
from torchrec_amort.training.bootstrap import (
    UserWeightedCosts,
    UserWeightedMetrics,
    paired_differences,
    paired_ratios,
)
from torchrec_amort.training.metrics import METRICS_OF_REQUESTS, MORE_IS_BETTER, Metric, Ranking, probabilities

CONTROL, TREATMENT = "control", "treatment"
# What is told of quality; of calibration neither more nor less is better.
METRICS: tuple[Metric | Literal["calibration"], ...] = (
    "ne",
    "request_ne",
    "auc",
    "gauc",
    "request_auc",
    "ndcg",
    "ndcg_at_10",
    "mrr",
    "calibration",
)
# Two ways to score with the same float32 weights differ by less than this in any metric.
ROUNDING = 1e-6
BUCKETS = 4


def quality(
    log: Log, logits: Mapping[str, np.ndarray], tasks: Sequence[str], *, samples: int, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """For each task and metric, the value of each arm, and the difference with its interval and what to make of it.

    Args:
        log: the requests.
        logits: [R, T] of each arm.
        tasks: names of the T tasks.
        samples: resamples of users.
        seed: of them.

    Returns:
        dict: by task and metric `control`, `treatment`, `difference`, `low`, `high` and `verdict`; of means over
        requests also the number of `requests` that have both labels. A metric that the requests do not have, as those
        if none has both, is left out.
    """
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for t, task in enumerate(tasks):
        metrics = {name: _metrics(log, arm[:, t], log.labels[:, t]) for name, arm in logits.items()}
        num_users = int(log.users.max()) + 1
        values = {name: one.at(np.ones(num_users)) for name, one in metrics.items()}
        differences = paired_differences(
            [metrics[CONTROL]], {TREATMENT: [metrics[TREATMENT]]}, num_users=num_users, samples=samples, seed=seed
        )[TREATMENT]
        record[task] = {
            metric: {
                CONTROL: values[CONTROL][metric],
                TREATMENT: values[TREATMENT][metric],
                **differences[metric],
                "verdict": _verdict(metric, differences[metric]),
            }
            for metric in METRICS
            if metric in differences
        }
        num_ranked = int(Ranking(logits[CONTROL][:, t], log.labels[:, t], log.requests).has_both_Q.sum())
        for metric in record[task].keys() & METRICS_OF_REQUESTS:
            record[task][metric]["requests"] = num_ranked
    return record


def _metrics(log: Log, logits: np.ndarray, labels: np.ndarray) -> UserWeightedMetrics:
    return UserWeightedMetrics(logits, labels, log.users[log.requests], log.requests)


def _verdict(metric: Metric | Literal["calibration"], difference: Mapping[str, float]) -> str:
    low, high = difference["low"], difference["high"]
    if low <= ROUNDING and high >= -ROUNDING:
        return "no difference beyond chance"
    if metric == "calibration":
        return "differs"
    return "better" if MORE_IS_BETTER[metric] == (low > 0) else "worse"


def largest_difference(logits: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two probabilities that the arms gave the same candidate."""
    return float(np.abs(probabilities(logits[TREATMENT]) - probabilities(logits[CONTROL])).max())


def latency(log: Log, replayed: Mapping[str, Replayed], *, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a request: p50, p95, p99 and mean of each arm, and the ratio of them with its interval."""
    return _ratios({name: 1e3 * arm.seconds for name, arm in replayed.items()}, log.users, samples, seed)


def processor_cost(log: Log, replayed: Mapping[str, Replayed], *, samples: int, seed: int) -> dict[str, float]:
    """CPU seconds for 1,000 requests, all threads together: of each arm, and the ratio with its interval."""
    seconds = {name: 1e3 * arm.processor_seconds for name, arm in replayed.items()}
    return _ratios(seconds, log.users, samples, seed)["mean"]


def _ratios(costs: Mapping[str, np.ndarray], users: np.ndarray, samples: int, seed: int) -> dict[str, dict[str, float]]:
    arms = {name: UserWeightedCosts(values, users) for name, values in costs.items()}
    num_users = int(users.max()) + 1
    values = {name: one.at(np.ones(num_users)) for name, one in arms.items()}
    ratios = paired_ratios(arms[CONTROL], arms[TREATMENT], num_users=num_users, samples=samples, seed=seed)
    return {
        figure: {CONTROL: values[CONTROL][figure], TREATMENT: values[TREATMENT][figure], **ratios[figure]}
        for figure in ratios
    }


def by_size(
    log: Log, sizes: np.ndarray, replayed: Mapping[str, Replayed], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """The same figures for requests of like size, in buckets of a quarter of the requests each where sizes allow.

    Args:
        log: the requests.
        sizes: int64 [Q], such as their numbers of events.
        replayed: by arm.
        tasks: names of the T tasks.

    Returns:
        list: for each bucket its smallest and largest size, `requests`, `candidates` and, by arm, `p50_ms`,
        `cpu_ms` and by task the metrics, None where the bucket's labels do not tell.
    """
    starts = np.unique(np.quantile(sizes, np.arange(1, BUCKETS) / BUCKETS, method="higher"))
    bucket_of = np.searchsorted(starts, sizes, side="right")
    buckets = []
    for bucket in np.unique(bucket_of):
        chosen_Q = bucket_of == bucket
        chosen_R = chosen_Q[log.requests]
        part = Log(
            log.labels[chosen_R],
            np.unique(log.users[chosen_Q], return_inverse=True)[1],
            log.num_candidates[chosen_Q],
            log.events[chosen_Q],
        )
        buckets.append(
            {
                "smallest": int(sizes[chosen_Q].min()),
                "largest": int(sizes[chosen_Q].max()),
                "requests": int(chosen_Q.sum()),
                "candidates": int(chosen_R.sum()),
                "arms": {
                    name: {
                        "p50_ms": 1e3 * float(np.median(arm.seconds[chosen_Q])),
                        "cpu_ms": 1e3 * float(np.mean(arm.processor_seconds[chosen_Q])),
                        "tasks": metrics_of(part, arm.logits[chosen_R], tasks),
                    }
                    for name, arm in replayed.items()
                },
            }
        )
    return buckets


def metrics_of(log: Log, logits: np.ndarray, tasks: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The metrics of each task; None where the labels do not tell."""
    ones = np.ones(int(log.users.max()) + 1)
    values = {task: _metrics(log, logits[:, t], log.labels[:, t]).at(ones) for t, task in enumerate(tasks)}
    return {task: {metric: _or_none(metrics.get(metric)) for metric in METRICS} for task, metrics in values.items()}


def _or_none(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def held_back(shapes: Sequence[tuple[int, int]]) -> list[bool]:
    """Which points of a grid the cost model is not fitted to: every other one, as the black fields of a chessboard."""
    lengths, candidates = (sorted({shape[side] for shape in shapes}) for side in (0, 1))
    return [(lengths.index(n) + candidates.index(m)) % 2 == 1 for n, m in shapes]


def cost_model(points: Sequence[Mapping[str, Any]], arm: str) -> tuple[CostModel, float]:
    """The one-thread milliseconds of an arm by events (of each history) and candidates; its error on held-back points.

    Args:
        points: what `time_shapes` measured, at least three lengths or numbers of candidates.
        arm: its name.

    Returns:
        tuple: the model, and the median over the points it was not fitted to of the relative difference.
    """
    measured = [(point["history_length"], point["candidates"], point["one_thread_ms"][arm]) for point in points]
    is_held_back = held_back([(n, m) for n, m, _ in measured])
    model = fit([point for point, back in zip(measured, is_held_back, strict=True) if not back])
    return model, model.error_on([point for point, back in zip(measured, is_held_back, strict=True) if back])


def sizing(
    log: Log, models: Mapping[str, CostModel], rates: Sequence[float], utilization: float, longest: int
) -> list[dict[str, Any]]:
    """Cores that a rate of requests takes, if each is kept busy for a share of its time.

    Args:
        log: the requests, for the shapes that there are.
        models: of each arm.
        rates: requests a second.
        utilization: that share.
        longest: events that an arm reads of a history at most.

    Returns:
        list: for each shape (all requests as logged, the median and the 95th percentile of both sizes) and rate, by
        arm, `ms` on one thread and `cores`.
    """
    # As in the points that the models are fitted to, where all histories have as many.
    events, candidates = np.minimum(log.events, longest).mean(1), log.num_candidates
    shapes: list[tuple[str, np.ndarray, np.ndarray]] = [("as logged", events, candidates)]
    for percent in (50, 95):
        n, m = (np.percentile(sizes, percent, method="higher").reshape(1) for sizes in (events, candidates))
        shapes.append((f"p{percent}", n, m))
    rows = []
    for name, n, m in shapes:
        milliseconds = {
            arm: float(np.mean([model(*one) for one in zip(n, m, strict=True)])) for arm, model in models.items()
        }
        for rate in rates:
            rows.append(
                {
                    "shape": name,
                    "history_length": float(n.mean()),
                    "candidates": float(m.mean()),
                    "requests_per_second": rate,
                    "ms": milliseconds,
                    "cores": {arm: rate * ms / 1e3 / utilization for arm, ms in milliseconds.items()},
                }
            )
    return rows
