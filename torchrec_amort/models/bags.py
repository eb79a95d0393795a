"""What a collection does after its lookups: towers, and bags of candidates put together.

Shape suffixes: B requests; N events of a history and C candidates, all requests together; V ids; W width of a bag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from torchrec_amort.modules.tower import CANDIDATE_ITEM, HistoryTower
from torchrec_amort.ops.jagged import expand

# What collections of sequences look up: embeddings of each feature.
Embeddings = Mapping[str, JaggedTensor]


@dataclass(frozen=True)
class SequenceBag:
    """A bag of what sequences look up.

    Args:
        feature: of `RequestBatch.sequences`, with an id, or a list of them, for each request or candidate.
        is_of_request: whether it is the request's.
        place: of the collection that has its table; the collection finds it.
    """

    feature: str
    is_of_request: bool = False
    place: int = -1


@dataclass(frozen=True)
class Reads:
    """Where what a tower reads is: in which collection of sequences, or among the numbers if None.

    Args:
        events: of each feature of its events.
        items: of each of its candidates' features.
    """

    events: dict[str, int | None]
    items: dict[str, int | None]

    @classmethod
    def of(cls, tower: HistoryTower, collections: Iterable[nn.Module], shared: Mapping[str, int]) -> Reads:
        if tower.item is not None and tower.item not in shared:
            raise ValueError(
                f"tower {tower.name!r} would share the table of {tower.item!r}, but there are no bags to share it: "
                f"give the tower `events` with {CANDIDATE_ITEM!r} among their features, and no item"
            )

        def place(feature: str) -> int | None:
            if tower.item is not None and feature in (CANDIDATE_ITEM, tower.history_item):
                return shared[tower.item]
            return None if feature in tower.numbers else place_of(feature, collections, tower.collections)

        events, items = tower.event_encoder.features, tower.candidate_features
        return cls({name: place(name) for name in events}, {name: place(name) for name in items})


# Rows of each feature: of each collection of sequences, by its place, and of numbers, by None.
Rows = Mapping[int | None, Embeddings]


class Bags(nn.Module):
    """All that a collection does after its lookups: towers, and bags of candidates put together.

    Nothing in it is ever sharded, so that TrainPipelineSparseDist, which traces what holds sharded modules, calls it.

    Args:
        towers: the histories.
        widths: of each bag, in order.
        own_widths: of each bag as it is looked up.
        reads: of each tower, by its name: where what it reads is.
        sequence_bags: bags of what sequences look up, by their names.
    """

    def __init__(
        self,
        towers: Sequence[HistoryTower],
        widths: Mapping[str, int],
        own_widths: Mapping[str, int],
        reads: Mapping[str, Reads],
        sequence_bags: Mapping[str, SequenceBag],
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({tower.name: tower for tower in towers})
        self.widths, self.reads, self.sequence_bags = dict(widths), dict(reads), dict(sequence_bags)
        others = [bag for bag, width in widths.items() if own_widths[bag] != width]
        self.own_widths = dict(own_widths)
        self._fit_of = {bag: place for place, bag in enumerate(others)}
        self.fits = nn.ModuleList(nn.Linear(own_widths[bag], widths[bag], bias=False) for bag in others)
        of_items = [feature for read in reads.values() for feature in read.items]
        of_bags = [bag.feature for bag in sequence_bags.values() if not bag.is_of_request]
        self.of_candidates = frozenset((*of_items, *of_bags))

    def fit(self, bag: str) -> nn.Module | None:
        """What fits a bag to the width that the model gets; None if it has it."""
        return self.fits[self._fit_of[bag]] if bag in self._fit_of else None

    @staticmethod
    def rows(
        sequences: Sequence[Embeddings],
        numbers: Embeddings,
        num_ids: Embeddings,
        is_read: Callable[[str], bool] = lambda _: True,
    ) -> Rows:
        """A row for each event, candidate or request.

        Args:
            sequences: of each collection, embeddings of the ids of its features.
            numbers: `RequestBatch.dense_sequences`.
            num_ids: `RequestBatch.num_ids`.
            is_read: of which features.
        """
        rows: dict[int | None, Embeddings] = {None: numbers}
        for place, of_features in enumerate(sequences):
            rows[place] = {
                name: averaged(of_feature, num_ids[name]) if name in num_ids else of_feature
                for name, of_feature in of_features.items()
                if is_read(name)
            }
        return rows

    def events(self, tower: HistoryTower, rows: Rows) -> Embeddings:
        """What a tower's events have."""
        return {name: rows[place][name] for name, place in self.reads[tower.name].events.items()}

    def items(self, tower: HistoryTower, rows: Rows) -> Embeddings:
        """What a tower's candidates have."""
        return {name: rows[place][name] for name, place in self.reads[tower.name].items.items()}

    def of_requests(self, looked_up: KeyedTensor | None, rows: Rows) -> dict[str, Tensor]:
        """Bags of the requests, [B, W] each."""
        return self._of_side(looked_up, rows, True)

    def of_the_candidates(self, looked_up: KeyedTensor | None, rows: Rows) -> dict[str, Tensor]:
        """Bags of the candidates, [C, W] each, but the towers'."""
        return self._of_side(looked_up, rows, False)

    def _of_side(self, looked_up: KeyedTensor | None, rows: Rows, is_of_request: bool) -> dict[str, Tensor]:
        bags = {} if looked_up is None else looked_up.to_dict()
        for name, bag in self.sequence_bags.items():
            if bag.is_of_request == is_of_request:
                bags[name] = rows[bag.place][bag.feature].values()
        for name in bags:
            if (fit := self.fit(name)) is not None:
                bags[name] = fit(bags[name])
        return bags

    def forward(
        self,
        request: KeyedTensor | None,
        candidate: KeyedTensor | None,
        sequences: Sequence[Embeddings],
        numbers: Embeddings,
        num_ids: Embeddings,
        num_candidates_B: Tensor,
        num_rows: int,
    ) -> KeyedTensor:
        """Bags of C candidates, of what is looked up."""
        rows = self.rows(sequences, numbers, num_ids)
        vectors = {
            name: tower(self.events(tower, rows), self.items(tower, rows))  # type: ignore[arg-type]
            for name, tower in self.towers.items()
        }
        of_requests, of_candidates = self.of_requests(request, rows), self.of_the_candidates(candidate, rows)
        return self.join(of_requests, of_candidates, vectors, num_candidates_B, num_rows)

    def join(
        self,
        request: Mapping[str, Tensor],
        candidate: Mapping[str, Tensor],
        vectors: Mapping[str, Sequence[Tensor]],
        num_candidates_B: Tensor,
        num_rows: int,
    ) -> KeyedTensor:
        """All bags of C candidates.

        Args:
            request: bags of the requests, [B, W] each.
            candidate: bags of the candidates, [C, W] each.
            vectors: of each tower, S times [C, W].
            num_candidates_B: int64 [B].
            num_rows: C.
        """
        bags = {name: expand(bag_BW, num_candidates_B, num_rows) for name, bag_BW in request.items()}
        bags |= candidate
        for name, of_tower in vectors.items():
            bags |= zip(self.towers[name].bags, of_tower, strict=True)  # type: ignore[arg-type]
        names, widths = list(self.widths), list(self.widths.values())
        return KeyedTensor(names, widths, torch.cat([bags[name] for name in names], dim=1))


def averaged(rows: JaggedTensor, num_ids: JaggedTensor) -> JaggedTensor:
    """The mean of the rows of each entry; zero for one that has none.

    Args:
        rows: of its ids, [V, W].
        num_ids: how many each entry has, with the lengths of the result.
    """
    sums = torch.zeros(
        len(num_ids.values()), rows.values().shape[1], dtype=rows.values().dtype, device=rows.values().device
    )
    of_ids = torch.repeat_interleave(num_ids.values(), output_size=rows.values().shape[0])
    sums = sums.index_add(0, of_ids, rows.values())
    return JaggedTensor(sums / num_ids.values().clamp(min=1).unsqueeze(1), lengths=num_ids.lengths())


def place_of(feature: str, collections: Iterable[nn.Module], among: Sequence[nn.Module] | None = None) -> int:
    """The place of the collection that has the table of a feature, among all or some of them."""
    for place, collection in enumerate(collections):
        is_asked = among is None or any(collection is one for one in among)
        if is_asked and _table_of_feature(feature, collection) is not None:
            return place
    raise ValueError(f"no table of sequences is read by {feature!r}: give `sequences` one")


def _table_of_feature(feature: str, collection: nn.Module) -> EmbeddingConfig | None:
    configs: Any = collection.embedding_configs
    return next((table for table in configs() if feature in table.feature_names), None)


def bag_of(feature: str, collections: Iterable[nn.Module]) -> EmbeddingBagConfig:
    """What a bag of sequences is to a model."""
    table = _table_of_feature(feature, list(collections)[place_of(feature, collections)])
    assert table is not None
    return EmbeddingBagConfig(
        name=feature, feature_names=[feature], num_embeddings=table.num_embeddings, embedding_dim=table.embedding_dim
    )
