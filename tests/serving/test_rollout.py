import copy
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests, with_weights
from tests.launch import ROOT
from tests.serving.test_scorer import WITHOUT_AGE, assert_same, by_impressions, grown, make_batch, make_model
from tests.serving.test_service import assert_end, run
from torchrec_amort import (
    AmortizedDLRM,
    AmortizedHistoryArch,
    AmortizedScorer,
    HistoryCache,
    InputError,
    RequestBatch,
    Rollout,
    ScoringService,
    score_impressions,
    user_places,
)
from torchrec_amort.models.dlrm import HISTORY
from torchrec_amort.modules.history import AmortizedHistoryLayer
from torchrec_amort.ops.attention import JaggedAttention
from torchrec_amort.ops.jagged import append, positions, requests
from torchrec_amort.serving.cache import CachedHistory

INT64 = st.integers(-(2**63), 2**63 - 1)
SHARES = st.floats(0, 1)


def place(user: int, experiment: str) -> float:
    """What the page tells other languages to do, in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    name = int(sha256(experiment.encode("utf-8")).hexdigest()[:16], 16)
    return (mix(mix(user % 2**64) ^ name) >> 11) / 2**53


@given(INT64, st.text(max_size=10))
@example(0, "")
@example(-(2**63), "é")
def test_places_are_those_of_the_page(user: int, experiment: str) -> None:
    assert user_places(np.array([user]), experiment).tolist() == [place(user, experiment)]


def test_the_test_vectors_of_the_page_are_kept() -> None:
    section = (ROOT / "docs" / "rollout.md").read_text().split("## The users of a share")[1].split("\n## ")[0]
    header, _, *lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    experiments = [cell.strip("`") for cell in header.split(" | ")[1:]]
    rows = [line.split(" | ") for line in lines]
    users = np.array([int(row[0].replace(",", "")) for row in rows])
    assert {0, -1, 2**53 + 1, 2**63 - 1, -(2**63)} <= set(users.tolist())
    for column, experiment in enumerate(experiments, 1):
        assert [f"{value:.12f}" for value in user_places(users, experiment)] == [row[column] for row in rows]


@given(st.lists(INT64, min_size=1), st.text(max_size=5), SHARES, SHARES)
def test_a_user_stays_and_a_larger_share_only_adds_users(
    users: list[int], experiment: str, share: float, other: float
) -> None:
    places = user_places(np.array(users, dtype=np.int64), experiment)
    assert ((places >= 0) & (places < 1)).all()
    assert places.tolist() == [float(user_places(np.array([user]), experiment)[0]) for user in users]
    assert not ((places < min(share, other)) & ~(places < max(share, other))).any()


@pytest.mark.parametrize("stride", [1, -1, 1000, 2**10, 2**32, 2**40 + 1])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_is_a_share_whatever_the_users_have_in_common(stride: int, share: float) -> None:
    users = np.arange(1, 100_001) * stride
    is_treated = user_places(users, "films-1") < share
    assert abs(is_treated.mean() - share) <= 5 * (share * (1 - share) / len(users)) ** 0.5


@pytest.mark.parametrize("stride", [1, 2**32])
def test_experiments_are_independent(stride: int) -> None:
    users, share = np.arange(1, 100_001) * stride, 0.3
    arms = np.stack([user_places(users, f"films-{number}") < share for number in range(6)])
    both = (arms.astype(np.float64) @ arms.T) / len(users)
    apart = both[~np.eye(len(arms), dtype=bool)]
    assert np.abs(apart - share**2).max() <= 5 * (share**2 * (1 - share**2) / len(users)) ** 0.5


def test_users_that_are_not_integers_are_refused() -> None:
    with pytest.raises(InputError, match="users are float64, not int64"):
        user_places(np.array([1.0]), "films-1")


def control(batch: RequestBatch) -> Tensor:
    """A path whose scores tell the candidate."""
    return batch.sequences["candidate_item"].values()[:, None].float().expand(-1, 2)


def treatment(batch: RequestBatch) -> Tensor:
    """Another one, whose scores tell that it was this one."""
    return control(batch) + 1000


def never(batch: RequestBatch) -> Tensor:
    raise AssertionError("not to be called")


def make_rollout(
    treatment: Any = treatment, control: Any = control, reference: Any = treatment, **other: Any
) -> Rollout:
    options: dict[str, Any] = {
        "experiment": "films-1",
        "share": 1.0,
        "sample_rate": 1.0,
        "seed": 0,
        "max_waiting": 1000,
    }
    return Rollout(treatment, control=control, reference=reference, **(options | other))


sizes_of_batches = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=6)


@given(sizes_of_batches, SHARES, st.integers(0, 2**20))
def test_each_request_gets_the_path_of_its_user_and_its_place(
    sizes: list[tuple[int, int]], share: float, seed: int
) -> None:
    batch = make_batch(sizes, seed)
    assert batch.users is not None
    is_treated_B = torch.tensor([place(user, "films-1") < share for user in batch.users.tolist()])
    with make_rollout(share=share) as rollout:
        logits_CT = rollout.score(batch)
    assert torch.equal(logits_CT, control(batch) + 1000 * is_treated_B.repeat_interleave(batch.num_candidates)[:, None])
    counters = rollout.counters()
    assert counters["treatment"] == int(is_treated_B.sum())
    assert counters["control"] == len(batch) - counters["treatment"]
    assert counters["compared"] == (len(batch) if share == 0 else counters["treatment"])
    assert rollout.switched_back is None


def test_a_share_of_the_users_needs_users() -> None:
    batch = make_batch([(2, 2), (1, 1)])
    batch.users = None
    with make_rollout(share=0.5) as rollout:
        with pytest.raises(InputError, match=r"users is None, but 0\.5 of the users are served by the treatment"):
            rollout.score(batch)
        rollout.switch_back("by hand")
        assert torch.equal(rollout.score(batch), control(batch))
    for share, path in ((0.0, control), (1.0, treatment)):
        with make_rollout(share=share) as rollout:
            assert torch.equal(rollout.score(batch), path(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.1}, "share is 1.1, not from 0 to 1"),
        ({"share": math.nan}, "share is nan"),
        ({"sample_rate": -0.1}, "sample_rate is -0.1, not from 0 to 1"),
        ({"threshold": 0.0}, "threshold is 0.0, not a finite number above 0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"max_waiting": 0}, "max_waiting is 0, not 1 or more"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rollout(**options)


def test_a_malformed_batch_of_both_paths_is_refused() -> None:
    batch = make_batch([(2, 2)] * 8)
    batch.num_candidates = batch.num_candidates.clone()
    batch.num_candidates[3] = 5
    with make_rollout(share=0.5) as rollout, pytest.raises(InputError, match="num_candidates tells of"):
        rollout.score(batch)


# The promise: a wrong treatment is found and taken back.


class WrongAttention(JaggedAttention):
    """Attention with a mask of its own, right or wrong, written down cell by cell."""

    def __init__(self, right: JaggedAttention, bug: str) -> None:
        super().__init__(right.row_lengths_B, right.key_lengths_B, is_causal=right.is_causal)
        self.bug = bug

    def __call__(
        self, queries_RHK: Tensor, keys_NHK: Tensor, values_NHK: Tensor, own: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        owners_R, owners_N = (
            requests(lengths_B, len(rows))
            for lengths_B, rows in ((self.row_lengths_B, queries_RHK), (self.key_lengths_B, keys_NHK))
        )
        places_R = positions(self.row_lengths_B, len(queries_RHK)) + (self.key_lengths_B - self.row_lengths_B)[owners_R]
        places_N = positions(self.key_lengths_B, len(keys_NHK))
        mask_RN = owners_R[:, None] == owners_N
        if self.bug == "another_request":
            mask_RN |= owners_R[:, None] == owners_N + 1
        if self.is_causal:
            late = {"reads_the_next_event": 1, "does_not_read_itself": -1}.get(self.bug, 0)
            mask_RN &= places_N <= places_R[:, None] + late
        elif self.bug == "misses_the_latest_event":
            mask_RN &= places_N < (self.key_lengths_B - 1)[owners_R][:, None]
        products_HRN = torch.einsum("rhk,nhk->hrn", queries_RHK, keys_NHK) * queries_RHK.shape[-1] ** -0.5
        weights_HRN = torch.softmax(products_HRN.masked_fill(~mask_RN, -1e30), dim=-1) * mask_RN
        return torch.einsum("hrn,nhk->rhk", weights_HRN, values_NHK)


class WrongLayer(AmortizedHistoryLayer):
    bug: str

    def forward(self, rows_RD: Tensor, attention: JaggedAttention, *keys_and_values: Any, **other: Any) -> Tensor:
        keys_NHK, values_NHK, *more = keys_and_values
        if self.bug == "other_candidates" and not attention.is_causal:
            lengths = attention.key_lengths_B, attention.row_lengths_B
            keys, values = self.keys_and_values(rows_RD)
            keys_NHK = append(keys_NHK, lengths[0], keys, lengths[1])
            values_NHK = append(values_NHK, lengths[0], values, lengths[1])
            attention = JaggedAttention(lengths[1], lengths[0] + lengths[1])
        return super().forward(rows_RD, WrongAttention(attention, self.bug), keys_NHK, values_NHK, *more, **other)


def with_bug(model: AmortizedDLRM, bug: str) -> AmortizedDLRM:
    """A copy of the model whose attention is wrong."""
    wrong = copy.deepcopy(model)
    assert isinstance(wrong.history_arch, AmortizedHistoryArch)
    for layer in wrong.history_arch.layers:
        layer.__class__ = WrongLayer
        layer.__dict__["bug"] = bug
    return wrong


def random_batches(count: int, schema: Any, seed: int = 0) -> Iterator[RequestBatch]:
    """Batches of one to three requests; every other one is the one before, some events later."""
    random = np.random.default_rng(seed)
    requests: list[dict[str, Any]] = []
    for number in range(count):
        if number % 2:
            requests = grown(requests, int(random.integers(3)), number)
        else:
            shapes = [(int(random.integers(MAX_HISTORY - 1)), int(random.integers(1, 6))) for _ in range(3)]
            requests = make_requests(shapes[: random.integers(1, 4)], number)
            requests = [request | {"user": number * 3 + row} for row, request in enumerate(requests)]
        yield RequestBatch.from_requests(requests, schema)


BUGS = [
    "another_request",
    "other_candidates",
    "reads_the_next_event",
    "does_not_read_itself",
    "misses_the_latest_event",
]
CAUSAL: dict[str, Any] = {"history": "append_cross_causal"}


# In shadow the samples are single requests: no other one's history is beside them to be read.
@pytest.mark.parametrize(("bug", "share"), [(b, s) for b in BUGS for s in (0.0, 0.5, 1.0) if (b, s) != (BUGS[0], 0.0)])
def test_a_mask_bug_is_found_and_switched_back_within_100_samples(
    bug: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(**CAUSAL)
    scorer = AmortizedScorer(with_bug(model, bug), backend="eager")
    batches = [batch for batch in random_batches(400, SCHEMA) if len(batch) > 1]
    with make_rollout(
        scorer.score, reference=partial(score_impressions, model), share=share, sample_rate=0.2
    ) as rollout:
        for batch in batches:
            rollout.score(batch)
            rollout.drain()
            if rollout.switched_back is not None or rollout.counters()["sampled"] > 100:
                break
        counters = rollout.counters()
        assert rollout.switched_back is not None
        assert 1 <= counters["sampled"] <= 100
        assert counters["largest_difference"] > 1e-4
        reason = r"sample \d+: a logit differs from the reference by .+, but the threshold is 0\.0001; 1 requests, \d+ "
        assert re.match(reason, rollout.switched_back)
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert rollout.switched_back in record.getMessage()
        # All go to the control, and nothing more is sampled.
        before = rollout.counters()
        for batch in batches[:5]:
            assert torch.equal(rollout.score(batch), control(batch))
        after = rollout.counters()
    assert after["control"] == before["control"] + sum(len(batch) for batch in batches[:5])
    assert [after[name] for name in ("treatment", "sampled")] == [before[name] for name in ("treatment", "sampled")]


def test_it_is_the_bug_that_is_found() -> None:
    model = make_model(**CAUSAL)
    scorer = AmortizedScorer(with_bug(model, "none"), backend="eager")
    with make_rollout(scorer.score, never, partial(score_impressions, model)) as rollout:
        for batch in random_batches(100, SCHEMA):
            rollout.score(batch)
    assert rollout.switched_back is None
    assert rollout.counters()["largest_difference"] <= 1e-5


class StaleCache(HistoryCache):
    """Serves whatever was put first, whether the history has changed or not."""

    def find(
        self,
        user: int,
        num_events: int,
        version_of: Callable[[int], bytes],
        *,
        extendable: bool = False,
        tower: str = HISTORY,
    ) -> CachedHistory | None:
        cached = super().find(user, 0, version_of)
        entry = self._entries.get((user, tower))
        return cached if entry is None else CachedHistory(entry.version, num_events, entry.state)


def test_a_cache_that_serves_what_a_history_was_is_found() -> None:
    schema = SCHEMA.without(["history_age"])
    model = make_model(**WITHOUT_AGE)
    scorer = AmortizedScorer(model, cache=StaleCache(2**20))
    with make_rollout(scorer.score, reference=partial(score_impressions, model)) as rollout:
        for batch in random_batches(60, schema):
            rollout.score(batch)
            rollout.drain()
            if rollout.switched_back is not None:
                break
    assert rollout.switched_back is not None
    assert rollout.counters()["sampled"] <= 100


@pytest.mark.parametrize(
    ("backend", "interaction", "microbatch_size", "share"),
    [("auto", "dot", 2, 1.0), ("native", "dot", None, 0.5), ("eager", "dcn", 3, 1.0), ("auto", "dot", None, 0.0)],
)
def test_a_right_treatment_is_not_switched_back(
    backend: Any, interaction: str, microbatch_size: int | None, share: float
) -> None:
    schema = SCHEMA.without(["history_age"])
    model, cache = make_model(**WITHOUT_AGE, interaction=interaction), HistoryCache(2**16)
    scorer = AmortizedScorer(model, microbatch_size, cache, backend=backend)
    reference = partial(score_impressions, model)
    batches = 0
    with make_rollout(scorer.score, reference, reference, share=share) as rollout:
        for batch in random_batches(140, schema):
            assert_same(rollout.score(batch), by_impressions(model, batch))
            batches += len(batch)
            rollout.drain()
    counters = rollout.counters()
    assert rollout.switched_back is None
    assert counters["control"] + counters["treatment"] == batches
    assert counters["compared"] == counters["sampled"] == (counters["treatment"] if share else batches)
    # Wrong ones are found within as many.
    assert counters["compared"] >= 100
    assert counters["largest_difference"] <= 1e-5
    assert min(cache.counters()[name] for name in ("hits", "extensions", "misses")) > 0


def test_bfloat16_is_right_within_its_own_threshold() -> None:
    model = make_model()
    scorer = AmortizedScorer(model, dtype=torch.bfloat16)
    with make_rollout(scorer.score, never, partial(score_impressions, model), threshold=0.1) as rollout:
        for batch in random_batches(100, SCHEMA):
            rollout.score(batch)
    assert rollout.switched_back is None
    assert rollout.counters()["largest_difference"] > 1e-4


def test_impressions_are_scored_as_the_scorer_limits_histories() -> None:
    model, batch = make_model(), make_batch([(MAX_HISTORY + 3, 4), (2, 3), (0, 1)])
    expected = by_impressions(model, batch.keep_latest(MAX_HISTORY))
    for size in (1, 3, 64):
        assert_same(score_impressions(model, batch, microbatch_size=size), expected, 1e-6)
    shorter = AmortizedScorer(model, history_length=4).score(batch)
    assert_same(score_impressions(model, batch, history_length=4), shorter)


# What raises, what is not finite, and what is said of it.

SECRET = 9_876_543_210


def secret_batch() -> RequestBatch:
    """Requests whose users and ids of all kinds are numbers that no size has."""
    batch = make_batch([(3, 2), (5, 1)])
    for kjt in (batch.request_sparse, batch.candidate_sparse, batch.sequences):
        kjt.values().add_(SECRET)
    batch.users = torch.tensor([SECRET, SECRET + 1])
    return batch


def raises(error: BaseException) -> Callable[[RequestBatch], Tensor]:
    def path(batch: RequestBatch) -> Tensor:
        raise error

    return path


def off_by(amount: float) -> Callable[[RequestBatch], Tensor]:
    return lambda batch: torch.full((batch.candidate_dense.shape[0], 1), amount)


FAULTS: list[tuple[Any, Any, str]] = [
    (off_by(0.25), off_by(0.0), r"sample 1: a logit differs from the reference by 0\.25"),
    (off_by(math.nan), off_by(0.0), "sample 1: a logit differs from the reference by inf"),
    (off_by(0.0), off_by(math.inf), "sample 1: a logit differs from the reference by inf"),
    (off_by(0.0), lambda batch: torch.zeros(1, 2), r"by inf, .* logits \[2, 1\], the reference's \[1, 2\]"),
    (off_by(0.0), raises(RuntimeError(f"id {SECRET}")), r"sample 1: the reference raised RuntimeError \(test_rollout"),
    (off_by(0.0), raises(InputError(f"id {SECRET}")), "sample 1: the reference raised InputError"),
    (off_by(0.0), raises(SystemExit(SECRET)), "sample 1: the reference raised SystemExit"),
    (off_by(0.0), lambda batch: None, "sample 1: the reference raised AttributeError"),
    (raises(FloatingPointError(f"id {SECRET}")), never, "the treatment raised FloatingPointError"),
]


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(("wrong", "reference", "reason"), FAULTS)
def test_the_reason_is_told_and_logged_without_ids(
    wrong: Any, reference: Any, reason: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    batch = secret_batch()
    with make_rollout(wrong, off_by(7.0), reference, share=share) as rollout:
        rollout.score(batch)
        rollout.drain()
        assert torch.equal(rollout.score(batch), off_by(7.0)(batch))
    assert rollout.switched_back is not None
    assert re.search(reason, rollout.switched_back)
    (record,) = [record for record in caplog.records if record.name == "torchrec_amort.serving.rollout"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        f"experiment films-1, share {share}: switched back to the control: {rollout.switched_back}"
    )
    said = caplog.text + repr(rollout.counters())
    assert not re.search(r"\d{9}", said.replace("0.000", ""))


def test_what_the_treatment_raises_is_answered_by_the_control_and_counted() -> None:
    batch = make_batch([(2, 2), (1, 1)])
    with make_rollout(raises(RuntimeError("broken")), reference=never) as rollout:
        for _ in range(3):
            assert torch.equal(rollout.score(batch), control(batch))
    counters = rollout.counters()
    assert [counters[name] for name in ("treatment", "failed", "control", "sampled")] == [2, 2, 4, 0]


def test_what_the_treatment_refuses_goes_to_the_control_and_changes_nothing() -> None:
    batch = make_batch([(2, 2), (1, 1)])
    with make_rollout(raises(InputError("an id")), reference=never) as rollout:
        assert torch.equal(rollout.score(batch), control(batch))
    assert rollout.switched_back is None
    assert [rollout.counters()[name] for name in ("treatment", "refused", "sampled")] == [2, 2, 0]
    with make_rollout(raises(InputError("an id")), reference=never, share=0.0) as rollout:
        assert torch.equal(rollout.score(batch), control(batch))
    assert rollout.switched_back is None
    assert [rollout.counters()[name] for name in ("control", "sampled", "uncompared")] == [2, 2, 2]
    with (
        make_rollout(raises(InputError("an id")), raises(InputError("the same id"))) as rollout,
        pytest.raises(InputError, match="the same id"),
    ):
        rollout.score(batch)


def test_a_malformed_request_that_the_control_answers_is_no_fault_of_the_shadow() -> None:
    batch = make_batch([(2, 2), (1, 1)])
    batch.num_candidates = torch.tensor([2, 2])
    with make_rollout(never, off_by(7.0), never, share=0.0) as rollout:
        assert torch.equal(rollout.score(batch), off_by(7.0)(batch))
    assert rollout.switched_back is None
    assert [rollout.counters()[name] for name in ("sampled", "uncompared")] == [2, 2]


def test_errors_of_the_control_are_the_senders() -> None:
    with make_rollout(never, raises(RuntimeError("its own")), never, share=0.0) as rollout:
        with pytest.raises(RuntimeError, match="its own"):
            rollout.score(make_batch([(1, 1)]))
        assert rollout.counters()["sampled"] == 0
    assert rollout.switched_back is None


def test_the_first_reason_stays() -> None:
    with make_rollout() as rollout:
        rollout.switch_back("p99 is 40 ms")
        rollout.switch_back("and another thing")
    assert rollout.switched_back == "p99 is 40 ms"


# Samples: drawn at random, none lost silently.


def drawn(rate: float, seed: int | None, calls: int = 200) -> list[bool]:
    batch, numbers = make_batch([(2, 2)]), []
    with make_rollout(sample_rate=rate, seed=seed) as rollout:
        for _ in range(calls):
            rollout.score(batch)
            numbers.append(rollout.counters()["sampled"])
    return np.diff([0, *numbers]).astype(bool).tolist()


def test_samples_are_drawn_by_chance_and_not_by_what_a_request_is() -> None:
    first = drawn(0.1, seed=3)
    assert first == drawn(0.1, seed=3)
    assert first != drawn(0.1, seed=4)
    assert drawn(0.1, seed=None) != drawn(0.1, seed=None)
    assert abs(sum(first) - 20) <= 5 * (200 * 0.1 * 0.9) ** 0.5
    assert not any(drawn(0.0, seed=0, calls=20))
    assert all(drawn(1.0, seed=0, calls=20))


class Held:
    """A reference that waits until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)

    def __call__(self, batch: RequestBatch) -> Tensor:
        self.started.release()
        self.go_on.wait()
        return treatment(batch)


def test_samples_that_find_the_queue_full_are_counted_and_requests_do_not_wait() -> None:
    held, batch = Held(), make_batch([(2, 2)])
    rollout = make_rollout(reference=held, max_waiting=2)
    rollout.score(batch)
    held.started.acquire()
    for _ in range(5):
        assert torch.equal(rollout.score(batch), treatment(batch))
    counters = rollout.counters()
    assert [counters[name] for name in ("sampled", "compared", "dropped")] == [6, 0, 3]
    held.go_on.set()
    rollout.close()
    rollout.close()
    assert torch.equal(rollout.score(batch), treatment(batch))
    rollout.drain()
    counters = rollout.counters()
    assert [counters[name] for name in ("sampled", "compared", "dropped", "uncompared")] == [7, 3, 4, 0]
    assert rollout.switched_back is None


def test_it_is_closed_by_many_threads_while_samples_wait() -> None:
    held, batch = Held(), make_batch([(2, 2)])
    rollout = make_rollout(reference=held, max_waiting=1)
    rollout.score(batch)
    assert held.started.acquire(timeout=60)
    rollout.score(batch)
    closing = run(rollout.close, rollout.close, rollout.close)
    held.go_on.set()
    assert_end(closing)
    assert rollout.counters()["compared"] == 2
    assert_end(run(rollout.close, rollout.drain))


def test_samples_are_copies() -> None:
    held, samples = Held(), list[RequestBatch]()
    batch = with_weights(make_batch([(2, 2), (3, 1)]), lambda ids: ids + 0.25)

    def reference(batch: RequestBatch) -> Tensor:
        samples.append(batch)
        return held(batch)

    with make_rollout(reference=reference) as rollout:
        logits_CT = rollout.score(batch)
        held.started.acquire()
        with torch.inference_mode():
            logits_CT.zero_()
        for kjt in (batch.request_sparse, batch.candidate_sparse, batch.sequences):
            kjt.values().zero_()
            kjt.weights().zero_()
        held.go_on.set()
    for sample in samples:
        for kjt in (sample.request_sparse, sample.candidate_sparse, sample.sequences):
            assert torch.equal(kjt.weights(), kjt.values() + 0.25)
    assert rollout.switched_back is None
    assert rollout.counters()["compared"] == 2


def test_the_worker_leaves_threads_to_the_requests() -> None:
    threads: list[int] = []

    def reference(batch: RequestBatch) -> Tensor:
        threads.append(torch.get_num_threads())
        return treatment(batch)

    before = torch.get_num_threads()
    with make_rollout(reference=reference) as rollout:
        rollout.score(make_batch([(1, 1)]))
        rollout.drain()
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(torch.get_num_threads).result()
    assert (threads, torch.get_num_threads(), later) == ([1], before, before)


def test_many_threads_of_a_service_get_the_scores_of_one() -> None:
    schema = SCHEMA.without(["history_age"])
    model = make_model(**WITHOUT_AGE)
    scorer = AmortizedScorer(model, 2, HistoryCache(20_000))
    batches = list(random_batches(30, schema))
    expected = [by_impressions(model, batch) for batch in batches]
    old: nn.Module = make_model(seed=1, **WITHOUT_AGE)
    with torch.no_grad():
        other = [old(batch) for batch in batches]
    rollout = make_rollout(scorer.score, old, partial(score_impressions, model), share=0.5)
    with rollout, ScoringService(rollout, num_workers=4, max_waiting=len(batches)) as service:
        futures = [service.submit(batch) for batch in batches]
        for batch, future, new_CT, old_CT in zip(batches, futures, expected, other, strict=True):
            assert batch.users is not None
            is_treated_B = torch.tensor([place(user, "films-1") < 0.5 for user in batch.users.tolist()])
            is_treated_C = is_treated_B.repeat_interleave(batch.num_candidates)[:, None]
            assert_same(future.result(), torch.where(is_treated_C, new_CT, old_CT))
    counters = rollout.counters()
    assert rollout.switched_back is None
    assert counters["treatment"] + counters["control"] == sum(len(batch) for batch in batches)
    assert counters["treatment"] == counters["sampled"] == counters["compared"] + counters["dropped"]
    assert min(counters["treatment"], counters["control"]) > 0


def test_threads_that_meet_a_fault_at_once_switch_back_once(caplog: pytest.LogCaptureFixture) -> None:
    barrier = threading.Barrier(4)

    def broken(batch: RequestBatch) -> Tensor:
        barrier.wait()
        raise RuntimeError("broken")

    batch = make_batch([(2, 2)])
    with make_rollout(broken, reference=never) as rollout, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(rollout.score, [batch] * 4))
    assert all(torch.equal(answer, control(batch)) for answer in answers)
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    assert rollout.counters()["failed"] == 4
