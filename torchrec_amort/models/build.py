"""From a request schema and a few numbers to an AmortizedDLRM, or to the ranker that a user's function makes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_amort.bounds import AT_LEAST_ONE, BELOW_ONE, refuse_out_of_bounds
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.models.attach import call_with_constant
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.managed import ManagedCollection, SequenceTables
from torchrec_amort.models.ranker import ModelRanker, Ranker, call_model
from torchrec_amort.models.towers import Tables, TowerParts, build_collection
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import Combine, EventEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import AppendSelfAttention, Concatenation, MeanPooling, TargetAttention
from torchrec_amort.modules.similarity import WINDOWS, HistoryMatches, HistorySimilarity
from torchrec_amort.modules.tower import CANDIDATE_ITEM
from torchrec_amort.schema import HISTORY, RequestSchema

Encoder = Literal[
    "none",
    "mean_pooling",
    "target_attention",
    "append_self",
    "append_candidate_self",
    "append_cross",
    "append_cross_causal",
    "concatenation",
    "similarity",
    "matches",
]
ENCODERS = get_args(Encoder)


@dataclass(kw_only=True)
class TowerConfig:
    """A tower of its own for a history; what is not given is as the model's.

    Args:
        history: that it reads; the one of its own name unless given.
        features: of the history's events that it reads, all unless given. Candidates read it by those of their features
            that share a table with these.
        encoder: as `ModelConfig.history`, but `none`.
        length: as `history_length`; towers of one history have the same.
        layers: as `history_layers`.
        heads: as `history_heads`.
        feedforward_dim: as `history_feedforward_dim`.
        positions: as the model's.
        vectors: as `history_vectors`.
        summary: as `history_summary`.
        recent_events: as the model's.
        summary_tokens: as the model's.
        windows: as `history_windows`.
        combine: as the model's.
    """

    history: str | None = None
    features: list[str] | None = None
    encoder: Encoder | None = None
    length: int | None = None
    layers: int | None = None
    heads: int | None = None
    feedforward_dim: int | None = None
    positions: Literal["recency", "rotary", "none"] | None = None
    vectors: int | None = None
    summary: bool | None = None
    recent_events: int | None = None
    summary_tokens: int | None = None
    windows: list[int] | None = None
    combine: Combine | None = None


# Fields of the model that a tower's have another name than.
_OF_MODEL = {
    "encoder": "history",
    **{
        name: f"history_{name}"
        for name in ("length", "layers", "heads", "feedforward_dim", "vectors", "summary", "windows")
    },
}


@dataclass(kw_only=True)
class ModelConfig:
    """The size and kind of a DLRM with histories, or the function that makes another ranker.

    Args:
        build: `package.module.function` of a function of yours that makes a ranker for a `RequestSchema`, in place of
            the sizes below, of which it goes with `history_length` and `leave_out` alone. Its module is found on
            PYTHONPATH, or in the current folder.
        embedding_dim: D, of tables that have no other width, of slots and of history encoders.
        history: the history encoder. Candidates appended to the history, with cross-attention to it: `append_cross`,
            or `append_cross_causal` if events read older ones only; with a candidate that reads itself, too:
            `append_candidate_self`; `mean_pooling`; `target_attention`; how alike a candidate is to latest and all
            events: `similarity`; whether it is among them: `matches`. These encode a history once per request.
            Those that cannot: `append_self` (events read the candidate), `concatenation` (a candidate beside every
            event). `none` is the control.
        towers: of data with several histories, or for several towers of one: what each tower is, by its name. A tower
            for each history, as the fields below say, unless given.
        leave_out: features that are looked up, or that events have, that the model does not read: its batches are of
            `schema.without(leave_out)`.
        history_length: events that each history may have; the latest ones are kept.
        history_layers: layers of the history encoder.
        history_heads: its attention heads.
        history_feedforward_dim: width of its feed-forward networks; twice `embedding_dim` unless given.
        history_windows: numbers of latest events that `similarity` and `matches` look at, beside all of them.
        positions: how an encoder knows the order of events: `recency` (a learned vector for each place, counted from
            the latest event), `rotary` (append_cross and its kin only) or `none`, as `similarity` and `matches` always
            have it.
        history_vectors: vectors that append_cross and its kin, `similarity` and `matches` make of each candidate, each
            a slot of the interaction.
        history_summary: append_cross and its kin add the mean of the encoded events as one slot more.
        recent_events: append_cross and its kin keep these latest events, and make `summary_tokens` rows of the older
            ones; all events are kept unless given.
        summary_tokens: rows that stand for the older events.
        combine: how the features of an event become its vector: their `sum`; `concatenate` and then a linear layer; or
            `product`, the first one times 1 + the sum of the others.
        dropout: dropout in the history encoder.
        interaction: `dot` or `dcn`.
        dcn_num_layers: cross layers of the DCN interaction.
        dcn_low_rank_dim: rank of its cross layers.
        dense_layers: hidden layers of the dense arch.
        over_layers: hidden layers of the over arch.
        eviction_interval: steps after which a table with vocabulary `managed` gives rows to other ids.
    """

    build: str | None = None
    embedding_dim: int = 32
    history: Encoder = "append_cross"
    towers: dict[str, TowerConfig] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)
    history_length: int = 100
    history_layers: int = 2
    history_heads: int = 2
    history_feedforward_dim: int | None = None
    history_windows: list[int] = field(default_factory=lambda: list(WINDOWS))
    positions: Literal["recency", "rotary", "none"] = "recency"
    history_vectors: int = 1
    history_summary: bool = False
    recent_events: int | None = None
    summary_tokens: int = 4
    combine: Combine = "sum"
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
        if self.build is not None:
            self._refuse_sizes()

    def of_towers(self, schema: RequestSchema) -> dict[str, tuple[str, ModelConfig]]:
        """The history of each tower, and what it is, as a model of it alone; none if the model reads no history.

        Args:
            schema: of the requests.

        Raises:
            InputError: there is no such history, or towers of one history keep different numbers of events.
        """
        if self.history == "none":
            return {}
        given = self.towers or {name: TowerConfig() for name in schema.histories}
        settings: dict[str, tuple[str, ModelConfig]] = {}
        lengths: dict[str, int] = {}
        for name, tower in given.items():
            history = tower.history or name
            if history not in schema.histories:
                raise InputError(
                    f"model.towers.{name}: no history {history!r} in data set {schema.dataset!r}, which has "
                    f"{list(schema.histories)}"
                )
            of_tower = {key: value for key, value in asdict(tower).items() if value is not None}
            own = {key: value for key, value in of_tower.items() if key not in ("history", "features")}
            changed = replace(self, **{_OF_MODEL.get(key, key): value for key, value in own.items()}, towers={})
            settings[name], length = (history, changed), changed.history_length
            if lengths.setdefault(history, length) != length:
                raise InputError(
                    f"model.towers.{name}: keeps {length} events of {history!r}, and another tower "
                    f"{lengths[history]}: give them the same"
                )
        return settings

    def history_lengths(self, schema: RequestSchema, most: int | None = None) -> dict[str, int]:
        """Events that are kept of each history: none of one that no tower of `towers` reads.

        Args:
            schema: of the requests, less what the model leaves out.
            most: keep no more of any.
        """
        lengths = dict.fromkeys(schema.histories, 0 if self.towers else self.history_length)
        lengths |= {history: of_tower.history_length for history, of_tower in self.of_towers(schema).values()}
        return lengths if most is None else {history: min(length, most) for history, length in lengths.items()}

    def longest_history(self, schema: RequestSchema) -> int:
        """Events that are kept of the history that may have most.

        Args:
            schema: of the requests, less what the model leaves out.
        """
        return max(self.history_lengths(schema).values(), default=self.history_length)

    def _refuse_sizes(self) -> None:
        """Refuse sizes that a function of the user's does not read."""
        usual = asdict(ModelConfig())
        for name, value in asdict(self).items():
            if name not in _OF_ANY_MODEL and value != usual[name]:
                raise InputError(
                    f"model.build is {self.build!r}, which does not read model.{name}={value}: leave one of the two out"
                )


# What a function of the user's goes with: it says what the reader reads.
_OF_ANY_MODEL = ("build", "history_length", "leave_out")


def build_model(
    schema: RequestSchema,
    config: ModelConfig,
    *,
    device: torch.device | None = None,
    seed: int | None = None,
) -> Ranker:
    """Build the model that reads the requests of a schema.

    Args:
        schema: what the requests are made of.
        config: size and kind of the model.
        device: where to put the weights, tables included.
        seed: makes the initial weights, the same for the same seed; the global generator's if None.

    Returns:
        Ranker: untrained. An `AmortizedDLRM` for data of one history of ids, in tables of one width; otherwise a DLRM
            on an `AmortizedEmbeddingBagCollection`; or what the function of `config.build` makes.

    Raises:
        InputError: the config asks for a history, or leaves out a feature, that the schema does not have; no id of the
            candidate is left beside its item; sizes do not fit each other; or the function of `config.build` is not
            there, or makes a model of other requests.

    Example::

        model = build_model(RequestSchema.load("data/movielens-1m"), ModelConfig(), seed=0)
    """
    schema = schema.without(config.leave_out)
    make: Callable[[RequestSchema], Any] = partial(_build_with_towers, config=config, device=device)
    if config.build is not None:
        make = _function(config.build)
    elif _is_of_one_history(schema, config):
        make = partial(_build, config=config, device=device)
    if config.build is None and config.history != "none" and not schema.of("event"):
        raise InputError(
            f"model.history is {config.history!r}, but data set {schema.dataset!r} has no event features: "
            "set model.history to none"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            ranker = make(schema)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"model: {one_line(error)}") from error
    if config.build is not None:
        _refuse_other_ranker(ranker, schema, config)
    return ranker if device is None else ranker.to(device)


def _is_of_one_history(schema: RequestSchema, config: ModelConfig) -> bool:
    """Whether an AmortizedDLRM reads it: one history of ids, the candidate's item, and tables of one width."""
    is_other = config.towers or config.combine != "sum" or schema.tables or schema.dense_sequence_features
    lists = [f for f in schema.sequence_features if f.kind == "ids" or (f.side != "event" and f.kind != "item")]
    has_item = not schema.histories or CANDIDATE_ITEM in {feature.name for feature in schema.of("candidate", "item")}
    return not is_other and not lists and has_item and set(schema.histories) <= {HISTORY}


def _build_with_towers(schema: RequestSchema, config: ModelConfig, device: torch.device | None) -> ModelRanker:
    settings = config.of_towers(schema)
    towers = {
        name: TowerParts(
            history,
            build_encoder(of_tower, device),
            partial(_event_encoder, config=of_tower, device=device),
            config.towers[name].features if config.towers else None,
        )
        for name, (history, of_tower) in settings.items()
    }
    dim = config.embedding_dim
    sparse = build_collection(schema, towers, dim, device=device, eviction_interval=config.eviction_interval)
    num_dense = sum(schema.num_dense.values())
    layers = {
        "dense_in_features": max(1, num_dense),
        "dense_arch_layer_sizes": [*config.dense_layers, dim],
        "over_arch_layer_sizes": [*config.over_layers, len(schema.labels)],
        "dense_device": device,
    }
    if not sparse.embedding_bag_configs():
        raise InputError(f"schema {schema.dataset!r}: the model would read no id and no history: it needs one at least")
    if config.interaction == "dcn":
        cross = {"dcn_num_layers": config.dcn_num_layers, "dcn_low_rank_dim": config.dcn_low_rank_dim}
        dlrm: nn.Module = DLRM_DCN(sparse, **layers, **cross)
    else:
        dlrm = DLRM(sparse, **layers)
    return ModelRanker(dlrm, call_model if num_dense else call_with_constant)


def _function(path: str) -> Callable[[RequestSchema], Any]:
    """What an import path names."""
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"model.build is {path!r}: give package.module.function")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, SyntaxError) as error:
        raise InputError(
            f"model.build is {path!r}, and {module} cannot be imported: {one_line(error)}: start in the folder that "
            "has it, or put that folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise InputError(f"model.build is {path!r}, but {module} has no function {name!r}")
    return found


def _refuse_other_ranker(ranker: object, schema: RequestSchema, config: ModelConfig) -> None:
    """Refuse what a function of the user's made, if it is no ranker of these requests."""
    if not isinstance(ranker, Ranker):
        raise InputError(
            f"model.build: {config.build} returned a {type(ranker).__name__}, which is no Ranker: return "
            "ModelRanker(model, call), or an AmortizedDLRM"
        )
    if ranker.history_length is not None and ranker.history_length < config.history_length:
        raise InputError(
            f"model.history_length is {config.history_length}, but the model of {config.build} has places for "
            f"{ranker.history_length} events: give {ranker.history_length} or less"
        )
    managed = {feature.name for feature in schema.features if feature.vocabulary == "managed"}
    if managed and not any(isinstance(module, ManagedCollection) for module in ranker.modules()):
        raise InputError(
            f"schema {schema.dataset!r}: {sorted(managed)[0]} is managed, but the model of {config.build} has no "
            "ManagedCollection: train with another vocabulary"
        )
    for name, rows in _rows_of_tables(ranker).items():
        if name not in managed and schema.table_sizes.get(name) != rows:
            raise InputError(
                f"schema {schema.dataset!r}: {name} has {schema.table_sizes.get(name)} rows, but the table for it of "
                f"{config.build} has {rows}: give it the feature's table_size"
            )


def _rows_of_tables(ranker: Ranker) -> dict[str, int]:
    """Rows of the table of each feature that a ranker looks up."""
    tables: list[BaseEmbeddingConfig] = []
    for module in ranker.modules():
        if isinstance(module, EmbeddingBagCollection):
            tables += module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollection):
            tables += module.embedding_configs()
    return {name: table.num_embeddings for table in tables for name in table.feature_names}


def _build(schema: RequestSchema, config: ModelConfig, device: torch.device | None) -> AmortizedDLRM:
    if not schema.bag_features["candidate"]:
        raise InputError(
            f"schema {schema.dataset!r}: the candidate has no feature of kind 'id' or 'ids', and the model reads 1 or "
            "more: add one, such as Feature('item_id', 'candidate', 'id', table_size, column='candidate_item')"
        )
    dim = config.embedding_dim
    has_history, tables = config.history != "none", Tables(schema, dim, device, config.eviction_interval)
    candidate_bags = tables.bags(schema.bag_features["candidate"])
    assert candidate_bags is not None
    return AmortizedDLRM(
        candidate_embedding_bag_collection=candidate_bags,
        request_embedding_bag_collection=tables.bags(schema.bag_features["request"]),
        dense_in_features=sum(schema.num_dense.values()),
        dense_arch_layer_sizes=[*config.dense_layers, dim],
        over_arch_layer_sizes=[*config.over_layers, len(schema.labels)],
        history_embedding_collection=_sequences(schema, config, tables) if has_history else None,
        event_encoder=_event_encoder([f.name for f in schema.of("event")], config, device) if has_history else None,
        history_arch=build_encoder(config, device) if has_history else None,
        interaction=config.interaction,
        dcn_num_layers=config.dcn_num_layers,
        dcn_low_rank_dim=config.dcn_low_rank_dim,
        dense_device=device,
    )


def _event_encoder(features: Sequence[str], config: ModelConfig, device: torch.device | None) -> EventEncoder:
    if config.history in _COMPARING:
        # Vectors that candidates are compared with: no places may be in them.
        return EventEncoder(features, config.embedding_dim, device=device, combine=config.combine)
    places = config.history_length if config.positions == "recency" else None
    return EventEncoder(features, config.embedding_dim, places, config.dropout, device, config.combine)


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
    _refuse_options_of_others(config)
    if config.history == "similarity":
        return HistorySimilarity(dim, config.history_heads, config.history_windows, config.history_vectors, device)
    if config.history == "matches":
        return HistoryMatches(dim, config.history_windows, config.history_vectors, device)
    if config.history == "mean_pooling":
        return MeanPooling(dim)
    if config.history == "target_attention":
        return TargetAttention(dim, config.history_feedforward_dim, device)
    rival = AppendSelfAttention if config.history == "append_self" else Concatenation
    return rival(*_transformer(config), config.dropout, device)


_APPEND_CROSS = ("append_cross", "append_cross_causal", "append_candidate_self")
_COMPARING = ("similarity", "matches")


def _transformer(config: ModelConfig) -> tuple[int, int, int, int | None]:
    return config.embedding_dim, config.history_layers, config.history_heads, config.history_feedforward_dim


def _refuse_options_of_others(config: ModelConfig) -> None:
    """Refuse what append_cross and its kin have, and some others have not."""
    given = {
        "positions": config.positions == "rotary",
        "history_vectors": config.history_vectors != 1 and config.history not in _COMPARING,
        "history_summary": config.history_summary,
        "recent_events": config.recent_events is not None,
        "combine": config.combine != "sum" and config.history == "matches",
    }
    for option, is_given in given.items():
        if is_given:
            raise InputError(
                f"model.history is {config.history!r}, which has no model.{option}={getattr(config, option)}: "
                f"leave it out, or choose one of {', '.join(_APPEND_CROSS)}"
            )


def _sequences(schema: RequestSchema, config: ModelConfig, tables: Tables) -> EmbeddingCollection | SequenceTables:
    """One collection of all tables of sequences; of a managed one and the others if there is one."""
    configs = tables.of_sequences(schema.sequence_features)
    managed = {feature.table for feature in schema.features if feature.vocabulary == "managed"}
    others = [table for table in configs if table.name not in managed]
    plain = EmbeddingCollection(tables=others, device=tables.device) if others else None
    if not managed:
        assert plain is not None
        return plain
    (item,) = (table for table in configs if table.name in managed)
    return SequenceTables(tables.managed(item), plain)
