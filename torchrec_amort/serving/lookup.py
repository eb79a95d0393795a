"""Embedding lookups of one process: TorchRec's tables, read with little ado.

A collection's own forward splits, pools and joins feature by feature in Python. That costs as much as a small request's
arithmetic, so that plain float32 tables are read here; any other collection, quantized ones above all, reads itself.

Shape suffixes: B requests; R rows of a batch; V values of a feature; F features; D embedding dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.jagged_ids import have_one_each, keyed, rows_of, span_of
from torchrec_amort.lists import Entries
from torchrec_amort.models.bags import Reads, SequenceBag, averaged
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.modules.plain import Plain
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.schema import ANY_ID

PLAIN_TABLES = Plain(EmbeddingBagCollection, EmbeddingCollection, nn.ModuleDict, nn.EmbeddingBag, nn.Embedding)

_SEQUENCES = Plain(EmbeddingCollection, QuantEmbeddingCollection, SequenceTables)

# Embeddings of bags or events, by their names.
Embeddings = Mapping[str, EmbeddingRows]
# A feature, and which collection of sequences has its table; numbers have none.
Place = tuple[int | None, str]


@dataclass(frozen=True, eq=False)
class Lookups:
    """All lookups of a model, in its tables where they are.

    Args:
        request_bags: of the requests' ids; None if they have none.
        candidate_bags: of the candidates' ids; None if they have none.
        sequences: of what requests list.
        reads: of each tower, by its name, which of `sequences` what it reads is in.
        sequence_bags: bags of what `sequences` look up, by their names.
    """

    request_bags: BagLookup | None
    candidate_bags: BagLookup | None
    sequences: Sequence[SequenceLookup]
    reads: Mapping[str, Reads]
    sequence_bags: Mapping[str, SequenceBag]

    @classmethod
    def of(cls, collection: AmortizedEmbeddingBagCollection, names: Mapping[nn.Module, str]) -> Lookups:
        """The lookups of a collection that is not sharded.

        Args:
            collection: of a model.
            names: of the model's modules.

        Raises:
            ValueError: its tables cannot be read as the model reads them.
        """
        request, candidate = collection.request_bags, collection.candidate_bags
        return cls(
            None if request is None else BagLookup(request, names[request]),
            None if candidate is None else BagLookup(candidate, names[candidate]),
            [SequenceLookup(sequences, names[sequences]) for sequences in collection.sequences],
            collection.bags.reads,
            collection.bags.sequence_bags,
        )

    @property
    def bags(self) -> dict[str, BagLookup]:
        """Lookups of bags by the field of a batch that they read."""
        sides = {"candidate_sparse": self.candidate_bags, "request_sparse": self.request_bags}
        return {field: bags for field, bags in sides.items() if bags is not None}

    @property
    def table_sizes(self) -> dict[str, int]:
        """Rows of the table of each feature."""
        lookups: list[BagLookup | SequenceLookup] = [*self.bags.values(), *self.sequences]
        sizes: dict[str, int] = {}
        for lookup in lookups:
            for name, size in lookup.table_sizes.items():
                sizes[name] = min(size, sizes.get(name, size))
        return sizes

    @property
    def features(self) -> dict[str, list[str]]:
        """Features that are read of each field of a batch."""
        of_sequences = [name for lookup in self.sequences for name in lookup.table_sizes]
        of_reads = [{**reads.events, **reads.items} for reads in self.reads.values()]
        numbers = dict.fromkeys(name for places in of_reads for name, place in places.items() if place is None)
        of_lists = {"sequences": of_sequences, "dense_sequences": list(numbers)}
        return {field: list(bags.table_sizes) for field, bags in self.bags.items()} | of_lists

    @property
    def events(self) -> dict[str, list[str]]:
        """Features of the events of each tower."""
        return {tower: list(reads.events) for tower, reads in self.reads.items()}

    def of_requests(self, batch: RequestBatch) -> Embeddings:
        """Bags of the requests."""
        bags = {} if self.request_bags is None else self.request_bags(batch.request_sparse)
        if not (places := self._bags_of_sequences(True)):
            return bags
        rows = self._rows(places.values(), batch.request_lists.entries)
        return {**bags, **{name: rows[place] for name, place in places.items()}}

    def of_candidates(self, batch: RequestBatch) -> tuple[Embeddings, Mapping[str, Embeddings]]:
        """Bags of the candidates, and what each tower reads of them."""
        bags = {} if self.candidate_bags is None else self.candidate_bags(batch.candidate_sparse)
        places = self._bags_of_sequences(False)
        items = {tower: {name: (of, name) for name, of in reads.items.items()} for tower, reads in self.reads.items()}
        wanted = [*places.values(), *(place for of_tower in items.values() for place in of_tower.values())]
        rows = self._rows(wanted, batch.request_lists.entries)
        bags = {**bags, **{name: rows[place] for name, place in places.items()}}
        return bags, {
            tower: {name: rows[place] for name, place in of_tower.items()} for tower, of_tower in items.items()
        }

    def of_events(self, tower: str, events: Mapping[str, Entries]) -> Embeddings:
        """What a tower reads of its events."""
        places = {name: (of, name) for name, of in self.reads[tower].events.items()}
        rows = self._rows(places.values(), events.__getitem__)
        return {name: rows[place] for name, place in places.items()}

    def _bags_of_sequences(self, is_of_request: bool) -> dict[str, Place]:
        bags = self.sequence_bags.items()
        return {name: (bag.place, bag.feature) for name, bag in bags if bag.is_of_request == is_of_request}

    def _rows(self, wanted: Iterable[Place], entries: Callable[[str], Entries]) -> dict[Place, EmbeddingRows]:
        """A row for each entry of some features, each collection asked once."""
        rows: dict[Place, EmbeddingRows] = {}
        features_of: dict[int, dict[str, Entries]] = {}
        for of, name in dict.fromkeys(wanted):
            if of is None:
                rows[of, name] = EmbeddingRows(entries(name).values)
            else:
                features_of.setdefault(of, {})[name] = entries(name)
        for of, features in features_of.items():
            rows |= {(of, name): of_name for name, of_name in self.sequences[of](features).items()}
        return rows


class BagLookup:
    """Reads an EmbeddingBagCollection, or its quantized kind.

    Args:
        bags: the collection; read where it is.
        name: its name in the model.

    Raises:
        ValueError: it is sharded or unknown; a table of a weighted collection pools by the mean.

    Example::

        bags = BagLookup(model.sparse_arch.embedding_bag_collection, "bags")(batch.candidate_sparse)
        film_RD = bags["candidate_id"].tensor()
    """

    def __init__(self, bags: EmbeddingBagCollection, name: str) -> None:
        if not isinstance(bags, EmbeddingBagCollection | QuantEmbeddingBagCollection):
            raise ValueError(f"{name} is a {type(bags).__name__}, sharded or unknown: score with the model itself")
        self._bags = _in_eval(bags)
        tables = bags.embedding_bag_configs()
        # Quantized tables have buffers alone.
        self._weights_dtype = next((weight.dtype for weight in bags.parameters()), torch.float32)
        self.table_sizes = _table_sizes(tables)
        self.is_weighted: bool = bags.is_weighted()
        for table in tables if self.is_weighted and type(bags) is EmbeddingBagCollection else ():
            if table.pooling is not PoolingType.SUM:
                raise ValueError(f"table {table.name!r} is weighted and pools by the mean, which PyTorch cannot: sum")
        self._names = _names(bags)
        self._poolings: list[tuple[str, str, Tensor, str]] | None = None
        if _is_plain(bags):
            self._poolings = [
                (
                    name,
                    feature,
                    bags.embedding_bags[table.name].weight.detach(),
                    "sum" if table.pooling is PoolingType.SUM else "mean",
                )
                for table, of_table in zip(tables, get_embedding_names_by_table(tables), strict=True)
                for name, feature in zip(of_table, table.feature_names, strict=True)
            ]

    @torch.no_grad()
    def __call__(self, features: KeyedJaggedTensor) -> Embeddings:
        """Pooled embeddings of each bag, in the order of their tables.

        Args:
            features: ids, with weights if the collection is weighted.
        """
        if self.is_weighted:
            features = self._with_weights_of_its_type(features)
        if self._poolings is None:
            pooled = self._bags(features).to_dict()
            return {name: EmbeddingRows(pooled[name]) for name in self._names}
        num_rows = features.stride()
        if have_one_each(features) and not self.is_weighted:
            ids = features.values().view(len(features.keys()), num_rows)
            ids_of = dict(zip(features.keys(), ids.long().contiguous().unbind(), strict=True))
            return {name: EmbeddingRows(table, ids_of[feature]) for name, feature, table, _ in self._poolings}
        bags = {}
        for name, feature, table, mode in self._poolings:
            ids, lengths_R = rows_of(features, feature, 0, num_rows)
            starts_R = torch.cumsum(lengths_R, 0) - lengths_R
            weights = features.weights()[span_of(features, feature, 0, num_rows)] if self.is_weighted else None
            rows_RD = F.embedding_bag(ids.long(), table, starts_R, mode=mode, per_sample_weights=weights)
            bags[name] = EmbeddingRows(rows_RD)
        return bags

    def _with_weights_of_its_type(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Sharded tables, with which a model is trained, take weights of any type."""
        weights = features.weights()
        if weights.dtype == self._weights_dtype:
            return features
        weights = weights.to(self._weights_dtype)
        return KeyedJaggedTensor(
            features.keys(), features.values(), weights, features.lengths(), stride=features.stride()
        )


class SequenceLookup:
    """Reads an EmbeddingCollection, its quantized kind, or one with a managed table.

    Args:
        collection: read where it is.
        name: its name in the model.

    Raises:
        ValueError: it is sharded, unknown or has hooks.

    Example::

        lookup = SequenceLookup(model.history_embedding_collection, "events")
        events_ND = lookup({"history_item": Entries(ids_N, lengths_B)})["history_item"].tensor()
    """

    def __init__(self, collection: EmbeddingCollection | SequenceTables, name: str) -> None:
        # Events and candidates' items are looked up one after the other: a hook would see half of each batch.
        if reason := _SEQUENCES.why_not(collection, name):
            raise ValueError(f"{reason}: score with the model itself")
        self._collection = _in_eval(collection)
        tables = collection.embedding_configs()
        self.table_sizes = _table_sizes(tables)
        self._features = [name for table in tables for name in table.feature_names]
        self._weights: dict[str, Tensor] | None = None
        if isinstance(collection, SequenceTables):
            self.table_sizes |= dict.fromkeys(collection.managed_features, ANY_ID)
        elif _is_plain(collection):
            self._weights = {
                name: collection.embeddings[table.name].weight.detach()
                for table in tables
                for name in table.feature_names
            }

    @torch.no_grad()
    def __call__(self, entries: Mapping[str, Entries]) -> dict[str, EmbeddingRows]:
        """A row for each entry of some features; the mean of several ids'."""
        if self._weights is not None:
            return {name: _rows_of(self._weights[name], of_name) for name, of_name in entries.items()}
        given = {name: (of_name.values, of_name.num_values) for name, of_name in entries.items()}
        ids, lengths_B = next(iter(given.values()))
        none = ids[:0], torch.zeros_like(lengths_B)
        every = {name: given.get(name, none) for name in self._features}
        embeddings: dict[str, JaggedTensor] = self._collection(keyed(every, len(lengths_B)))
        return {name: EmbeddingRows(_averaged(embeddings[name], of_name)) for name, of_name in entries.items()}


def _rows_of(table: Tensor, entries: Entries) -> EmbeddingRows:
    ids = entries.values.long().contiguous()
    if entries.num_ids is None:
        return EmbeddingRows(table, ids)
    starts = torch.cumsum(entries.num_ids, 0) - entries.num_ids
    return EmbeddingRows(F.embedding_bag(ids, table, starts, mode="mean"))


def _averaged(embeddings: JaggedTensor, entries: Entries) -> Tensor:
    if entries.num_ids is None:
        rows: Tensor = embeddings.values()
    else:
        rows = averaged(embeddings, JaggedTensor(entries.num_ids, lengths=entries.lengths)).values()
    return rows


def bags_of(collection: AmortizedEmbeddingBagCollection, side: Literal["request", "candidate"]) -> list[str]:
    """Names of the bags of one side that a collection looks up, in order."""
    bags = collection.request_bags if side == "request" else collection.candidate_bags
    of_sequences = collection.bags.sequence_bags.items()
    names = [name for name, bag in of_sequences if bag.is_of_request == (side == "request")]
    return [*(_names(bags) if bags is not None else ()), *names]


def _names(bags: EmbeddingBagCollection) -> list[str]:
    return [name for of_table in get_embedding_names_by_table(bags.embedding_bag_configs()) for name in of_table]


def _in_eval(collection: Any) -> Any:
    """A collection in eval mode, which learns no ids and drops nothing; its weights are the collection's own."""
    if not collection.training:
        return collection
    weights = [*collection.parameters(), *collection.buffers()]
    return copy.deepcopy(collection, {id(weight): weight for weight in weights}).eval()


def _is_plain(collection: nn.Module) -> bool:
    """Whether a collection reads rows of its float32 tables and does nothing else."""
    if PLAIN_TABLES.why_not_any(collection, "") is not None:
        return False
    tables = [table for table in collection.modules() if isinstance(table, nn.EmbeddingBag | nn.Embedding)]
    return all(
        table.weight.dtype == torch.float32 and table.padding_idx is None and table.max_norm is None for table in tables
    )


def _table_sizes(tables: Iterable[Any]) -> dict[str, int]:
    return {name: table.num_embeddings for table in tables for name in table.feature_names}
