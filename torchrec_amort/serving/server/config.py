"""How a server is set up."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, UP_TO_ONE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.ops.cores import usable_cores

_LAST_PORT = 2**16 - 1


@dataclass(kw_only=True)
class ServeConfig:
    """Answer requests for scores over gRPC and HTTP, by the Open Inference Protocol, until a signal ends it.

    With SIGTERM it is not ready any more, goes on for `seconds_unready`, answers what came, and ends.

    Args:
        package: what `export` wrote.
        watch: folder of packages: whenever one is there that is newer than `package`, it is switched to.
        trusted_key: PEM file of one Ed25519 public key or several: a package that none of them has signed is refused
            before anything of it is loaded. It is read for each package. Any package is loaded unless given.
        run_folder: or a training run, whose best or last checkpoint answers.
        name: of the model, as clients ask for it; the schema's data set unless given.
        host: that is listened on; this machine alone unless given. Give tokens and TLS with any other.
        grpc_port: of gRPC; any free one if 0.
        http_port: of HTTP; any free one if 0.
        processes: that answer side by side, with one copy of a package's tables. Who connects to `grpc_port` or
            `http_port` gets any of them; each has ports of its own besides, 2, 4, 6 and so on further on. Queues,
            caches and histories are each process' own. As many as there are CPUs unless given; 1 with `cache_bytes`,
            `history_bytes` or a `run_folder`.
        workers: requests that each process scores at the same time. Python runs on one thread at a time: another
            process is faster, as a rule.
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
        request_log: folder that a random share of the scored requests is written to, with users, histories and scores;
            none unless given. It needs `request_log_share` and `request_log_days`.
        request_log_share: of the requests that are written, above 0 and up to 1; each is drawn by itself.
        request_log_days: after which they are removed.
        shared_histories: `redis://HOST:PORT/DATABASE` of a Valkey or Redis that keeps the histories of several servers,
            so that new events may go to any of them.
        shared_histories_key: file of 32 bytes in base64 that they are encrypted with there, or `off`.
        tokens: JSON file of tokens by role, `score` and `admin`; without the token of a role, anybody has it.
        certificate: PEM file of the server's certificate chain, for TLS.
        private_key: PEM file of its key.
        client_ca: PEM file of the authority whose certificates clients have to show.
        trace_to: address of a collector of traces, which takes OTLP over HTTP: needs the extra `trace`.
        seconds_unready: how long it goes on when it is told to end, so that balancers learn of it.
    """

    package: str | None = None
    watch: str | None = None
    trusted_key: str | None = None
    run_folder: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    processes: int | None = None
    workers: int = 1
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
    request_log: str | None = None
    request_log_share: float | None = None
    request_log_days: float | None = None
    shared_histories: str | None = None
    shared_histories_key: str | None = None
    tokens: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    client_ca: str | None = None
    trace_to: str | None = None
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
        refuse_out_of_bounds(
            self,
            {
                AT_LEAST_ONE: (*at_least_one, "max_message_bytes"),
                NOT_NEGATIVE: not_negative,
                POSITIVE: ("request_log_share", "request_log_days"),
                UP_TO_ONE: ("request_log_share",),
            },
        )
        if (self.package is None) == (self.run_folder is None):
            raise InputError("give a package or a run_folder, one of the two")
        self._refuse_other_ports()
        if self.watch is not None and self.package is None:
            raise InputError(f"watch is {self.watch!r}, but a run_folder answers: give a package to begin with")
        if self.trusted_key is not None and self.package is None:
            raise InputError(
                f"trusted_key is {self.trusted_key!r}, but a run_folder answers, and runs are not signed: export it "
                "with signing_key, and give the package"
            )
        of_log = (self.request_log, self.request_log_share, self.request_log_days)
        if None in of_log and of_log != (None, None, None):
            raise InputError(
                f"request_log is {self.request_log!r}, request_log_share {self.request_log_share}, request_log_days "
                f"{self.request_log_days}: requests are personal data: say which share is kept, where and how long, or "
                "give none of the three"
            )
        self._refuse_half_shared()

    @property
    def num_processes(self) -> int:
        """How many processes answer."""
        if self.processes is not None:
            return self.processes
        # What is kept of a user is in one of several processes, and of runs each has tables of its own.
        is_one = self.package is None or self.cache_bytes > 0 or self.history_bytes > 0
        return 1 if is_one else usable_cores()

    def ports_of(self, place: int) -> tuple[int, int]:
        """The ports of one of several processes alone, gRPC's first; free ones where 0 is given."""
        grpc_port, http_port = (port and port + 2 * (place + 1) for port in (self.grpc_port, self.http_port))
        return grpc_port, http_port

    def _refuse_other_ports(self) -> None:
        """Refuse ports that there are not, and those of several processes that meet."""
        furthest = 0 if self.num_processes == 1 else 2 * self.num_processes
        for name, port in (("grpc_port", self.grpc_port), ("http_port", self.http_port)):
            if port and port + furthest > _LAST_PORT:
                raise InputError(
                    f"{name} is {port}, and {port + furthest} is the last one of {self.num_processes} processes, but "
                    f"ports end at {_LAST_PORT}"
                )
        apart = abs(self.grpc_port - self.http_port)
        if self.grpc_port and self.http_port and apart % 2 == 0 and apart <= furthest:
            raise InputError(
                f"grpc_port is {self.grpc_port} and http_port {self.http_port}: each of {self.num_processes} processes "
                "has those that are 2 further on, and they would meet: give an even and an odd one"
            )

    def _refuse_half_shared(self) -> None:
        """Refuse a tier that not all is told of."""
        if (self.shared_histories is None) != (self.shared_histories_key is None):
            raise InputError("shared_histories and shared_histories_key go together: a key's file, or off, is needed")
        if self.shared_histories is not None and (not self.history_bytes or self.cache_seconds is None):
            raise InputError(
                f"history_bytes is {self.history_bytes} and cache_seconds {self.cache_seconds}: with shared_histories "
                "give bytes for what is read of them, and how long they are kept"
            )
