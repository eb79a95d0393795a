"""Batches of equal work: what each request of a split costs, and which of them a step has."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torchrec_amort import Feature, InputError, RequestBatch, RequestSchema
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests

SCHEMA = RequestSchema(
    dataset="skewed",
    features=(
        Feature("number", "request", "dense"),
        Feature("film", "candidate", "id", table_size=3),
        Feature("clicked", "event", "id", table_size=3, history="clicks"),
        Feature("bought", "event", "id", table_size=3, history="purchases"),
        Feature("liked", "candidate", "label"),
    ),
)
# The requests of a step: on each rank, their numbers.
Step = list[list[int]]


def lists(lengths: Sequence[int], kind: pa.DataType) -> pa.Array:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.ones(ends[-1]), kind))


def write(
    folder: Path, candidates: Sequence[int], clicks: Sequence[int], purchases: Sequence[int] | None = None
) -> None:
    """Requests of so many candidates and events, each with its number."""
    zeros = [0] * len(candidates)
    columns = {
        "request_id": pa.array(range(len(candidates))),
        "user": pa.array(zeros),
        "time": pa.array(zeros),
        "number": pa.array(range(len(candidates)), pa.float32()),
        "film": lists(candidates, pa.int64()),
        "clicked": lists(clicks, pa.int64()),
        "bought": lists(purchases or zeros, pa.int64()),
        "liked": lists(candidates, pa.float32()),
    }
    write_requests(folder, SCHEMA, {"train": [pa.table(columns, SCHEMA.arrow_schema())]})


@contextmanager
def written(
    candidates: Sequence[int],
    clicks: Sequence[int],
    purchases: Sequence[int] | None = None,
    *,
    rows_per_group: int = 64,
) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchrec_amort.data.writer.ROWS_PER_GROUP", rows_per_group)
        write(Path(parent) / "data", candidates, clicks, purchases)
        yield Path(parent) / "data"


def numbers(batch: RequestBatch) -> list[int]:
    return [int(number) for number in batch.request_dense[:, 0]]


def steps(
    folder: Path, *, ranks: int = 1, workers: int = 0, epoch: int = 0, first: int = 0, **options: Any
) -> list[Step]:
    of_ranks = []
    for rank in range(ranks):
        arguments = {"seed": 0, "balance_work": True} | options
        dataset = RequestDataset(folder, "train", rank=rank, world_size=ranks, **arguments)
        dataset.set_position(epoch=epoch, step=first)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=workers))
        assert len(batches) == len(dataset) - first
        of_ranks.append([numbers(batch) for batch in batches])
    return [list(step) for step in zip(*of_ranks, strict=True)]


def of_all_ranks(found: list[Step]) -> list[list[int]]:
    return [sorted(number for rank in step for number in rank) for step in found]


@st.composite
def data_and_options(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, int]]:
    """Numbers of candidates and of events, and how they are read by up to three ranks."""
    num_requests = draw(st.integers(3, 120))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    candidates, clicks = (np.minimum(random.zipf(1.5, num_requests), 200) for _ in range(2))
    options = {
        "batch_size": draw(st.integers(5, 40)),
        "num_lanes": draw(st.integers(3, 14)),
        "shuffle_rows": draw(st.integers(1, 200)),
        "seed": draw(st.integers(0, 9)),
        "epoch": draw(st.integers(0, 3)),
    }
    return candidates.tolist(), (clicks - 1).tolist(), options


@settings(max_examples=12)
@given(data_and_options(), st.integers(4, 40), st.sampled_from([0, 0, 0, 2]), st.floats(0, 1))
def test_every_request_is_in_one_batch_of_an_epoch_whoever_reads_it_and_wherever_it_goes_on(
    drawn: tuple[list[int], list[int], dict[str, int]], rows_per_group: int, workers: int, left: float
) -> None:
    candidates, clicks, options = drawn
    with written(candidates, clicks, rows_per_group=rows_per_group) as folder:
        alone = steps(folder, **options)
        assert sorted(number for step in alone for number in step[0]) == list(range(len(candidates)))
        lanes = min(options["num_lanes"], options["batch_size"], len(candidates))
        assert min(len(step[0]) for step in alone) >= lanes
        for ranks in (2, 3):
            found = steps(folder, ranks=ranks, workers=workers if ranks == 2 else 0, **options)
            assert of_all_ranks(found) == of_all_ranks(alone)
            assert min(len(of_rank) for step in found for of_rank in step) >= lanes // ranks
        first = int(left * len(alone))
        assert steps(folder, first=first, **options) == alone[first:]


def test_epochs_and_seeds_have_other_batches() -> None:
    # One row group: what differs is not their order.
    with written([3, 1] * 100, [5] * 200, rows_per_group=200) as folder:
        options = {"batch_size": 20, "num_lanes": 4}
        one = of_all_ranks(steps(folder, **options))
        assert one == of_all_ranks(steps(folder, **options))
        for other in (steps(folder, epoch=1, **options), steps(folder, seed=1, **options)):
            assert of_all_ranks(other) != one
            # Not the same batches in another order.
            assert not {tuple(step) for step in of_all_ranks(other)} & {tuple(step) for step in one}


LANES = 12


def skewed(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of candidates and of events of 3,000 requests."""
    random = np.random.default_rng(5)
    if name == "zipf":
        return np.minimum(random.zipf(1.8, 3_000), 300), np.minimum(random.zipf(1.8, 3_000) - 1, 300)
    candidates = 2 + random.poisson(18, 3_000)
    candidates[random.choice(3_000, 5, replace=False)] = [2_000, 3_000, 3_000, 4_000, 5_000]
    return candidates, np.minimum(random.geometric(0.02, 3_000) - 1, 1_000)


def unevenness(found: list[Step], work: np.ndarray) -> tuple[float, float]:
    """The largest step's work over the mean, and the largest work of a rank at a step over the mean."""
    works = np.array([[work[of_rank].sum() for of_rank in step] for step in found])
    return float(works.sum(1).max() / works.sum(1).mean()), float(works.max() / works.mean())


def allowed(lanes: int, share: float, largest: int) -> float:
    """The work of these lanes at a step over the mean, if one has the largest request and the others their share.

    What windows of a lane have more than the mean of all, and what is over in dealing, is a tenth at most.
    """
    return max(1.1, (1.1 * (lanes - 1) * share + largest) / (lanes * share))


@pytest.mark.parametrize("name", ["zipf", "outliers"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_and_ranks_have_equal_work_but_for_requests_larger_than_a_lanes_share(name: str, ranks: int) -> None:
    candidates, clicks = skewed(name)
    work = candidates + clicks
    with written(candidates.tolist(), clicks.tolist()) as folder:
        options = {"batch_size": 240, "num_lanes": LANES, "ranks": ranks, "shuffle_rows": 3_000}
        balanced = unevenness(steps(folder, **options), work)
        equal = unevenness(steps(folder, **options, balance_work=False), work)
        num_steps = math.ceil(3_000 / 240)
    share = float(work.sum()) / num_steps / LANES
    bounds = [allowed(lanes, share, int(work.max())) for lanes in (LANES, LANES // ranks)]
    for which, bound in enumerate(bounds):
        assert balanced[which] <= bound < equal[which]


def test_large_requests_of_several_lanes_do_not_meet_in_one_batch() -> None:
    candidates = np.ones(1_200, dtype=np.int64)
    # One in each hundred, which is a lane's part.
    candidates[::100] = 500
    with written(candidates.tolist(), [0] * 1_200, rows_per_group=100) as folder:
        found = steps(folder, batch_size=60, num_lanes=LANES)
    assert sorted(int((candidates[step[0]] == 500).sum()) for step in found) == [0] * 8 + [1] * 12


@pytest.mark.parametrize(
    ("history_length", "counted"),
    [
        (None, (400, 400)),
        (10, (10, 10)),
        ({"clicks": 0, "purchases": 400}, (0, 400)),
        ({"clicks": 7}, (7, 400)),
    ],
)
def test_work_is_candidates_and_the_events_that_are_kept(
    history_length: int | Mapping[str, int] | None, counted: tuple[int, int]
) -> None:
    random = np.random.default_rng(2)
    candidates, clicks, purchases = (
        random.integers(1, 40, 600),
        random.integers(0, 400, 600),
        random.integers(0, 400, 600),
    )
    kept = [np.minimum(events, most) for events, most in zip((clicks, purchases), counted, strict=True)]
    with written(candidates.tolist(), clicks.tolist(), purchases.tolist()) as folder:
        options: dict[str, Any] = {"batch_size": 100, "num_lanes": 2, "history_length": history_length}
        balanced, _ = unevenness(steps(folder, **options), candidates + kept[0] + kept[1])
        equal, _ = unevenness(steps(folder, **options, balance_work=False), candidates + kept[0] + kept[1])
    assert balanced < 1.01 < equal


def test_equal_work_needs_a_seed() -> None:
    with written([1, 2, 3], [0, 0, 0]) as folder, pytest.raises(InputError, match="balance_work: .* give a seed"):
        RequestDataset(folder, "train", batch_size=3, balance_work=True)
