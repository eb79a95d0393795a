"""All of a model but its lookups, in two phases: its own modules, with native code where that computes their function.

Shape suffixes: B requests; C candidates, all requests together; N events, all requests together; D width of an
encoder; S vectors that a tower makes of a candidate; W width of a bag; T tasks.
"""

from __future__ import annotations

import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows
from torchrec_amort.models.ranker import CollectionRanker
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, amortizable
from torchrec_amort.modules.events import EventEncoder, recency
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.plain import Plain, why_patched
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.serving.heads import Dlrm, Head, dlrm_of, why_no_kernel
from torchrec_amort.serving.lookup import Embeddings, bags_of
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native

logger = logging.getLogger(__name__)

Backend = Literal["auto", "native", "eager", "compiled"]
Histories = Mapping[str, Sequence[HistoryState]]

_BARE = Plain(nn.Identity)
_PLAIN_EVENTS = Plain(EventEncoder, nn.Embedding, nn.Dropout)


@dataclass(frozen=True, eq=False)
class RequestTerms:
    """What phase one gives but histories.

    Args:
        tensors: with one row of B per request each.
        head: that takes them; None if the model's own modules do.
    """

    tensors: tuple[Tensor, ...]
    head: Head | None = None


class Phases(ABC):
    """All of a model but its lookups, in two phases."""

    @abstractmethod
    def request(self, batch: RequestBatch, bags: Embeddings) -> RequestTerms:
        """Phase one of all but histories.

        Args:
            batch: B requests with C candidates, of which only the number is read.
            bags: of the requests.

        Raises:
            InputError: the batch has other dense inputs than the model reads, as far as that is known.
        """

    @abstractmethod
    def encode(self, terms: RequestTerms, tower: str, events: Embeddings, lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories.

        Args:
            terms: what `request` gave for these requests and maybe others.
            tower: its name.
            events: what each of its features has, a row for each event.
            lengths_B: int64 [B], events of each history.
        """

    @abstractmethod
    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since."""

    def extend(
        self, terms: RequestTerms, tower: str, state: HistoryState, events: Embeddings, lengths_B: Tensor
    ) -> HistoryState:
        """Phase one of the events since, where states are extendable."""
        raise ValueError(f"the states of {tower!r} cannot be extended: encode the whole history again")

    @abstractmethod
    def score(
        self,
        terms: RequestTerms,
        histories: Histories,
        batch: RequestBatch,
        bags: Embeddings,
        items: Mapping[str, Embeddings],
    ) -> Tensor:
        """Phase two.

        Args:
            terms: what `request` gave for the batch's requests.
            histories: states of each tower, of B requests together.
            batch: of the requests with C candidates, all or some; a request may have none.
            bags: of the candidates.
            items: of each tower, what each of its candidates' features has.

        Returns:
            Tensor: logits [C, T], float32 at least.
        """


class RankerPhases(Phases):
    """The phases of a ranker in this process.

    Args:
        ranker: in eval mode and not changed afterwards; so are its towers.
        collection: the one of the ranker.
        dtype: of encoders, states and what native code does after them.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.

    Raises:
        ValueError: a tower cannot be served, or native code is asked for and cannot.
    """

    def __init__(
        self,
        ranker: CollectionRanker,
        collection: AmortizedEmbeddingBagCollection,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        self._bags, self._dtype = collection.bags, dtype
        self.fits = collection.bags.fits
        self.request_bags, self.candidate_bags = (bags_of(collection, side) for side in ("request", "candidate"))
        may_be_native = backend in ("auto", "native")
        self.towers = {tower.name: ServedTower(tower, dtype, may_be_native) for tower in collection.towers}
        known = dlrm_of(ranker, collection)
        why_no_head = known if isinstance(known, str) else why_no_kernel(known, dtype)
        # What it reads is known, whatever computes it.
        self._known = known if isinstance(known, Dlrm) else None
        self._dlrm = self._known if may_be_native and why_no_head is None else None
        not_native = [f"encoder: {tower.not_native}" for tower in self.towers.values() if tower.not_native is not None]
        not_native += [f"head: {why_no_head}"] if why_no_head is not None else []
        self._refuse_or_tell(not_native, backend)
        self._heads: dict[int, Head] = {}
        # The tower whose vector is the last slot, if heads can make it as well.
        last = next(reversed(self.towers), None)
        self._fusable = last if last is not None and self.towers[last].fusable is not None else None
        self._lock = threading.Lock()
        self.ranker = ranker
        self._score_rows = ranker.score_rows
        if backend == "compiled":
            self._score_rows = torch.compile(self._score_rows, dynamic=True)
            for tower in self.towers.values():
                tower.compile()

    @staticmethod
    def _refuse_or_tell(not_native: Sequence[str], backend: Backend) -> None:
        if backend == "native" and not_native:
            raise ValueError(f"no native {not_native[0]}; backend 'auto' leaves to PyTorch what it cannot do")
        for reason in not_native if backend == "auto" else ():
            logger.info("PyTorch serves what native code cannot: %s", reason)

    def head(self, num_request_dense: int) -> Head | None:
        """What computes the model's function after lookups and towers in native code; None if it cannot.

        Args:
            num_request_dense: dense inputs of a request.
        """
        if self._dlrm is None:
            return None
        with self._lock:
            if num_request_dense not in self._heads:
                encoder = None if self._fusable is None else self.towers[self._fusable].fusable
                self._heads[num_request_dense] = self._dlrm.head(num_request_dense, encoder, self._dtype)
            return self._heads[num_request_dense]

    def request(self, batch: RequestBatch, bags: Embeddings) -> RequestTerms:
        """Phase one of all but histories; see `Phases.request`."""
        if self._known is not None:
            self._known.refuse_other_dense(batch)
        head = self.head(batch.request_dense.shape[1])
        if head is not None and head.is_cheaper(len(batch), batch.stride()):
            return RequestTerms(head.request(batch.request_dense, self.fitted(bags)), head)
        return RequestTerms(tuple(rows.tensor() for rows in bags.values()))

    def fitted(self, bags: Embeddings) -> Embeddings:
        """Bags of the width that the model gets."""
        fits = {name: fit for name in bags if (fit := self._bags.fit(name)) is not None}
        return {name: EmbeddingRows(fits[name](rows.tensor())) if name in fits else rows for name, rows in bags.items()}

    def encode(self, terms: RequestTerms, tower: str, events: Embeddings, lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories; see `Phases.encode`."""
        return self.towers[tower].encode(events, lengths_B, beside_pytorch=terms.head is None)

    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since."""
        return self.towers[tower].is_extendable

    def extend(
        self, terms: RequestTerms, tower: str, state: HistoryState, events: Embeddings, lengths_B: Tensor
    ) -> HistoryState:
        """Phase one of the events since."""
        return self.towers[tower].extend(state, events, lengths_B, beside_pytorch=terms.head is None)

    def score(
        self,
        terms: RequestTerms,
        histories: Histories,
        batch: RequestBatch,
        bags: Embeddings,
        items: Mapping[str, Embeddings],
    ) -> Tensor:
        """Phase two; see `Phases.score`."""
        bags, head, counts_B = self.fitted(bags), terms.head, batch.num_candidates
        fused = self._fusable if head is not None else None
        apart = [name for name in self.towers if name != fused]
        vectors = {
            name: self.towers[name].vectors(histories[name], items[name], counts_B, beside_pytorch=head is None)
            for name in apart
        }
        if head is not None:
            rows = dict(bags)
            for name, of_tower in vectors.items():
                named = zip(self.towers[name].bags, of_tower, strict=True)
                rows |= {bag: EmbeddingRows(vector_CW.float()) for bag, vector_CW in named}
            states = [] if fused is None else histories[fused]
            of_fused = None if fused is None else self.towers[fused].items(items[fused], counts_B)
            return head.candidates(terms.tensors, counts_B, batch.candidate_dense, rows, states, of_fused)
        raw = {name: EmbeddingRows(bag) for name, bag in zip(self.request_bags, terms.tensors, strict=True)}
        of_request = {name: rows.tensor() for name, rows in self.fitted(raw).items()}
        of_candidate = {name: rows.tensor() for name, rows in bags.items()}
        joined = self._bags.join(of_request, of_candidate, vectors, counts_B, batch.stride())
        logits_CT: Tensor = self._score_rows(batch, CandidateRows(joined))
        return logits_CT.to(torch.promote_types(logits_CT.dtype, torch.float32))


class ServedTower:
    """A tower as it is served.

    Args:
        tower: not changed afterwards.
        dtype: of its encoder and states.
        may_be_native: whether native code may run the encoder.

    Raises:
        ValueError: its encoder cannot be amortized, or computes something else in two phases than in one.
    """

    def __init__(self, tower: HistoryTower, dtype: torch.dtype, may_be_native: bool) -> None:
        encoder = amortizable(tower.encoder)
        if type(encoder).forward is not AmortizableEncoder.forward:
            raise ValueError(
                f"the encoder is a {type(encoder).__name__} with a forward of its own beside its two phases: score "
                "with the model itself"
            )
        if reason := why_patched(encoder, "history_arch"):
            raise ValueError(f"{reason}: score with the model itself")
        # What hooks make of some of the events is not known.
        has_hooks = any(why_patched(module, "") for module in tower.modules())
        other_events = _PLAIN_EVENTS.why_not_any(tower.event_encoder, "event_encoder")
        is_known = other_events is None and not has_hooks and _extends_what_it_encodes(type(encoder))
        self.is_extendable = tower.is_extendable and is_known
        self.bags = tower.bags
        if tower.event_encoder.recency is not None and tower.event_encoder.recency.max_norm is not None:
            other_events = "event_encoder.recency has a max_norm"
        self.not_native = why_not_native(encoder, dtype) or other_events
        self._native: NativeEncoder | None = None
        self._beside_pytorch: NativeEncoder | None = None
        if may_be_native and self.not_native is None:
            assert isinstance(encoder, AmortizedHistoryArch)
            self._native = NativeEncoder(encoder, dtype)
            self._beside_pytorch = self._native.beside_pytorch()
        self._tower = tower
        self._tower_beside_pytorch = tower
        if self._native is not None:
            self._tower, self._tower_beside_pytorch = _with(tower, self._native), _with(tower, self._beside_pytorch)
        elif dtype != torch.float32:
            self._tower = self._tower_beside_pytorch = _with(tower, InDtype(encoder, dtype))
        # The native encoder, if nothing comes between it and what reads its vector.
        self.fusable: NativeEncoder | None = None
        if (
            tower.gate is None
            and _is_bare(tower.out)
            and self._native is not None
            and isinstance(self._native.vectors, nn.Identity)
        ):
            self.fusable = self._native
        # The events of a sum are added up while they are read.
        self._sums: EventEncoder | None = tower.event_encoder if tower.event_encoder.combine == "sum" else None
        self._bare = {
            feature
            for feature in (*tower.event_encoder.features, *tower.candidate_features)
            if _is_bare(tower.fit(feature))
        }

    def num_keys(self) -> int | None:
        """Keys that a state has; None if it is native code's."""
        if self._native is not None:
            return None
        dim, weight = self._tower.encoder.embedding_dim, next(self._tower.encoder.parameters(), torch.empty(0))
        none = JaggedTensor(weight.new_empty(0, dim), lengths=torch.zeros(1, dtype=torch.int64))
        return len(amortizable(self._tower.encoder).encode_history(none).keys)

    def compile(self) -> None:
        """Have torch.compile make the encoder's code."""
        for method in ("encode_history", "score_candidates", "extend_history"):
            setattr(self._tower.encoder, method, torch.compile(getattr(self._tower.encoder, method), dynamic=True))

    def encode(self, events: Embeddings, lengths_B: Tensor, beside_pytorch: bool) -> HistoryState:
        """Phase one of B histories."""
        native = self._beside_pytorch if beside_pytorch else self._native
        if native is not None and self._sums is not None:
            return native.encode_events(self._terms_of(self._sums, events, lengths_B), lengths_B)
        return self.module(beside_pytorch).encode_history(_jagged(events, lengths_B))

    def extend(self, state: HistoryState, events: Embeddings, lengths_B: Tensor, beside_pytorch: bool) -> HistoryState:
        """Phase one of the events since."""
        return self.module(beside_pytorch).extend_history(state, _jagged(events, lengths_B))

    def vectors(
        self, states: Sequence[HistoryState], items: Embeddings, num_candidates_B: Tensor, beside_pytorch: bool
    ) -> Sequence[Tensor]:
        """Phase two: S times [C, W]."""
        return self.module(beside_pytorch).score_states(states, _jagged(items, num_candidates_B))

    def items(self, items: Embeddings, num_candidates_B: Tensor) -> EmbeddingRows:
        """What candidates read the history by: a row for each."""
        if len(items) == 1 and self._bare.issuperset(items):
            return next(iter(items.values()))
        return EmbeddingRows(self._tower.items(_jagged(items, num_candidates_B)).values())

    def module(self, beside_pytorch: bool) -> HistoryTower:
        """The tower as it runs."""
        return self._tower_beside_pytorch if beside_pytorch else self._tower

    def _terms_of(self, encoder: EventEncoder, events: Embeddings, lengths_B: Tensor) -> list[EmbeddingRows]:
        """What an event encoder adds up."""
        rows = [
            events[name] if name in self._bare else EmbeddingRows(self._tower.fitted(name, events[name].tensor()))
            for name in encoder.features
        ]
        if encoder.recency is not None:
            rows.append(EmbeddingRows(encoder.recency.weight, recency(lengths_B, rows[0].num_rows)))
        return rows


def _extends_what_it_encodes(kind: type[AmortizableEncoder]) -> bool:
    """Whether the class that says how histories are extended knows how they are encoded."""
    extends, encodes = (
        next(base for base in kind.__mro__ if method in vars(base)) for method in ("extend_history", "encode_history")
    )
    return issubclass(extends, encodes)


def _is_bare(module: nn.Module) -> bool:
    return _BARE.why_not(module, "") is None


def _with(tower: HistoryTower, encoder: AmortizableEncoder | None) -> HistoryTower:
    """A tower with another encoder; all else is the same."""
    other = copy.copy(tower)
    other._modules = {**tower._modules, "encoder": encoder}
    return other


def _jagged(events: Embeddings, lengths_B: Tensor) -> dict[str, JaggedTensor]:
    return {name: JaggedTensor(rows.tensor(), lengths=lengths_B) for name, rows in events.items()}


class InDtype(AmortizableEncoder):
    """An encoder in another dtype, between embeddings and vectors in float32.

    Args:
        encoder: a copy of it is made.
        dtype: of weights and states.
    """

    def __init__(self, encoder: AmortizableEncoder, dtype: torch.dtype) -> None:
        super().__init__(encoder.embedding_dim, encoder.num_slots)
        self.encoder, self.dtype = copy.deepcopy(encoder).to(dtype), dtype

    @property
    def is_extendable(self) -> bool:
        """Whether a state can be extended."""
        return self.encoder.is_extendable

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one; see `AmortizableEncoder.encode_history`."""
        return self.encoder.encode_history(self._cast(history))

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only; see `AmortizableEncoder.extend_history`."""
        return self.encoder.extend_history(state, self._cast(events))

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two; see `AmortizableEncoder.score_candidates`."""
        return self.encoder.score_candidates(state, self._cast(candidates)).float()

    def _cast(self, rows: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(rows.values().to(self.dtype), lengths=rows.lengths())
