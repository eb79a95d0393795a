"""AmortizedScorer: the serving path of any ranker.

Shape suffixes: B requests; C candidates, all requests together; N history events; E features of an event; F slots;
D embedding dimension; T tasks.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from torchrec_amort.batch import (
    RequestBatch,
    refuse_missing_features,
    refuse_other_dtypes,
    refuse_unequal_events,
    refuse_weights,
)
from torchrec_amort.errors import InputError
from torchrec_amort.lists import Entries, Lists, shortest
from torchrec_amort.models.ranker import Call
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.ahead import with_a_candidate
from torchrec_amort.serving.cache import CachedHistory, HistoryCache
from torchrec_amort.serving.phases import Backend, RequestTerms
from torchrec_amort.serving.served import Served, serve

logger = logging.getLogger(__name__)

WhenLonger = Literal["keep_latest", "refuse"]


class AmortizedScorer:
    """Scores requests as its model does, each history encoded once, and all of a request's own work done once.

    Its scores are the model's, to rounding, however candidates are put together, cut into micro-batches or served
    from a cache. It takes the dense weights of the moment that it is made, and reads the model's tables where they are:
    to serve newer weights, make a new scorer, with a new cache. It runs in inference mode; any number of threads may
    call it.

    Args:
        model: a ranker, or a model that is built on an `AmortizedEmbeddingBagCollection`, not sharded, with amortizable
            encoders or none; or what `load_package` returned.
        microbatch_size: candidates that are scored at a time, so that memory does not grow with their number; all at
            once if None (M-FALCON's micro-batches: Zhai et al., arXiv 2402.17152, section 3.4).
        cache: keeps encoded histories from one request of a user to the next, for batches with `users`. It belongs to
            this scorer.
        call: how a model that is no ranker is called; see `ModelRanker`.
        schema: of requests that are given as a table or mappings; not needed for batches. A package has its own.
        dtype: of encoders, states and native heads, `torch.float32` or `torch.bfloat16`; tables, and what PyTorch runs
            of a model after them, stay as they are.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.
        history_length: events that a history may have; the model's own limit unless given.
        when_longer: what to do with a longer history: `keep_latest` events, or `refuse` it.
        validate: check every batch; without, a malformed one may crash the process. Tables and mappings are checked in
            any case, as they are read.

    Raises:
        ValueError: the model or an option does not fit; the cache is another scorer's.
        InputError: the schema lacks a feature that the model reads, or has another table size for it.

    Example::

        scorer = AmortizedScorer(model, microbatch_size=512, cache=HistoryCache(max_bytes=2**30))
        scorer.warm_up(batch)
        logits_CT = scorer.score(batch)
    """

    def __init__(
        self,
        model: nn.Module | Served,
        microbatch_size: int | None = None,
        cache: HistoryCache | None = None,
        *,
        call: Call | None = None,
        schema: RequestSchema | None = None,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
        history_length: int | None = None,
        when_longer: WhenLonger = "keep_latest",
        validate: bool = True,
    ) -> None:
        if microbatch_size is not None and microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}, not 1 or more")
        self.microbatch_size = microbatch_size
        self.when_longer = when_longer
        self.validate = validate
        for name, value, known in (("backend", backend, Backend), ("when_longer", when_longer, WhenLonger)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(get_args(known))}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, not torch.float32 or torch.bfloat16")
        if isinstance(model, Served):
            if dtype != torch.float32 or backend != "auto" or call is not None:
                raise ValueError("a package is of the dtype, backend and call that it was exported with: give none")
            self._served = model
        else:
            self._served = serve(model, dtype, backend, call)
        lookups = self._served.lookups
        self._features, self._table_sizes, self._events = lookups.features, lookups.table_sizes, lookups.events
        self._is_weighted = {field: bags.is_weighted for field, bags in lookups.bags.items()}
        self._limits = dict(self._served.history_lengths)
        for tower, limit in self._limits.items():
            if history_length is not None and limit is not None and history_length > limit:
                raise ValueError(f"history_length is {history_length}, but the model knows places for {limit} events")
            self._limits[tower] = limit if history_length is None else history_length
        self.history_length = shortest(self._limits.values())
        self.schema = schema or self._served.schema
        if self.schema is not None:
            self._refuse_other_schema(self.schema)
        self.cache = cache
        self._hash_key = secrets.token_bytes(16)
        if cache is not None:
            if not self._events:
                raise ValueError("the model reads no history: it needs no cache")
            cache.bind(self)

    def score(self, requests: RequestBatch | pa.Table | Iterable[Mapping[str, Any]]) -> Tensor:
        """Score every candidate of every request.

        Args:
            requests: B requests with C candidates, of any lengths, on any device, which are left as they are; or a
                table with one row per request, as `RequestBatch.from_arrow` reads it; or one mapping per request, as
                `RequestBatch.from_requests` reads them.

        Returns:
            Tensor: logits [C, T], the candidates in the order of the requests, on the model's device.

        Raises:
            InputError: there is no request, or one is malformed, has an id outside its table or, if that is to be
                refused, too long a history; its ids have weights where the model's bags have none, or none where they
                have some; or a cache is to be used and the batch does not tell `users`.
            FloatingPointError: a score is not finite.

        Example::

            probabilities_CT = torch.sigmoid(scorer.score(batch))
        """
        with torch.inference_mode():
            return self._score(self._batch(requests), self.cache)

    def score_impressions(
        self, requests: RequestBatch | pa.Table | Iterable[Mapping[str, Any]], microbatch_size: int = 64
    ) -> Tensor:
        """Score every candidate as a request of its own, without the cache: the reference of a rollout of a package.

        It finds candidates and requests that read each other, and a wrong cache, but no fault that one candidate alone
        has, too. Where the model is there, `score_impressions` of that finds those.

        Args:
            requests: see `score`.
            microbatch_size: impressions that are scored at a time, so that memory does not grow with their number.

        Returns:
            Tensor: logits [C, T], as `score` returns them.

        Raises:
            InputError: see `score`.
            FloatingPointError: see `score`.

        Example::

            difference = (scorer.score(batch) - scorer.score_impressions(batch)).abs().max()
        """
        with torch.inference_mode():
            return by_impressions(partial(self._score, cache=None), self._batch(requests), microbatch_size)

    def encode(self, requests: pa.Table | Iterable[Mapping[str, Any]]) -> None:
        """Encode the histories of requests for the cache, before their candidates are known.

        Args:
            requests: as for `score`, without any column of candidates.

        Raises:
            ValueError: the scorer has no cache.
            InputError: as `score`.

        Example::

            AmortizedScorer(model, cache=HistoryCache(max_bytes=2**20), schema=schema).encode(
                [{"user": 7, "user_id": 7, "history_item": [3, 4]}]
            )
        """
        if self.cache is None or self.schema is None:
            raise ValueError("the scorer has no cache, or no schema: there is nowhere to keep what it encodes")
        with torch.inference_mode():
            batch = self._batch(with_a_candidate(requests, self.schema))
            terms = self._served.request(batch)
            for tower in self._events:
                self._states(batch, terms, tower, self.cache)

    def warm_up(self, requests: RequestBatch | pa.Table | Iterable[Mapping[str, Any]], times: int = 3) -> None:
        """Score some requests, so that the first real one does not wait for memory, threads or compilation.

        The cache is left as it is.

        Args:
            requests: of the usual sizes.
            times: how often.

        Example::

            scorer.warm_up(batch)
        """
        with torch.inference_mode():
            batch = self._batch(requests)
            for _ in range(times):
                self._score(batch, None)

    def _batch(self, requests: RequestBatch | pa.Table | Iterable[Mapping[str, Any]]) -> RequestBatch:
        batch = requests.shallow_copy() if isinstance(requests, RequestBatch) else self._read(requests)
        if not len(batch):
            raise InputError("requests: there is none: a batch needs at least 1 request")
        if self.validate:
            refuse_missing_features(batch, self._features)
        if self.validate and isinstance(requests, RequestBatch):
            batch.validate(self._table_sizes)
            refuse_unequal_events(batch, self._events)
            refuse_other_dtypes(batch)
        # Not only when batches are checked: weights that are left out crash nothing.
        for field, is_weighted in self._is_weighted.items():
            refuse_weights(field, getattr(batch, field), is_weighted)
        if batch.num_candidates.device != self._served.device:
            # Where keys begin is asked of the host while the ids are there.
            for ids in (batch.request_sparse, batch.candidate_sparse, batch.sequences):
                ids.offset_per_key()
            batch = batch.to(self._served.device)
        return self._limit(batch)

    def _read(self, requests: pa.Table | Iterable[Mapping[str, Any]]) -> RequestBatch:
        """A batch that is checked as it is read, by the sizes of the schema, which are the model's."""
        if isinstance(requests, pa.Table):
            if self.schema is None:
                raise InputError("requests are given as a table: give the scorer the schema that it follows")
            return RequestBatch.from_arrow(requests, self.schema)
        if self.schema is None:
            raise InputError("requests are given as mappings: give the scorer the schema that they follow")
        return RequestBatch.from_requests(requests, self.schema)

    def _refuse_other_schema(self, schema: RequestSchema) -> None:
        for feature, size in self._table_sizes.items():
            if schema.table_sizes.get(feature) != size:
                raise InputError(
                    f"schema {schema.dataset!r}: {feature} has {schema.table_sizes.get(feature)} rows, but the model's "
                    f"table for it has {size}: the model was made for other requests"
                )

    def _limit(self, batch: RequestBatch) -> RequestBatch:
        if self.history_length is None:
            return batch
        lists = batch.request_lists
        for tower, features in self._events.items():
            lengths_B, limit = lists.num_entries(features[0]), self._limits[tower]
            if lengths_B is not None and limit is not None and int(lengths_B.max()) > limit:
                self._refuse_longer(lengths_B, limit)
                return batch.keep_latest(lists.layout.limits(self._events, self._limits))
        return batch

    def _refuse_longer(self, lengths_B: Tensor, limit: int) -> None:
        if self.when_longer == "refuse":
            request = int((lengths_B > limit).nonzero()[0])
            raise InputError(
                f"batch: request {request}: a history of {int(lengths_B[request])} events, but the limit is {limit}: "
                f"send the latest {limit}, or let the scorer keep_latest"
            )

    def _score(self, batch: RequestBatch, cache: HistoryCache | None) -> Tensor:
        # Native code and packages are of the dtype that they were made with.
        with torch.autocast(self._served.device.type, enabled=False):
            logits_CT = self._logits(batch, cache)
        # The sum of what is not finite is not finite, either; the sum of numbers nearly always is.
        if not math.isfinite(float(logits_CT.sum())) and not torch.isfinite(logits_CT).all():
            candidate = int((~torch.isfinite(logits_CT)).any(1).nonzero()[0])
            raise FloatingPointError(
                f"candidate {candidate} of the batch: the model's logits are {logits_CT[candidate].tolist()}, not "
                "finite: look for weights that are not"
            )
        return logits_CT

    def _logits(self, batch: RequestBatch, cache: HistoryCache | None) -> Tensor:
        terms = self._served.request(batch)
        histories = {tower: self._states(batch, terms, tower, cache) for tower in self._events}
        parts = (self._served.score(terms, histories, part) for part in self._microbatches(batch))
        return _put_together(parts, batch.candidate_dense.shape[0])

    def _states(
        self, batch: RequestBatch, terms: RequestTerms, tower: str, cache: HistoryCache | None
    ) -> list[HistoryState]:
        """States of one of the histories of all requests."""
        if cache is None:
            return [self._served.encode(terms, tower, self._entries(batch.request_lists, tower))]
        if batch.users is None:
            raise InputError("batch: users is None: a cache needs to know whose histories they are")
        lists = batch.request_lists
        # What histories consist of is read on the host: a GPU is waited for once, not once for each of them.
        on_host = lists if batch.users.device.type == "cpu" else batch.to(torch.device("cpu")).request_lists
        return [
            self._state(lists, on_host, terms, row, user, tower, cache) for row, user in enumerate(batch.users.tolist())
        ]

    def _entries(self, lists: Lists, tower: str, start: int = 0, stop: int | None = None) -> dict[str, Entries]:
        """What the events of some requests have, feature by feature."""
        return {name: lists.entries(name, start, stop) for name in self._events[tower]}

    def _state(
        self, lists: Lists, on_host: Lists, terms: RequestTerms, row: int, user: int, tower: str, cache: HistoryCache
    ) -> HistoryState:
        """One request's state: from the cache, or extended or encoded and then put there."""
        history = _History(self._entries(on_host, tower, row, row + 1), self._hash_key)
        epoch, is_extendable = cache.epoch, self._served.phases.is_extendable(tower)
        cached = cache.find(user, history.num_events, history.version, extendable=is_extendable, tower=tower)
        if cached is not None and cached.num_events == history.num_events:
            return cached.state
        events = self._entries(lists, tower, row, row + 1)
        if cached is not None:
            new = {name: of_feature.after(cached.num_events) for name, of_feature in events.items()}
            state = self._served.extend(terms, tower, cached.state, new)
        else:
            state = self._served.encode(terms, tower, events)
        version = history.version(history.num_events)
        cache.put(user, CachedHistory(version, history.num_events, state), epoch=epoch, tower=tower)
        return state

    def _microbatches(self, batch: RequestBatch) -> Iterator[RequestBatch]:
        num_candidates = batch.stride()
        size = self.microbatch_size or num_candidates
        if size >= num_candidates:
            yield batch
            return
        for start in range(0, num_candidates, size):
            yield batch.part(start, min(num_candidates, start + size))


def by_impressions(score: Callable[[RequestBatch], Tensor], batch: RequestBatch, microbatch_size: int) -> Tensor:
    """Logits [C, T] of candidates that are scored as requests of their own, some at a time.

    Args:
        score: gives the logits of a batch.
        batch: C candidates.
        microbatch_size: candidates that are scored at a time.
    """
    impressions = batch.to_impressions()
    rows_C = torch.arange(len(impressions), device=impressions.num_candidates.device)
    return torch.cat([score(impressions.select(part)) for part in rows_C.split(microbatch_size)])


def _put_together(parts: Iterator[Tensor], num_rows: int) -> Tensor:
    """Rows of several tensors in one, each copied before the next is made: kept apart, they would scatter memory."""
    first = next(parts)
    if first.shape[0] == num_rows:
        return first
    rows = first.new_empty(num_rows, *first.shape[1:])
    stop = 0
    for part in itertools.chain([first], parts):
        rows[stop : stop + part.shape[0]] = part
        stop += part.shape[0]
    return rows


class _History:
    """The history of one request: what each feature of its events has."""

    def __init__(self, entries: Mapping[str, Entries], hash_key: bytes) -> None:
        self._hash_key = hash_key
        self.num_events = int(next(iter(entries.values())).lengths.sum())
        fixed = [of_feature.values for of_feature in entries.values() if of_feature.num_ids is None]
        # What all features have of an event, together.
        none = np.empty((self.num_events, 0), np.uint8)
        self._bytes = np.concatenate([none, *(_bytes_of(values, self.num_events) for values in fixed)], axis=1)
        self._lists = [
            (_bytes_of(of_feature.num_ids, self.num_events), of_feature)
            for of_feature in entries.values()
            if of_feature.num_ids is not None
        ]

    def version(self, num_events: int) -> bytes:
        """A digest of the first so many events: another history has another one."""
        digest = hashlib.blake2b(self._bytes[:num_events].tobytes(), digest_size=16, key=self._hash_key)
        for numbers, of_feature in self._lists:
            digest.update(numbers[:num_events].tobytes())
            assert of_feature.num_ids is not None
            num_ids = int(of_feature.num_ids[:num_events].sum())
            digest.update(of_feature.values[:num_ids].long().numpy().tobytes())
        return digest.digest()


def _bytes_of(values: Tensor, num_rows: int) -> np.ndarray:
    """uint8 [rows, bytes of each]."""
    array = (values if values.is_floating_point() else values.long()).contiguous().numpy()
    return array.reshape(num_rows, -1).view(np.uint8) if num_rows else np.empty((0, 0), np.uint8)
