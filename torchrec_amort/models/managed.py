"""The managed vocabulary: a table of events and candidates that learns in training which ids get a row of their own.

It is TorchRec's zero collision hash (`MCHManagedCollisionModule`). All that is private to TorchRec is in this file; it
was tried with torchrec 1.8.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_amort.errors import InputError

# What the keys of a map in a state dict have, and those of its table.
MAP = "._managed_collision_collection."
TABLE = "._embedding_module"
# The key of the rows with which the ranks' parts of a map begin.
FIRST_ROWS = re.compile(rf"{re.escape(MAP)}_managed_collision_modules\.(.*)\._output_segments_tensor$")


class _Map(MCHManagedCollisionModule):
    """The rows of ids. Each rank has the ids of one remainder, and its last row is for those that have none."""

    _input_history_buffer_size: int

    def _init_history_buffers(self, features: dict[str, JaggedTensor]) -> None:
        super()._init_history_buffers(features)
        if self._input_history_buffer_size == 0:
            # TorchRec sizes it by the first batch: without an id there, this rank would never learn any.
            self._input_history_buffer_size = -1

    def validate_state(self) -> None:
        """Put what was loaded in order: TorchRec would forget of how many ranks the map is."""
        self._sort_mch_buffers()

    def remap(self, features: dict[str, JaggedTensor], *_: Any, **__: Any) -> dict[str, JaggedTensor]:
        """The row of each id, on one of the ranks or, with the maps of all of them, in one process."""
        first_rows = self._output_segments_tensor
        last_rows = first_rows[first_rows >= 0][1:] - 1
        remapped = {}
        for name, feature in features.items():
            ids = feature.values()
            place = torch.searchsorted(self._mch_sorted_raw_ids[:-1], ids)
            is_known = self._mch_sorted_raw_ids[place] == ids
            rows = torch.where(is_known, self._mch_remapped_ids_mapping[place], last_rows[ids % len(last_rows)])
            remapped[name] = JaggedTensor(rows, lengths=feature.lengths(), weights=feature.weights_or_none())
        return remapped


class ManagedCollection(ManagedCollisionEmbeddingCollection):
    """An EmbeddingCollection of one table, whose ids are any from 0 to 2**63 - 2.

    Made for the ranks of the default process group, or this process alone. Rows that change hands are drawn anew only
    once it is sharded.

    Args:
        table: the table; each rank needs 2 rows.
        eviction_interval: steps in which ids are counted until those that come most, lately above all, get the rows.
        device: where to put the weights.

    Raises:
        InputError: a rank would have fewer than 2 rows, or the interval is below 1.
    """

    def __init__(self, table: EmbeddingConfig, eviction_interval: int, device: torch.device | None) -> None:
        ranks, rows = dist.get_world_size() if dist.is_initialized() else 1, table.num_embeddings
        if rows - -(-rows // ranks) * (ranks - 1) < 2:
            raise InputError(
                f"table {table.name!r} is managed and has {rows} rows for {ranks} ranks: each needs 2, the last one's "
                "rest included"
            )
        if eviction_interval < 1:
            raise InputError(f"model.eviction_interval is {eviction_interval}: give 1 or more")
        rows_of_ids = _Map(
            zch_size=rows,
            device=device or torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(),
            eviction_interval=eviction_interval,
            # Ids go to ranks by their remainder, so that each rank gets its share of them, however large they are.
            input_hash_size=0,
            buckets=ranks,
        )
        super().__init__(
            EmbeddingCollection(tables=[table], device=device),
            ManagedCollisionCollection({table.name: rows_of_ids}, [table]),
        )

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The table, in a list."""
        return list(self._embedding_module.embedding_configs())

    def forward(self, features: KeyedJaggedTensor, *_: Any) -> tuple[dict[str, JaggedTensor], None]:
        """Embeddings by feature; ids are learned in training only."""
        if self.training:
            return super().forward(features)
        # TorchRec would take all batches for ones whose keys are in the first one's order.
        (table,) = self.embedding_configs()
        known = self._managed_collision_collection._managed_collision_modules[table.name]
        rows = known.remap({name: features[name] for name in table.feature_names})
        return self._embedding_module(KeyedJaggedTensor.from_jt_dict(rows)), None


class SequenceTables(nn.Module):
    """A managed table and plain tables of other event features, as one collection.

    TorchRec's collections are of one kind or the other.

    Args:
        managed: the managed table.
        plain: the others, if there are any.
    """

    def __init__(self, managed: ManagedCollection, plain: EmbeddingCollection | None) -> None:
        super().__init__()
        self.managed, self.plain = managed, plain
        self.managed_features = [name for table in managed.embedding_configs() for name in table.feature_names]
        others = [] if plain is None else plain.embedding_configs()
        self._other_features = [name for table in others for name in table.feature_names]

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """All tables."""
        return self.managed.embedding_configs() + ([] if self.plain is None else list(self.plain.embedding_configs()))

    def forward(self, sequences: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embeddings by feature."""
        of_managed, _ = self.managed(sequences)
        embeddings = {name: of_managed[name] for name in self.managed_features}
        if self.plain is not None:
            others = self.plain(sequences)
            embeddings |= {name: others[name] for name in self._other_features}
        return embeddings


class _Sharded(ShardedManagedCollisionEmbeddingCollection):
    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        if self._device.type != "cpu":
            super()._evict(evictions_per_table)
            return
        # fbgemm::reset_weight_momentum has no CPU kernel.
        for name, rows in evictions_per_table.items():
            if rows is not None and rows.numel():
                tables, place = self._table_to_tbe_and_index[name]
                with torch.no_grad():
                    weight = tables.split_embedding_weights()[int(place)]
                    weight[rows] = self._embedding_module._table_name_to_config[name].init_fn(weight[rows])
                    for state in tables.split_optimizer_states()[int(place)]:
                        state[rows] = 0


class ManagedCollectionSharder(ManagedCollisionEmbeddingCollectionSharder):
    """Spreads the rows of a ManagedCollection over ranks.

    Args:
        qcomm_codecs_registry: types of what ranks send.
    """

    def __init__(self, qcomm_codecs_registry: dict[str, Any] | None) -> None:
        # With duplicates, whose number tells how often an id came.
        super().__init__(EmbeddingCollectionSharder(qcomm_codecs_registry=qcomm_codecs_registry, use_index_dedup=False))

    def shard(
        self,
        module: ManagedCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedCollisionEmbeddingCollection:
        """See TorchRec's."""
        return _Sharded(module, params, self._e_sharder, self._mc_sharder, env, device or torch.device("cuda"))

    @property
    def module_type(self) -> type[ManagedCollection]:
        """What it shards."""
        return ManagedCollection


def refuse_other_ranks(weights: Mapping[str, Any], source: str) -> None:
    """Refuse the maps of another number of ranks: ids would look for their rows on the wrong ranks.

    One process by itself reads the maps of any number.

    Args:
        weights: as saved.
        source: where they are from, for error messages.

    Raises:
        InputError: they are of another number of ranks.
    """
    for name, first_rows in weights.items():
        if (found := FIRST_ROWS.search(name)) and dist.is_initialized():
            ranks = int((first_rows >= 0).sum()) - 1
            if ranks != dist.get_world_size():
                raise InputError(
                    f"{source}: the managed table {found[1]!r} was spread over {ranks} ranks, and there are "
                    f"{dist.get_world_size()} now: use as many as it was trained on"
                )
