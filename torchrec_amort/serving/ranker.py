"""Serving of any ranker: its own modules after fast lookups, with native encoders where they can be.

Shape suffixes: B requests; N events and C candidates, all requests together; D width of an encoder; W width of a bag;
T tasks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.jagged_ids import JaggedIds, rows_of
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows, RequestState
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.models.ranker import Call, CollectionRanker, Ranker, ranker_of
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.plain import why_own_methods, why_patched
from torchrec_amort.modules.tower import CANDIDATE_ITEM, HistoryTower
from torchrec_amort.serving.lookup import BagLookup, SequenceLookup
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native
from torchrec_amort.serving.phases import serve_dlrm
from torchrec_amort.serving.served import Backend, Histories, Served

logger = logging.getLogger(__name__)

_TABLES = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    QuantEmbeddingBagCollection,
    QuantEmbeddingCollection,
    SequenceTables,
)


def serve(model: nn.Module, dtype: torch.dtype, backend: Backend, call: Call | None = None) -> Served:
    """A model in two phases, with the dense weights of this moment, and its tables where they are.

    Args:
        model: a ranker, or built on an `AmortizedEmbeddingBagCollection`; not sharded.
        dtype: `torch.float32` or `torch.bfloat16`, of encoders and states; of an `AmortizedDLRM`, of all dense weights.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.
        call: how a model that is no ranker is called.

    Raises:
        ValueError: the model, or a part of it, may compute something else than what is served.

    Example::

        served = serve(model, torch.float32, "auto")
    """
    is_built_on_one = any(isinstance(module, AmortizedEmbeddingBagCollection) for module in model.modules())
    if not isinstance(model, Ranker) and not is_built_on_one:
        hint = "attach_history makes one of a DLRM" if isinstance(model, DLRM) else "unwrap it, or build it on"
        hint += "" if isinstance(model, DLRM) else " an AmortizedEmbeddingBagCollection"
        raise ValueError(f"the model is a {type(model).__name__}, which is no ranker: {hint}")
    ranker = ranker_of(model, call)
    if isinstance(ranker, AmortizedDLRM):
        return serve_dlrm(ranker, dtype, backend)
    if not isinstance(ranker, CollectionRanker):
        raise ValueError(
            f"the model is a {type(ranker).__name__}, a ranker of no known kind: score with the model itself"
        )
    return ServedRanker(ranker, dtype, backend)


class ServedRanker(Served):
    """A ranker that reads ids and histories with an `AmortizedEmbeddingBagCollection`.

    Args:
        ranker: not sharded; its dense weights are copied.
        dtype: see `serve`.
        backend: see `serve`.

    Raises:
        ValueError: see `serve`.
    """

    def __init__(self, ranker: CollectionRanker, dtype: torch.dtype, backend: Backend) -> None:
        if reason := why_own_methods(ranker, "the model"):
            raise ValueError(f"{reason}, which a copy would not have: score with the model itself")
        _refuse_sharded(ranker.collection)
        self._ranker = _snapshot(ranker)
        collection = self._ranker.collection
        self._request_bags = _Bags(collection.request_bags)
        self._candidate_bags = _Bags(collection.candidate_bags)
        self._sequences = [SequenceLookup(sequences) for sequences in collection.sequences]
        self._bags = collection.bags
        for tower in collection.towers:
            tower.encoder = _encoder(tower, dtype, backend)
        self.features = collection.features
        self.table_sizes = {**self._request_bags.table_sizes, **self._candidate_bags.table_sizes}
        for lookup in self._sequences:
            self.table_sizes |= lookup.table_sizes
        sides = {"request_sparse": collection.request_bags, "candidate_sparse": collection.candidate_bags}
        self.is_weighted = {field: bags.is_weighted() for field, bags in sides.items() if bags is not None}
        self.events = {tower.name: tower.event_encoder.features for tower in collection.towers}
        self.history_length = ranker.history_length
        self.device = next((weight.device for weight in self._ranker.parameters()), torch.device("cpu"))
        self.schema = None

    def request(self, batch: RequestBatch) -> Mapping[str, Tensor]:
        """Phase one of all but histories; see `Served.request`."""
        return self._request_bags(batch.request_sparse)

    def encode(self, tower: str, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of B histories."""
        return self._tower(tower).encode_history(self._looked_up(tower, events))

    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since."""
        # What hooks make of some of the events is not known.
        has_hooks = any(why_patched(module, "") for module in self._tower(tower).modules())
        return self._tower(tower).is_extendable and not has_hooks

    def extend(self, tower: str, state: HistoryState, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of the events since."""
        return self._tower(tower).extend_history(state, self._looked_up(tower, events))

    def score(self, request: Mapping[str, Tensor], histories: Histories, batch: RequestBatch) -> Tensor:
        """Phase two; see `Served.score`."""
        state = RequestState({name: _one(states) for name, states in histories.items()}, request, len(batch))
        bags = self._candidate_bags(batch.candidate_sparse)
        places = {*self._bags.shared.values(), *(reads.items for reads in self._bags.reads.values())}
        items = {place: self._items(place, batch) for place in places}
        bags |= {bag: items[place] for bag, place in self._bags.shared.items()}
        of_towers = {name: items[reads.items] for name, reads in self._bags.reads.items()}
        rows = CandidateRows(state, batch.num_candidates, bags, of_towers, batch.stride())
        logits_CT = self._ranker.score_rows(batch, rows)
        return logits_CT.to(torch.promote_types(logits_CT.dtype, torch.float32))

    def _tower(self, name: str) -> HistoryTower:
        tower = self._bags.towers[name]
        assert isinstance(tower, HistoryTower)
        return tower

    def _looked_up(self, tower: str, events: Mapping[str, JaggedIds]) -> dict[str, JaggedTensor]:
        """Embeddings of the features of events."""
        of_place: dict[int, dict[str, JaggedIds]] = {}
        for feature, place in self._bags.reads[tower].events.items():
            of_place.setdefault(place, {})[feature] = events[feature]
        return {
            feature: JaggedTensor(rows.tensor(), lengths=events[feature][1])
            for place, ids in of_place.items()
            for feature, rows in self._sequences[place](ids).items()
        }

    def _items(self, place: int, batch: RequestBatch) -> Tensor:
        ids, _ = rows_of(batch.sequences, CANDIDATE_ITEM, 0, len(batch))
        return self._sequences[place]({CANDIDATE_ITEM: (ids, batch.num_candidates)})[CANDIDATE_ITEM].tensor()


class _Bags:
    """Bags of one side by their names; nothing if there are none."""

    def __init__(self, bags: EmbeddingBagCollection | None) -> None:
        self._lookup = None if bags is None else BagLookup(bags)
        tables = [] if bags is None else bags.embedding_bag_configs()
        self._names = [name for names in get_embedding_names_by_table(tables) for name in names]
        self.table_sizes = {} if self._lookup is None else self._lookup.table_sizes

    def __call__(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        if self._lookup is None:
            return {}
        return {name: rows.tensor() for name, rows in zip(self._names, self._lookup(features), strict=True)}


def _refuse_sharded(collection: AmortizedEmbeddingBagCollection) -> None:
    tables = [collection.request_bags, collection.candidate_bags, *collection.sequences]
    for module in tables:
        if module is not None and not isinstance(module, _TABLES):
            raise ValueError(
                f"its collection has a {type(module).__name__}, sharded or unknown: score with the model itself"
            )


def _one(states: Sequence[HistoryState]) -> HistoryState:
    return states[0] if len(states) == 1 else HistoryState.cat(states)


def _snapshot(ranker: CollectionRanker) -> CollectionRanker:
    """The ranker with copies of all weights but its tables, for inference."""
    tables = [module for module in ranker.modules() if isinstance(module, _TABLES)]
    copied = copy.deepcopy(ranker, {id(table): table for table in tables})
    of_tables = {module for table in tables for module in table.modules()}
    for module in copied.modules():
        if module not in of_tables:
            module.training = False
    return copied


def _encoder(tower: HistoryTower, dtype: torch.dtype, backend: Backend) -> AmortizableEncoder:
    """A tower's encoder as it is served.

    Raises:
        ValueError: it cannot be served, or not by native code, which is asked for.
    """
    encoder = tower.encoder
    if not isinstance(encoder, AmortizableEncoder):
        raise ValueError(
            f"tower {tower.name!r}: a {type(encoder).__name__} encodes a history for every candidate anew: score with "
            "the model itself"
        )
    reason = why_not_native(encoder, dtype)
    if backend == "native" and reason is not None:
        raise ValueError(f"no native encoder: {reason}; backend 'auto' leaves to PyTorch what it cannot do")
    if backend in ("auto", "native"):
        if isinstance(encoder, AmortizedHistoryArch) and reason is None:
            return NativeEncoder(encoder, dtype)
        logger.info("PyTorch serves what native code cannot: tower %r: %s", tower.name, reason)
    served = encoder if dtype == torch.float32 else _InDtype(encoder, dtype)
    if backend == "compiled":
        for method in ("encode_history", "score_candidates", "extend_history"):
            setattr(served, method, torch.compile(getattr(served, method), dynamic=True))
    return served


class _InDtype(AmortizableEncoder):
    """An encoder in another dtype, between embeddings and vectors in float32."""

    def __init__(self, encoder: AmortizableEncoder, dtype: torch.dtype) -> None:
        super().__init__(encoder.embedding_dim, encoder.num_slots)
        self.encoder, self.dtype = encoder.to(dtype), dtype

    @property
    def is_extendable(self) -> bool:
        return self.encoder.is_extendable

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        return self.encoder.encode_history(self._cast(history))

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        return self.encoder.extend_history(state, self._cast(events))

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        return self.encoder.score_candidates(state, self._cast(candidates)).float()

    def _cast(self, rows: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(rows.values().to(self.dtype), lengths=rows.lengths())
