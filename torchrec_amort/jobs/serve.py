"""A server of scores, from its config to its end."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchrec_amort.errors import InputError
from torchrec_amort.garbage import imports_frozen
from torchrec_amort.serving.cache import HistoryCache
from torchrec_amort.serving.histories import Histories, HistoryStore
from torchrec_amort.serving.request_log import RequestLog
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.serving.server.access import Access, Role
from torchrec_amort.serving.server.config import ServeConfig
from torchrec_amort.serving.server.endpoint import Endpoint
from torchrec_amort.serving.server.fleet import Fleet, Link, Started
from torchrec_amort.serving.server.loaded import Loaded
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.server.opener import Opener, VersionOfPackage, clear
from torchrec_amort.serving.server.run import ScoringServer
from torchrec_amort.serving.server.watch import Watch
from torchrec_amort.serving.service import ScoringService
from torchrec_amort.serving.versions import Version, Versions
from torchrec_amort.stores import local_path
from torchrec_amort.training.processes import stop_signals
from torchrec_amort.training.run import load_model

if TYPE_CHECKING:
    from torchrec_amort.serving.server.traces import Traces

# Those that wait longer come too late, and what is refused before it is read costs least.
_WAITING_PER_WORKER = 16
_SECONDS_BETWEEN_LOOKS = 1.0
# Imported once, before processes are forked.
_FORKED = [__name__, "torchrec_amort.serving.server.forked"]


def serve_until_told(config: ServeConfig) -> None:
    """Answer requests until a signal tells the process to end, and then those that came.

    Args:
        config: what answers, and where.

    Raises:
        InputError: there is no such package or run, a file of the config is not as it should be, or a port cannot be
            had.
    """
    is_told_to_end = threading.Event()

    with stop_signals(lambda _: is_told_to_end.set()):
        if config.num_processes == 1:
            with imports_frozen():
                _serve(config, is_told_to_end)
        else:
            _serve_by_several(config, is_told_to_end)


def _serve_by_several(config: ServeConfig, is_told_to_end: threading.Event) -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="torchrec-amort-", dir=memory if memory.is_dir() else None) as mapped:
        run = partial(_serve_as_one, config, mapped)
        loaded = Loaded((config.package,) if config.package else ())
        with Fleet(config.num_processes, run, _FORKED, loaded, partial(clear, Path(mapped))) as fleet:
            print(f"{config.num_processes} processes answer{_shared_addresses(config)}", flush=True)
            fleet.watch(until=is_told_to_end)


def _serve_as_one(config: ServeConfig, mapped: str, link: Link, before: Started | None, loaded: Loaded) -> None:
    """Answer as one of several processes, until told to end or left alone."""
    is_told_to_end = threading.Event()
    ports = config.ports_of(link.place) if before is None else (before.grpc_port, before.http_port)
    config = replace(config, package=loaded.packages[0] if loaded.packages else None)

    with stop_signals(lambda _: is_told_to_end.set()), imports_frozen():
        _serve(config, is_told_to_end, Path(mapped), link, loaded, ports)


def _shared_addresses(config: ServeConfig) -> str:
    """Where any of several processes is reached."""
    ports = {"gRPC": config.grpc_port, "HTTP": config.http_port}
    shared = [f"{protocol} on {config.host}:{port}" for protocol, port in ports.items() if port]
    return f": any of them by {' and '.join(shared)}" if shared else ""


def _serve(
    config: ServeConfig,
    is_told_to_end: threading.Event,
    mapped: Path | None = None,
    link: Link | None = None,
    loaded: Loaded | None = None,
    own_ports: tuple[int, int] | None = None,
) -> None:
    """Answer in this process."""
    # Work is spread over requests; what one thread does of it is the service's to say.
    torch.set_num_threads(config.threads_per_request)
    watched = None if config.watch is None else _folder(config.watch)
    load = partial(_of_package, config, mapped=mapped)
    versions = Versions(load(config.package) if config.package else _of_run(config))
    loaded = loaded or Loaded((config.package,) if config.package else ())
    for folder in loaded.packages[1:]:
        versions.switch(load(folder, current=versions.current))
    with ExitStack() as at_the_end:
        at_the_end.callback(versions.close)
        request_log = _request_log(config, link)
        if request_log is not None:
            at_the_end.callback(request_log.close)
        switched = (lambda folder: load(folder, current=versions.current)) if config.package else None
        endpoint = _endpoint(config, versions, switched, link, request_log, at_the_end)
        if loaded.rollout is not None:
            endpoint.restore(loaded.rollout)
        server = _server(config, endpoint, own_ports)
        server.start()
        print(
            f"{endpoint.name}, version {versions.current.name}: gRPC on {config.host}:{server.grpc_port}, HTTP on "
            f"{config.host}:{server.http_port}",
            flush=True,
        )
        if link is not None:
            link.started(Started(server.grpc_port, server.http_port), endpoint.actions, is_told_to_end.set)
        looks = [] if request_log is None else [request_log.look]
        if watched is not None and config.package is not None and (link is None or link.place == 0):
            looks.append(Watch(watched, local_path(loaded.packages[-1]), endpoint.switch).look)
        while not is_told_to_end.wait(_SECONDS_BETWEEN_LOOKS if looks else None):
            for look in looks:
                look()
        server.close(config.seconds_unready)
    print(json.dumps({"service": endpoint.service.counters(), "cache": _cache_counters(versions.current)}))


def _endpoint(
    config: ServeConfig,
    versions: Versions,
    load: Callable[[str], Version] | None,
    link: Link | None,
    request_log: RequestLog | None,
    at_the_end: ExitStack,
) -> Endpoint:
    """What answers, with all that it counts."""
    name = config.name or versions.current.schema.dataset
    service = ScoringService(
        versions,
        config.workers,
        _max_waiting(config),
        config.threads_per_request,
        max_bytes=config.max_waiting_bytes,
        max_together=config.max_together,
    )
    histories = _histories(config, versions, name)
    metrics = Metrics()
    metrics.collect("service", service.counters)
    metrics.collect("cache", lambda: _cache_counters(versions.current))
    metrics.collect("rollout", lambda: _rollout_counters(versions))
    metrics.collect("rollout_cache", lambda: _cache_counters(versions.treatment))
    if histories is not None:
        metrics.collect("histories", histories.counters)
    if request_log is not None:
        metrics.collect("request_log", request_log.counters)
    traces = None
    if config.trace_to is not None:
        traces = _traces(config.trace_to, name)
        at_the_end.callback(traces.close)
    return Endpoint(
        name,
        versions,
        service,
        metrics,
        config.timeout_ms,
        load,
        histories,
        link.all if link else None,
        traces.add if traces else None,
        request_log,
    )


def _server(config: ServeConfig, endpoint: Endpoint, own_ports: tuple[int, int] | None) -> ScoringServer:
    """What listens: on the ports of the config, which are those of all if a process has ports of its own."""
    given = config.grpc_port, config.http_port
    (grpc_port, http_port), shared_ports = (given, (0, 0)) if own_ports is None else (own_ports, given)
    access = Access(
        tokens=_tokens(config.tokens),
        certificate=config.certificate,
        private_key=config.private_key,
        client_ca=config.client_ca,
    )
    return ScoringServer(
        endpoint,
        config.host,
        grpc_port=grpc_port,
        http_port=http_port,
        shared_ports=shared_ports,
        access=access,
        num_threads=config.workers + _max_waiting(config),
        max_bytes=config.max_message_bytes,
    )


def _max_waiting(config: ServeConfig) -> int:
    return config.max_waiting or _WAITING_PER_WORKER * config.workers


def _of_package(
    config: ServeConfig, package: str, mapped: Path | None, current: Version | None = None
) -> VersionOfPackage:
    """A version, by the name of the folder of the package, or of a delta since that of the current one."""
    opener = Opener(mapped, config.trusted_key)
    served, opened = opener.read(package, current.package if isinstance(current, VersionOfPackage) else None).load()
    scorer = AmortizedScorer(served, config.microbatch_size, _cache(config))
    return VersionOfPackage(opened.folder.name, scorer, package=opened)


def _traces(address: str, name: str) -> Traces:
    from torchrec_amort.serving.server.traces import Traces  # noqa: PLC0415 - of the extra `trace`

    return Traces.to(address, name)


def _folder(path: str) -> Path:
    folder = local_path(path)
    if not folder.is_dir():
        raise InputError(f"watch: {folder}: no such folder")
    return folder


def _of_run(config: ServeConfig) -> Version:
    assert config.run_folder is not None
    model, trained, schema = load_model(config.run_folder)
    read = schema.without(trained.model.leave_out)
    scorer = AmortizedScorer(model, config.microbatch_size, _cache(config), schema=read)
    return Version(local_path(config.run_folder).resolve().name, scorer)


def _cache(config: ServeConfig) -> HistoryCache | None:
    return HistoryCache(config.cache_bytes, config.cache_seconds) if config.cache_bytes else None


def _histories(config: ServeConfig, versions: Versions, model: str) -> Histories | None:
    if not config.history_bytes:
        return None
    limits = dict.fromkeys(versions.current.schema.histories, config.history_events)
    local = HistoryStore(versions.current.schema, config.history_bytes, limits, config.cache_seconds)
    return local if config.shared_histories is None else _shared(config, local, model)


def _shared(config: ServeConfig, local: HistoryStore, model: str) -> Histories:
    from torchrec_amort.serving.history_tier import HistoryTier, Plain, Sealed  # noqa: PLC0415 - of the extra `tier`
    from torchrec_amort.serving.shared_histories import SharedHistoryStore  # noqa: PLC0415 - the same

    assert config.shared_histories is not None
    assert config.shared_histories_key is not None
    assert config.cache_seconds is not None
    key = config.shared_histories_key
    sealing = Plain(model) if key == "off" else Sealed.read(model, key)
    tier = HistoryTier(config.shared_histories, local.columns, sealing, config.cache_seconds)
    return SharedHistoryStore(local, tier)


def _request_log(config: ServeConfig, link: Link | None) -> RequestLog | None:
    if config.request_log is None or config.request_log_share is None or config.request_log_days is None:
        return None
    return RequestLog(
        config.request_log,
        config.request_log_share,
        config.request_log_days,
        place=link.place if link else 0,
        num_places=config.num_processes,
    )


def _cache_counters(version: Version | None) -> dict[str, int]:
    cache = None if version is None else version.scorer.cache
    return {} if cache is None else cache.counters()


def _rollout_counters(versions: Versions) -> dict[str, float]:
    rollout = versions.rollout
    if rollout is None:
        return {}
    return {**rollout.counters(), "share": rollout.share, "switched_back": float(rollout.switched_back is not None)}


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
