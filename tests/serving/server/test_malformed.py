"""A hundred thousand messages that are not as they should be."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.serving.server.test_server import Client, arrow_of, of_tensor, scores_of, serving, unlabelled, version
from torchrec_amort.serving.server.messages import SERVICE, message
from torchrec_amort.serving.versions import Versions

NUM_MESSAGES = 100_000
# What one in three of a spoilt message's bytes becomes: these mean most to parsers.
WORDS = b'\x00\x01\x7f\x80\xff{}[]",:-.eE'


def spoilt(whole: bytes, rng: np.random.Generator) -> bytes:
    """A message with some bytes changed, left out, doubled, or cut off."""
    message_ = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        start, size = int(rng.integers(len(message_))), int(rng.integers(1, 9))
        what = rng.integers(5)
        if what == 0:
            message_[start] = int(rng.integers(256))
        elif what == 1:
            message_[start] = int(rng.choice(list(WORDS)))
        elif what == 2 and len(message_) > 20:
            del message_[start : start + size]
        elif what == 3:
            message_[start:start] = message_[start : start + size]
        elif len(message_) > 20:
            del message_[max(20, start) :]
    return bytes(message_)


def asked(data: bytes) -> bytes:
    """A whole message of Arrow data."""
    inputs = [{"name": "arrow", "datatype": "BYTES", "shape": [1]}]
    raw = [len(data).to_bytes(4, "little") + data]
    request = message("ModelInferRequest")(model_name="films", inputs=inputs, raw_input_contents=raw)
    whole: bytes = request.SerializeToString()
    return whole


def by_grpc(client: Client) -> Callable[[bytes], str]:
    infer = client.channel.unary_unary(f"/{SERVICE}/ModelInfer")

    def send(body: bytes) -> str:
        try:
            infer(body, timeout=60)
        except grpc.RpcError as error:
            told: Any = error
            assert told.code().name != "INTERNAL", told.details()
            assert told.details()
            return str(told.code().name)
        return "OK"

    return send


def by_http(client: Client, path: str, whole: Any) -> tuple[bytes, Callable[[bytes], str]]:
    def send(body: bytes) -> str:
        answer = client.http.post(path, content=body)
        assert answer.status_code == 200 or answer.json()["error"]
        return str(answer.status_code)

    return json.dumps(whole).encode(), send


def resident() -> int:
    """Bytes that this process, the server's, has in memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


@pytest.mark.slow
def test_each_is_answered_or_refused_with_a_reason_and_nothing_stays_of_it() -> None:
    rng = np.random.default_rng(0)
    with serving(Versions(version("monday"))) as client:
        columns = {name: [request[name] for request in unlabelled()] for name in ("user", "time", "user_id", "hour")}
        inputs = [
            {"name": name, "datatype": "FP32" if name == "hour" else "INT64", "shape": [3], "data": values}
            for name, values in columns.items()
        ]
        send = by_grpc(client)
        ways = [
            (asked(arrow_of(unlabelled())), send),
            (arrow_of(unlabelled()), lambda data: send(asked(data))),
            by_http(client, "/v1/score", {"requests": unlabelled()}),
            by_http(client, "/v2/models/films/infer", {"inputs": inputs}),
        ]
        statuses: Counter[str] = Counter()
        before = 0
        for number in range(NUM_MESSAGES):
            whole, ask = ways[number % len(ways)]
            statuses[ask(spoilt(whole, rng))] += 1
            # By then all that is kept once is there.
            if number == NUM_MESSAGES // 10:
                before = resident()
        # A number that was changed may be another good one.
        assert statuses.keys() <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED",
                                   "200", "400", "504"}, statuses  # fmt: skip
        assert statuses["INVALID_ARGUMENT"] > 1000 and statuses["400"] > 1000, statuses
        assert resident() - before < 50e6
        np.testing.assert_allclose(
            of_tensor(client.infer(unlabelled()), "logits", "<f4"), scores_of(unlabelled()), atol=1e-5
        )
