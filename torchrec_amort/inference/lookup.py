"""Embedding lookups of one process: TorchRec's tables, read with little ado.

A collection's own forward splits, pools and joins feature by feature in Python. That costs as much as a small request's
arithmetic, so that plain float32 tables are read here; any other collection, quantized ones above all, reads itself.

Shape suffixes: B requests; R rows of a batch; V values of a feature; F features; D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

Rows = tuple[Tensor, Tensor]  # values [V], and lengths: how many of each row


class BagLookup:
    """Reads an EmbeddingBagCollection, or its quantized kind.

    Args:
        bags: the collection; read where it is.

    Example::

        slots_RFD = BagLookup(model.sparse_arch.embedding_bag_collection)(batch.candidate_sparse)
    """

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        self._bags = bags
        tables = bags.embedding_bag_configs()
        self.dim: int = tables[0].embedding_dim
        self.table_sizes = _table_sizes(tables)
        self._poolings: list[tuple[str, Tensor, str]] | None = None
        if type(bags) is EmbeddingBagCollection and _are_plain(bags.embedding_bags) and not bags.is_weighted():
            self._poolings = [
                (name, bags.embedding_bags[table.name].weight, "sum" if table.pooling is PoolingType.SUM else "mean")
                for table in tables
                for name in table.feature_names
            ]

    @torch.no_grad()
    def __call__(self, features: KeyedJaggedTensor) -> Tensor:
        """Pooled embeddings, [R, F, D], features in the order of their tables, as `SparseArch` has them."""
        if self._poolings is None:
            pooled: Tensor = self._bags(features).values().unflatten(1, (-1, self.dim))
            return pooled
        values, lengths, num_rows = features.values(), features.lengths(), features.stride()
        keys = list(features.keys())
        have_one_each = values.numel() == lengths.numel() and bool((lengths == 1).all())
        # Feature by feature in memory, so that each is written in one piece.
        slots_FRD = values.new_empty(len(self._poolings), num_rows, self.dim, dtype=torch.float32)
        for place, (name, weight, mode) in enumerate(self._poolings):
            slot, first = slots_FRD[place], keys.index(name) * num_rows
            if have_one_each:
                torch.index_select(weight, 0, values[first : first + num_rows], out=slot)
            else:
                ids, lengths_R = rows_of(features, name, 0, num_rows)
                starts_R = torch.cumsum(lengths_R, 0) - lengths_R
                slot.copy_(F.embedding_bag(ids, weight, starts_R, mode=mode))
        return slots_FRD.transpose(0, 1)


class SequenceLookup:
    """Reads an EmbeddingCollection, or its quantized kind.

    Args:
        collection: read where it is.

    Example::

        lookup = SequenceLookup(model.history_embedding_collection)
        events = lookup({"history_item": (ids, lengths_B)})["history_item"]
    """

    def __init__(self, collection: EmbeddingCollection) -> None:
        self._collection = collection
        tables = collection.embedding_configs()
        self.table_sizes = _table_sizes(tables)
        self._features = [name for table in tables for name in table.feature_names]
        self._weights: dict[str, Tensor] | None = None
        if type(collection) is EmbeddingCollection and _are_plain(collection.embeddings):
            self._weights = {
                name: collection.embeddings[table.name].weight for table in tables for name in table.feature_names
            }

    @torch.no_grad()
    def __call__(self, sequences: Mapping[str, Rows]) -> dict[str, JaggedTensor]:
        """Embeddings of some features, each [V, D] with one row of B per request."""
        if self._weights is not None:
            return {
                name: JaggedTensor(F.embedding(values, self._weights[name]), lengths=lengths_B)
                for name, (values, lengths_B) in sequences.items()
                if name in self._weights
            }
        values, lengths_B = next(iter(sequences.values()))
        none = values[:0], torch.zeros_like(lengths_B)
        every = {name: sequences.get(name, none) for name in self._features}
        embeddings: dict[str, JaggedTensor] = self._collection(keyed(every, len(lengths_B)))
        return embeddings


def rows_of(kjt: KeyedJaggedTensor, key: str, start: int, stop: int) -> Rows:
    """Values and lengths of the rows of a key from `start` to `stop`."""
    first = kjt.keys().index(key) * kjt.stride()
    offsets = kjt.offsets()
    begin, end = int(offsets[first + start]), int(offsets[first + stop])
    return kjt.values()[begin:end], kjt.lengths()[first + start : first + stop]


def keyed(rows: Mapping[str, Rows], stride: int) -> KeyedJaggedTensor:
    """Put the rows of several keys together."""
    if not rows:
        return KeyedJaggedTensor.empty()
    values, lengths = zip(*rows.values(), strict=True)
    return KeyedJaggedTensor(list(rows), torch.cat(values), lengths=torch.cat(lengths), stride=stride)


def _are_plain(tables: nn.ModuleDict) -> bool:
    return all(table.weight.dtype == torch.float32 for table in tables.values())


def _table_sizes(tables: Iterable[Any]) -> dict[str, int]:
    return {name: table.num_embeddings for table in tables for name in table.feature_names}
