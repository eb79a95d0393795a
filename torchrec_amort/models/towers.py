"""From a schema to the collection that a model is built on: tables of any width, and a tower for each history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import PoolingType

from torchrec_amort.errors import InputError
from torchrec_amort.models.bags import SequenceBag
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.managed import ManagedCollection, SequenceTables
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import OTHER_ITEM, Feature, RequestSchema, TableConfig
from torchrec_amort.stores import local_path


@dataclass(frozen=True, eq=False)
class TowerParts:
    """What a tower is made of, beside its tables.

    Args:
        history: that it reads.
        encoder: of it.
        event_encoder: makes the encoder of events of such features.
        features: of events that it reads; all if None.
    """

    history: str
    encoder: HistoryEncoder
    event_encoder: Callable[[list[str]], EventEncoder]
    features: Sequence[str] | None = None

    def events(self, schema: RequestSchema, tower: str) -> list[Feature]:
        """The features of events that it reads.

        Args:
            schema: of the requests.
            tower: its name, for the error message.

        Raises:
            InputError: the history has no such feature.
        """
        events = {feature.name: feature for feature in schema.histories[self.history]}
        for name in (chosen := events if self.features is None else self.features):
            if name not in events:
                raise InputError(
                    f"model.towers.{tower}: history {self.history!r} has no feature {name!r}, only {list(events)}"
                )
        if not chosen:
            raise InputError(f"model.towers.{tower}: features are none: name one of {list(events)} at least")
        return [events[name] for name in chosen]


def build_collection(
    schema: RequestSchema,
    towers: Mapping[str, TowerParts],
    dim: int,
    *,
    device: torch.device | None = None,
    eviction_interval: int = 10,
) -> AmortizedEmbeddingBagCollection:
    """The collection of a schema's tables and histories.

    A candidate reads a history by the features that share a table with the history's events; those are no bags.

    Args:
        schema: what the requests are made of.
        towers: what each is made of, by its name.
        dim: D, width of tables that have no other, and of all bags.
        device: where to put the tables.
        eviction_interval: steps after which a managed table gives rows to other ids.

    Returns:
        AmortizedEmbeddingBagCollection: with a bag for each other feature that is looked up.

    Raises:
        InputError: no feature of candidates shares a table with a history, a managed table is of no history, or a file
            of vectors does not fit.

    Example::

        arch = AmortizedHistoryArch(32)
        parts = TowerParts("history", arch, partial(EventEncoder, embedding_dim=32, max_length=100))
        sparse = build_collection(schema, {"history": parts}, 32)
    """
    tables, listed = Tables(schema, dim, device, eviction_interval), schema.sequence_features
    of_events = {feature.table for feature in schema.of("event") if feature.is_looked_up}
    bags = [f for f in listed if f.side == "request" or (f.side == "candidate" and f.table not in of_events)]
    tables.refuse_managed(bags)
    read = {feature.name: feature.table for name, parts in towers.items() for feature in parts.events(schema, name)}
    of_towers = set(read.values())
    others = [f for f in listed if f.name in read or (f.side == "candidate" and f.table in of_towers)]
    sequences = tables.sequences([f for f in listed if f in bags or f in others])
    made = [_tower(name, schema, parts, sequences) for name, parts in towers.items()]
    of_request, of_candidate = (schema.bag_features[side] for side in ("request", "candidate"))
    return AmortizedEmbeddingBagCollection(
        tables.bags([*of_request, *of_candidate]),
        made,
        [feature.name for feature in of_request],
        width=dim,
        sequence_bags=[SequenceBag(feature.name, feature.side == "request") for feature in bags],
        sequences=sequences,
    )


def _tower(
    name: str,
    schema: RequestSchema,
    parts: TowerParts,
    sequences: Sequence[EmbeddingCollection | SequenceTables],
) -> HistoryTower:
    events = parts.events(schema, name)
    like = {feature.table: feature.name for feature in reversed(events)}
    listed = [*schema.sequence_features, *schema.dense_sequence_features]
    candidates = [f for f in listed if f.side == "candidate" and f.table in like]
    if not candidates:
        raise InputError(
            f"schema {schema.dataset!r}: no feature of candidates shares a table with history {parts.history!r}, whose "
            f"tables are {sorted({f.table for f in events})}: candidates need one to read it by"
        )
    return HistoryTower(
        name,
        parts.encoder,
        events=sequences,
        event_encoder=parts.event_encoder([feature.name for feature in events]),
        starts_at_zero=False,
        candidate_features={feature.name: like[feature.table] for feature in candidates},
        numbers={feature.name: feature.num_inputs for feature in (*events, *candidates) if feature.num_inputs},
    )


class Tables:
    """Tables of features, those that share one together.

    Args:
        schema: of the features.
        dim: width of tables that have no other.
        device: where to put them.
        eviction_interval: steps after which a managed table gives rows to other ids.

    Example::

        bags = Tables(schema, 32, None, 10).bags(schema.bag_features["candidate"])
    """

    def __init__(self, schema: RequestSchema, dim: int, device: torch.device | None, eviction_interval: int) -> None:
        self.device, self._eviction_interval = device, eviction_interval
        self._schema, self._dim = schema, dim

    @staticmethod
    def _of(features: Sequence[Feature]) -> dict[str, list[Feature]]:
        of_tables: dict[str, list[Feature]] = {}
        for feature in features:
            # As models of version 1 called the table of an id of this name.
            table = feature.name if feature.table == OTHER_ITEM else feature.table
            of_tables.setdefault(table, []).append(feature)
        return of_tables

    def _config(self, name: str) -> TableConfig:
        return self._schema.tables.get(name, TableConfig())

    def _width(self, name: str) -> int:
        return self._config(name).width or self._dim

    def _init(self, name: str, rows: int) -> partial[Tensor]:
        width, file = self._width(name), self._config(name).pretrained
        if not file:
            # Rows of unit length on average, whatever the size of the table, so that sums of rows are balanced.
            return partial(nn.init.normal_, std=width**-0.5)
        return partial(_copy, vectors=_vectors(local_path(file), rows, width, name))

    def refuse_managed(self, features: Sequence[Feature]) -> None:
        """Refuse features that become bags and are of a managed table.

        Raises:
            InputError: one is.
        """
        for feature in features:
            if feature.vocabulary == "managed":
                raise InputError(
                    f"schema {self._schema.dataset!r}: table {feature.table!r} of {feature.name!r} is managed, but the "
                    "model reads no history of it: train with vocabulary 'hash' for it"
                )

    def bags(self, features: Sequence[Feature]) -> EmbeddingBagCollection | None:
        """Bags of features; several ids are averaged. None of none.

        Raises:
            InputError: one is of a managed table.
        """
        self.refuse_managed(features)
        tables = [
            EmbeddingBagConfig(
                name=name,
                feature_names=[feature.name for feature in of_table],
                num_embeddings=of_table[0].table_size or 0,
                embedding_dim=self._width(name),
                pooling=PoolingType.MEAN if any(f.kind == "ids" for f in of_table) else PoolingType.SUM,
                init_fn=self._init(name, of_table[0].table_size or 0),
            )
            for name, of_table in self._of(features).items()
        ]
        return EmbeddingBagCollection(tables=tables, device=self.device) if tables else None

    def of_sequences(self, features: Sequence[Feature]) -> list[EmbeddingConfig]:
        """What the tables of sequences are."""
        return [
            EmbeddingConfig(
                name=name,
                feature_names=[feature.name for feature in of_table],
                num_embeddings=of_table[0].table_size or 0,
                embedding_dim=self._width(name),
                init_fn=self._init(name, of_table[0].table_size or 0),
            )
            for name, of_table in self._of(features).items()
        ]

    def sequences(self, features: Sequence[Feature]) -> list[EmbeddingCollection | SequenceTables]:
        """A collection for each width, since TorchRec's have one, and one of the table that is managed."""
        managed = {feature.table for feature in features if feature.vocabulary == "managed"}
        of_widths: dict[int, list[EmbeddingConfig]] = {}
        collections: list[EmbeddingCollection | SequenceTables] = []
        for table in self.of_sequences(features):
            if table.name in managed:
                collections.append(SequenceTables(self.managed(table), None))
            else:
                of_widths.setdefault(table.embedding_dim, []).append(table)
        plain = [EmbeddingCollection(tables=tables, device=self.device) for tables in of_widths.values()]
        return [*plain, *collections]

    def managed(self, table: EmbeddingConfig) -> ManagedCollection:
        """The collection of a managed table."""
        return ManagedCollection(table, self._eviction_interval, self.device)


def _vectors(path: Path, rows: int, width: int, table: str) -> Tensor:
    """The initial vectors of a table."""
    if path.suffix == ".npy":
        vectors = np.load(path).astype(np.float32, copy=False)
    else:
        given = pq.read_table(path, columns=["id", "vector"])
        ids, sizes = given["id"].to_numpy(), given["vector"].combine_chunks().value_lengths().to_numpy()
        if len(wrong := np.flatnonzero((sizes != width) | (ids < 0) | (ids >= rows))):
            row = int(wrong[0])
            raise InputError(
                f"{path}: row {row}: id {ids[row]} has {sizes[row]} numbers, but table {table!r} has {rows} rows of "
                f"{width}"
            )
        vectors = np.zeros((rows, width), np.float32)
        vectors[ids] = given["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    if vectors.shape != (rows, width):
        raise InputError(f"{path}: vectors are {vectors.shape}, but table {table!r} has {rows} rows of {width}")
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: row {int(np.argwhere(~np.isfinite(vectors))[0, 0])} is not finite: mend the file")
    return torch.from_numpy(vectors)


def _copy(weight: Tensor, vectors: Tensor) -> Tensor:
    # TorchRec draws a shard's rows as if they were the whole table; `build_model` makes tables whole.
    with torch.no_grad():
        return weight.copy_(vectors)
