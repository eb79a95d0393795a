"""Servers of scores that share histories."""

import signal
from typing import Any

import numpy as np
import pytest

from tests.conftest import SCHEMA
from tests.serving.server.test_server import EVENTS, of_tensor, scores_of, serving, status_of, unlabelled, version
from tests.serving.valkey import Valkey, valkey
from torchrec_amort import InputError
from torchrec_amort.serving.histories import HistoryStore
from torchrec_amort.serving.history_tier import HistoryTier, Sealed
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.shared_histories import SharedHistoryStore
from torchrec_amort.serving.versions import Versions


def store_of(server: Valkey, timeout: float) -> SharedHistoryStore:
    local = HistoryStore(SCHEMA, max_bytes=2**20, seconds_to_live=3600)
    tier = HistoryTier(server.url, local.columns, Sealed("films", bytes(32)), 3600, timeout=timeout)
    return SharedHistoryStore(local, tier)


def test_new_events_go_to_any_server() -> None:
    requests = [request | {"user": row} for row, request in enumerate(unlabelled())]
    start = [request | {name: request[name][:-1] for name in EVENTS} for request in requests]
    news = [request | {name: request[name][-1:] for name in EVENTS} for request in requests]
    bare = [{name: value for name, value in request.items() if name not in EVENTS} for request in requests]
    append: Any = {"history": {"string_param": "append"}}
    with (
        valkey() as server,
        serving(Versions(version("monday")), histories=store_of(server, 1.0)) as one,
        serving(Versions(version("monday")), histories=store_of(server, 1.0)) as other,
    ):
        one.infer(start)
        logits = of_tensor(other.infer(news, parameters=append), "logits", "<f4")
        np.testing.assert_allclose(logits, scores_of(requests), atol=1e-5)
        body = {"requests": bare, "parameters": {"history": "append"}}
        scores = one.http.post("/v1/score", json=body).json()["scores"]
        np.testing.assert_allclose(np.concatenate(scores), scores_of(requests), atol=1e-5)
        assert other.http.post("/v1/forget", json={"user": 1}).json() == {"found": True}
        told = status_of(lambda: one.infer(news, parameters=append))
        assert told == ("FAILED_PRECONDITION", "user 1: the history is not kept here: send it whole")
        server.process.send_signal(signal.SIGSTOP)
        try:
            reply = one.http.post("/v1/forget", json={"user": 0})
            assert (reply.status_code, reply.json()["error"]) == (
                503,
                "user 0: is not forgotten: the shared tier of histories does not answer: forget again",
            )
            np.testing.assert_allclose(of_tensor(one.infer(requests), "logits", "<f4"), scores_of(requests), atol=1e-5)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert one.http.post("/v1/forget", json={"user": 2}).json() == {"found": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_histories": "redis://host"}, "go together: a key's file, or off"),
        ({"shared_histories_key": "off"}, "go together: a key's file, or off"),
        ({"shared_histories": "redis://host", "shared_histories_key": "off"}, "history_bytes is 0 and cache_seconds"),
        (
            {"shared_histories": "redis://host", "shared_histories_key": "off", "history_bytes": 9},
            "history_bytes is 9 and cache_seconds None: with shared_histories give",
        ),
    ],
)
def test_a_tier_that_not_all_is_told_of_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServeConfig(package="packages/films", **options)
