"""Load on servers of scores: requests at given rates, what became of each, and whether the answers are right.

Shape suffixes: m candidates of one request, C of several; T tasks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.load import TOLERANCE
from torchrec_amort.bench.open_loop import Arrivals, Call, Sender, SystemClock, send_all, summary
from torchrec_amort.bench.server_load_report import write_report
from torchrec_amort.bench.timing import machine
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, refuse_out_of_bounds
from torchrec_amort.data.sample import drawn_requests, inputs_of, latest_events, sample_requests
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.files import new_file, utc_now
from torchrec_amort.garbage import imports_frozen
from torchrec_amort.progress import progress
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.package import load_package
from torchrec_amort.serving.rollout import score_impressions
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.training.run import load_model

Answer = tuple[np.ndarray, str]


@dataclass(kw_only=True)
class ServerLoadConfig:
    """Send requests to servers at given rates, and tell latency, goodput, and what became of each.

    Requests are sent at the times of a Poisson process, whether earlier ones are answered or not, and latency is
    counted from the moment that each was due.

    Args:
        addresses: `host:port` of each server; of several, each user's requests go to one.
        out: folder of the results: `load.json`, `load.md` and `load.png`.
        data: prepared data folder, whose requests are sent.
        split: of that data.
        requests: at most so many different requests, drawn at random; each is sent again and again.
        candidates: candidates of each request, drawn from those of the split; its own unless given.
        history_length: events of each history, the latest ones, of requests that have as many; their own unless given.
        body: JSON file that is sent as it is in place of requests of `data`: a body of `rest`, for any server of the
            protocol.
        protocol: `grpc` or `rest`: the Open Inference Protocol over gRPC, or in JSON; `score`: `POST /v1/score`. What
            finds a queue full is sent again over gRPC, as `ScoringClient` does, and refused if that does not help.
        model: name of the model; the data set of `data` unless given.
        rates: requests a second, one load after the other.
        seconds: how long each load lasts.
        warmup: seconds of each load before those that count.
        timeout_ms: deadline of each request, of which the server is told; none unless given. A call of gRPC ends at
            it, as those of `ScoringClient` do; over HTTP answers are waited for, and count as late.
        give_up: seconds after which an answer is not waited for any more.
        connections: of `rest` and `score` to each server.
        token_file: file of a token that the servers want to be shown.
        ca_file: file of the certificates, in PEM, of who vouches for the servers; plain text unless given.
        save_answers: file (`.npz`) of all answers: `rate`, `request_id`, `version` and `num_candidates` of each, and
            `logits` [C, T].
        check_run: folder of the training run that the servers serve: every answer is compared with that of its model,
            impression by impression.
        check_package: the same of a package.
        seed: of all draws.
    """

    addresses: list[str]
    out: str
    data: str | None = None
    split: str = "test"
    requests: int = 1000
    candidates: int | None = None
    history_length: int | None = None
    body: str | None = None
    protocol: Literal["grpc", "rest", "score"] = "grpc"
    model: str = ""
    rates: list[float] = field(default_factory=lambda: [100.0])
    seconds: float = 10.0
    warmup: float = 2.0
    timeout_ms: int | None = None
    give_up: float = 30.0
    connections: int = 64
    token_file: str | None = None
    ca_file: str | None = None
    save_answers: str | None = None
    check_run: str | None = None
    check_package: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("requests", "candidates", "timeout_ms", "connections")
        not_negative = ("history_length", "warmup", "seed")
        bounds = {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: not_negative, POSITIVE: ("rates", "seconds", "give_up")}
        refuse_out_of_bounds(self, bounds)
        for address in self.addresses:
            if not re.fullmatch(r".+:\d+", address):
                raise InputError(f"addresses: {address!r} is not host:port")
        if not self.addresses or not self.rates:
            raise InputError("addresses or rates are empty: give 1 or more of each")
        if (self.data is None) == (self.body is None):
            raise InputError(f"data is {self.data} and body {self.body}: give one of them")
        if self.body is not None:
            if not self.model:
                raise InputError("model is '', but body does not tell it: give the name that the server has for it")
            if self.protocol != "rest":
                raise InputError(f"protocol is {self.protocol}, but body is one of rest: use it, or data")
            of_data = ("candidates", "history_length", "timeout_ms", "save_answers", "check_run", "check_package")
            if given := [name for name in of_data if getattr(self, name) is not None]:
                raise InputError(f"{given[0]} is {getattr(self, given[0])}, but body is sent as it is: leave out one")
        if self.check_run is not None and self.check_package is not None:
            raise InputError(f"check_run is {self.check_run}, check_package {self.check_package}: give one of them")


def run_load(config: ServerLoadConfig) -> None:
    """Send the loads, and leave the results in the folder.

    Args:
        config: what to send, where and how fast.

    Raises:
        InputError: there is no such data, run or file, or an answer is none of scores.
    """
    # What needs the extra `client`; the options do without.
    from torchrec_amort.bench.bodies import reader_of  # noqa: PLC0415

    requests = None if config.data is None else _requests(config, config.data)
    score = None if requests is None else _way_to_score(config, requests)
    sender, num_rows = _sender(config, requests)
    calls, rates = _send(config, sender, num_rows)
    if requests is not None and (score is not None or config.save_answers is not None):
        read = reader_of(config.protocol)
        answers = [[_answer(read, call) for call in _answered(of_rate)] for of_rate in calls]
        if config.save_answers is not None:
            _save(config.save_answers, config.rates, requests, calls, answers)
        if score is not None:
            _check(score, calls, answers, rates)
    record = {"finished": utc_now(), "machine": machine(), "config": asdict(config), "rates": rates}
    write_report(Path(config.out), record)


def _requests(config: ServerLoadConfig, data: str) -> pa.Table:
    schema = RequestSchema.load(data)
    if config.candidates is None and config.history_length is None:
        return inputs_of(drawn_requests(data, config.split, config.requests, seed=config.seed), schema)
    requests = sample_requests(
        data,
        config.split,
        num_requests=config.requests,
        num_candidates=config.candidates,
        history_length=config.history_length or 0,
        seed=config.seed,
    )
    return requests if config.history_length is None else latest_events(requests, schema, config.history_length)


def _sender(config: ServerLoadConfig, requests: pa.Table | None) -> tuple[Sender, int]:
    """The sender, and how many different bodies it has."""
    from torchrec_amort.bench.bodies import bodies_of, path_of  # noqa: PLC0415
    from torchrec_amort.bench.senders import GrpcSender, HttpSender  # noqa: PLC0415
    from torchrec_amort.serving.server.client import address_of, users_of  # noqa: PLC0415

    model = config.model
    if requests is None:
        # To any of the servers.
        bodies, addresses = [_read(config.body)] * len(config.addresses), config.addresses
    else:
        schema = RequestSchema.load(str(config.data))
        model = model or schema.dataset
        timeout = None if config.timeout_ms is None else config.timeout_ms / 1e3
        bodies = bodies_of(requests, schema, config.protocol, model=model, timeout=timeout)
        addresses = [address_of(user, config.addresses) for user in users_of(requests)]
    token = None if config.token_file is None else _read(config.token_file).decode().strip()
    ca = None if config.ca_file is None else _read(config.ca_file)
    if config.protocol == "grpc":
        give_up = config.give_up if config.timeout_ms is None else config.timeout_ms / 1e3
        return GrpcSender(bodies, addresses, token=token, ca=ca, give_up=give_up), len(bodies)
    path, connections = path_of(config.protocol, model), config.connections
    sender = HttpSender(bodies, addresses, path, connections=connections, token=token, ca=ca, give_up=config.give_up)
    return sender, len(bodies)


def _read(file: str | None) -> bytes:
    path = Path(str(file))
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path.read_bytes()


def _send(config: ServerLoadConfig, sender: Sender, num_rows: int) -> tuple[list[list[Call]], list[dict[str, Any]]]:
    """The calls of each rate that count, and what became of them."""
    random = np.random.default_rng(config.seed)
    lasts = config.warmup + config.seconds
    loads = [Arrivals.poisson(rate, lasts, num_rows, random) for rate in config.rates]
    deadline = np.inf if config.timeout_ms is None else config.timeout_ms / 1e3
    all_calls, rates = [], []
    total = sum(len(load.seconds_R) for load in loads)
    with imports_frozen(), closing(sender), progress(total=total, desc="load", unit="requests") as bar:
        for rate, load in zip(config.rates, loads, strict=True):
            busy = time.process_time()
            calls = send_all(load, sender, SystemClock(), bar.update)
            for call in calls:
                call.wait()
            busy = time.process_time() - busy
            counted = calls[int((load.seconds_R < config.warmup).sum()) :]
            all_calls.append(counted)
            cost = {"client_cpu_ms": 1e3 * busy / max(1, len(calls))}
            rates.append({"rate": rate, **summary(counted, config.seconds, deadline), **cost})
    return all_calls, rates


def _answered(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.ending == "answered"]


def _answer(read: Callable[[bytes], tuple[list[np.ndarray], str]], call: Call) -> Answer:
    """Logits [m, T] of the one request that a call had, and the version of the model."""
    try:
        logits, version = read(call.answer)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"answer: cannot be read ({one_line(error)}): is it a server of scores?") from error
    if len(logits) != 1:
        raise InputError(f"answer: logits of {len(logits)} requests, but 1 was sent: is it a server of scores?")
    return logits[0], version


def _save(
    file: str,
    rates: Sequence[float],
    requests: pa.Table,
    calls: Sequence[Sequence[Call]],
    answers: Sequence[Sequence[Answer]],
) -> None:
    request_ids = requests["request_id"].to_numpy()
    flat = [answer for of_rate in answers for answer in of_rate]
    columns = {
        "rate": np.repeat(rates, [len(of_rate) for of_rate in answers]),
        "request_id": request_ids[[call.row for of_rate in calls for call in _answered(of_rate)]],
        "version": np.array([version for _, version in flat], dtype=str),
        "num_candidates": np.array([len(logits_mT) for logits_mT, _ in flat], dtype=np.int64),
        "logits": np.concatenate([logits_mT for logits_mT, _ in flat]) if flat else np.empty((0, 0), np.float32),
    }
    with new_file(file) as temporary:
        np.savez(temporary, **columns)


def _way_to_score(config: ServerLoadConfig, requests: pa.Table) -> Callable[[int], np.ndarray] | None:
    """Right logits [m, T] of the request of a row; None if answers are not to be checked."""
    if config.check_run is not None:
        model, trained, schema = load_model(config.check_run)
        read = schema.without(trained.model.leave_out)
        lengths = trained.model.history_lengths(read)

        def score_run(row: int) -> np.ndarray:
            batch = RequestBatch.from_arrow(requests.slice(row, 1), read, lengths)
            logits_mT: np.ndarray = score_impressions(model, batch).numpy()
            return logits_mT

        return score_run
    if config.check_package is not None:
        scorer = AmortizedScorer(load_package(config.check_package))

        def score_package(row: int) -> np.ndarray:
            logits_mT: np.ndarray = scorer.score_impressions(requests.slice(row, 1)).numpy()
            return logits_mT

        return score_package
    return None


def _check(
    score: Callable[[int], np.ndarray],
    calls: Sequence[Sequence[Call]],
    answers: Sequence[Sequence[Answer]],
    rates: Sequence[dict[str, Any]],
) -> None:
    """Count wrong answers of each rate, and tell the largest difference of a logit."""
    rows = sorted({call.row for of_rate in calls for call in _answered(of_rate)})
    right = {}
    with progress(total=len(rows), desc="check", unit="requests") as bar:
        for row in rows:
            right[row] = score(row)
            bar.update()
    for record, of_rate, answers_of_rate in zip(rates, calls, answers, strict=True):
        pairs = [(a, right[call.row]) for call, (a, _) in zip(_answered(of_rate), answers_of_rate, strict=True)]
        is_right = [a.shape == b.shape and np.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in pairs]
        record["wrong"] = is_right.count(False)
