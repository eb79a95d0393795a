"""Replays logged requests through two arms: what each one answered, how long it took, and what it used.

Shape suffixes: Q requests; R candidates of all of them; T tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from torchrec_amort.bench.arms import Arm
from torchrec_amort.bench.timing import Times, peak_memory, threads
from torchrec_amort.data.sample import sample_requests
from torchrec_amort.errors import InputError
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema

# Requests that are scored in one call where only the scores matter.
REQUESTS_PER_CALL = 64
WARMUP_TURNS = 2


@dataclass(frozen=True)
class Log:
    """What is known of the replayed requests.

    Args:
        labels: float32 [R, T].
        users: int64 [Q], places of users from 0.
        num_candidates: int64 [Q].
        events: int64 [Q, histories], events of each history as logged; of one that is empty if there is none.
    """

    labels: np.ndarray
    users: np.ndarray
    num_candidates: np.ndarray
    events: np.ndarray

    @classmethod
    def of(cls, requests: pa.Table, schema: RequestSchema) -> Log:
        """Read it off the requests.

        Raises:
            InputError: a label is neither 0 nor 1.
        """
        schema.refuse_targets("pilot")
        num_candidates = pc.list_value_length(requests[schema.candidate_column]).to_numpy()
        labels = [pc.list_flatten(requests[name]).to_numpy() for name in schema.labels]
        for name, values in zip(schema.labels, labels, strict=True):
            if len(wrong := np.flatnonzero((values != 0) & (values != 1))):
                row = int(np.searchsorted(np.cumsum(num_candidates), wrong[0], side="right"))
                raise InputError(
                    f"request_id {requests['request_id'][row]}: {name} is {values[wrong[0]]}, neither 0 nor 1, as are "
                    f"{len(wrong)} of {len(values)} labels: ranking metrics need one of the two"
                )
        columns = schema.event_columns.values()
        events = [pc.list_value_length(requests[column]).to_numpy() for column in columns]
        users = np.unique(requests["user"].to_numpy(), return_inverse=True)[1]
        return cls(
            np.stack(labels, axis=1), users, num_candidates, np.stack(events or [np.zeros_like(num_candidates)], 1)
        )

    @property
    def num_events(self) -> np.ndarray:
        """Events of all histories of each request: int64 [Q]."""
        total: np.ndarray = self.events.sum(1)
        return total

    @property
    def requests(self) -> np.ndarray:
        """Place of each candidate's request: int64 [R]."""
        return np.repeat(np.arange(len(self.users)), self.num_candidates)


@dataclass(frozen=True)
class Replayed:
    """What an arm made of the requests.

    Args:
        logits: float32 [R, T].
        seconds: [Q].
        processor_seconds: [Q], of all threads together.
    """

    logits: np.ndarray
    seconds: np.ndarray
    processor_seconds: np.ndarray


@torch.inference_mode()
def replay(arms: Mapping[str, Arm], requests: pa.Table, warmup: int) -> dict[str, Replayed]:
    """Score each request by each arm, one request at a time, the arms in random order.

    Args:
        arms: by name.
        requests: Q requests.
        warmup: requests that are scored before the clock starts, too.

    Raises:
        FloatingPointError: a score is not finite.
    """
    times = Times(warmup)
    logits: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    rows = [*itertools.islice(itertools.cycle(range(requests.num_rows)), warmup), *range(requests.num_rows)]
    with progress(total=len(rows), desc="replay", unit="requests") as bar:
        for turn, row in enumerate(rows):
            one = requests.slice(row, 1)
            answers = times.take({name: partial(arm.score, arm.read(one)) for name, arm in arms.items()})
            for name, logits_CT in answers.items() if turn >= warmup else ():
                logits[name].append(_finite(logits_CT, name, row))
            bar.update()
    return {
        name: Replayed(np.concatenate(logits[name]), times.seconds(name), times.processor_seconds(name))
        for name in arms
    }


def _finite(logits_CT: torch.Tensor, arm: str, row: int) -> np.ndarray:
    logits = logits_CT.float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"{arm}: a score of replayed request {row} is not finite: look for such weights")
    return logits


@torch.inference_mode()
def replay_memory(arm: Arm, requests: pa.Table) -> int | None:
    """Bytes that an arm needs at its peak, beyond its model, to score the requests one after the other.

    That is host memory, or a GPU's if the arm is on one; None where it cannot be told.
    """

    def score_first(count: int) -> None:
        for row in range(min(count, requests.num_rows)):
            arm.score(arm.read(requests.slice(row, 1)))

    # What is made once in a process, whoever is the first to need it, is no arm's.
    score_first(REQUESTS_PER_CALL)
    return peak_memory(partial(score_first, requests.num_rows))


@torch.inference_mode()
def score_shorter(arm: Arm, requests: pa.Table, history_length: int) -> np.ndarray:
    """Logits [R, T] of requests whose histories are cut to the latest events."""
    logits = []
    for start in range(0, requests.num_rows, REQUESTS_PER_CALL):
        batch = arm.read(requests.slice(start, REQUESTS_PER_CALL), history_length)
        logits.append(_finite(arm.score(batch), arm.config.run_folder, start))
    return np.concatenate(logits)


@torch.inference_mode()
def time_shapes(
    arms: Mapping[str, Arm],
    data: str,
    split: str,
    shapes: Sequence[tuple[int, int]],
    *,
    turns: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Median milliseconds of requests of given shapes, by each arm, the arms in random order.

    Args:
        arms: by name.
        data: prepared data folder, from whose requests those to score are made.
        split: of it.
        shapes: events of each history, and candidates.
        turns: requests of each shape.
        seed: of the draw.

    Returns:
        list: for each shape, `history_length`, `candidates` and, by arm, `ms` and, on one thread, `one_thread_ms`.

    Raises:
        InputError: the split has too few histories that long.
    """
    drawn = [
        sample_requests(data, split, num_requests=turns, num_candidates=candidates, history_length=events, seed=seed)
        for events, candidates in shapes
    ]
    times, one_thread_times = ([Times(WARMUP_TURNS) for _ in shapes] for _ in range(2))
    # All shapes in each turn, so that a noisy moment of the machine is not the time of one of them.
    with progress(total=WARMUP_TURNS + turns, desc="shapes", unit="turns") as bar:
        for turn in range(WARMUP_TURNS + turns):
            one_each = [requests.slice(turn % turns, 1) for requests in drawn]
            _take_turn(arms, shapes, one_each, times)
            with threads(1):
                _take_turn(arms, shapes, one_each, one_thread_times)
            bar.update()
    return [
        {
            "history_length": events,
            "candidates": candidates,
            "ms": {name: 1e3 * times[place].median(name) for name in arms},
            "one_thread_ms": {name: 1e3 * one_thread_times[place].median(name) for name in arms},
        }
        for place, (events, candidates) in enumerate(shapes)
    ]


def _take_turn(
    arms: Mapping[str, Arm], shapes: Sequence[tuple[int, int]], requests: Sequence[pa.Table], times: Sequence[Times]
) -> None:
    for (events, _), one, of_shape in zip(shapes, requests, times, strict=True):
        of_shape.take({name: partial(arm.score, arm.read(one, events)) for name, arm in arms.items()})
