"""What is served: lookups, and a model's two phases after them, by native code where it can and by PyTorch elsewhere.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; D embedding dimension; F slots;
S history vectors of a candidate; T tasks.
"""

from __future__ import annotations

import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import SparseArch
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.jagged_ids import JaggedIds, rows_of
from torchrec_amort.models.dlrm import HISTORY, AmortizedDLRM
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState
from torchrec_amort.modules.events import EventEncoder, recency
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.plain import Plain, why_other_methods, why_own_methods, why_patched
from torchrec_amort.modules.tower import CANDIDATE_ITEM
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.schema import InputError, RequestSchema
from torchrec_amort.serving.heads import Terms, build_head
from torchrec_amort.serving.lookup import BagLookup, SequenceLookup, Slots, stack
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native
from torchrec_amort.serving.native_head import NativeHead, why_not_native_head
from torchrec_amort.serving.served import Backend, Histories, Served

logger = logging.getLogger(__name__)

_PLAIN = Plain(AmortizedDLRM, SparseArch, EventEncoder, EmbeddingCollection, SequenceTables, nn.Embedding, nn.Dropout)


class Phases(ABC):
    """All of a model but its lookups, in two phases.

    Args:
        num_request_dense: dense inputs of a request that are read.
        num_candidate_dense: dense inputs of a candidate.
        is_extendable: whether a state can be extended by the events since.
    """

    def __init__(self, num_request_dense: int, num_candidate_dense: int, is_extendable: bool) -> None:
        self.num_request_dense = num_request_dense
        self.num_candidate_dense = num_candidate_dense
        self.is_extendable = is_extendable
        self.not_native: list[str] = []

    @abstractmethod
    def encode(self, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories, of the embeddings of their events' features and the number of events of each."""

    def extend(self, state: HistoryState, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of the events since, where states are extendable."""
        raise ValueError("the states of these phases cannot be extended: encode the whole history again")

    @abstractmethod
    def terms(self, dense_BI: Tensor, slots: Slots) -> Terms:
        """Phase one of all else, of the requests' dense inputs and the embeddings of each of their ids."""

    @abstractmethod
    def score(
        self,
        states: Sequence[HistoryState],
        terms: Terms,
        items: EmbeddingRows | None,
        num_candidates_B: Tensor,
        dense_CI: Tensor,
        slots: Slots,
    ) -> Tensor:
        """Phase two.

        Args:
            states: of B requests together; none if the model reads no history.
            terms: of the requests.
            items: embeddings of the candidates' items; None without history.
            num_candidates_B: int64 [B]; a request may have none here.
            dense_CI: the candidates' dense inputs.
            slots: embeddings of each of their ids.

        Returns:
            Tensor: logits [C, T], float32 at least.
        """


@dataclass(eq=False)
class ServedDLRM(Served):
    """Lookups and phases of an AmortizedDLRM.

    Args:
        candidate_bags: of the candidates' ids.
        request_bags: of the requests' ids; None if they have none.
        sequences: of events and candidates' items; None if the model reads no history.
        event_features: features of an event.
        history_length: events that a history may have; None if any number.
        phases_of: the phases, given the number of dense inputs of a request.
        schema: of the requests, if it is known.
        tells: whether the log tells what native code does not do.
    """

    candidate_bags: BagLookup
    request_bags: BagLookup | None
    sequences: SequenceLookup | None
    event_features: tuple[str, ...]
    history_length: int | None
    phases_of: Callable[[int], Phases]
    schema: RequestSchema | None = None
    tells: bool = False

    def __post_init__(self) -> None:
        lookups = {
            "candidate_sparse": self.candidate_bags,
            "request_sparse": self.request_bags,
            "sequences": self.sequences,
        }
        sizes = {field: lookup.table_sizes for field, lookup in lookups.items() if lookup is not None}
        self.features = {field: list(of_field) for field, of_field in sizes.items()}
        self.table_sizes = {name: size for of_field in sizes.values() for name, size in of_field.items()}
        bags = {"candidate_sparse": self.candidate_bags, "request_sparse": self.request_bags}
        self.is_weighted = {field: lookup.is_weighted for field, lookup in bags.items() if lookup is not None}
        self.events = {} if self.sequences is None else {HISTORY: self.event_features}
        self.device = self.candidate_bags.device
        self._phases: dict[int, Phases] = {}
        self._lock = threading.Lock()

    def request(self, batch: RequestBatch) -> tuple[Phases, Terms]:
        """Phase one of all but histories; see `Served.request`."""
        phases = self._phases_for(batch)
        slots = [] if self.request_bags is None else self.request_bags(batch.request_sparse)
        return phases, phases.terms(batch.request_dense, slots)

    def _phases_for(self, batch: RequestBatch) -> Phases:
        num_request_dense, num_candidate_dense = batch.request_dense.shape[1], batch.candidate_dense.shape[1]
        with self._lock:
            if num_request_dense not in self._phases:
                self._phases[num_request_dense] = self.phases_of(num_request_dense)
                for reason in self._phases[num_request_dense].not_native if self.tells else ():
                    logger.info("PyTorch serves what native code cannot: %s", reason)
            phases = self._phases[num_request_dense]
        if num_candidate_dense != phases.num_candidate_dense:
            raise InputError(
                f"batch: request_dense has {num_request_dense} columns and candidate_dense {num_candidate_dense}, but "
                f"the model reads {phases.num_request_dense} and {phases.num_candidate_dense}"
            )
        return phases

    @property
    def _any_phases(self) -> Phases:
        """Histories are encoded alike, whatever dense inputs there are."""
        return next(iter(self._phases.values()))

    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since."""
        return self._any_phases.is_extendable

    def encode(self, tower: str, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of B histories."""
        return self._any_phases.encode(*self._looked_up(events))

    def extend(self, tower: str, state: HistoryState, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of the events since."""
        return self._any_phases.extend(state, *self._looked_up(events))

    def _looked_up(self, events: Mapping[str, JaggedIds]) -> tuple[dict[str, EmbeddingRows], Tensor]:
        assert self.sequences is not None
        return self.sequences(events), events[self.event_features[0]][1]

    def score(self, request: tuple[Phases, Terms], histories: Histories, batch: RequestBatch) -> Tensor:
        """Phase two; see `Served.score`."""
        phases, terms = request
        items = None
        if self.sequences is not None:
            ids, _ = rows_of(batch.sequences, CANDIDATE_ITEM, 0, len(batch))
            items = self.sequences({CANDIDATE_ITEM: (ids, batch.num_candidates)})[CANDIDATE_ITEM]
        return phases.score(
            histories.get(HISTORY, []),
            terms,
            items,
            batch.num_candidates,
            batch.candidate_dense,
            self.candidate_bags(batch.candidate_sparse),
        )


def serve_dlrm(model: AmortizedDLRM, dtype: torch.dtype, backend: Backend) -> ServedDLRM:
    """Lookups in a model's tables, and its phases with the weights of this moment.

    Args:
        model: with an amortizable encoder, or none.
        dtype: `torch.float32` or `torch.bfloat16`, of dense weights and states.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.

    Raises:
        ValueError: the model, or a part of it, may compute something else than what is served.

    Example::

        served = serve_dlrm(model, torch.float32, "auto")
    """
    if reason := why_not_served(model):
        raise ValueError(f"{reason}: score with the model itself" if isinstance(model, AmortizedDLRM) else reason)
    frozen = snapshot(model)
    request_arch, sequences, events = model.request_sparse_arch, model.history_embedding_collection, model.event_encoder
    return ServedDLRM(
        candidate_bags=BagLookup(model.sparse_arch.embedding_bag_collection),
        request_bags=None if request_arch is None else BagLookup(request_arch.embedding_bag_collection),
        sequences=None if sequences is None else SequenceLookup(sequences),
        event_features=() if events is None else tuple(events.features),
        history_length=model.history_length,
        phases_of=lambda num_request_dense: ModelPhases(frozen, num_request_dense, dtype, backend),
        tells=backend == "auto",
    )


def why_not_served(model: nn.Module) -> str | None:
    """Why a model cannot be served in two phases, or None if it can.

    Args:
        model: any.

    Example::

        assert why_not_served(model) is None
    """
    if not isinstance(model, AmortizedDLRM):
        return f"the model is a {type(model).__name__}, not an AmortizedDLRM, neither wrapped nor sharded"
    reasons = (
        why_other_methods(type(model), AmortizedDLRM) or _PLAIN.why_replaced(AmortizedDLRM),
        why_patched(model, "the model"),
        *(_why_other_bags(name, arch) for name, arch in _sparse_archs(model)),
        _why_other_sequences(model.history_embedding_collection),
        _why_other_encoder(model.history_arch),
        *(why_own_methods(module, name) for name, module in model.named_children() if name not in _TABLES),
    )
    return next(filter(None, reasons), None)


_TABLES = ("sparse_arch", "request_sparse_arch", "history_embedding_collection")


def _sparse_archs(model: AmortizedDLRM) -> list[tuple[str, nn.Module]]:
    archs = {"sparse_arch": model.sparse_arch, "request_sparse_arch": model.request_sparse_arch}
    return [(name, arch) for name, arch in archs.items() if arch is not None]


def _why_other_bags(name: str, arch: nn.Module) -> str | None:
    if reason := _PLAIN.why_not(arch, name):
        return reason
    bags = arch.embedding_bag_collection
    known = isinstance(bags, EmbeddingBagCollection | QuantEmbeddingBagCollection)
    return None if known else f"{name}.embedding_bag_collection is a {type(bags).__name__}, sharded or unknown"


def _why_other_sequences(collection: nn.Module | None) -> str | None:
    # Events and candidates' items are looked up one after the other: a hook would see half of each batch.
    name = "history_embedding_collection"
    if collection is None:
        return None
    is_quantized = type(collection) is QuantEmbeddingCollection
    return why_patched(collection, name) if is_quantized else _PLAIN.why_not(collection, name)


def _why_other_encoder(encoder: nn.Module | None) -> str | None:
    # Its two phases are called, not its forward.
    if encoder is None:
        return None
    if not isinstance(encoder, AmortizableEncoder):
        return f"the encoder is a {type(encoder).__name__}, which encodes a history for every candidate anew"
    if type(encoder).forward is not AmortizableEncoder.forward:
        return f"the encoder is a {type(encoder).__name__} with a forward of its own beside its two phases"
    return why_patched(encoder, "history_arch")


def snapshot(model: AmortizedDLRM) -> AmortizedDLRM:
    """The model with copies of all weights but its tables, for inference."""
    copied = copy.copy(model)
    copied._modules = {
        name: module if name in _TABLES or module is None else copy.deepcopy(module).eval().requires_grad_(False)
        for name, module in model._modules.items()
    }
    return copied


class ModelPhases(Phases):
    """The phases of a model in this process.

    Args:
        model: whose encoder, if it has one, is amortizable; not changed afterwards.
        num_request_dense: dense inputs of a request.
        dtype: see `serve`.
        backend: see `serve`.

    Raises:
        ValueError: native code is asked for and cannot.
    """

    def __init__(self, model: AmortizedDLRM, num_request_dense: int, dtype: torch.dtype, backend: Backend) -> None:
        encoder, head = model.history_arch, build_head(model, num_request_dense)
        self.dtype = dtype
        self.event_encoder: EventEncoder | None = model.event_encoder
        other_events = None if self.event_encoder is None else _PLAIN.why_not_any(self.event_encoder, "event_encoder")
        self.encoder: AmortizableEncoder | None = None
        reasons = {
            "encoder": None if encoder is None else other_events or why_not_native(encoder, dtype),
            "head": why_not_native_head(head, dtype),
        }
        not_native = [f"{part}: {reason}" for part, reason in reasons.items() if reason is not None]
        if backend == "native" and not_native:
            raise ValueError(f"no native {not_native[0]}; backend 'auto' leaves to PyTorch what it cannot do")
        may_be_native = backend in ("auto", "native")
        if isinstance(encoder, AmortizedHistoryArch) and may_be_native and reasons["encoder"] is None:
            self.encoder = NativeEncoder(encoder, dtype)
        elif isinstance(encoder, AmortizableEncoder):
            self.encoder = copy.deepcopy(encoder).to(dtype)
        # Vectors that the encoder is not the last to work on are slots like any other.
        self._fused = None
        if isinstance(self.encoder, NativeEncoder) and isinstance(self.encoder.vectors, nn.Identity):
            self._fused = self.encoder
        self._native_head = None
        if may_be_native and reasons["head"] is None:
            self._native_head = NativeHead(head, self._fused, dtype)
        self.head = head.to(dtype)
        if backend == "compiled":
            _compile(self.head, "request", "candidates")
            _compile(self.encoder, "encode_history", "score_candidates", "extend_history")
        # An event's place is counted from the latest one, so that every new event moves all others. What hooks make of
        # some of the events is not known.
        has_fixed_places = self.event_encoder is not None and self.event_encoder.recency is None
        is_known = other_events is None and encoder is not None and not any(map(_has_hooks, encoder.modules()))
        super().__init__(
            head.num_request_dense,
            head.num_candidate_dense,
            has_fixed_places and is_known and self.encoder is not None and self.encoder.is_extendable,
        )
        self.not_native = not_native

    def encode(self, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of B histories."""
        assert self.encoder is not None
        if isinstance(self.encoder, NativeEncoder):
            return self.encoder.encode_events(self._terms_of(events, lengths_B), lengths_B)
        return self.encoder.encode_history(self._event_vectors(events, lengths_B))

    def extend(self, state: HistoryState, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> HistoryState:
        """Phase one of the events since."""
        assert self.encoder is not None
        return self.encoder.extend_history(state, self._event_vectors(events, lengths_B))

    def terms(self, dense_BI: Tensor, slots: Slots) -> Terms:
        """Phase one of all else; see `Head.request`."""
        if self._native_head is not None:
            return self._native_head.request(dense_BI, slots)
        slots_BFD = stack(slots, self.head.embedding_dim, dense_BI)
        return self.head.request(dense_BI.to(self.dtype), slots_BFD.to(self.dtype))

    def score(
        self,
        states: Sequence[HistoryState],
        terms: Terms,
        items: EmbeddingRows | None,
        num_candidates_B: Tensor,
        dense_CI: Tensor,
        slots: Slots,
    ) -> Tensor:
        """Phase two; see `Phases.score`."""
        if self._native_head is not None and self._fused is not None:
            return self._native_head.candidates(terms, states, num_candidates_B, items, dense_CI, slots)
        history_CSD: list[Tensor] = []
        if self.encoder is not None:
            assert items is not None
            vectors_CX = self.encoder.score_states(
                states, self._cast(JaggedTensor(items.tensor(), lengths=num_candidates_B))
            )
            history_CSD = [vectors_CX.unflatten(1, (self.encoder.num_slots, -1))]
        if self._native_head is not None:
            vectors = [EmbeddingRows(rows_CD.float()) for rows_CSD in history_CSD for rows_CD in rows_CSD.unbind(1)]
            return self._native_head.candidates(terms, [], num_candidates_B, None, dense_CI, [*slots, *vectors])
        of_ids_CFD = stack(slots, self.head.embedding_dim, dense_CI)
        slots_CFD = torch.cat([of_ids_CFD, *history_CSD], dim=1).to(self.dtype)
        logits_CT = self.head.candidates(terms, num_candidates_B, dense_CI.to(self.dtype), slots_CFD)
        return logits_CT.to(torch.promote_types(self.dtype, torch.float32))

    def _event_vectors(self, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> JaggedTensor:
        assert self.event_encoder is not None
        embeddings = {name: JaggedTensor(rows.tensor(), lengths=lengths_B) for name, rows in events.items()}
        return self._cast(self.event_encoder(embeddings))

    def _terms_of(self, events: Mapping[str, EmbeddingRows], lengths_B: Tensor) -> list[EmbeddingRows]:
        """What `EventEncoder` adds up: native code adds it up while it reads it."""
        assert self.event_encoder is not None
        rows = [events[name] for name in self.event_encoder.features]
        if self.event_encoder.recency is not None:
            rows.append(EmbeddingRows(self.event_encoder.recency.weight, recency(lengths_B, len(rows[0]))))
        return rows

    def _cast(self, rows: JaggedTensor) -> JaggedTensor:
        if isinstance(self.encoder, NativeEncoder) or rows.values().dtype == self.dtype:
            return rows
        return JaggedTensor(rows.values().to(self.dtype), lengths=rows.lengths())


def _has_hooks(module: nn.Module) -> bool:
    return why_patched(module, "") is not None


def _compile(module: nn.Module | None, *methods: str) -> None:
    for method in methods if module is not None else ():
        setattr(module, method, torch.compile(getattr(module, method), dynamic=True))
