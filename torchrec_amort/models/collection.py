"""AmortizedEmbeddingBagCollection: stands where a model's EmbeddingBagCollection stood; a history is one more bag.

Shape suffixes: B requests; N events of a history and C candidates, all requests together; W width of a bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_amort.batch import RequestBatch, refuse_missing_features, refuse_weights
from torchrec_amort.models.bags import Bags, Reads, Rows, SequenceBag, bag_of, place_of
from torchrec_amort.models.sharded import refuse_tables_without_optimizer
from torchrec_amort.models.tables import refuse_tied_tables
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.modules.plain import Plain
from torchrec_amort.modules.tower import CANDIDATE_ITEM, HistoryTower

# Pipelines trace the model, and a traced batch has no weights to look at.
torch.fx.wrap("refuse_weights")

_PLAIN = Plain(EmbeddingBagCollection, nn.ModuleDict, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class RequestState:
    """All that candidates need of B requests.

    Args:
        histories: of each tower, by its name.
        bags: of each feature of the requests, by its name: [B, W].
        num_requests: B.

    Example::

        state = model.encode_request(batch)
        logits_CT = model.score_candidates(state, batch)
    """

    histories: Mapping[str, HistoryState]
    bags: Mapping[str, Tensor]
    num_requests: int

    def __len__(self) -> int:
        """The number of requests, B."""
        return self.num_requests


@dataclass(frozen=True, eq=False)
class CandidateRows:
    """What a model gets in phase two, where its batch stood: C candidates, all their bags made.

    Args:
        bags: of C rows, in the order of `AmortizedEmbeddingBagCollection.embedding_bag_configs`.
    """

    bags: KeyedTensor

    def stride(self) -> int:
        """The number of rows that the model has, C."""
        return self.bags.values().shape[0]


class AmortizedEmbeddingBagCollection(nn.Module):
    """An EmbeddingBagCollection with histories: what a model is built on to read them.

    It stands in a model where `embedding_bag_collection` stood, and reports one bag more for each vector of a tower.
    The model is called with a `RequestBatch` of C candidates where it was called with a KeyedJaggedTensor of C rows.
    Requests' features are looked up once per request and repeated for its candidates after lookup; events once per
    request; each collection once.

    The tables of `embedding_bag_collection` are not copied: it keeps working, and shares its weights with this one
    until one of the two is sharded. Its state dict loads into this one.

    Args:
        embedding_bag_collection: of the model, not sharded and not quantized; None for towers alone.
        towers: the histories.
        request_features: features that are of the request: `RequestBatch.request_sparse` has them. All others are of
            the candidate, in `RequestBatch.candidate_sparse`, but for a tower's `item`.
        width: of all bags; one whose table has another width is fitted by a linear layer without bias. As their tables
            have it if None.
        sequence_bags: more bags, of features in `RequestBatch.sequences` that share a table of the towers' `events`, or
            one of `sequences`; several ids are averaged.
        sequences: tables of `sequence_bags` that no tower reads; a collection for each width.

    Raises:
        ValueError: a name is unknown or there twice, a table is read by features of requests and of candidates, or two
            collections share a table.

    Example::

        sparse = AmortizedEmbeddingBagCollection(ebc, [tower], request_features=["user", "country"])
        model = SimpleDeepFMNN(
            num_dense_features=2, embedding_bag_collection=sparse, hidden_layer_size=8, deep_fm_dimension=4
        )
        logits_CT = model(batch.dense, sparse.rows(batch))
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection | None,
        towers: Sequence[HistoryTower],
        request_features: Sequence[str] = (),
        *,
        width: int | None = None,
        sequence_bags: Sequence[SequenceBag] = (),
        sequences: Sequence[EmbeddingCollection] = (),
    ) -> None:
        super().__init__()
        tables: list[EmbeddingBagConfig] = []
        request_bags = candidate_bags = None
        shared = _Shared()
        if (bags := embedding_bag_collection) is not None:
            _refuse_other_bags(bags)
            tables = bags.embedding_bag_configs()
            shared = _share(bags, towers)
            of_request = _of_request([table for table in tables if table.name not in shared.items], request_features)
            rest = [table for table in tables if table not in of_request and table.name not in shared.items]
            request_bags, candidate_bags = _bags_of(bags, of_request), _bags_of(bags, rest)
        elif request_features:
            raise ValueError(f"request_features are {list(request_features)}, but there are no bags")
        self._set(request_bags, candidate_bags, towers, tables, shared, width, sequence_bags, sequences)

    @classmethod
    def of_sides(
        cls,
        request_bags: EmbeddingBagCollection | None,
        candidate_bags: EmbeddingBagCollection,
        towers: Sequence[HistoryTower],
    ) -> AmortizedEmbeddingBagCollection:
        """The same of a collection for each side.

        Args:
            request_bags: of the requests' features.
            candidate_bags: of the candidates'.
            towers: the histories, each with an item of its own `events`.
        """
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        sides = [bags.embedding_bag_configs() for bags in (request_bags, candidate_bags) if bags is not None]
        tables = [table for of_side in sides for table in of_side]
        _refuse_twice([name for of_side in sides for name in sorted(set(_features(of_side)))], "features of both sides")
        collection._set(request_bags, candidate_bags, towers, tables, _Shared())
        return collection

    def _set(
        self,
        request_bags: EmbeddingBagCollection | None,
        candidate_bags: EmbeddingBagCollection | None,
        towers: Sequence[HistoryTower],
        tables: Sequence[EmbeddingBagConfig],
        shared: _Shared,
        width: int | None = None,
        sequence_bags: Sequence[SequenceBag] = (),
        sequences: Sequence[EmbeddingCollection] = (),
    ) -> None:
        self.request_bags, self.candidate_bags = request_bags, candidate_bags
        given = [*(collection for tower in towers for collection in tower.collections), *sequences]
        self.sequences = nn.ModuleList([*shared.collections, *dict.fromkeys(given)])
        tables = [*tables, *(bag_of(bag.feature, self.sequences) for bag in sequence_bags)]
        of_towers = [
            EmbeddingBagConfig(name=bag, feature_names=[bag], num_embeddings=1, embedding_dim=tower.width)
            for tower in towers
            for bag in tower.bags
        ]
        fitted = tables if width is None else [replace(table, embedding_dim=width) for table in tables]
        self._configs = [*fitted, *of_towers]
        _refuse_twice([table.name for table in self._configs], "tables or histories")
        _refuse_twice([*_features(of_towers), *set(_features(tables))], "features or histories")
        widths, own_widths = _widths(self._configs), _widths([*tables, *of_towers])
        places = {bag: SequenceBag(CANDIDATE_ITEM, False, place) for bag, place in shared.places.items()}
        for bag in sequence_bags:
            places[bag.feature] = replace(bag, place=place_of(bag.feature, self.sequences))
        reads = {tower.name: Reads.of(tower, self.sequences, shared.places) for tower in towers}
        self.bags = Bags(towers, widths, own_widths, reads, places)
        # Asked now: collections that are sharded do not tell.
        sides = {"request_sparse": request_bags, "candidate_sparse": candidate_bags}
        self._weighted = {field for field, bags in sides.items() if bags is not None and bags.is_weighted()}
        features = {field: _features(bags.embedding_bag_configs()) if bags else [] for field, bags in sides.items()}
        of_sequences = [_features(collection.embedding_configs()) for collection in self.sequences]  # type: ignore[operator]
        features["sequences"] = [name for names in of_sequences for name in names]
        features["dense_sequences"] = list(dict.fromkeys(name for tower in towers for name in tower.numbers))
        self.features = features
        self._renamed = self._names_of_tables()
        self._register_load_state_dict_pre_hook(self._rename)
        refuse_tied_tables(self)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Of all bags that the model gets: those of `embedding_bag_collection`, and then the towers'."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether ids have weights."""
        return bool(self._weighted)

    @property
    def towers(self) -> list[HistoryTower]:
        """The histories."""
        return list(self.bags.towers.values())  # type: ignore[arg-type]

    def rows(self, batch: RequestBatch) -> RequestBatch:
        """What a model is given in place of the KeyedJaggedTensor that it was called with: the batch, if it fits.

        Args:
            batch: B requests with C candidates.

        Raises:
            InputError: the batch lacks a feature.
        """
        refuse_missing_features(batch, self.features)
        return batch

    def forward(self, rows: RequestBatch | CandidateRows) -> KeyedTensor:
        """Bags of candidates.

        Args:
            rows: B requests with C candidates; or, in phase two, candidates whose bags are made.

        Returns:
            KeyedTensor: of C rows, in the order of `embedding_bag_configs`.

        Raises:
            ValueError: this is a step of training, and some tables were sharded without an optimizer.
            InputError: ids have weights where the bags have none, or none where they have some.
        """
        if isinstance(rows, CandidateRows):
            return rows.bags
        if self.training and torch.is_grad_enabled():
            refuse_tables_without_optimizer(self, "embedding_bag_collection")
        request, candidate = self._of_requests(rows), self._of_candidates(rows)
        sequences = [collection(rows.sequences) for collection in self.sequences]
        bags: KeyedTensor = self.bags(
            request, candidate, sequences, rows.dense_sequences, rows.num_ids, rows.num_candidates, rows.stride()
        )
        return bags

    def encode_request(self, batch: RequestBatch) -> RequestState:
        """Phase one.

        Args:
            batch: B requests; their candidates are not read.

        Raises:
            ValueError: the encoder of a tower encodes a history for every candidate anew.
            InputError: as `forward`.
        """
        request, rows = self._of_requests(batch), self._rows(batch, of_candidates=False)
        histories = {tower.name: tower.encode_history(self.bags.events(tower, rows)) for tower in self.towers}
        return RequestState(histories, self.bags.of_requests(request, rows), len(batch))

    def candidates(self, state: RequestState, batch: RequestBatch) -> CandidateRows:
        """What the model is given in phase two.

        Args:
            state: of the batch's requests.
            batch: B requests with C candidates; what `state` is made of is not read.

        Raises:
            InputError: as `forward`.
        """
        candidate, rows = self._of_candidates(batch), self._rows(batch, of_candidates=True)
        vectors = {
            tower.name: tower.score_candidates(state.histories[tower.name], self.bags.items(tower, rows))
            for tower in self.towers
        }
        bags = self.bags.of_the_candidates(candidate, rows)
        return CandidateRows(self.bags.join(state.bags, bags, vectors, batch.num_candidates, batch.stride()))

    def _rows(self, batch: RequestBatch, of_candidates: bool) -> Rows:
        """What sequences look up of the candidates, or of all else."""

        def is_read(feature: str) -> bool:
            return (feature in self.bags.of_candidates) == of_candidates

        given = _without(batch.sequences, lambda feature: not is_read(feature))
        looked_up = [collection(given) for collection in self.sequences]
        return self.bags.rows(looked_up, batch.dense_sequences, batch.num_ids, is_read)

    def _of_requests(self, batch: RequestBatch) -> KeyedTensor | None:
        if self.request_bags is None:
            return None
        refuse_weights("request_sparse", batch.request_sparse, "request_sparse" in self._weighted)
        bags: KeyedTensor = self.request_bags(batch.request_sparse)
        return bags

    def _of_candidates(self, batch: RequestBatch) -> KeyedTensor | None:
        if self.candidate_bags is None:
            return None
        refuse_weights("candidate_sparse", batch.candidate_sparse, "candidate_sparse" in self._weighted)
        bags: KeyedTensor = self.candidate_bags(batch.candidate_sparse)
        return bags

    def renamed(self) -> dict[str, str]:
        """Names of tables in the state dict of `embedding_bag_collection`, and their names in this one's."""
        return self._renamed

    def _names_of_tables(self) -> dict[str, str]:
        names = {}
        for side in ("request_bags", "candidate_bags"):
            bags = getattr(self, side)
            for table in bags.embedding_bag_configs() if bags is not None else ():
                names[f"embedding_bags.{table.name}.weight"] = f"{side}.embedding_bags.{table.name}.weight"
        for place in sorted({bag.place for bag in self.bags.sequence_bags.values()}):
            for table in self.sequences[place].embedding_configs():  # type: ignore[operator]
                names[f"embedding_bags.{table.name}.weight"] = f"sequences.{place}.embeddings.{table.name}.weight"
        return names

    def _rename(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        for old, new in self.renamed().items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)


def _widths(tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
    """Widths of bags, by their names."""
    bags = [name for names in get_embedding_names_by_table(list(tables)) for name in names]
    return dict(zip(bags, (table.embedding_dim for table in tables for _ in table.feature_names), strict=True))


def _features(tables: Iterable[BaseEmbeddingConfig]) -> list[str]:
    return [name for table in tables for name in table.feature_names]


def _without(sequences: KeyedJaggedTensor, is_left_out: Callable[[str], bool]) -> KeyedJaggedTensor:
    # The same keys in the same order: a sharded collection takes those of its first batch for those of all.
    none = JaggedTensor(sequences.values()[:0], lengths=sequences.lengths().new_zeros(sequences.stride()))
    rows = [none if is_left_out(name) else of_name for name, of_name in sequences.to_dict().items()]
    return KeyedJaggedTensor(
        sequences.keys(),
        torch.cat([none.values(), *(of_name.values() for of_name in rows)]),
        lengths=torch.cat([sequences.lengths()[:0], *(of_name.lengths() for of_name in rows)]),
        stride=sequences.stride(),
    )


@dataclass(frozen=True)
class _Shared:
    """Tables that bags share with events, moved to collections of sequences of their own.

    Args:
        items: of each such table, by its name, the candidate's feature.
        collections: one for each width.
        places: which of them has the table, of each such feature.
    """

    items: Mapping[str, str] = field(default_factory=dict)
    collections: Sequence[EmbeddingCollection] = ()
    places: Mapping[str, int] = field(default_factory=dict)


def _share(bags: EmbeddingBagCollection, towers: Sequence[HistoryTower]) -> _Shared:
    """Collections of the tables that towers share with the bags, with the bags' weights."""
    features_of_item: dict[str, list[str]] = {}
    for tower in towers:
        if tower.item is not None:
            features_of_item.setdefault(tower.item, []).append(tower.history_item)
    tables = {item: _table_of(bags, item) for item in features_of_item}
    if len(tables) > 1:
        raise ValueError(f"towers share the tables of {list(tables)} with the bags: candidates have one item")
    collections = []
    for item, table in tables.items():
        features = [CANDIDATE_ITEM, *dict.fromkeys(features_of_item[item])]
        config = EmbeddingConfig(
            name=table.name,
            embedding_dim=table.embedding_dim,
            num_embeddings=table.num_embeddings,
            feature_names=features,
            init_fn=table.init_fn,
            data_type=table.data_type,
        )
        collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        collection.embeddings[table.name].weight = bags.embedding_bags[table.name].weight
        collections.append(collection)
        for tower in towers:
            if tower.item == item:
                tower.share(table.embedding_dim)
    places = {item: place for place, item in enumerate(tables)}
    return _Shared({table.name: item for item, table in tables.items()}, collections, places)


def _table_of(bags: EmbeddingBagCollection, item: str) -> EmbeddingBagConfig:
    tables = [table for table in bags.embedding_bag_configs() if item in table.feature_names]
    if len(tables) != 1:
        have = _features(bags.embedding_bag_configs())
        raise ValueError(f"a tower's item {item!r} is read by {len(tables)} tables of the bags, which have {have}")
    (table,) = tables
    if table.feature_names != [item] or bags.is_weighted():
        why = "its ids have weights" if bags.is_weighted() else f"it is read by {table.feature_names}"
        raise ValueError(f"table {table.name!r} cannot serve events as well: {why}: give the tower `events` of its own")
    return table


def _refuse_other_bags(bags: nn.Module) -> None:
    if reason := _PLAIN.why_not_any(bags, "embedding_bag_collection"):
        raise ValueError(f"{reason}: give it as TorchRec makes it, before sharding, compiling and quantizing")


def _of_request(tables: Sequence[EmbeddingBagConfig], features: Sequence[str]) -> list[EmbeddingBagConfig]:
    """Tables that are read by features of the request."""
    have = _features(tables)
    for name in features:
        if name not in have:
            raise ValueError(f"request_features has {name!r}, but the bags have {have}")
    of_request = []
    for table in tables:
        mine = [name for name in table.feature_names if name in features]
        if mine and len(mine) < len(table.feature_names):
            others = [name for name in table.feature_names if name not in mine]
            raise ValueError(
                f"table {table.name!r} is read by {mine} of the request and {others} of the candidate: leave {mine} "
                "out of request_features, so that candidates have them"
            )
        if mine:
            of_request.append(table)
    return of_request


def _bags_of(bags: EmbeddingBagCollection, tables: Sequence[EmbeddingBagConfig]) -> EmbeddingBagCollection | None:
    """A collection of some tables of another one, with its weights."""
    if not tables:
        return None
    some = EmbeddingBagCollection([replace(table) for table in tables], bags.is_weighted(), torch.device("meta"))
    for table in tables:
        some.embedding_bags[table.name] = bags.embedding_bags[table.name]
    some._device = bags.device
    return some.train(bags.training)


def _refuse_twice(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} of one name: {name!r} is there {names.count(name)} times: rename one")
