"""From a request schema and a few numbers to an AmortizedDLRM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import PoolingType

from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch, HistoryAttention
from torchrec_amort.schema import Feature, InputError, RequestSchema


@dataclass(kw_only=True)
class ModelConfig:
    """The size and kind of an AmortizedDLRM.

    Args:
        embedding_dim: D, of all tables and of the history encoder.
        history: the history encoder: `append_cross` (candidates appended, cross-attention to the
            history), or `none` for the control.
        history_attention: how events read each other: `full` or `causal`.
        history_length: events that a history may have.
        history_layers: layers of the history encoder.
        history_heads: its attention heads.
        history_feedforward_dim: width of its feed-forward networks; twice `embedding_dim` unless given.
        dropout: dropout in the history encoder.
        interaction: `dot` or `dcn`.
        dcn_num_layers: cross layers of the DCN interaction.
        dcn_low_rank_dim: rank of its cross layers.
        dense_layers: hidden layers of the dense arch.
        over_layers: hidden layers of the over arch.
    """

    embedding_dim: int = 32
    history: Literal["none", "append_cross"] = "append_cross"
    history_attention: HistoryAttention = "full"
    history_length: int = 100
    history_layers: int = 2
    history_heads: int = 2
    history_feedforward_dim: int | None = None
    dropout: float = 0.0
    interaction: Literal["dot", "dcn"] = "dot"
    dcn_num_layers: int = 2
    dcn_low_rank_dim: int = 32
    dense_layers: list[int] = field(default_factory=lambda: [64])
    over_layers: list[int] = field(default_factory=lambda: [128, 64])


def build_model(
    schema: RequestSchema,
    config: ModelConfig,
    *,
    device: torch.device | None = None,
    seed: int | None = None,
) -> AmortizedDLRM:
    """Build the model that reads the requests of a schema.

    Args:
        schema: what the requests are made of.
        config: size and kind of the model.
        device: where to put the weights, tables included.
        seed: makes the initial weights, the same for the same seed; the global generator's if None.

    Returns:
        AmortizedDLRM: untrained.

    Raises:
        InputError: the config asks for a history that the schema does not have.

    Example::

        model = build_model(RequestSchema.load("data/movielens-1m"), ModelConfig(), seed=0)
    """
    if config.history != "none" and not schema.of("event"):
        raise InputError(
            f"model.history is {config.history!r}, but data set {schema.dataset!r} has no event features: "
            "set model.history to none"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _build(schema, config, device)


def _build(schema: RequestSchema, config: ModelConfig, device: torch.device | None) -> AmortizedDLRM:
    dim = config.embedding_dim
    has_history = config.history != "none"
    event_features = [feature.name for feature in schema.of("event")]
    request_ids = schema.of("request", "id", "ids")
    return AmortizedDLRM(
        candidate_embedding_bag_collection=_bags(schema.of("candidate", "id", "ids"), dim, device),
        request_embedding_bag_collection=_bags(request_ids, dim, device) if request_ids else None,
        dense_in_features=len(schema.of("request", "dense") + schema.of("candidate", "dense")),
        dense_arch_layer_sizes=[*config.dense_layers, dim],
        over_arch_layer_sizes=[*config.over_layers, len(schema.labels)],
        history_embedding_collection=_sequences(schema, dim, device) if has_history else None,
        event_encoder=(
            EventEncoder(event_features, dim, config.history_length, config.dropout, device) if has_history else None
        ),
        history_arch=(
            AmortizedHistoryArch(
                dim,
                config.history_layers,
                config.history_heads,
                config.history_feedforward_dim,
                config.history_attention,
                config.dropout,
                device,
            )
            if has_history
            else None
        ),
        interaction=config.interaction,
        dcn_num_layers=config.dcn_num_layers,
        dcn_low_rank_dim=config.dcn_low_rank_dim,
        dense_device=device,
    )


def _init(dim: int) -> partial[torch.Tensor]:
    """Rows of unit length on average, whatever the size of the table, so that sums of rows are balanced."""
    return partial(nn.init.normal_, std=dim**-0.5)


def _bags(features: Sequence[Feature], dim: int, device: torch.device | None) -> EmbeddingBagCollection:
    """One table for each feature; several ids are averaged."""
    tables = [
        EmbeddingBagConfig(
            name=feature.name,
            feature_names=[feature.name],
            num_embeddings=feature.table_size or 0,
            embedding_dim=dim,
            pooling=PoolingType.MEAN if feature.kind == "ids" else PoolingType.SUM,
            init_fn=_init(dim),
        )
        for feature in features
    ]
    return EmbeddingBagCollection(tables=tables, device=device)


def _sequences(schema: RequestSchema, dim: int, device: torch.device | None) -> EmbeddingCollection:
    """One table for the items of histories and candidates, and one for each other event feature."""
    features_of_table: dict[str, list[Feature]] = {}
    for feature in schema.sequence_features:
        features_of_table.setdefault("item" if feature.kind == "item" else feature.name, []).append(feature)
    tables = [
        EmbeddingConfig(
            name=name,
            feature_names=[feature.name for feature in features],
            num_embeddings=features[0].table_size or 0,
            embedding_dim=dim,
            init_fn=_init(dim),
        )
        for name, features in features_of_table.items()
    ]
    return EmbeddingCollection(tables=tables, device=device)
