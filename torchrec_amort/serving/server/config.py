"""How a server is set up."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.errors import InputError


@dataclass(kw_only=True)
class ServeConfig:
    """Answer requests for scores over gRPC and HTTP, by the Open Inference Protocol, until a signal ends it.

    With SIGTERM it is not ready any more, goes on for `seconds_unready`, answers what came, and ends.

    Args:
        package: what `export` wrote.
        watch: folder of packages: whenever one is there that is newer than `package`, it is switched to.
        run_folder: or a training run, whose best or last checkpoint answers.
        name: of the model, as clients ask for it; the schema's data set unless given.
        host: that is listened on; this machine alone unless given. Give tokens and TLS with any other.
        grpc_port: of gRPC; any free one if 0.
        http_port: of HTTP; any free one if 0.
        processes: that answer side by side, with one copy of a package's tables: the first listens on `grpc_port` and
            `http_port`, each other on those after the one before. Give clients all of them, so that a user's requests
            go to one. Queues, caches and histories are each process' own.
        workers: requests that each process scores at the same time; as many as there are CPUs for it unless given.
        threads_per_request: CPU threads of each.
        max_together: requests that wait which a worker scores together; their scores are the same, to rounding.
        microbatch_size: candidates that are scored at a time; all at once unless given.
        max_waiting: requests that may wait for a worker; more are refused. Sixteen for each worker unless given.
        max_waiting_bytes: what those may have together.
        max_message_bytes: of one message; larger ones are refused.
        timeout_ms: of requests that give none, in milliseconds; any time unless given.
        cache_bytes: of encoded histories, which are kept from one request of a user to the next; none if 0.
        cache_seconds: how long they, and histories, are kept; without limit unless given.
        history_bytes: of histories, which are kept so that clients need send new events alone; none if 0.
        history_events: of each history that are kept, the latest ones.
        shared_histories: `redis://HOST:PORT/DATABASE` of a Valkey or Redis that keeps the histories of several servers,
            so that new events may go to any of them.
        shared_histories_key: file of 32 bytes in base64 that they are encrypted with there, or `off`.
        tokens: JSON file of tokens by role, `score` and `admin`; without the token of a role, anybody has it.
        certificate: PEM file of the server's certificate chain, for TLS.
        private_key: PEM file of its key.
        client_ca: PEM file of the authority whose certificates clients have to show.
        seconds_unready: how long it goes on when it is told to end, so that balancers learn of it.
    """

    package: str | None = None
    watch: str | None = None
    run_folder: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    processes: int = 1
    workers: int | None = None
    threads_per_request: int = 1
    max_together: int = 8
    microbatch_size: int | None = None
    max_waiting: int | None = None
    max_waiting_bytes: int = 2**26
    max_message_bytes: int = 2**24
    timeout_ms: float | None = None
    cache_bytes: int = 0
    cache_seconds: float | None = None
    history_bytes: int = 0
    history_events: int = 1000
    shared_histories: str | None = None
    shared_histories_key: str | None = None
    tokens: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    client_ca: str | None = None
    seconds_unready: float = 0.0

    def __post_init__(self) -> None:
        at_least_one = (
            "processes",
            "workers",
            "threads_per_request",
            "max_together",
            "microbatch_size",
            "max_waiting",
            "max_waiting_bytes",
            "history_events",
        )
        not_negative = ("grpc_port", "http_port", "cache_bytes", "history_bytes", "seconds_unready")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: (*at_least_one, "max_message_bytes"), NOT_NEGATIVE: not_negative})
        if (self.package is None) == (self.run_folder is None):
            raise InputError("give a package or a run_folder, one of the two")
        if self.watch is not None and self.package is None:
            raise InputError(f"watch is {self.watch!r}, but a run_folder answers: give a package to begin with")
        self._refuse_half_shared()

    def _refuse_half_shared(self) -> None:
        """Refuse a tier that not all is told of."""
        if (self.shared_histories is None) != (self.shared_histories_key is None):
            raise InputError("shared_histories and shared_histories_key go together: a key's file, or off, is needed")
        if self.shared_histories is not None and (not self.history_bytes or self.cache_seconds is None):
            raise InputError(
                f"history_bytes is {self.history_bytes} and cache_seconds {self.cache_seconds}: with shared_histories "
                "give bytes for what is read of them, and how long they are kept"
            )
