"""Rollout: a new path for a share of the users, compared with a reference, and switched back when it is wrong.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError, place_of
from torchrec_amort.hashing import mix
from torchrec_amort.models.ranker import CollectionRanker, Ranker
from torchrec_amort.serving.workers import Workers

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
    impressions = batch.to_impressions()
    rows_C = torch.arange(len(impressions), device=impressions.num_candidates.device)
    with torch.inference_mode():
        return torch.cat([model(impressions.select(part)) for part in rows_C.split(microbatch_size)])


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


@dataclass
class ShadowCounters:
    """What became of the samples so far: those that are none of compared, uncompared and dropped are waiting.

    Args:
        sampled: requests that were drawn.
        compared: with the reference.
        uncompared: not compared, since an error was raised: the treatment refused the request as malformed (in shadow
            only), or it or the reference raised any other error, which switches back.
        dropped: found the queue full, or the rollout closed.
        largest_difference: the largest absolute difference of a logit so far; inf where one was not finite.
    """

    sampled: int = 0
    compared: int = 0
    uncompared: int = 0
    dropped: int = 0
    largest_difference: float = 0.0


class Rollout:
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
        for name, value in (("share", share), ("sample_rate", sample_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, not from 0 to 1")
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold is {threshold}, not a finite number above 0")
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}, not 1 or more")
        self.experiment = experiment
        self.share = share
        self._treatment = treatment
        self._control = control
        self._lock = threading.Lock()
        self._counters = RolloutCounters()
        self._switched_back: str | None = None
        self._shadow = _Shadow(
            treatment, reference, sample_rate, threshold, max_waiting, random.Random(seed), self.switch_back
        )

    @property
    def switched_back(self) -> str | None:
        """Why the control answers everybody; None if it does not."""
        return self._switched_back

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
            is_treated_B = self._is_treated(batch)
            if not is_treated_B.any():
                return self._by_control(batch)
            if is_treated_B.all():
                return self._by_treatment(batch)
            batch.validate()
            requests_B = torch.from_numpy(is_treated_B).to(batch.num_candidates.device)
            control_CT = self._by_control(batch.select((~requests_B).nonzero().flatten()))
            treatment_CT = self._by_treatment(batch.select(requests_B.nonzero().flatten()))
            is_treated_C = torch.repeat_interleave(requests_B, batch.num_candidates).to(control_CT.device)
            logits_CT = control_CT.new_empty(is_treated_C.shape[0], control_CT.shape[1])
            logits_CT[~is_treated_C], logits_CT[is_treated_C] = control_CT, treatment_CT.to(control_CT)
            return logits_CT

    def switch_back(self, reason: str) -> None:
        """Let the control answer everybody from now on. Does nothing if that is so already.

        Args:
            reason: what is logged, and told by `switched_back`.

        Example::

            rollout.switch_back("p99 is 40 ms")
        """
        with self._lock:
            if self._switched_back is not None:
                return
            self._switched_back = reason
        logger.error("experiment %s, share %s: switched back to the control: %s", self.experiment, self.share, reason)

    def counters(self) -> dict[str, float]:
        """Where requests went and what became of samples so far: see `RolloutCounters` and `ShadowCounters`."""
        with self._lock:
            counters = asdict(self._counters)
        return {**counters, **self._shadow.counters()}

    def drain(self) -> None:
        """Return when every sample that was taken so far is compared."""
        self._shadow.drain()

    def close(self) -> None:
        """Take no more samples, and return when those that were taken are compared.

        Requests that come later are still scored; samples of them are dropped.
        """
        self._shadow.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_treated(self, batch: RequestBatch) -> np.ndarray:
        """bool [B]: whether the treatment is to answer."""
        if self._switched_back is not None or self.share in (0, 1):
            return np.full(len(batch), self._switched_back is None and self.share == 1)
        if batch.users is None:
            raise InputError(
                f"batch: users is None, but {self.share} of the users are served by the treatment: tell whose requests "
                "they are, or serve a share of 0 or 1"
            )
        return user_places(batch.users.cpu().numpy(), self.experiment) < self.share

    def _by_control(self, batch: RequestBatch) -> Tensor:
        with self._lock:
            self._counters.control += len(batch)
        logits_CT = self._control(batch)
        if self.share == 0 and self._switched_back is None:
            self._shadow.offer(batch, None)
        return logits_CT

    def _by_treatment(self, batch: RequestBatch) -> Tensor:
        with self._lock:
            self._counters.treatment += len(batch)
        try:
            logits_CT = self._treatment(batch)
        except InputError:
            with self._lock:
                self._counters.refused += len(batch)
            return self._control(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the control answers
            with self._lock:
                self._counters.failed += len(batch)
            self.switch_back(f"the treatment raised {place_of(error)} for {_sizes(batch)}")
            return self._control(batch)
        self._shadow.offer(batch, logits_CT)
        return logits_CT


@dataclass(frozen=True, eq=False)
class _Sample:
    """A request that was drawn.

    Args:
        number: of the samples, from 1.
        request: a batch of one.
        logits_CT: what the treatment answered; None if the control did.
    """

    number: int
    request: RequestBatch
    logits_CT: Tensor | None


class _Shadow:
    """Compares a sample of requests with the reference, in a thread of its own."""

    def __init__(
        self,
        treatment: Score,
        reference: Score,
        sample_rate: float,
        threshold: float,
        max_waiting: int,
        draw: random.Random,
        on_fault: Callable[[str], None],
    ) -> None:
        self._treatment = treatment
        self._reference = reference
        self._sample_rate = sample_rate
        self._threshold = threshold
        self._draw = draw
        self._on_fault = on_fault
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._counters = ShadowCounters()
        self._is_closed = False
        self._worker = Workers(num_workers=1, num_threads=1)
        self._latest: Future[None] | None = None

    def offer(self, batch: RequestBatch, logits_CT: Tensor | None) -> None:
        """Take a sample of the requests, which the treatment has answered so if it has."""
        with self._lock:
            first = self._counters.sampled + 1
            rows = [row for row in range(len(batch)) if self._draw.random() < self._sample_rate]
            self._counters.sampled += len(rows)
        if not rows:
            return
        try:
            samples = _copies(batch, rows, first, logits_CT)
        except InputError:
            self._uncompared(len(rows))
        except Exception as error:  # noqa: BLE001 - the request is answered, and its sample must not fail it
            self._uncompared(len(rows), f"sample {first}: to copy it raised {place_of(error)}")
        else:
            for sample in samples:
                self._put(sample)

    def counters(self) -> dict[str, float]:
        with self._lock:
            return asdict(self._counters)

    def drain(self) -> None:
        with self._lock:
            latest = self._latest
        if latest is not None:
            # One worker takes samples in turn.
            latest.result()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._worker.close()

    def _put(self, sample: _Sample) -> None:
        with self._lock:
            if self._is_closed or self._num_waiting == self._max_waiting:
                self._counters.dropped += 1
            else:
                self._num_waiting += 1
                self._latest = self._worker.submit(self._compare, sample)

    @torch.inference_mode()
    def _compare(self, sample: _Sample) -> None:
        with self._lock:
            self._num_waiting -= 1
        logits_CT, sizes = sample.logits_CT, _sizes(sample.request)
        try:
            if logits_CT is None:
                logits_CT = self._treatment(sample.request)
        except InputError:
            self._uncompared(1)
            return
        except BaseException as error:  # noqa: BLE001 - a thread cannot exit the process, and the worker goes on
            self._uncompared(1, f"sample {sample.number}: the treatment raised {place_of(error)} for {sizes}")
            return
        try:
            expected_CT = self._reference(sample.request)
            difference = _largest_difference(logits_CT, expected_CT)
        except BaseException as error:  # noqa: BLE001 - a thread cannot exit the process, and the worker goes on
            self._uncompared(1, f"sample {sample.number}: the reference raised {place_of(error)} for {sizes}")
            return
        with self._lock:
            self._counters.compared += 1
            self._counters.largest_difference = max(self._counters.largest_difference, difference)
        if difference > self._threshold:
            self._on_fault(
                f"sample {sample.number}: a logit differs from the reference by {difference:.3g}, but the threshold "
                f"is {self._threshold:.3g}; {sizes}, logits {list(logits_CT.shape)}, the reference's "
                f"{list(expected_CT.shape)}"
            )

    def _uncompared(self, count: int, fault: str | None = None) -> None:
        with self._lock:
            self._counters.uncompared += count
        if fault is not None:
            self._on_fault(fault)


def _copies(batch: RequestBatch, rows: list[int], first: int, logits_CT: Tensor | None) -> list[_Sample]:
    """Samples of some requests, numbered from `first`: what was handed in and out is the caller's, who may change it.

    Raises:
        InputError: the batch is malformed.
    """
    batch.validate()
    ends_B = torch.cumsum(batch.num_candidates, 0).tolist()
    samples = []
    for number, row in enumerate(rows, first):
        request = batch.select(torch.tensor([row], device=batch.num_candidates.device))
        part = None if logits_CT is None else logits_CT[ends_B[row] - len(request.candidate_dense) : ends_B[row]]
        samples.append(_Sample(number, request, None if part is None else part.clone()))
    return samples


def _largest_difference(logits_CT: Tensor, expected_CT: Tensor) -> float:
    """The largest absolute difference of a logit; inf if one is not finite, or they are not as many."""
    if logits_CT.shape != expected_CT.shape:
        return math.inf
    difference = float((logits_CT.cpu().double() - expected_CT.cpu().double()).abs().max())
    return difference if math.isfinite(difference) else math.inf


def _sizes(batch: RequestBatch) -> str:
    num_candidates, num_ids = batch.candidate_dense.shape[0], batch.sequences.values().numel()
    return f"{len(batch)} requests, {num_candidates} candidates, {num_ids} ids of events and candidates"
