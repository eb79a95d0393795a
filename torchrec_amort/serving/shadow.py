"""Shadow: a sample of requests, scored again by a reference after they were answered.

Shape suffixes: C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from torchrec_amort.errors import InputError, place_of
from torchrec_amort.serving.workers import Workers

Asked = TypeVar("Asked", bound=Sized)


class Kind(Protocol[Asked]):
    """How requests of a kind are read, several at a time.

    Args:
        without_users: what is told of those that do not tell whose they are.
    """

    without_users: str

    def users(self, requests: Asked) -> np.ndarray | None:
        """int64 [B]: whose requests they are; None if they do not tell."""
        ...

    def select(self, requests: Asked, rows: Sequence[int]) -> Asked:
        """Some of them, in memory of their own."""
        ...

    def num_candidates(self, requests: Asked) -> Sequence[int]:
        """Of each request."""
        ...

    def sizes(self, requests: Asked) -> str:
        """What a log may tell of them: no user and no id."""
        ...

    def refuse_malformed(self, requests: Asked) -> None:
        """Refuse requests that cannot be taken apart.

        Raises:
            InputError: see above.
        """
        ...


@dataclass
class ShadowCounters:
    """What became of the samples so far: those that are none of compared, uncompared and dropped are waiting.

    Args:
        sampled: requests that were drawn.
        compared: with the reference.
        uncompared: not compared, since an error was raised: the treatment refused the request as malformed (in shadow
            only), or it or the reference raised any other error, which switches back.
        dropped: found the queue full, or the rollout closed; or waited when a user was to be forgotten.
        largest_difference: the largest absolute difference of a logit so far; inf where one was not finite.
    """

    sampled: int = 0
    compared: int = 0
    uncompared: int = 0
    dropped: int = 0
    largest_difference: float = 0.0


@dataclass(frozen=True, eq=False)
class _Sample(Generic[Asked]):
    """A request that was drawn.

    Args:
        number: of the samples, from 1.
        request: one alone.
        logits_CT: what the treatment answered; None if the control did.
    """

    number: int
    request: Asked
    logits_CT: Tensor | None


class Shadow(Generic[Asked]):
    """Compares a sample of requests with the reference, in a thread of its own.

    Args:
        kind: of the requests.
        treatment: scores samples that it has not answered.
        reference: what the treatment's logits have to be.
        sample_rate: share of the requests that are drawn.
        threshold: the largest absolute difference of a logit that is no fault.
        max_waiting: samples that may wait.
        draw: of the samples.
        on_fault: called with what is wrong.
    """

    def __init__(
        self,
        kind: Kind[Asked],
        treatment: Callable[[Asked], Tensor],
        reference: Callable[[Asked], Tensor],
        sample_rate: float,
        threshold: float,
        max_waiting: int,
        draw: random.Random,
        on_fault: Callable[[str], None],
    ) -> None:
        self._kind = kind
        self._treatment = treatment
        self._reference = reference
        self._sample_rate = sample_rate
        self._threshold = threshold
        self._draw = draw
        self._on_fault = on_fault
        self._max_waiting = max_waiting
        self._num_waiting = 0
        # Samples up to this number are not compared any more.
        self._dropped_up_to = 0
        self._lock = threading.Lock()
        self._counters = ShadowCounters()
        self._is_closed = False
        self._worker = Workers(num_workers=1, num_threads=1)
        self._latest: Future[None] | None = None

    def offer(self, requests: Asked, logits_CT: Tensor | None) -> None:
        """Take a sample of the requests, which the treatment has answered so if it has."""
        with self._lock:
            first = self._counters.sampled + 1
            rows = [row for row in range(len(requests)) if self._draw.random() < self._sample_rate]
            self._counters.sampled += len(rows)
        if not rows:
            return
        try:
            samples = self._copies(requests, rows, first, logits_CT)
        except InputError:
            self._uncompared(len(rows))
        except Exception as error:  # noqa: BLE001 - the request is answered, and its sample must not fail it
            self._uncompared(len(rows), f"sample {first}: to copy it raised {place_of(error)}")
        else:
            for sample in samples:
                self._put(sample)

    def counters(self) -> dict[str, float]:
        """What became of the samples so far: see `ShadowCounters`."""
        with self._lock:
            return asdict(self._counters)

    def drain(self) -> None:
        """Return when every sample that was taken so far is compared, or dropped."""
        with self._lock:
            latest = self._latest
        if latest is not None:
            # One worker takes samples in turn.
            latest.result()

    def drop(self) -> None:
        """Let go of the samples that wait, and return when none of those that were taken so far is left."""
        with self._lock:
            self._dropped_up_to = self._counters.sampled
        self.drain()

    def close(self) -> None:
        """Take no more samples, and return when those that were taken are compared, or dropped."""
        with self._lock:
            self._is_closed = True
        self._worker.close()

    def _copies(self, requests: Asked, rows: list[int], first: int, logits_CT: Tensor | None) -> list[_Sample[Asked]]:
        """Samples of some requests, numbered from `first`: what was handed in and out is the caller's to change.

        Raises:
            InputError: the requests are malformed.
        """
        self._kind.refuse_malformed(requests)
        bounds = list(itertools.accumulate(self._kind.num_candidates(requests), initial=0))
        samples = []
        for number, row in enumerate(rows, first):
            part = None if logits_CT is None else logits_CT[bounds[row] : bounds[row + 1]].clone()
            samples.append(_Sample(number, self._kind.select(requests, [row]), part))
        return samples

    def _put(self, sample: _Sample[Asked]) -> None:
        with self._lock:
            if self._is_closed or self._num_waiting == self._max_waiting:
                self._counters.dropped += 1
            else:
                self._num_waiting += 1
                self._latest = self._worker.submit(self._compare, sample)

    @torch.inference_mode()
    def _compare(self, sample: _Sample[Asked]) -> None:
        with self._lock:
            self._num_waiting -= 1
            if sample.number <= self._dropped_up_to:
                self._counters.dropped += 1
                return
        logits_CT, sizes = sample.logits_CT, self._kind.sizes(sample.request)
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


def _largest_difference(logits_CT: Tensor, expected_CT: Tensor) -> float:
    """The largest absolute difference of a logit; inf if one is not finite, or they are not as many."""
    if logits_CT.shape != expected_CT.shape:
        return math.inf
    difference = float((logits_CT.cpu().double() - expected_CT.cpu().double()).abs().max())
    return difference if math.isfinite(difference) else math.inf
