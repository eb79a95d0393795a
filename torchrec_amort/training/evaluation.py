"""Metrics of a split of any size: taken in batch by batch, the same on any number of ranks.

No rank holds all predictions. What adds up over requests is added up as they come, in float64. AUC needs all scores in
order, and GAUC the rows of a user together: both are spilled to the rank's disk and finished some at a time, exactly.

Shape suffixes: R rows (candidates) of some requests; Q requests; T tasks; F fine buckets of a slicing; K sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import mix
from torchrec_amort.modules.losses import REGRESSIONS, LossConfig
from torchrec_amort.training.metrics import Ranking, metrics_of, probabilities, sums_of_requests, sums_of_targets
from torchrec_amort.training.processes import sum_over_ranks
from torchrec_amort.training.spill import Spill, brought_together, tallied_together

# Of users, by hash; and of scores, by their first bits.
USER_BUCKETS = 4096
SCORE_BUCKETS = 4096
# A curve's, each of about as many candidates.
CALIBRATION_BINS = 20
# Of scores, by the first 16 bits: 128 to each power of two.
FINE_SCORES = 2**16


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` found, the same on all ranks.

    Args:
        requests: how many there were.
        candidates: of all of them.
        users: whose they were.
        tasks: metrics of each task.
        calibration: of each task with labels, bins of scores from low to high: `candidates`, and the mean of what is
            `predicted` and `observed`.
        slices: for each slicing, its slices in order: `slice`, `requests`, `candidates`, and metrics of `tasks`.
    """

    requests: int
    candidates: int
    users: int
    tasks: dict[str, dict[str, float]]
    calibration: dict[str, list[dict[str, float]]]
    slices: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Slicing:
    """A way to tell requests apart, whose slices are made of fine buckets once all were seen.

    Args:
        num_fine: F.
        fine_of: of a batch, the fine bucket of each request, int64 [Q].
        slices_of: of the requests in each fine bucket, [F], the name of each slice and its fine buckets.
    """

    num_fine: int
    fine_of: Callable[[RequestBatch], np.ndarray]
    slices_of: Callable[[np.ndarray], list[tuple[str, np.ndarray]]]


# All requests, in one slice.
_WHOLE = Slicing(1, lambda batch: np.zeros(len(batch), dtype=np.int64), lambda _: [("", np.zeros(1, dtype=np.int64))])


class Evaluation:
    """Takes in a split's predictions. All ranks make one, and ask for its result, together.

    A rank needs a few hundred MB, and 8 bytes a candidate and task and 8 + 5T bytes a candidate on its disk (`TMPDIR`);
    memory grows with the candidates of users of one of `USER_BUCKETS` alone.

    Args:
        tasks: names of the T labels.
        loss: that was trained with; the default if None.
        slicings: by name.
    """

    def __init__(
        self, tasks: Sequence[str], loss: LossConfig | None = None, slicings: Mapping[str, Slicing] | None = None
    ) -> None:
        self._kinds = {task: (loss or LossConfig()).of(task).kind for task in tasks}
        self._ranked = [t for t, kind in enumerate(self._kinds.values()) if kind not in REGRESSIONS]
        self._slicings = {"": _WHOLE, **(slicings or {})}
        # By slicing and task: name of the sum to [F].
        self._sums: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self._not_finite = 0
        size = len(self._ranked)
        row = np.dtype([("user", np.int64), ("logits", np.float32, (size,)), ("positive", np.bool_, (size,))])
        self._of_users = Spill(row, USER_BUCKETS)
        self._scores = {t: Spill(np.dtype(np.int64), SCORE_BUCKETS) for t in self._ranked}
        # By the first bits of the score.
        self._curves: dict[int, dict[str, np.ndarray]] = {t: {} for t in self._ranked}

    def add(self, logits_RT: np.ndarray, batch: RequestBatch) -> None:
        """Take in a batch; each rank takes one at least.

        Args:
            logits_RT: float32, of the batch's candidates.
            batch: with labels and users.
        """
        assert batch.labels is not None
        assert batch.users is not None
        if not (finite := np.isfinite(logits_RT)).all():
            # Told by all ranks together, at the end.
            self._not_finite += int((~finite).sum())
            return
        sizes_Q, labels_RT = batch.num_candidates.numpy(), batch.labels.cpu().numpy()
        requests_R = np.repeat(np.arange(len(sizes_Q)), sizes_Q)
        fine = {name: slicing.fine_of(batch) for name, slicing in self._slicings.items()}
        for t, (task, kind) in enumerate(self._kinds.items()):
            logits_R, labels_R = logits_RT[:, t], labels_RT[:, t]
            if kind in REGRESSIONS:
                predicted_R = np.exp(logits_R.astype(np.float64)) if kind == "poisson" else logits_R
                sums = sums_of_targets(predicted_R, labels_R, requests_R)
            else:
                sums = sums_of_requests(logits_R, labels_R, requests_R)
                self._add_scores(t, logits_R, labels_R)
            sums["requests"] = np.ones(len(sizes_Q))
            for name, fine_Q in fine.items():
                _fold(self._sums.setdefault((name, task), {}), self._slicings[name].num_fine, sums, fine_Q)
        rows = np.empty(len(requests_R), self._of_users.dtype)
        rows["user"] = np.repeat(batch.users.cpu().numpy(), sizes_Q)
        rows["logits"], rows["positive"] = logits_RT[:, self._ranked], labels_RT[:, self._ranked] == 1
        self._of_users.add(mix(rows["user"]) % USER_BUCKETS, rows)

    def _add_scores(self, t: int, logits_R: np.ndarray, labels_R: np.ndarray) -> None:
        order_R = sortable(logits_R)
        self._scores[t].add(order_R >> 20, 2 * order_R + (labels_R == 1))
        values = {"candidates": np.ones(len(labels_R)), "observed": labels_R, "predicted": probabilities(logits_R)}
        _fold(self._curves[t], FINE_SCORES, values, order_R >> 16)

    def result(self) -> EvaluateResult:
        """The metrics of all ranks' batches.

        Raises:
            InputError: a task has labels of one kind only, or a logit is not finite.
        """
        if not_finite := int(sum_over_ranks(torch.tensor(self._not_finite))):
            raise InputError(
                f"{not_finite:,} logits of the split's candidates are not finite: evaluate an earlier checkpoint, or "
                "train with lower learning rates"
            )
        sums = {key: _summed(folded) for key, folded in self._sums.items()}
        whole = {task: {name: values_F[0] for name, values_F in sums["", task].items()} for task in self._kinds}
        tasks = {task: metrics_of(whole[task]) for task in self._kinds}
        gaucs, users = self._gaucs()
        names = list(self._kinds)
        for place, t in enumerate(self._ranked):
            self._refuse_one_kind(names[t], whole[names[t]])
            if not whole[names[t]]["neither"]:
                total, rows = gaucs[place]
                tasks[names[t]] |= {"auc": _auc(self._scores[t]), **({"gauc": total / rows} if rows else {})}
        first = whole[names[0]]
        return EvaluateResult(
            requests=int(first["requests"]),
            candidates=int(first["rows"]),
            users=users,
            tasks=tasks,
            calibration={names[t]: _curve(_summed(curve)) for t, curve in self._curves.items()},
            slices={name: self._slices(name, sums) for name in self._slicings if name},
        )

    def _refuse_one_kind(self, task: str, sums: Mapping[str, float]) -> None:
        if sums["positives"] in (0, sums["rows"]):
            raise InputError(
                f"{task}: all {sums['rows']:,.0f} labels are {int(sums['positives'] > 0)}: AUC and normalized entropy "
                f"need both kinds: {sums['requests']:,.0f} requests were scored, evaluate a split of more"
            )

    def _gaucs(self) -> tuple[list[list[float]], int]:
        """AUC of users times their rows, and these rows, of each task that is ranked; and the number of users."""
        found = np.zeros((len(self._ranked), 2))
        users = 0
        for _, rows in brought_together(self._of_users):
            of_rows, users_R = np.unique(rows["user"], return_inverse=True)
            users += len(of_rows)
            for place in range(len(found)):
                ranking = Ranking(rows["logits"][:, place], rows["positive"][:, place], users_R)
                both = ranking.has_both_Q
                found[place] += ranking.auc()[both] @ ranking.rows_Q[both], ranking.rows_Q[both].sum()
        return _sum_of_ranks(found).tolist(), int(sum_over_ranks(torch.tensor(users)))

    def _slices(self, name: str, sums: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
        first = sums[name, next(iter(self._kinds))]
        return [
            {
                "slice": told,
                "requests": int(first["requests"][fine].sum()),
                "candidates": int(first["rows"][fine].sum()),
                "tasks": {
                    task: metrics_of({key: values_F[fine] for key, values_F in sums[name, task].items()})
                    for task in self._kinds
                },
            }
            for told, fine in self._slicings[name].slices_of(first["requests"])
        ]


def _fold(folded: dict[str, np.ndarray], num_fine: int, values: Mapping[str, np.ndarray], fine: np.ndarray) -> None:
    """Add values up by their fine bucket."""
    places, inverse = np.unique(fine, return_inverse=True)
    for name, each in values.items():
        folded.setdefault(name, np.zeros(num_fine))[places] += np.bincount(inverse, each, len(places))


def _sum_of_ranks(values: np.ndarray) -> np.ndarray:
    return sum_over_ranks(torch.from_numpy(values)).cpu().numpy()


def _summed(folded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(folded, _sum_of_ranks(np.stack(list(folded.values()))), strict=True))


def in_equal_parts(counts_F: np.ndarray, num_parts: int) -> np.ndarray:
    """The part of each bucket, int64 [F], so that parts have about as much each: buckets stay whole."""
    middle_F = np.cumsum(counts_F) - counts_F / 2
    return np.minimum(num_parts - 1, (num_parts * middle_F / counts_F.sum()).astype(np.int64))


def sortable(scores_R: np.ndarray) -> np.ndarray:
    """Numbers below 2**32, int64 [R], in the order of float32 scores, and equal where they are."""
    # Adding 0 makes 0 of -0.
    bits = (scores_R.astype(np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31)).astype(np.int64)


def score_of(fine: int) -> float:
    """The score of the first 16 bits of its `sortable` number, whose other bits are 0."""
    bits = fine << 16
    return float(np.array(bits ^ 2**31 if bits >> 31 else ~bits & 0xFFFFFFFF, dtype=np.uint32).view(np.float32))


def _auc(scores: Spill) -> float:
    """The chance that a positive scores above a negative, ties counted as half, of whole numbers until the end.

    Args:
        scores: of values that are twice a score's `sortable`, plus 1 if it is a positive's.
    """
    of_groups: dict[int, tuple[int, int, int]] = {}
    for place, tally in tallied_together(scores):
        ties, tie = np.unique(tally["value"] >> 1, return_inverse=True)
        is_positive = (tally["value"] & 1).astype(bool)
        positives, negatives = (np.zeros(len(ties), dtype=np.int64) for _ in range(2))
        positives[tie[is_positive]] = tally["count"][is_positive]
        negatives[tie[~is_positive]] = tally["count"][~is_positive]
        twice_below = 2 * np.cumsum(negatives) - negatives
        of_groups[place] = int(positives.sum()), int(negatives.sum()), int(positives @ twice_below)
    found = np.zeros((SCORE_BUCKETS, 3), dtype=np.int64)
    for place, values in of_groups.items():
        found[place] = values
    twice_wins = below = total = 0
    for positives, negatives, twice_within in _sum_of_ranks(found).tolist():
        twice_wins += twice_within + 2 * positives * below
        below += negatives
        total += positives
    return twice_wins / (2 * total * below)


def _curve(sums: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    """Bins of about as many candidates each, from low scores to high ones.

    Args:
        sums: [F] each: candidates, and the sums of what was observed and predicted.
    """
    bin_of = in_equal_parts(sums["candidates"], CALIBRATION_BINS)
    bins = {name: np.bincount(bin_of, values, CALIBRATION_BINS) for name, values in sums.items()}
    return [
        {"candidates": int(count), **{name: float(bins[name][place] / count) for name in ("predicted", "observed")}}
        for place, count in enumerate(bins["candidates"])
        if count
    ]
