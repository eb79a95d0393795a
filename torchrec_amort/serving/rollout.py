"""Rollout: a new path for a share of the users, compared with a reference, and switched back when it is wrong.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError, place_of
from torchrec_amort.hashing import mix
from torchrec_amort.models.ranker import CollectionRanker, Ranker
from torchrec_amort.serving.scorer import by_impressions
from torchrec_amort.serving.shadow import Asked, Kind, Shadow

logger = logging.getLogger(__name__)

Score = Callable[[RequestBatch], Tensor]


def user_places(users: np.ndarray, experiment: str) -> np.ndarray:
    """Where users stand between 0 and 1 in an experiment: a share of the users are those who stand below it.

    The finalizer of SplitMix64 of the user, then of that and the experiment's name together, so that a user's places
    in two experiments have nothing to do with each other. `docs/rollout.md` has it for other languages, with test
    vectors.

    Args:
        users: integers, of any shape.
        experiment: its name.

    Returns:
        np.ndarray: float64, at least 0 and below 1, of the shape of `users`.

    Raises:
        InputError: users are not integers.

    Example::

        is_treated_B = user_places(np.array([1, 2, 3]), "amortized-1") < 0.1
    """
    if users.dtype.kind not in "iu":
        raise InputError(f"users are {users.dtype}, not int64: a number that is cut off is another user's")
    name = int.from_bytes(hashlib.sha256(experiment.encode()).digest()[:8], "big")
    return (mix(mix(users) ^ np.uint64(name)) >> 11).astype(np.float64) * 2.0**-53


def score_impressions(
    model: Ranker, batch: RequestBatch, *, history_length: int | None = None, microbatch_size: int = 64
) -> Tensor:
    """Score every candidate as a request of its own, nothing amortized: the reference of a rollout.

    Args:
        model: in eval mode, with the weights that the scorer was made from.
        batch: B requests with C candidates.
        history_length: the scorer's; the model's own limit unless given. Longer histories keep the latest events.
        microbatch_size: impressions that are scored at a time, so that memory does not grow with their number.

    Returns:
        Tensor: logits [C, T], the candidates in the order of the requests.

    Example::

        reference = partial(score_impressions, model)  # to be given to a Rollout
        logits_CT = reference(batch)
    """
    batch = batch.to(next(model.parameters()).device)
    if history_length is not None:
        batch = batch.keep_latest(history_length)
    elif isinstance(model, CollectionRanker):
        features = {tower.name: tower.event_encoder.features for tower in model.collection.towers}
        batch = batch.keep_latest(batch.request_lists.layout.limits(features, model.history_lengths))
    with torch.inference_mode():
        return by_impressions(model, batch, microbatch_size)


@dataclass
class RolloutCounters:
    """Where requests went so far: each went to one of the two paths.

    Args:
        control: to the control: users outside the share, and everybody after the switch back.
        treatment: to the treatment.
        refused: of these, refused as malformed by the treatment (`InputError`) and passed on to the control.
        failed: of these, passed on to the control since the treatment raised any other error: that switches back.
    """

    control: int = 0
    treatment: int = 0
    refused: int = 0
    failed: int = 0


class Went(Enum):
    """Where a request went, and what became of it there."""

    CONTROL = auto()
    TREATMENT = auto()
    # By the treatment; the control answered.
    REFUSED = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Stage:
    """Which users a treatment answers, and which of its answers are compared.

    Args:
        experiment: its name; another name draws other users.
        share: of the users that the treatment answers, from 0 to 1.
        sample_rate: share of the requests that are compared, from 0 to 1.
        threshold: the largest absolute difference of a logit that is taken for rounding, in log-odds.

    Raises:
        InputError: `share` or `sample_rate` is not from 0 to 1, or `threshold` not a finite number above 0.

    Example::

        Stage("tuesday-1", share=0.1)
    """

    experiment: str
    share: float
    sample_rate: float = 0.01
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("sample_rate", self.sample_rate)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}, not from 0 to 1")
        if not 0 < self.threshold < math.inf:
            raise InputError(f"threshold is {self.threshold}, not a finite number above 0")


@dataclass(frozen=True, eq=False)
class Part(Generic[Asked]):
    """Requests that went the same way, of those that came together.

    Args:
        rows: which of them they are.
        requests: these alone.
        logits_CT: their scores.
        went: where to, and what became of them there.
    """

    rows: Sequence[int]
    requests: Asked
    logits_CT: Tensor
    went: Went

    @property
    def is_treated(self) -> bool:
        """Whether the treatment scored them."""
        return self.went is Went.TREATMENT


class RolloutOf(Generic[Asked]):
    """What a rollout does whatever requests are: see `Rollout`, which is that of batches.

    Args:
        kind: of the requests.
        treatment: the new path.
        control: the path that all others get.
        reference: what the treatment's logits have to be.
        stage: whose requests go where.
        max_waiting: samples that may wait to be compared.
        seed: of the draw of samples; another one every time if None.
        on_fault: called with the reason when a fault has switched back.

    Raises:
        ValueError: `max_waiting` is below 1.
    """

    def __init__(
        self,
        kind: Kind[Asked],
        treatment: Callable[[Asked], Tensor],
        *,
        control: Callable[[Asked], Tensor],
        reference: Callable[[Asked], Tensor],
        stage: Stage,
        max_waiting: int = 32,
        seed: int | None = None,
        on_fault: Callable[[str], None] = lambda _: None,
    ) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}, not 1 or more")
        self.stage = stage
        self.experiment = stage.experiment
        self.share = stage.share
        self._kind = kind
        self._treatment = treatment
        self._control = control
        self._on_fault = on_fault
        self._lock = threading.Lock()
        self._counters = RolloutCounters()
        self._switched_back: str | None = None
        self._shadow = Shadow(
            kind,
            treatment,
            reference,
            stage.sample_rate,
            stage.threshold,
            max_waiting,
            random.Random(seed),
            self._fault,
        )

    @property
    def switched_back(self) -> str | None:
        """Why the control answers everybody; None if it does not."""
        return self._switched_back

    def switch_back(self, reason: str) -> bool:
        """Let the control answer everybody from now on. Does nothing if that is so already.

        Args:
            reason: what is logged, and told by `switched_back`.

        Returns:
            bool: whether it was not so already.

        Example::

            rollout.switch_back("p99 is 40 ms")
        """
        with self._lock:
            if self._switched_back is not None:
                return False
            self._switched_back = reason
        logger.error("experiment %s, share %s: switched back to the control: %s", self.experiment, self.share, reason)
        return True

    def counters(self) -> dict[str, float]:
        """Where requests went and what became of samples so far: see `RolloutCounters` and `ShadowCounters`."""
        with self._lock:
            counters = asdict(self._counters)
        return {**counters, **self._shadow.counters()}

    def drain(self) -> None:
        """Return when every sample that was taken so far is compared."""
        self._shadow.drain()

    def drop_samples(self) -> None:
        """Let go of the samples that wait, and return when none of those that were taken so far is left."""
        self._shadow.drop()

    def close(self) -> None:
        """Take no more samples, and return when those that were taken are compared.

        Requests that come later are still scored; samples of them are dropped.
        """
        self._shadow.close()

    def _parts(self, requests: Asked) -> list[Part[Asked]]:
        """Let each path score the requests of its users: those of the control come first. Nothing is counted yet."""
        is_treated_B = self._is_treated(requests)
        rows = range(len(requests))
        if not is_treated_B.any():
            return [self._by_control(requests, rows, Went.CONTROL)]
        if is_treated_B.all():
            return self._by_treatment(requests, rows)
        self._kind.refuse_malformed(requests)
        others, treated = (is_so_B.nonzero()[0].tolist() for is_so_B in (~is_treated_B, is_treated_B))
        control = self._by_control(self._kind.select(requests, others), others, Went.CONTROL)
        return [control, *self._by_treatment(self._kind.select(requests, treated), treated)]

    def _put_together(self, requests: Asked, parts: Sequence[Part[Asked]]) -> Tensor:
        """The logits of all parts, in the order of the requests, on the device and of the dtype of the first part."""
        if len(parts) == 1:
            return parts[0].logits_CT
        counts = self._kind.num_candidates(requests)
        of_requests: dict[int, Tensor] = {}
        for part in parts:
            logits = part.logits_CT.to(parts[0].logits_CT).split([counts[row] for row in part.rows])
            of_requests |= zip(part.rows, logits, strict=True)
        return torch.cat([of_requests[row] for row in range(len(requests))])

    def _count(self, parts: Sequence[Part[Asked]]) -> None:
        """Count where requests went, and take samples of them."""
        is_shadow = self.share == 0 and self._switched_back is None
        for part in parts:
            count, went = len(part.rows), part.went
            with self._lock:
                self._counters.control += count * (went is Went.CONTROL)
                self._counters.treatment += count * (went is not Went.CONTROL)
                self._counters.refused += count * (went is Went.REFUSED)
                self._counters.failed += count * (went is Went.FAILED)
            if part.is_treated or is_shadow:
                self._shadow.offer(part.requests, part.logits_CT if part.is_treated else None)

    def _is_treated(self, requests: Asked) -> np.ndarray:
        """bool [B]: whether the treatment is to answer."""
        if self._switched_back is not None or self.share in (0, 1):
            return np.full(len(requests), self._switched_back is None and self.share == 1)
        users = self._kind.users(requests)
        if users is None:
            raise InputError(
                f"{self._kind.without_users}, but {self.share} of the users are served by the treatment: tell whose "
                "requests they are, or serve a share of 0 or 1"
            )
        return user_places(users, self.experiment) < self.share

    def _by_control(self, requests: Asked, rows: Sequence[int], went: Went) -> Part[Asked]:
        return Part(rows, requests, self._control(requests), went)

    def _by_treatment(self, requests: Asked, rows: Sequence[int]) -> list[Part[Asked]]:
        try:
            return [Part(rows, requests, self._treatment(requests), Went.TREATMENT)]
        except InputError:
            return self._refused(requests, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, the control answers
            self._fault(f"the treatment raised {place_of(error)} for {self._kind.sizes(requests)}")
            return [self._by_control(requests, rows, Went.FAILED)]

    def _refused(self, requests: Asked, rows: Sequence[int]) -> list[Part[Asked]]:
        """Requests that the treatment has refused, answered by the control."""
        return [self._by_control(requests, rows, Went.REFUSED)]

    def _fault(self, reason: str) -> None:
        if self.switch_back(reason):
            self._on_fault(reason)


class Rollout(RolloutOf[RequestBatch]):
    """Serves a new path, the treatment, to a share of the users, and takes it back when it is wrong.

    The same user is always on the same side; a larger share has the users of a smaller one and more. Of the requests
    that the treatment answers, a random sample is scored again by the reference, in one thread of its own, after the
    answer. At share 0 the control answers all, and the sample is scored by the treatment and the reference there: the
    shadow.

    The first sample with a logit that differs by more than the threshold or is not finite, or for which anything
    raises, and the first request on which the treatment fails, switch back: from then on the control answers
    everybody. The reason is logged at level ERROR. It has numbers and sizes, no user, no id and no message of an
    error, which might. To start again, make a new rollout.

    A request that the treatment refuses as malformed (`InputError`) goes to the control and changes nothing: it would
    be no safe rollout that one malformed request could end. Any number of threads may call it, a `ScoringService`'s
    among them.

    Args:
        treatment: the new path: logits [C, T] of a batch, `AmortizedScorer.score` as a rule.
        control: the path that all others get.
        reference: what the treatment's logits have to be, `score_impressions` with its model as a rule.
        experiment: its name; another name draws other users.
        share: of the users that the treatment answers, from 0 to 1.
        sample_rate: share of the requests that are compared, from 0 to 1.
        threshold: the largest absolute difference of a logit that is taken for rounding, in log-odds: 1e-4 for
            float32, 0.1 for bfloat16; `docs/rollout.md` has what was measured.
        max_waiting: samples that may wait to be compared; any more are dropped and counted.
        seed: of the draw of samples; another one every time if None.

    Raises:
        ValueError: `share` or `sample_rate` is not from 0 to 1, `threshold` not a finite number above 0, or
            `max_waiting` below 1.

    Example::

        reference = partial(score_impressions, model)
        rollout = Rollout(scorer.score, control=old, reference=reference, experiment="amortized-1", share=0.01)
        with rollout, ScoringService(rollout, num_workers=8, max_waiting=32) as service:
            logits_CT = service.submit(batch).result()
    """

    def __init__(
        self,
        treatment: Score,
        *,
        control: Score,
        reference: Score,
        experiment: str,
        share: float,
        sample_rate: float = 0.01,
        threshold: float = 1e-4,
        max_waiting: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            _Batches(),
            treatment,
            control=control,
            reference=reference,
            stage=Stage(experiment, share, sample_rate, threshold),
            max_waiting=max_waiting,
            seed=seed,
        )

    def score(self, batch: RequestBatch) -> Tensor:
        """Score every candidate of every request, each request by the path of its user.

        Args:
            batch: B requests with C candidates.

        Returns:
            Tensor: logits [C, T], the candidates in the order of the requests; of a batch with both paths, on the
            control's device and of its dtype.

        Raises:
            InputError: a share of the users is to be served and the batch does not tell `users`, or has requests of
                both paths and is malformed.
            Exception: what the control raises.

        Example::

            probabilities_CT = torch.sigmoid(rollout.score(batch))
        """
        with torch.inference_mode():
            # Whatever a path is, the caller's batch stays as it is.
            batch = batch.shallow_copy()
            parts = self._parts(batch)
            self._count(parts)
            return self._put_together(batch, parts)

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Batches:
    """Requests as batches."""

    without_users = "batch: users is None"

    def users(self, requests: RequestBatch) -> np.ndarray | None:
        return None if requests.users is None else requests.users.cpu().numpy()

    def select(self, requests: RequestBatch, rows: Sequence[int]) -> RequestBatch:
        return requests.select(torch.tensor(rows, device=requests.num_candidates.device))

    def num_candidates(self, requests: RequestBatch) -> list[int]:
        counts: list[int] = requests.num_candidates.tolist()
        return counts

    def sizes(self, requests: RequestBatch) -> str:
        num_candidates, num_ids = requests.candidate_dense.shape[0], requests.sequences.values().numel()
        return f"{len(requests)} requests, {num_candidates} candidates, {num_ids} ids of events and candidates"

    def refuse_malformed(self, requests: RequestBatch) -> None:
        requests.validate()
