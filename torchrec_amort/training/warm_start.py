"""A run that starts with the weights of another one: the day before's, for instance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_amort.config import load_config
from torchrec_amort.errors import InputError
from torchrec_amort.schema import KINDS_OF_IDS, Feature, RequestSchema, TableConfig
from torchrec_amort.training.checkpoint import load_start, refuse_ranks
from torchrec_amort.training.processes import sum_over_ranks
from torchrec_amort.training.run import TrainConfig, refuse_other
from torchrec_amort.training.sharding import ShardedModel

_INSTEAD = "train without warm_start"


class WarmStart:
    """What a run takes over from another one, whose tables may have fewer rows.

    Its `initial` is the schema that the model is to be built by: with pretrained tables if new rows are drawn.

    Args:
        config: names the other run.
        schema: of the config's data, with its tables.

    Raises:
        InputError: there is no such run, its model or optimizers are other ones, its managed tables are spread over
            another number of ranks, or its tables' rows are of other ids.

    Example::

        WarmStart(config, schema).load(model)
    """

    def __init__(self, config: TrainConfig, schema: RequestSchema) -> None:
        assert config.warm_start is not None
        self._run, self._config = config.warm_start, config
        saved = load_config(self._run, TrainConfig, "train")
        names = [field.name for field in fields(saved.model)]
        refuse_other(self._run, saved.model, config.model, names, "is of a model with model.", instead=_INSTEAD)
        told = "is of a model with loss."
        refuse_other(self._run, saved.loss, config.loss, ("weighting",), told, instead=_INSTEAD)
        is_decayed, kind = 0 < config.warm_start_optimizer < 1, config.optimizer.table_optimizer
        if is_decayed and kind != "rowwise_adagrad":
            raise InputError(
                f"warm_start_optimizer is {config.warm_start_optimizer}, but optimizer.table_optimizer {kind} has no "
                "sums that only grow: give 1 or 0"
            )
        if config.warm_start_optimizer:
            names = ["table_optimizer", "dense_optimizer"]
            instead = "start without its state: warm_start_optimizer 0"
            refuse_other(self._run, saved.optimizer, config.optimizer, names, "has optimizer.", instead=instead)
        refuse_ranks(self._run)
        before = RequestSchema.load(self._run)
        left_out = config.model.leave_out
        draws = config.warm_start_rows == "draw"
        self.initial = schema if draws else schema.without_pretrained()
        self._grown = _grown_tables(self._run, before.without(left_out), config.data, schema.without(left_out))

    def load(self, model: ShardedModel) -> Path:
        """Give a model what it starts with. All ranks call it together.

        Args:
            model: of the config.

        Returns:
            Path: the checkpoint that it is from.

        Raises:
            InputError: there is no checkpoint, or none that is whole and fits.
        """
        checkpoint = load_start(self._run, model, self._grown.keys(), self._config.warm_start_optimizer)
        for table, feature in self._grown.items():
            if self._config.warm_start_rows == "draw":
                continue
            rows: int = feature.table_size  # type: ignore[assignment]
            # A vocabulary that refuses ids has no unknown one in row 0.
            is_like_first = self._config.warm_start_rows == "unknown" and feature.vocabulary != "refuse"
            for name, weight in model.module.state_dict().items():
                if name.endswith(f".{table}.weight"):
                    _set_new_rows(weight, rows, 1 if is_like_first else rows)
        if model.average is not None:
            model.average.restart()
        return checkpoint


def _grown_tables(run: str, before: RequestSchema, data: str, now: RequestSchema) -> dict[str, Feature]:
    """The tables that have more rows than those of a run, each with a feature of it as the run has it."""
    for feature, other in zip_longest(before.features, now.features):
        if _input(feature) != _input(other):
            raise InputError(
                f"{run}: was trained on {_told(feature)}, and {data} has {_told(other)} in its place: give data of the "
                f"same features, or {_INSTEAD}"
            )
    if one_alone := sorted(before.tables.keys() ^ now.tables.keys()):
        raise InputError(
            f"{run}: table {one_alone[0]!r} has more than rows and a vocabulary there or here alone, and a model has "
            f"other parts then: give the same tables, or {_INSTEAD}"
        )
    grown = {}
    for feature, other in zip(before.features, now.features, strict=True):
        if not feature.is_looked_up:
            continue
        told = f"{run}: table {feature.table!r} has"
        width, other_width = (schema.tables.get(feature.table, TableConfig()).width for schema in (before, now))
        if width != other_width:
            raise InputError(f"{told} width {width}, and {other_width} here: use the same, or {_INSTEAD}")
        rows, other_rows = feature.table_size or 0, other.table_size or 0
        if rows > other_rows:
            raise InputError(f"{told} {rows} rows, and {other_rows} here: give as many or more, or {_INSTEAD}")
        if rows < other_rows:
            if feature.kind not in KINDS_OF_IDS or feature.vocabulary in ("hash", "managed"):
                kind = feature.vocabulary if feature.kind in KINDS_OF_IDS else feature.kind
                raise InputError(
                    f"{told} {rows} rows, and {other_rows} here, but rows of kind {kind!r} are of other ids then: give "
                    f"tables.{feature.table}.rows {rows}, or {_INSTEAD}"
                )
            grown[feature.table] = feature
        if feature.vocabulary == "file":
            _refuse_renumbered(told, feature.table, before, now, data)
    return grown


def _refuse_renumbered(told: str, table: str, before: RequestSchema, now: RequestSchema, data: str) -> None:
    known, other = (schema.vocabularies[table].values for schema in (before, now))
    if other.slice(0, len(known)).equals(known):
        return
    row = next((row for row, (one, two) in enumerate(zip(known, other, strict=False)) if one != two), len(other))
    there, here = (str(values[row]) if row < len(values) else "no id" for values in (known, other))
    raise InputError(
        f"{told} {there} in row {row + 1}, where the vocabulary of {data} has {here}: append to the folder that the "
        f"run was trained on (build --since), whose vocabularies stay, or {_INSTEAD}"
    )


def _input(feature: Feature | None) -> dict[str, Any] | None:
    """What has to be the same of a feature."""
    if feature is None:
        return None
    return {name: value for name, value in feature.record().items() if name != "table_size"}


def _told(feature: Feature | None) -> str:
    return "no further feature" if feature is None else f"{feature.name!r} ({_input(feature)})"


@torch.no_grad()
def _set_new_rows(weight: Tensor | ShardedTensor, rows: int, num_first: int) -> None:
    """Set the rows of a table from `rows` on to the mean of its first ones, wherever these are."""
    blocks = list(_blocks(weight))
    mean = torch.zeros(weight.size(1), dtype=torch.float64)
    for block, row, column in blocks:
        of_rank = block[: max(0, num_first - row)].sum(0, dtype=torch.float64)
        mean[column : column + block.shape[1]] += of_rank.cpu() / num_first
    if isinstance(weight, ShardedTensor):
        mean = sum_over_ranks(mean)
    for block, row, column in blocks:
        block[max(0, rows - row) :] = mean[column : column + block.shape[1]].to(block)


def _blocks(weight: Tensor | ShardedTensor) -> Iterator[tuple[Tensor, int, int]]:
    """What this rank has of a table: rows and columns, and the first row and column of them."""
    if not isinstance(weight, ShardedTensor):
        yield weight, 0, 0
        return
    for shard in weight.local_shards():
        row, column = shard.metadata.shard_offsets
        yield shard.tensor, row, column
