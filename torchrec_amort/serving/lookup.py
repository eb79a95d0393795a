"""Embedding lookups of one process: TorchRec's tables, read with little ado.

A collection's own forward splits, pools and joins feature by feature in Python. That costs as much as a small request's
arithmetic, so that plain float32 tables are read here; any other collection, quantized ones above all, reads itself.

Shape suffixes: B requests; R rows of a batch; V values of a feature; F features; D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.jagged_ids import JaggedIds, have_one_each, keyed, rows_of, rows_of_all, span_of
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.modules.plain import Plain
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.schema import ANY_ID

PLAIN_TABLES = Plain(EmbeddingBagCollection, EmbeddingCollection, nn.ModuleDict, nn.EmbeddingBag, nn.Embedding)

Slots = Sequence[EmbeddingRows]


def stack(slots: Slots, dim: int, dense_RI: Tensor) -> Tensor:
    """[R, F, D] of F features; if there are none, for as many rows as there are of dense inputs."""
    if not slots:
        return dense_RI.new_empty(dense_RI.shape[0], 0, dim)
    return torch.stack([slot.tensor() for slot in slots], dim=1)


class BagLookup:
    """Reads an EmbeddingBagCollection, or its quantized kind.

    Args:
        bags: the collection; read where it is.

    Raises:
        ValueError: a table of a weighted collection pools by the mean.

    Example::

        slots = BagLookup(model.sparse_arch.embedding_bag_collection)(batch.candidate_sparse)
        first_RD = slots[0].tensor()
    """

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        self._bags = bags
        tables = bags.embedding_bag_configs()
        self.dim: int = tables[0].embedding_dim
        weights = [*bags.parameters(), *bags.buffers()]
        self.device = weights[0].device if weights else torch.device("cpu")
        # Quantized tables have buffers alone.
        self._weights_dtype = next((weight.dtype for weight in bags.parameters()), torch.float32)
        self.table_sizes = _table_sizes(tables)
        self.is_weighted: bool = bags.is_weighted()
        for table in tables if self.is_weighted and type(bags) is EmbeddingBagCollection else ():
            if table.pooling is not PoolingType.SUM:
                raise ValueError(f"table {table.name!r} is weighted and pools by the mean, which PyTorch cannot: sum")
        self._features = [name for table in tables for name in table.feature_names]
        self._poolings: list[tuple[str, Tensor, str]] | None = None
        if _is_plain(bags):
            self._poolings = [
                (
                    name,
                    bags.embedding_bags[table.name].weight.detach(),
                    "sum" if table.pooling is PoolingType.SUM else "mean",
                )
                for table in tables
                for name in table.feature_names
            ]

    @torch.no_grad()
    def __call__(self, features: KeyedJaggedTensor, start: int = 0, stop: int | None = None) -> Slots:
        """Pooled embeddings of each feature, in the order of their tables, as `SparseArch` has them.

        Args:
            features: ids, with weights if the collection is weighted.
            start: the first row that is read.
            stop: where they end; with the last one if None.
        """
        stop = features.stride() if stop is None else stop
        if self.is_weighted:
            features = self._with_weights_of_its_type(features)
        if self._poolings is None:
            if stop - start < features.stride():
                features = rows_of_all(features, start, stop)
            pooled = self._bags(features).to_dict()
            return [EmbeddingRows(pooled[name]) for name in self._features]
        if have_one_each(features) and not self.is_weighted:
            ids = features.values().view(len(features.keys()), features.stride())[:, start:stop]
            ids_of = dict(zip(features.keys(), ids.long().unbind(), strict=True))
            return [EmbeddingRows(table, ids_of[name]) for name, table, _ in self._poolings]
        slots = []
        for name, table, mode in self._poolings:
            ids, lengths_R = rows_of(features, name, start, stop)
            starts_R = torch.cumsum(lengths_R, 0) - lengths_R
            weights = features.weights()[span_of(features, name, start, stop)] if self.is_weighted else None
            rows_RD = F.embedding_bag(ids.long(), table, starts_R, mode=mode, per_sample_weights=weights)
            slots.append(EmbeddingRows(rows_RD))
        return slots

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

    Example::

        lookup = SequenceLookup(model.history_embedding_collection)
        events_ND = lookup({"history_item": (ids_N, lengths_B)})["history_item"].tensor()
    """

    def __init__(self, collection: EmbeddingCollection | SequenceTables) -> None:
        self._collection = collection
        tables = collection.embedding_configs()
        self.table_sizes = _table_sizes(tables)
        self._features = [name for table in tables for name in table.feature_names]
        self._weights: dict[str, Tensor] | None = None
        if isinstance(collection, SequenceTables):
            self.table_sizes |= dict.fromkeys(collection.item_features, ANY_ID)
        elif _is_plain(collection):
            self._weights = {
                name: collection.embeddings[table.name].weight.detach()
                for table in tables
                for name in table.feature_names
            }

    @torch.no_grad()
    def __call__(self, sequences: Mapping[str, JaggedIds]) -> dict[str, EmbeddingRows]:
        """Embeddings of the ids of some features, which have one row of B per request each."""
        if self._weights is not None:
            return {name: EmbeddingRows(self._weights[name], ids.long()) for name, (ids, _) in sequences.items()}
        ids, lengths_B = next(iter(sequences.values()))
        none = ids[:0], torch.zeros_like(lengths_B)
        every = {name: sequences.get(name, none) for name in self._features}
        embeddings: dict[str, JaggedTensor] = self._collection(keyed(every, len(lengths_B)))
        return {name: EmbeddingRows(embeddings[name].values()) for name in sequences}


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
