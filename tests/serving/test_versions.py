from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SCHEMA
from tests.serving.server.test_server import scores_of, unlabelled, version
from torchrec_amort import InputError
from torchrec_amort.serving.versions import Ahead, Requests, Versions


def call_of(how: str, rows: slice, seed: int) -> Requests:
    requests: list[dict[str, Any]] = unlabelled(seed)[rows]
    if how == "mappings":
        return requests
    if how == "more":
        requests = [request | {"page": 3} for request in requests]
    kinds = {field.name: field for field in SCHEMA.arrow_schema()}
    return pa.Table.from_pylist(requests, pa.schema([kinds.get(name, (name, pa.int64())) for name in requests[0]]))


@settings(max_examples=25, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["table", "more", "mappings"]),
            st.sampled_from([slice(0, 1), slice(1, 3), slice(0, 3)]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_calls_that_are_scored_together_have_the_scores_that_they_have_alone(calls: list[Any]) -> None:
    versions = Versions(version("monday"))
    scored = versions.score_together([call_of(*call) for call in calls])
    for (_, rows, seed), of_call in zip(calls, scored, strict=True):
        counts = [len(request["candidate_item"]) for request in unlabelled(seed)]
        bounds = np.cumsum([0, *counts])
        expected = scores_of(unlabelled(seed))[bounds[rows.start] : bounds[rows.stop]]
        np.testing.assert_allclose(of_call.logits_CT.numpy(), expected, atol=1e-5)
        assert (list(of_call.num_candidates), of_call.version) == (counts[rows], "monday")


def test_histories_that_are_encoded_ahead_are_there_for_calls_beside() -> None:
    versions = Versions(version("monday"))
    ahead = [{k: v for k, v in r.items() if k not in ("candidate_item", "genres", "price")} for r in unlabelled()]
    first, second = versions.score_together([Ahead(ahead), call_of("table", slice(0, 3), 0)])
    assert first.logits_CT.shape == (0, len(SCHEMA.labels)) and list(first.num_candidates) == [0, 0, 0]
    np.testing.assert_allclose(second.logits_CT.numpy(), scores_of(unlabelled()), atol=1e-5)
    spoilt = call_of("table", slice(0, 1), 0)
    assert isinstance(spoilt, pa.Table)
    spoilt = spoilt.set_column(spoilt.column_names.index("user_id"), "user_id", pa.array([99]))
    with pytest.raises(InputError, match="has id 99"):
        versions.score_together([call_of("table", slice(0, 1), 1), spoilt])
