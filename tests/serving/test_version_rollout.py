"""A version that answers a share of the users, beside the one that answers all others."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import HASHED, SCHEMA, make_requests
from tests.serving.server.test_server import CANDIDATES, LABELS, version
from tests.serving.test_rollout import place
from tests.serving.test_scorer import make_model
from torchrec_amort import AmortizedScorer, HistoryCache, InputError, RequestBatch
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.rollout import Stage
from torchrec_amort.serving.versions import Ahead, Requests, Version, Versions

SCHEMAS = {"monday": SCHEMA, "tuesday": HASHED}
HALF = Stage("tuesday-1", share=0.5, sample_rate=1.0)
# Users of either side.
OTHER, TREATED = (next(user for user in range(99) if (place(user, "tuesday-1") < 0.5) is so) for so in (False, True))


class Scorer(AmortizedScorer):
    """Of a version whose rows of tables are not those of others, and which may be wrong."""

    def __init__(self, name: str, then: Callable[[Tensor], Tensor], reference: Callable[[], object]) -> None:
        model = make_model(int(name == "tuesday"), SCHEMAS[name])
        super().__init__(model, cache=HistoryCache(2**20), schema=SCHEMAS[name], backend="eager")
        self.then, self.reference = then, reference

    def score(self, requests: Any) -> Tensor:
        return self.then(super().score(requests))

    def score_impressions(self, requests: Any, microbatch_size: int = 64) -> Tensor:
        self.reference()
        return super().score_impressions(requests, microbatch_size)


def named(name: str, then: Any = lambda logits_CT: logits_CT, reference: Any = lambda: None) -> Version:
    return Version(name, Scorer(name, then, reference))


def rolled_out(tuesday: Version, stage: Stage = HALF, told: Any = lambda *_: None) -> Versions:
    versions = Versions(named("monday"))
    versions.roll_out(versions.prepare(tuesday), stage, told)
    return versions


def requests_of(users: list[int], seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    made = make_requests([(int(random.integers(5)), int(random.integers(1, 4))) for _ in users], seed)
    return [
        {name: value for name, value in request.items() if name not in LABELS} | {"user": user}
        for request, user in zip(made, users, strict=True)
    ]


def table_of(requests: list[dict[str, Any]]) -> pa.Table:
    kinds = {field.name: field for field in SCHEMA.arrow_schema()}
    return pa.Table.from_pylist(requests, pa.schema([kinds.get(name, (name, pa.int64())) for name in requests[0]]))


def call_of(how: str, requests: list[dict[str, Any]]) -> Requests:
    if how == "mappings":
        return requests
    return table_of(requests if how == "table" else [request | {"page": 3} for request in requests])


def side_of(user: int, stage: Stage = HALF) -> str:
    return "tuesday" if place(user, stage.experiment) < stage.share else "monday"


def by_itself(name: str, request: dict[str, Any]) -> np.ndarray:
    """A request's scores, by impressions, of the model of a version itself."""
    schema: RequestSchema = SCHEMAS[name]
    batch = RequestBatch.from_requests([request], schema)
    with torch.no_grad():
        logits_CT: np.ndarray = make_model(int(name == "tuesday"), schema)(batch.to_impressions()).numpy()
    return logits_CT


USERS = st.lists(st.integers(0, 30), min_size=1, max_size=4)


@settings(max_examples=20)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["table", "more", "mappings"]), USERS), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_each_request_is_scored_by_the_version_of_its_users_side(calls: list[Any], share: float) -> None:
    stage = Stage("tuesday-1", share, sample_rate=1.0)
    versions = rolled_out(named("tuesday"), stage)
    asked = [requests_of(users, seed) for seed, (_, users) in enumerate(calls)]
    scored = versions.score_together([call_of(how, requests) for (how, _), requests in zip(calls, asked, strict=True)])
    for requests, of_call in zip(asked, scored, strict=True):
        names = [side_of(request["user"], stage) for request in requests]
        assert list(of_call.versions) == names and of_call.version == ",".join(sorted(set(names)))
        parts = of_call.logits_CT.split(list(of_call.num_candidates))
        for name, request, logits_mT in zip(names, requests, parts, strict=True):
            np.testing.assert_allclose(logits_mT.numpy(), by_itself(name, request), atol=1e-5)
    rollout = versions.rollout
    assert rollout is not None
    rollout.drain()
    counters, users = rollout.counters(), [user for _, of_call in calls for user in of_call]
    num_treated = sum(side_of(user, stage) == "tuesday" for user in users)
    assert (counters["treatment"], counters["control"]) == (num_treated, len(users) - num_treated)
    assert counters["compared"] == (len(users) if share == 0 else num_treated)
    assert rollout.switched_back is None and counters["largest_difference"] < 1e-5


def test_a_share_of_the_users_needs_users() -> None:
    requests = requests_of([OTHER, TREATED])
    nameless = [{name: value for name, value in request.items() if name != "user"} for request in requests]
    monday = Version("monday", AmortizedScorer(make_model(), schema=SCHEMA))
    versions = Versions(monday)
    tuesday = versions.prepare(Version("tuesday", AmortizedScorer(make_model(1, HASHED), schema=HASHED)))
    versions.roll_out(tuesday, HALF, lambda *_: None)
    for wrong in (nameless, table_of(nameless)):
        with pytest.raises(InputError, match="column 'user' is missing, but 0.5 of the users are served by the"):
            versions.score(wrong)
    for one in (nameless[1], requests[1] | {"user": None}):
        with pytest.raises(InputError, match="request 1: .*user"):
            versions.score([requests[0], one])
    versions.go_on(Stage("tuesday-1", share=0))
    assert versions.score(nameless).version == "monday"
    versions.go_on(Stage("tuesday-1", share=1))
    assert versions.score(nameless).version == "tuesday"


def test_histories_are_encoded_ahead_for_the_side_of_their_user() -> None:
    tuesday = named("tuesday")
    versions = rolled_out(tuesday)
    requests = requests_of([TREATED, OTHER])
    early = [{name: value for name, value in asked.items() if name not in CANDIDATES} for asked in requests]
    scored = versions.score(Ahead(early))
    assert scored.logits_CT.shape == (0, 2) and scored.version == "monday,tuesday"
    for version_, user in ((tuesday, TREATED), (versions.current, OTHER)):
        assert version_.scorer.cache is not None
        assert [key[0] for key in version_.scorer.cache._entries] == [user]
    assert versions.rollout is not None and versions.rollout.counters()["treatment"] == 0


def refusing(user: int) -> Version:
    """A treatment that refuses the requests of a user, as a model with another vocabulary may."""

    class Refusing(Scorer):
        def score(self, requests: Any) -> Tensor:
            if user in requests["user"].to_pylist():
                raise InputError("user_id: has an id that is unknown")
            return super().score(requests)

    return Version("tuesday", Refusing("tuesday", lambda logits_CT: logits_CT, lambda: None))


def test_what_the_treatment_refuses_moves_no_other_user_to_the_control() -> None:
    other_treated = next(user for user in range(TREATED + 1, 99) if side_of(user) == "tuesday")
    versions = rolled_out(refusing(TREATED))
    requests = requests_of([OTHER, TREATED, other_treated])
    scored = versions.score_together([table_of(requests), table_of(requests[2:])])
    assert [list(of_call.versions) for of_call in scored] == [["monday", "monday", "tuesday"], ["tuesday"]]
    parts = scored[0].logits_CT.split(list(scored[0].num_candidates))
    for name, request, logits_mT in zip(scored[0].versions, requests, parts, strict=True):
        np.testing.assert_allclose(logits_mT.numpy(), by_itself(name, request), atol=1e-5)
    rollout = versions.rollout
    assert rollout is not None and rollout.switched_back is None
    assert [rollout.counters()[name] for name in ("control", "treatment", "refused")] == [1, 3, 1]


def test_a_bad_request_is_told_by_its_number_and_nothing_beside_it_is_counted() -> None:
    versions = rolled_out(named("tuesday"))
    mixed = requests_of([TREATED, TREATED, OTHER])
    mixed[2]["user_id"] = 99
    for call in (mixed, table_of(mixed)):
        with pytest.raises(InputError, match="request 2: .* has id 99"):
            versions.score(call)
    good, bad = requests_of([OTHER, TREATED]), [requests_of([OTHER])[0] | {"user_id": 99}]
    with pytest.raises(InputError, match="has id 99"):
        versions.score_together([good, table_of(good), table_of(bad)])
    rollout = versions.rollout
    assert rollout is not None
    assert [rollout.counters()[name] for name in ("control", "treatment", "sampled")] == [0, 0, 0]


FAULTS: list[tuple[Any, float, str]] = [
    (
        lambda logits_CT: logits_CT + 0.25,
        0.5,
        "a logit differs from the reference by 0.25, but the threshold is 0.0001",
    ),
    (
        lambda logits_CT: logits_CT + 0.25,
        0.0,
        "a logit differs from the reference by 0.25, but the threshold is 0.0001",
    ),
    (lambda logits_CT: logits_CT * torch.nan, 1.0, "differs from the reference by inf"),
    (lambda logits_CT: logits_CT.no_such_thing, 1.0, "the treatment raised AttributeError"),
    (lambda logits_CT: logits_CT.no_such_thing, 0.0, "sample 1: the treatment raised AttributeError"),
]


@pytest.mark.parametrize(("then", "share", "reason"), FAULTS)
def test_a_wrong_treatment_is_switched_back_and_told_of_once(
    then: Any, share: float, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, str]] = []
    versions = rolled_out(named("tuesday", then), Stage("tuesday-1", share, 1.0), lambda *reasons: told.append(reasons))
    rollout, call = versions.rollout, table_of(requests_of([TREATED] * 3))
    assert rollout is not None
    first = versions.score(call)
    rollout.drain()
    assert rollout.switched_back is not None and reason in rollout.switched_back
    assert told == [("tuesday", rollout.switched_back)]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert rollout.switched_back in record.getMessage()
    # Whoever it was asked by, what the treatment cannot answer the control does.
    assert first.version == ("monday" if share == 0 or "raised" in reason else "tuesday")
    after = versions.score(call)
    assert after.version == "monday" and versions.names == ["monday"]
    expected = np.concatenate([by_itself("monday", request) for request in requests_of([TREATED] * 3)])
    np.testing.assert_allclose(after.logits_CT.numpy(), expected, atol=1e-5)


def test_the_next_stage_loads_nothing_and_begins_to_count_anew() -> None:
    tuesday = named("tuesday")
    versions = rolled_out(tuesday)
    call = table_of(requests_of([TREATED]))
    versions.score(call)
    versions.go_on(Stage("tuesday-1", share=0.9))
    assert versions.score(call).version == "tuesday"
    assert tuesday.scorer.cache is not None and tuesday.scorer.cache.counters()["hits"] == 1
    assert versions.rollout is not None and versions.rollout.counters()["treatment"] == 1
    versions.switch_back("monday", "is none that is rolled out")
    assert versions.rollout.switched_back is None
    versions.switch_back("tuesday", "p99 is 40 ms")
    versions.go_on(HALF)
    assert versions.rollout.switched_back == "p99 is 40 ms"
    assert versions.score(call).version == "monday"


class Held:
    """A reference that waits until it may go on."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Semaphore(0), threading.Event()

    def __call__(self) -> None:
        self.started.release()
        assert self.go_on.wait(60)


def test_a_fault_of_a_sample_of_the_stage_before_switches_the_next_one_back() -> None:
    held = Held()
    versions = rolled_out(named("tuesday", lambda logits_CT: logits_CT + 1, held))
    call = table_of(requests_of([TREATED]))
    versions.score(call)
    assert held.started.acquire(timeout=60)
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(versions.go_on, Stage("tuesday-1", share=1))
        while versions.rollout is None or versions.rollout.share != 1:
            assert not going_on.done()
        held.go_on.set()
        going_on.result(60)
    assert versions.rollout.switched_back is not None
    assert versions.score(call).version == "monday"


def test_a_user_who_is_forgotten_is_in_no_cache_and_no_sample() -> None:
    held = Held()
    tuesday = named("tuesday", reference=held)
    # In shadow: scoring samples puts their histories into the treatment's cache.
    versions = rolled_out(tuesday, Stage("tuesday-1", share=0, sample_rate=1.0))
    rollout, cache = versions.rollout, tuesday.scorer.cache
    assert rollout is not None and cache is not None
    for user in (TREATED, TREATED, OTHER):
        versions.score(table_of(requests_of([user])))
    assert held.started.acquire(timeout=60)
    with ThreadPoolExecutor(1) as pool:
        forgetting = pool.submit(versions.forget, TREATED)
        while rollout._shadow._dropped_up_to == 0:
            assert not forgetting.done()
        held.go_on.set()
        assert forgetting.result(60)
    assert [rollout.counters()[name] for name in ("sampled", "compared", "dropped")] == [3, 1, 2]
    assert list(cache._entries) == [] and not versions.forget(TREATED)
    # Later ones are taken again.
    versions.score(table_of(requests_of([OTHER])))
    rollout.drain()
    assert rollout.counters()["compared"] == 2


def test_a_rollout_ends_by_completion_or_by_rolling_back_and_no_other_way() -> None:
    tuesday = named("tuesday")
    versions = rolled_out(tuesday)
    goes_on = "version 'wednesday': 'tuesday' is being rolled out: complete it, or roll back, first"
    wednesday = version("wednesday")
    with pytest.raises(InputError, match=goes_on):
        versions.switch(wednesday)
    assert versions.names == ["monday", "tuesday"]
    assert versions.roll_back().name == "monday" and versions.names == ["monday"]
    prepared = versions.prepare(tuesday)
    late = versions.prepare(wednesday)
    versions.roll_out(prepared, HALF, lambda *_: None)
    for end in (lambda: versions.commit(late), lambda: versions.roll_out(late, HALF, lambda *_: None)):
        with pytest.raises(InputError, match=goes_on):
            end()
    assert versions.complete() is tuesday and versions.current is tuesday
    assert versions.score(requests_of([OTHER])).version == "tuesday"
    assert versions.roll_back().name == "monday" and versions.rollout is None
    for nothing in (versions.complete, lambda: versions.go_on(HALF)):
        with pytest.raises(InputError, match="version 'monday': answers everybody: no other one is being rolled out"):
            nothing()
