"""A server of scores, from its config to its end."""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchrec_amort.errors import InputError
from torchrec_amort.serving.cache import HistoryCache
from torchrec_amort.serving.histories import HistoryStore
from torchrec_amort.serving.package import load_package
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.server.access import Access, Role
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.memory import refuse_without_room
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.server.run import ScoringServer
from torchrec_amort.serving.service import ScoringService
from torchrec_amort.serving.versions import Version, Versions
from torchrec_amort.stores import local_path
from torchrec_amort.training.processes import stop_signals
from torchrec_amort.training.run import load_model


def serve_until_told(config: ServeConfig) -> None:
    """Answer requests until a signal tells the process to end, and then those that came.

    Args:
        config: what answers, and where.

    Raises:
        InputError: there is no such package or run, a file of the config is not as it should be, or a port cannot be
            had.
    """
    # Work is spread over requests; what one thread does of it is the service's to say.
    torch.set_num_threads(config.threads_per_request)
    versions = Versions(_of_package(config, config.package) if config.package else _of_run(config))
    metrics = Metrics()
    workers = config.workers or len(os.sched_getaffinity(0))
    service = ScoringService(
        versions, workers, config.max_waiting, config.threads_per_request, max_bytes=config.max_waiting_bytes
    )
    metrics.collect("service", service.counters)
    metrics.collect("cache", lambda: _cache_counters(versions))
    name = config.name or versions.current.schema.dataset
    histories = _histories(config, versions)
    if histories is not None:
        metrics.collect("histories", histories.counters)
    load = partial(_of_package, config) if config.package else None
    endpoint = Endpoint(name, versions, service, metrics, config.timeout_ms, load, histories)
    access = Access(
        tokens=_tokens(config.tokens),
        certificate=config.certificate,
        private_key=config.private_key,
        client_ca=config.client_ca,
    )
    server = ScoringServer(
        endpoint,
        config.host,
        grpc_port=config.grpc_port,
        http_port=config.http_port,
        access=access,
        num_threads=workers + config.max_waiting,
        max_bytes=config.max_message_bytes,
    )
    is_told_to_end = threading.Event()

    def take(_: signal.Signals) -> None:
        is_told_to_end.set()

    with stop_signals(take):
        server.start()
        print(
            f"{name}, version {versions.current.name}: gRPC on {config.host}:{server.grpc_port}, HTTP on "
            f"{config.host}:{server.http_port}, {workers} workers",
            flush=True,
        )
        is_told_to_end.wait()
        server.close(config.seconds_unready)
    print(json.dumps({"service": service.counters(), "cache": _cache_counters(versions)}))


def _of_package(config: ServeConfig, package: str) -> Version:
    """A version, by the name of the package's folder."""
    folder = local_path(package)
    if folder.is_dir():
        refuse_without_room(folder)
    scorer = AmortizedScorer(load_package(folder), config.microbatch_size, _cache(config))
    return Version(folder.resolve().name, scorer)


def _of_run(config: ServeConfig) -> Version:
    assert config.run_folder is not None
    model, trained, schema = load_model(config.run_folder)
    read = schema.without(trained.model.leave_out)
    scorer = AmortizedScorer(model, config.microbatch_size, _cache(config), schema=read)
    return Version(local_path(config.run_folder).resolve().name, scorer)


def _cache(config: ServeConfig) -> HistoryCache | None:
    return HistoryCache(config.cache_bytes, config.cache_seconds) if config.cache_bytes else None


def _histories(config: ServeConfig, versions: Versions) -> HistoryStore | None:
    if not config.history_bytes:
        return None
    limits = dict.fromkeys(versions.current.schema.histories, config.history_events)
    return HistoryStore(versions.current.schema, config.history_bytes, limits, config.cache_seconds)


def _cache_counters(versions: Versions) -> dict[str, int]:
    cache = versions.current.scorer.cache
    return {} if cache is None else cache.counters()


def _tokens(path: str | None) -> dict[Role, str]:
    if path is None:
        return {}
    try:
        tokens: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"tokens: {path}: not a JSON file that can be read ({error})") from error
    if not isinstance(tokens, dict) or not tokens.keys() <= {"score", "admin"}:
        raise InputError(f"tokens: {path}: give an object of the roles 'score' and 'admin'")
    if any(not isinstance(token, str) or len(token) < 16 for token in tokens.values()):
        raise InputError(f"tokens: {path}: a token is text of 16 characters or more")
    return tokens
