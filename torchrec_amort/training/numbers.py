"""The mean and deviation of what events have in numbers, measured on the training split before a model is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.reader import read_piece, row_groups
from torchrec_amort.modules.events import Numbers
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import RequestSchema

# Requests that are read, from all over the split.
_REQUESTS = 8192


def measure_numbers(model: nn.Module, data: str | Path, split: str, schema: RequestSchema) -> None:
    """Give towers the mean and deviation of the numbers of events; vectors stay as they are.

    Every rank that calls it reads the same requests, and gives its model the same numbers.

    Args:
        model: not sharded, and not trained yet.
        data: prepared data folder.
        split: of it.
        schema: what the requests are read by.

    Raises:
        InputError: the data cannot be read.

    Example::

        measure_numbers(model, "data/ebnerd", "train", schema)
    """
    vectors = {feature.name for feature in schema.features if feature.kind == "vector"}
    fits = [
        (feature, tower.fit(feature))
        for tower in model.modules()
        if isinstance(tower, HistoryTower)
        for feature in tower.event_encoder.features
        if feature in tower.numbers and feature not in vectors
    ]
    if not fits:
        return
    values: dict[str, list[torch.Tensor]] = {feature: [] for feature, _ in fits}
    pieces = row_groups(Path(data) / split, schema)
    step = max(1, sum(piece.num_rows for piece in pieces) // _REQUESTS)
    for piece in pieces[::step]:
        batch = RequestBatch.from_arrow(read_piece(piece, schema), schema, validate=False)
        for feature, of_feature in values.items():
            of_feature.append(batch.dense_sequences[feature].values().double())
    for feature, numbers in fits:
        assert isinstance(numbers, Numbers)
        if len(rows := torch.cat(values[feature])):
            deviation = rows.std(0, correction=0)
            numbers.mean.copy_(rows.mean(0))
            # A number that is always the same tells nothing, however it is scaled.
            numbers.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))
