"""Endpoint: what a server does for every protocol.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from torchrec_amort.errors import InputError, place_of
from torchrec_amort.schema import KINDS_OF_LABELS
from torchrec_amort.serving.histories import Histories, TierUnreachable, UnknownHistory
from torchrec_amort.serving.request_log import RequestLog
from torchrec_amort.serving.rollout import Stage
from torchrec_amort.serving.server.access import Unauthenticated
from torchrec_amort.serving.server.call import Call
from torchrec_amort.serving.server.loaded import RolledOut
from torchrec_amort.serving.server.metrics import Metrics
from torchrec_amort.serving.server.tensors import DATATYPE_OF_COLUMN
from torchrec_amort.serving.service import Closed, DeadlineExceeded, Overloaded, ScoringService, Timing
from torchrec_amort.serving.versions import Ahead, Prepared, Requests, Scored, Version, Versions, table_of
from torchrec_amort.stores import local_path

logger = logging.getLogger(__name__)

PLATFORM = "torchrec_amort"
LOGITS, NUM_CANDIDATES = "logits", "num_candidates"
# Of a request: how many milliseconds its scores may take, and which ones go first.
TIMEOUT, PRIORITY = "timeout_ms", "priority"
# Whether its events are all (`whole`) or come after those that are kept (`append`); and whether histories are only
# encoded, before the candidates are known.
HISTORY, ENCODE = "history", "encode"
_WORDS = ("whole", "append")


class Tensor(NamedTuple):
    """What the protocol tells of a tensor; a size of -1 may be any."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class NotHere(LookupError):
    """There is no such model, version or path."""


class Endpoint:
    """A model under a name, its versions, and the queue before them.

    Args:
        name: of the model.
        versions: the ones that answer.
        service: scores by them.
        metrics: what became of requests is told there.
        timeout_ms: of requests that give none, in milliseconds; any time if None.
        load: makes a version of the package in a folder; None if versions stay.
        histories: keeps histories, so that clients need not send them whole; None if they have to.
        everywhere: does one of `actions`, with its arguments, here and in all other processes that answer, and returns
            what each returned; here alone if None.
        trace: called with each call that has ended.
        request_log: writes a share of the requests that are scored into files; none if None.

    Example::

        endpoint = Endpoint("films", versions, ScoringService(versions, num_workers=2, max_waiting=64), Metrics())
        scored = endpoint.submit([request], {"timeout_ms": 50}).result()
    """

    def __init__(
        self,
        name: str,
        versions: Versions,
        service: ScoringService[Scored],
        metrics: Metrics,
        timeout_ms: float | None = None,
        load: Callable[[str], Version] | None = None,
        histories: Histories | None = None,
        everywhere: Callable[..., list[Any]] | None = None,
        trace: Callable[[Call], None] | None = None,
        request_log: RequestLog | None = None,
    ) -> None:
        self.name, self.versions, self.service, self.metrics = name, versions, service, metrics
        self._timeout_ms, self._load, self._histories = timeout_ms, load, histories
        self._request_log = request_log
        self._everywhere = everywhere or (lambda action, *args: [self.actions[action](*args)])
        self._trace = trace
        self._loading = threading.Lock()
        # With its folder: another process may have been asked for another one meanwhile.
        self._prepared: tuple[str, Prepared] | None = None
        self._is_draining = threading.Event()

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return not self._is_draining.is_set()

    @property
    def waits(self) -> bool:
        """Whether `submit` may wait for other servers, so that no event loop may call it."""
        return self._histories is not None and self._histories.is_shared

    def drain(self) -> None:
        """Be not ready from now on, but go on with what comes."""
        self._is_draining.set()

    def refuse_other(self, name: str, version: str = "") -> None:
        """Refuse a model or a version that is not here.

        Raises:
            NotHere: names what is here.
        """
        if name != self.name:
            raise NotHere(f"model {name!r}: is not here: there is {self.name!r}")
        if version and version not in (answering := self.versions.names):
            raise NotHere(f"model {name!r}: version {version!r} does not answer: {answering} do")

    def submit(
        self,
        requests: Requests,
        parameters: Mapping[str, Any],
        *,
        call: Call | None = None,
        seconds_left: float | None = None,
        num_bytes: int = 0,
    ) -> Future[Scored]:
        """Hand in requests that came together.

        Args:
            requests: of the schema of the version that answers.
            parameters: `timeout_ms`, `priority`, `history` and `encode`, those of them that are given.
            call: that they came by, which is told what becomes of them.
            seconds_left: what the protocol itself leaves until no one waits for the scores any more.
            num_bytes: of the message.

        Returns:
            Future: of the scores.

        Raises:
            InputError: a parameter is unknown or not as it should be.
            UnknownHistory: as `HistoryStore.asked`.
            Overloaded: as `ScoringService.submit`.
            DeadlineExceeded: as `ScoringService.submit`.
            Closed: as `ScoringService.submit`.
        """
        deadline = self._deadline(parameters, seconds_left)
        asked, keep = self._with_histories(requests, is_new=parameters.get(HISTORY) == "append")
        log = None
        if self._request_log is not None and not parameters.get(ENCODE):
            log = partial(self._request_log.put, asked, num_bytes=num_bytes)
        if call is not None:
            call.was_read()
        return self.service.submit(
            Ahead(asked) if parameters.get(ENCODE) else asked,
            deadline=deadline,
            priority=int(parameters.get(PRIORITY, 0)),
            num_bytes=num_bytes,
            # Before the answer is out: the next request of the user may follow at once.
            then=partial(self._scored, call=call, keep=keep, log=log),
        )

    def refuse_early(
        self, parameters: Mapping[str, Any], *, seconds_left: float | None = None, num_bytes: int = 0
    ) -> None:
        """Refuse requests as `submit` would now, before they are read.

        Args:
            parameters: see `submit`.
            seconds_left: see `submit`.
            num_bytes: see `submit`.

        Raises:
            InputError: as `submit`.
            Overloaded: as `ScoringService.submit`.
            DeadlineExceeded: as `ScoringService.submit`.
        """
        deadline = self._deadline(parameters, seconds_left)
        self.service.refuse_early(deadline=deadline, priority=int(parameters.get(PRIORITY, 0)), num_bytes=num_bytes)

    def _deadline(self, parameters: Mapping[str, Any], seconds_left: float | None) -> float | None:
        """When no one waits for the scores any more, by the clock of `time.monotonic`."""
        _refuse_parameters(parameters)
        timeout_ms = parameters.get(TIMEOUT, self._timeout_ms)
        left = [s for s in (seconds_left, None if timeout_ms is None else timeout_ms / 1e3) if s is not None]
        return time.monotonic() + min(left) if left else None

    def _with_histories(self, requests: Requests, is_new: bool) -> tuple[Requests, Callable[[], None] | None]:
        """Requests with whole histories, and what keeps those once they are scored."""
        store = self._histories
        if store is None:
            if is_new:
                raise InputError(f"parameter {HISTORY!r}: this server keeps no histories: send them whole")
            return requests, None
        table = table_of(requests, self.versions.current.schema)
        asked = store.asked(table, is_new=is_new)
        return asked.requests if is_new else requests, asked.keep

    def switch(self, folder: str) -> str:
        """Load the package of a folder, and let it answer once it has scored its samples and the latest requests.

        Of several processes all load it, and then all answer by it, or none does. A package that is rolled out is there
        already: it answers everybody then.

        Args:
            folder: on the server's machine.

        Returns:
            str: the name of the version.

        Raises:
            InputError: it cannot be loaded, or as `Versions.switch`; the version that answers goes on.
        """
        with self._loaded_by_all(folder):
            self._everywhere("prepare", folder, None)
            name: str = self._everywhere("commit", folder)[0]
        logger.info("version %s answers", name)
        return name

    def roll_out(self, folder: str, stage: Stage) -> dict[str, Any]:
        """Load the package of a folder, as `switch` does, and let it answer a share of the users.

        A package that is rolled out already goes on to the next stage, and nothing is loaded.

        Args:
            folder: on the server's machine.
            stage: whose requests go where.

        Returns:
            dict: see `rollout`.

        Raises:
            InputError: it cannot be loaded, or as `Versions.prepare`; or another one is being rolled out, or this one
                in another experiment, or it was switched back. All is as it was then.
        """
        with self._loaded_by_all(folder):
            name: str = self._everywhere("prepare", folder, stage)[0]
            self._everywhere("roll_out", RolledOut(folder, name, stage))
        logger.info("version %s is rolled out: experiment %s, share %s", name, stage.experiment, stage.share)
        return self.rollout()

    def roll_back(self) -> str:
        """End a rollout, or let the version before answer again.

        Returns:
            str: the name of the one that answers.

        Raises:
            InputError: there is none before.
        """
        name: str = self._everywhere("roll_back")[0]
        return name

    def rollout(self) -> dict[str, Any]:
        """What is rolled out, whose requests it answers, why it was switched back, and what this process counted.

        Raises:
            NotHere: no version is rolled out.
        """
        rollout = self.versions.rollout
        if rollout is None:
            raise NotHere(f"version {self.versions.current.name!r}: answers everybody: no other one is rolled out")
        return {
            "treatment": rollout.treatment.name,
            "control": rollout.control.name,
            **asdict(rollout.stage),
            "switched_back": rollout.switched_back,
            "counters": rollout.counters(),
        }

    def restore(self, rolled_out: RolledOut) -> None:
        """Roll out in this process what is rolled out in the others.

        Raises:
            InputError: as `roll_out`.
        """
        self._prepare(rolled_out.folder, rolled_out.stage)
        self._roll_out(rolled_out)
        if rolled_out.switched_back is not None:
            self.versions.switch_back(rolled_out.version, rolled_out.switched_back)

    @property
    def actions(self) -> dict[str, Callable[..., Any]]:
        """What has to be done in all processes that answer for the model, by name."""
        return {
            "prepare": self._prepare,
            "commit": self._commit,
            "roll_out": self._roll_out,
            "discard": self._discard,
            "roll_back": lambda: self.versions.roll_back().name,
            "switch_back": self.versions.switch_back,
            "forget": self._forget,
        }

    @contextmanager
    def _loaded_by_all(self, folder: str) -> Iterator[None]:
        """Let one package at a time be loaded; what becomes of it is counted and logged."""
        if self._load is None:
            raise InputError("this server answers by what it was started with: start it with a package to switch")
        if not self._loading.acquire(blocking=False):
            raise InputError(f"{folder}: another version is being loaded: wait until it answers")
        try:
            yield
        except Exception as error:
            self.metrics.switched("refused")
            logger.error("%s does not answer: %s", folder, place_of(error))
            raise
        finally:
            self._loading.release()
        self.metrics.switched("ok")

    def _prepare(self, folder: str, stage: Stage | None) -> str:
        """Load a version, unless it is the one that is rolled out."""
        assert self._load is not None
        rollout = self.versions.rollout
        if rollout is not None:
            rollout.refuse_other(_name_of(folder), stage)
            return rollout.treatment.name
        prepared = self.versions.prepare(self._load(folder))
        self._prepared = folder, prepared
        return prepared.version.name

    def _commit(self, folder: str) -> str:
        if self._is_rolled_out(_name_of(folder)):
            return self.versions.complete().name
        prepared = self._taken(folder)
        self.versions.commit(prepared)
        return prepared.version.name

    def _roll_out(self, rolled_out: RolledOut) -> None:
        if self._is_rolled_out(rolled_out.version):
            self.versions.go_on(rolled_out.stage)
        else:
            self.versions.roll_out(self._taken(rolled_out.folder), rolled_out.stage, self._switched_back)

    def _is_rolled_out(self, version: str) -> bool:
        rollout = self.versions.rollout
        return rollout is not None and rollout.treatment.name == version

    def _taken(self, folder: str) -> Prepared:
        (loaded, prepared), self._prepared = self._prepared or (None, None), None
        if prepared is None or loaded != folder:
            raise InputError(f"{folder}: is not loaded: switch once more")
        return prepared

    def _discard(self) -> None:
        self._prepared = None

    def _switched_back(self, version: str, reason: str) -> None:
        """Switch back in all other processes, too, where this one has found a fault."""
        # By a thread of its own: another process may be waiting for this one to score what came.
        threading.Thread(target=self._switch_back_all, args=(version, reason), name="switch-back", daemon=True).start()

    def _switch_back_all(self, version: str, reason: str) -> None:
        try:
            self._everywhere("switch_back", version, reason)
        except Exception as error:  # noqa: BLE001 - it is nobody's who asked
            logger.error("version %s is switched back in this process alone: %s", version, place_of(error))

    @contextmanager
    def call(self, protocol: str, headers: Mapping[str, str]) -> Iterator[Call]:
        """Time and count a call, which is answered within, by what becomes of it.

        Args:
            protocol: by which it came.
            headers: that came with it.
        """
        call = Call(protocol, headers)
        try:
            yield call
        except BaseException as error:
            call.result = failure_of(error).kind
            raise
        finally:
            call.end()
            self.metrics.ended(call)
            if self._trace is not None:
                self._trace(call)

    def forget(self, user: int) -> bool:
        """Remove every trace of a user; what came before is scored first, so that it leaves none either.

        Args:
            user: whom to forget.

        Returns:
            bool: whether there was anything.

        Raises:
            TierUnreachable: a shared tier does not answer. The user is forgotten on this server alone.
        """
        return any(self._everywhere("forget", user))

    def _forget(self, user: int) -> bool:
        self.service.drain()
        try:
            found = self._histories is not None and self._histories.forget(user)
        finally:
            # After the histories: what is encoded of them until then is forgotten, too.
            is_elsewhere = self._forget_but_histories(user)
        return is_elsewhere or found

    def _forget_but_histories(self, user: int) -> bool:
        found = self.versions.forget(user)
        # The last one, since a disk can fail.
        return (self._request_log is not None and self._request_log.forget(user)) or found

    def _scored(
        self,
        scored: Scored,
        timing: Timing,
        call: Call | None,
        keep: Callable[[], None] | None,
        log: Callable[..., None] | None,
    ) -> None:
        num_candidates = sum(scored.num_candidates)
        self.metrics.scored(set(scored.versions), num_candidates)
        if call is not None:
            call.was_scored(scored.version, num_candidates, timing)
        if keep is not None:
            keep()
        if log is not None:
            log(scored=scored, schema=self.versions.current.schema)

    def metadata(self) -> dict[str, Any]:
        """What the protocol tells of the model: tensors of lists may have their lengths beside them."""
        inputs, outputs = ([tensor._asdict() for tensor in tensors] for tensors in (self._inputs(), self._outputs()))
        return {
            "name": self.name,
            "versions": self.versions.names,
            "platform": PLATFORM,
            "inputs": inputs,
            "outputs": outputs,
        }

    def _inputs(self) -> Sequence[Tensor]:
        schema = self.versions.current.schema
        unread = {"request_id", *(feature.source for feature in schema.of("candidate", *KINDS_OF_LABELS))}
        fields = [field for field in schema.arrow_schema() if field.name not in unread]
        return [Tensor(field.name, *_described(field.type)) for field in fields]

    def _outputs(self) -> Sequence[Tensor]:
        num_tasks = len(self.versions.current.schema.labels)
        return [Tensor(LOGITS, "FP32", (-1, num_tasks)), Tensor(NUM_CANDIDATES, "INT64", (-1,))]


def _name_of(folder: str) -> str:
    """The name of the version in a folder."""
    return local_path(folder).resolve().name


def _refuse_parameters(parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if name in (TIMEOUT, PRIORITY):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            expected = None if is_number and abs(value) < 2**53 else "a number"
        elif name == HISTORY:
            expected = None if value in _WORDS else f"one of {list(_WORDS)}"
        elif name == ENCODE:
            expected = None if isinstance(value, bool) else "true or false"
        else:
            known = [TIMEOUT, PRIORITY, HISTORY, ENCODE]
            raise InputError(f"parameter {name!r}: is unknown: there are {known}")
        if expected is not None:
            raise InputError(f"parameter {name!r}: is {value!r}, not {expected}")


def _described(kind: pa.DataType) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of a column."""
    if pa.types.is_list(kind):
        datatype, shape = _described(kind.value_type)
        return datatype, (-1, *shape)
    return DATATYPE_OF_COLUMN[kind], (-1,)


@dataclass(frozen=True, eq=False)
class Answer:
    """What protocols send of scores.

    Args:
        version: the one that scored.
        tensors: by name, numpy arrays: `logits` [C, T] and `num_candidates` [B].
    """

    version: str
    tensors: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scored: Scored, wanted: Sequence[str]) -> Answer:
        """An answer.

        Args:
            scored: the scores.
            wanted: names of the tensors that it has; all of them if none is named.

        Raises:
            InputError: there is no such tensor.
        """
        counts = np.asarray(scored.num_candidates, np.int64)
        tensors: dict[str, np.ndarray] = {LOGITS: scored.logits_CT.numpy().astype(np.float32), NUM_CANDIDATES: counts}
        if other := [name for name in wanted if name not in tensors]:
            raise InputError(f"output {other[0]!r}: is unknown: there are {list(tensors)}")
        return cls(scored.version, {name: tensors[name] for name in wanted or list(tensors)})


class Failure(NamedTuple):
    """How protocols tell an error.

    Args:
        grpc: name of the status code.
        http: status.
        kind: a word for counters and logs, which must not have what a request has.
    """

    grpc: str
    http: int
    kind: str


FAULT = Failure("INTERNAL", 500, "fault")
_FAILURES: list[tuple[type[BaseException], Failure]] = [
    (InputError, Failure("INVALID_ARGUMENT", 400, "bad_input")),
    (NotHere, Failure("NOT_FOUND", 404, "not_here")),
    (UnknownHistory, Failure("FAILED_PRECONDITION", 409, "unknown_history")),
    (TierUnreachable, Failure("UNAVAILABLE", 503, "tier_unreachable")),
    (Unauthenticated, Failure("UNAUTHENTICATED", 401, "unauthenticated")),
    (Overloaded, Failure("RESOURCE_EXHAUSTED", 429, "overloaded")),
    (DeadlineExceeded, Failure("DEADLINE_EXCEEDED", 504, "deadline")),
    (Closed, Failure("UNAVAILABLE", 503, "closed")),
    (CancelledError, Failure("CANCELLED", 499, "cancelled")),
    (FloatingPointError, Failure("INTERNAL", 500, "not_finite")),
]


def failure_of(error: BaseException) -> Failure:
    """How an error is told.

    Example::

        failure_of(InputError("film: has id 70")).http  # 400
    """
    return next((failure for kind, failure in _FAILURES if isinstance(error, kind)), FAULT)


def told(error: BaseException) -> str:
    """What a caller may read of an error; of a fault of the server's own, where it is, which is logged, too."""
    if failure_of(error) is not FAULT:
        return str(error)
    logger.error("a call raised %s", place_of(error))
    return f"a fault of the server: {place_of(error)}"
