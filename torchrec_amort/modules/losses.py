"""Losses: of each candidate, of the pairs of a request's candidates, and of a request's whole list.

A loss is the mean of its samples, which are candidates, pairs or requests. Each batch gives the sum over its samples
and their number, so that any number of ranks come to the mean of the global batch.

Shape suffixes: B requests; C candidates, all requests together; P pairs; S samples; T tasks; K means that a loss is of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.ops.jagged import pairs, requests
from torchrec_amort.schema import RequestSchema

LossKind = Literal["binary", "squared", "huber", "poisson", "pairwise", "listwise", "joint"]
MeanOver = Literal["samples", "requests"]
Weighting = Literal["fixed", "uncertainty"]

# Of targets; the others are of labels from 0 to 1.
REGRESSIONS = ("squared", "huber", "poisson")
_WITHIN_REQUESTS = ("pairwise", "listwise", "joint")

# Of logits and labels, float [C, T] each: a scalar; [C, T] with `reduction="none"`, where candidates have weights.
Loss = Callable[..., Tensor]
# The loss of each sample [S], and its request, int64 [S].
Samples = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class TaskLossConfig:
    """How one task is trained.

    Args:
        kind: of a label: `binary` (cross entropy of each candidate), `pairwise` (logistic loss of each two candidates
            of a request whose labels differ), `listwise` (softmax cross entropy over the candidates of a request) or
            `joint` (`binary` plus `ranking_weight` times `listwise`). Of a target: `squared` (error), `huber` (half of
            that up to `delta`, linear beyond) or `poisson` (of a count, 0 or more; the logit is the logarithm of its
            mean).
        weight: factor of the task's loss.
        delta: of `huber`; 1 unless given.
        ranking_weight: of `joint`; 1 unless given.
    """

    kind: LossKind = "binary"
    weight: float = 1.0
    delta: float | None = None
    ranking_weight: float | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(
            self, {NOT_NEGATIVE: ("weight",), POSITIVE: ("delta", "ranking_weight")}, "loss.tasks: a task's "
        )
        for name, kind in (("delta", "huber"), ("ranking_weight", "joint")):
            if getattr(self, name) is not None and self.kind != kind:
                raise InputError(f"loss.tasks: {name} is of kind {kind}, not of {self.kind}: leave it out")


@dataclass(kw_only=True)
class LossConfig:
    """What is minimized: the mean of all tasks' losses, each times its weight.

    Args:
        tasks: how tasks are trained, by the names of their labels; `binary` unless named. Targets have to be named.
        mean_over: `samples`, which are candidates or pairs, or `requests`: the mean of each request's own mean, so that
            a request counts the same whatever the number of its candidates.
        weighting: of tasks against each other: `fixed`, or `uncertainty`, by a variance that is learned for each
            (Kendall et al., arXiv 1705.07115, 3.2).
        next_action: weight of one loss more, in which each event of a history predicts the item of the next one; none
            if 0. Histories need an encoder whose events read older ones only: `append_cross_causal`.
        next_action_negatives: items that the next one is told apart from, at most: some of those of the batch.
    """

    tasks: dict[str, TaskLossConfig] = field(default_factory=dict)
    mean_over: MeanOver = "samples"
    weighting: Weighting = "fixed"
    next_action: float = 0.0
    next_action_negatives: int = 1024

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {NOT_NEGATIVE: ("next_action",), AT_LEAST_ONE: ("next_action_negatives",)}, "loss.")

    def of(self, task: str) -> TaskLossConfig:
        """How a task is trained."""
        return self.tasks.get(task) or TaskLossConfig()


class BatchLoss(nn.Module):
    """The loss of a batch: base class of modules that give it as sums and numbers of samples.

    `over_ranks` adds up a tensor over ranks that train together, if there are several.
    """

    over_ranks: Callable[[Tensor], Tensor] | None = None

    def sums(
        self, logits_CT: Tensor, labels_CT: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add up the losses of the batch's samples.

        Args:
            logits_CT: of the candidates.
            labels_CT: theirs.
            weights_C: each candidate's share of the loss, or None.
            num_candidates_B: of each request.

        Returns:
            tuple: for each mean that the loss is of, the sum [K], and the number of samples, float64 [K].
        """
        raise NotImplementedError

    def total(self, means_K: Tensor) -> Tensor:
        """The loss, a scalar, of its means."""
        raise NotImplementedError

    def refuse_impressions(self, num_requests: int, num_candidates: int, source: str) -> None:
        """Refuse requests of one candidate each, where the loss compares those of a request.

        Args:
            num_requests: how many there are.
            num_candidates: of all of them.
            source: where they are from, for the error message.

        Raises:
            InputError: they are such.
        """

    def forward(
        self, logits_CT: Tensor, labels_CT: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch; see `sums`.

        Returns:
            tuple: the loss, and the same detached. With several ranks, the first is this rank's share, whose gradients'
            mean over ranks is that of the global batch's loss, which is the second.
        """
        sums_K, numbers_K = self.sums(logits_CT, labels_CT, weights_C, num_candidates_B)
        # The number of requests and of candidates.
        shape = (num_candidates_B.numel(), logits_CT.shape[0])
        shares_K, means_K, shape_of_all = means_over_ranks(sums_K, numbers_K, self.over_ranks, shape)
        self._refuse_first(shape_of_all)
        with torch.no_grad():
            loss_of_all = self.total(means_K)
        return self.total(shares_K), loss_of_all

    _is_checked = False

    def _refuse_first(self, shape: Tensor) -> None:
        """Look at the first batch of training alone: a later one may have such requests by chance."""
        if self.training and not self._is_checked:
            num_requests, num_candidates = map(int, shape)
            self.refuse_impressions(num_requests, num_candidates, "batch")
            self._is_checked = True


def means_over_ranks(
    sums_K: Tensor, numbers_K: Tensor, over_ranks: Callable[[Tensor], Tensor] | None, others: Sequence[float] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the samples of a batch, or of all ranks' batches, which are one; 0 where there is no sample.

    Args:
        sums_K: of the samples of this rank.
        numbers_K: of these samples, float64.
        over_ranks: adds up a tensor over ranks; None if there is one.
        others: numbers to be added up as well.

    Returns:
        tuple: the means [K]; the same detached; and the sums of `others`, float64. With several ranks, the first are
            this rank's share, whose gradients' mean over ranks is that of the second.
    """
    others_X = numbers_K.new_tensor([1, *others])
    if over_ranks is None:
        means_K = sums_K / numbers_K.clamp(min=1).to(sums_K.dtype)
        return means_K, means_K.detach(), others_X[1:]
    everything = torch.cat([sums_K.detach().double(), numbers_K, others_X])
    of_all_K, numbers_K, others_X = over_ranks(everything).split([len(sums_K), len(sums_K), len(others_X)])
    numbers_K = numbers_K.clamp(min=1)
    share_K = (others_X[0] / numbers_K).to(sums_K.dtype)
    return sums_K * share_K, of_all_K / numbers_K, others_X[1:]


class FunctionLoss(BatchLoss):
    """A loss that is a function of logits and labels, and a mean over candidates.

    Args:
        loss: see `AmortizedDLRMTrain`.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self._loss = loss

    def sums(
        self, logits_CT: Tensor, labels_CT: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `BatchLoss`."""
        if weights_C is None:
            mean = self._loss(logits_CT, labels_CT)
        else:
            losses_CT = self._loss(logits_CT, labels_CT, reduction="none")
            mean = (losses_CT * weights_C.unsqueeze(1)).mean()
        numbers_K = mean.new_full((1,), logits_CT.shape[0], dtype=torch.float64)
        return mean.reshape(1) * logits_CT.shape[0], numbers_K

    def total(self, means_K: Tensor) -> Tensor:
        """See `BatchLoss`."""
        return means_K[0]


@dataclass(frozen=True)
class _Mean:
    """One of the means that a loss is of: a factor times that of the samples of a task."""

    task: int
    factor: float
    samples: Callable[[Tensor, Tensor, Tensor | None, Tensor], Samples]


class TaskLosses(BatchLoss):
    """The loss that a config says, for `AmortizedDLRMTrain`.

    A sample's weight is a factor of its loss, and changes no number of samples. The weight of a pair is that of its
    candidate with the higher label; in a list, each positive's term has its own.

    Args:
        config: what is minimized.
        schema: of the batches.

    Raises:
        InputError: a task is no label, its loss is not for such labels, or that of a target is not said.

    Example::

        config = LossConfig(tasks={"liked": TaskLossConfig(kind="joint")})
        train = AmortizedDLRMTrain(model, TaskLosses(config, schema))
    """

    def __init__(self, config: LossConfig, schema: RequestSchema) -> None:
        super().__init__()
        self._tasks, self._mean_over = schema.labels, config.mean_over
        _refuse_other_tasks(config, schema)
        self._losses = [config.of(task) for task in self._tasks]
        is_uncertain = config.weighting == "uncertainty"
        self.log_variances = nn.Parameter(torch.zeros(len(self._tasks))) if is_uncertain else None
        self._means = [mean for t, loss in enumerate(self._losses) for mean in _means_of(t, loss, is_uncertain)]

    @property
    def is_of_requests(self) -> bool:
        """Whether it depends on which candidates are of one request."""
        return self._mean_over == "requests" or any(loss.kind in _WITHIN_REQUESTS for loss in self._losses)

    def refuse_impressions(self, num_requests: int, num_candidates: int, source: str) -> None:
        """See `BatchLoss`."""
        for task, loss in zip(self._tasks, self._losses, strict=True):
            if loss.kind in _WITHIN_REQUESTS and num_requests == num_candidates > 1:
                raise InputError(
                    f"{source}: each of {num_requests} requests has 1 candidate, but loss.tasks.{task}.kind "
                    f"{loss.kind} compares those of a request: give whole requests, or kind binary"
                )

    def sums(
        self, logits_CT: Tensor, labels_CT: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `BatchLoss`."""
        if not logits_CT.shape[1] == labels_CT.shape[1] == len(self._tasks):
            raise InputError(
                f"batch: {labels_CT.shape[1]} labels and {logits_CT.shape[1]} logits of a candidate, but the loss is "
                f"of {len(self._tasks)}, {list(self._tasks)}: give batches and a model of its schema"
            )
        sums, numbers = [], []
        for mean in self._means:
            samples = mean.samples(
                logits_CT[:, mean.task], labels_CT[:, mean.task].to(logits_CT.dtype), weights_C, num_candidates_B
            )
            total, number = self._sum(*samples, num_candidates_B)
            sums.append(total)
            numbers.append(number)
        return torch.stack(sums), torch.stack(numbers)

    def _sum(self, losses_S: Tensor, requests_S: Tensor, num_candidates_B: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the samples and their number, float64; of requests' means, if requests count alike."""
        if self._mean_over == "samples":
            return losses_S.sum(), losses_S.new_full((), len(losses_S), dtype=torch.float64)
        sums_B = _sums_of_requests(losses_S, requests_S, num_candidates_B)
        counts_B = _sums_of_requests(torch.ones_like(losses_S), requests_S, num_candidates_B)
        return (sums_B / counts_B.clamp(min=1)).sum(), (counts_B > 0).sum().double()

    def total(self, means_K: Tensor) -> Tensor:
        """See `BatchLoss`."""
        losses = [means_K.new_zeros(()) for _ in self._tasks]
        for mean, value in zip(self._means, means_K.unbind(), strict=True):
            losses[mean.task] = losses[mean.task] + mean.factor * value
        if self.log_variances is not None:
            # With s = log(variance), log(deviation) is s / 2.
            of_tasks = zip(losses, self.log_variances.to(means_K.dtype).unbind(), strict=True)
            losses = [torch.exp(-s) * loss + s / 2 for loss, s in of_tasks]
        weighted = [loss.weight * value for loss, value in zip(self._losses, losses, strict=True)]
        return torch.stack(weighted).mean()


def _refuse_other_tasks(config: LossConfig, schema: RequestSchema) -> None:
    if unknown := sorted(config.tasks.keys() - set(schema.labels)):
        raise InputError(f"loss.tasks: the data has no label {unknown[0]!r}, but {list(schema.labels)}")
    for t, task in enumerate(schema.labels):
        kind, is_target = config.of(task).kind, t in schema.targets
        if is_target and kind not in REGRESSIONS:
            raise InputError(
                f"loss.tasks.{task}.kind is {kind}, but {task!r} is a target, any number: give {', '.join(REGRESSIONS)}"
            )
        if not is_target and kind in REGRESSIONS:
            raise InputError(
                f"loss.tasks.{task}.kind is {kind}, but {task!r} is a label from 0 to 1: give the feature kind "
                "'target', or its loss another kind"
            )


def _means_of(task: int, loss: TaskLossConfig, is_uncertain: bool) -> list[_Mean]:
    """The means that a task's loss is of."""
    pointwise: dict[LossKind, Callable[[Tensor, Tensor], Tensor]] = {
        "binary": partial(F.binary_cross_entropy_with_logits, reduction="none"),
        "squared": partial(F.mse_loss, reduction="none"),
        "huber": partial(F.huber_loss, reduction="none", delta=1.0 if loss.delta is None else loss.delta),
        "poisson": _poisson,
    }
    if loss.kind == "pairwise":
        return [_Mean(task, 1.0, _pairwise)]
    if loss.kind == "listwise":
        return [_Mean(task, 1.0, _listwise)]
    if loss.kind == "joint":
        # Softmax sees differences alone; what each candidate's probability is, the cross entropy says.
        ranking_weight = 1.0 if loss.ranking_weight is None else loss.ranking_weight
        binary = partial(_of_candidates, pointwise["binary"])
        return [_Mean(task, 1.0, binary), _Mean(task, ranking_weight, _listwise)]
    # A squared error is twice what is in the logarithm of a normal density.
    factor = 0.5 if is_uncertain and loss.kind == "squared" else 1.0
    return [_Mean(task, factor, partial(_of_candidates, pointwise[loss.kind]))]


def _of_candidates(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits_C: Tensor,
    labels_C: Tensor,
    weights_C: Tensor | None,
    num_candidates_B: Tensor,
) -> Samples:
    return _weighted(loss(logits_C, labels_C), weights_C), requests(num_candidates_B, len(logits_C))


def _poisson(logits_C: Tensor, counts_C: Tensor) -> Tensor:
    """Negative log likelihood of counts, whole: without its constant it could be negative, and a variance vanish."""
    if (counts_C < 0).any():
        candidate = int((counts_C < 0).nonzero()[0])
        raise InputError(
            f"batch: candidate {candidate} has target {float(counts_C[candidate])}, but loss.tasks kind poisson is of "
            "counts, 0 or more: give another kind"
        )
    return logits_C.exp() - counts_C * logits_C + torch.lgamma(counts_C + 1)


def _pairwise(logits_C: Tensor, labels_C: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor) -> Samples:
    """Logistic loss of all pairs of candidates of a request whose labels differ (RankNet: Burges et al., ICML 2005)."""
    requests_C = requests(num_candidates_B, len(logits_C))
    lowest_B = labels_C.new_full((num_candidates_B.numel(),), torch.inf).scatter_reduce(0, requests_C, labels_C, "amin")
    above = (labels_C > lowest_B[requests_C]).nonzero().flatten()
    above_B = _sums_of_requests(torch.ones_like(above), requests_C[above], num_candidates_B)
    # Each that is above another, beside all of its request.
    other_P, place_P, _ = pairs(num_candidates_B, above_B, len(above))
    differ = labels_C[other_P] < labels_C[above[place_P]]
    higher_P, lower_P = above[place_P[differ]], other_P[differ]
    losses_P = -F.logsigmoid(logits_C[higher_P] - logits_C[lower_P])
    return _weighted(losses_P, None if weights_C is None else weights_C[higher_P]), requests_C[higher_P]


def _listwise(logits_C: Tensor, labels_C: Tensor, weights_C: Tensor | None, num_candidates_B: Tensor) -> Samples:
    """Cross entropy of a request's softmax and its labels' shares of their sum, where that is not zero.

    ListNet's top-one probabilities (Cao et al., ICML 2007), with labels in place of their exponentials.
    """
    requests_C = requests(num_candidates_B, len(logits_C))
    most_B = logits_C.new_full((num_candidates_B.numel(),), -torch.inf).scatter_reduce(
        0, requests_C, logits_C.detach(), "amax"
    )
    shifted_C = logits_C - most_B[requests_C]
    log_sums_B = _sums_of_requests(shifted_C.exp(), requests_C, num_candidates_B).log()
    terms_C = labels_C * (log_sums_B[requests_C] - shifted_C)
    losses_B = _sums_of_requests(_weighted(terms_C, weights_C), requests_C, num_candidates_B)
    labels_B = _sums_of_requests(labels_C, requests_C, num_candidates_B)
    positive = (labels_B > 0).nonzero().flatten()
    return losses_B[positive] / labels_B[positive], positive


def _weighted(losses_S: Tensor, weights_S: Tensor | None) -> Tensor:
    return losses_S if weights_S is None else losses_S * weights_S


def _sums_of_requests(values_S: Tensor, requests_S: Tensor, num_candidates_B: Tensor) -> Tensor:
    """[S] to [B]."""
    return values_S.new_zeros(num_candidates_B.numel()).index_add(0, requests_S, values_S)
