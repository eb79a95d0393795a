"""From a request schema and a few numbers to an AmortizedDLRM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import PoolingType

from torchrec_amort.bounds import AT_LEAST_ONE, BELOW_ONE, refuse_out_of_bounds
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.managed import ManagedCollection, SequenceTables
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import AppendSelfAttention, Concatenation, MeanPooling, TargetAttention
from torchrec_amort.schema import Feature, InputError, RequestSchema, one_line

Encoder = Literal[
    "none",
    "mean_pooling",
    "target_attention",
    "append_self",
    "append_candidate_self",
    "append_cross",
    "append_cross_causal",
    "concatenation",
]
ENCODERS = get_args(Encoder)


@dataclass(kw_only=True)
class ModelConfig:
    """The size and kind of an AmortizedDLRM.

    Args:
        embedding_dim: D, of all tables and of the history encoder.
        history: the history encoder. Candidates appended to the history, with cross-attention to it: `append_cross`,
            or `append_cross_causal` if events read older ones only; with a candidate that reads itself, too:
            `append_candidate_self`; `mean_pooling`; `target_attention`. These encode a history once per request.
            Those that cannot: `append_self` (events read the candidate), `concatenation` (a candidate beside every
            event). `none` is the control.
        leave_out: ids and ages of the data set that the model does not read.
        history_length: events that a history may have; the latest ones are kept.
        history_layers: layers of the history encoder.
        history_heads: its attention heads.
        history_feedforward_dim: width of its feed-forward networks; twice `embedding_dim` unless given.
        positions: how an encoder knows the order of events: `recency` (a learned vector for each place, counted from
            the latest event), `rotary` (append_cross and its kin only) or `none`.
        history_vectors: vectors that append_cross and its kin make of each candidate, each a slot of the interaction.
        history_summary: append_cross and its kin add the mean of the encoded events as one slot more.
        recent_events: append_cross and its kin keep these latest events, and make `summary_tokens` rows of the older
            ones; all events are kept unless given.
        summary_tokens: rows that stand for the older events.
        dropout: dropout in the history encoder.
        interaction: `dot` or `dcn`.
        dcn_num_layers: cross layers of the DCN interaction.
        dcn_low_rank_dim: rank of its cross layers.
        dense_layers: hidden layers of the dense arch.
        over_layers: hidden layers of the over arch.
        eviction_interval: steps after which a table with vocabulary `managed` gives rows to other ids.
    """

    embedding_dim: int = 32
    history: Encoder = "append_cross"
    leave_out: list[str] = field(default_factory=list)
    history_length: int = 100
    history_layers: int = 2
    history_heads: int = 2
    history_feedforward_dim: int | None = None
    positions: Literal["recency", "rotary", "none"] = "recency"
    history_vectors: int = 1
    history_summary: bool = False
    recent_events: int | None = None
    summary_tokens: int = 4
    dropout: float = 0.0
    interaction: Literal["dot", "dcn"] = "dot"
    dcn_num_layers: int = 2
    dcn_low_rank_dim: int = 32
    dense_layers: list[int] = field(default_factory=lambda: [64])
    over_layers: list[int] = field(default_factory=lambda: [128, 64])
    eviction_interval: int = 10

    def __post_init__(self) -> None:
        sizes = ("embedding_dim", "dcn_num_layers", "dcn_low_rank_dim", "dense_layers", "over_layers")
        of_history = ("length", "layers", "heads", "feedforward_dim", "vectors")
        of_events = ("recent_events", "summary_tokens", "eviction_interval")
        at_least_one = (*sizes, *(f"history_{name}" for name in of_history), *of_events)
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, BELOW_ONE: ("dropout",)}, "model.")


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
        InputError: the config asks for a history, or leaves out a feature, that the schema does not have; no id of the
            candidate is left beside its item; or sizes do not fit each other.

    Example::

        model = build_model(RequestSchema.load("data/movielens-1m"), ModelConfig(), seed=0)
    """
    schema = schema.without(config.leave_out)
    if config.history != "none" and not schema.of("event"):
        raise InputError(
            f"model.history is {config.history!r}, but data set {schema.dataset!r} has no event features: "
            "set model.history to none"
        )
    if not schema.of("candidate", "id", "ids"):
        raise InputError(
            f"schema {schema.dataset!r}: the candidate has no feature of kind 'id' or 'ids', and the model reads 1 or "
            "more: add one, such as Feature('item_id', 'candidate', 'id', table_size, column='candidate_item')"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return _build(schema, config, device)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"model: {one_line(error)}") from error


def _build(schema: RequestSchema, config: ModelConfig, device: torch.device | None) -> AmortizedDLRM:
    dim = config.embedding_dim
    has_history = config.history != "none"
    request_ids = schema.of("request", "id", "ids")
    return AmortizedDLRM(
        candidate_embedding_bag_collection=_bags(schema.of("candidate", "id", "ids"), dim, device),
        request_embedding_bag_collection=_bags(request_ids, dim, device) if request_ids else None,
        dense_in_features=len(schema.of("request", "dense") + schema.of("candidate", "dense")),
        dense_arch_layer_sizes=[*config.dense_layers, dim],
        over_arch_layer_sizes=[*config.over_layers, len(schema.labels)],
        history_embedding_collection=_sequences(schema, config, device) if has_history else None,
        event_encoder=_event_encoder(schema, config, device) if has_history else None,
        history_arch=build_encoder(config, device) if has_history else None,
        interaction=config.interaction,
        dcn_num_layers=config.dcn_num_layers,
        dcn_low_rank_dim=config.dcn_low_rank_dim,
        dense_device=device,
    )


def _event_encoder(schema: RequestSchema, config: ModelConfig, device: torch.device | None) -> EventEncoder:
    features = [feature.name for feature in schema.of("event")]
    places = config.history_length if config.positions == "recency" else None
    return EventEncoder(features, config.embedding_dim, places, config.dropout, device)


def build_encoder(config: ModelConfig, device: torch.device | None = None) -> HistoryEncoder:
    """The history encoder that a config asks for.

    Args:
        config: size and kind; its `history` is not `none`.
        device: where to put the weights.

    Raises:
        InputError: the config asks for something that this encoder does not have.

    Example::

        encoder = build_encoder(ModelConfig(history="target_attention"))
    """
    dim = config.embedding_dim
    if config.history in _APPEND_CROSS:
        return AmortizedHistoryArch(
            *_transformer(config),
            "causal" if config.history == "append_cross_causal" else "full",
            config.dropout,
            device,
            reads_itself=config.history == "append_candidate_self",
            rotary=config.positions == "rotary",
            num_vectors=config.history_vectors,
            has_summary=config.history_summary,
            recent_events=config.recent_events,
            summary_tokens=config.summary_tokens,
        )
    _refuse_options_of_append_cross(config)
    if config.history == "mean_pooling":
        return MeanPooling(dim)
    if config.history == "target_attention":
        return TargetAttention(dim, config.history_feedforward_dim, device)
    rival = AppendSelfAttention if config.history == "append_self" else Concatenation
    return rival(*_transformer(config), config.dropout, device)


_APPEND_CROSS = ("append_cross", "append_cross_causal", "append_candidate_self")


def _transformer(config: ModelConfig) -> tuple[int, int, int, int | None]:
    return config.embedding_dim, config.history_layers, config.history_heads, config.history_feedforward_dim


def _refuse_options_of_append_cross(config: ModelConfig) -> None:
    given = {
        "positions": config.positions == "rotary",
        "history_vectors": config.history_vectors != 1,
        "history_summary": config.history_summary,
        "recent_events": config.recent_events is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise InputError(
                f"model.history is {config.history!r}, which has no model.{option}={getattr(config, option)}: "
                f"leave it out, or choose one of {', '.join(_APPEND_CROSS)}"
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


def _sequences(
    schema: RequestSchema, config: ModelConfig, device: torch.device | None
) -> EmbeddingCollection | SequenceTables:
    """One table for the items of histories and candidates, and one for each other event feature."""
    features_of_table: dict[str, list[Feature]] = {}
    for feature in schema.sequence_features:
        features_of_table.setdefault(feature.table, []).append(feature)
    tables = [
        EmbeddingConfig(
            name=name,
            feature_names=[feature.name for feature in features],
            num_embeddings=features[0].table_size or 0,
            embedding_dim=config.embedding_dim,
            init_fn=_init(config.embedding_dim),
        )
        for name, features in features_of_table.items()
    ]
    if features_of_table["item"][0].vocabulary != "managed":
        return EmbeddingCollection(tables=tables, device=device)
    (item,) = (table for table in tables if table.name == "item")
    others = [table for table in tables if table is not item]
    plain = EmbeddingCollection(tables=others, device=device) if others else None
    return SequenceTables(ManagedCollection(item, config.eviction_interval, device), plain)
