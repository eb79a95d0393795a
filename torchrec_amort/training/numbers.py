"""The mean and deviation of what events have in numbers, measured before a model is trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchrec_amort.batch import RequestBatch
from torchrec_amort.modules.events import Numbers
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import RequestSchema


def measure_numbers(model: nn.Module, batches: Iterable[RequestBatch], schema: RequestSchema) -> None:
    """Give towers the mean and deviation of the numbers of events; vectors stay as they are.

    Args:
        model: not sharded, and not trained yet.
        batches: of requests like those that it will be trained on, the same on every rank.
        schema: what they were read by.

    Example::

        measure_numbers(model, [batch], schema)
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
    for batch in batches:
        for feature, of_feature in values.items():
            of_feature.append(batch.dense_sequences[feature].values().double())
    for feature, numbers in fits:
        assert isinstance(numbers, Numbers)
        if len(rows := torch.cat(values[feature])):
            deviation = rows.std(0, correction=0)
            numbers.mean.copy_(rows.mean(0))
            # A number that is always the same tells nothing, however it is scaled.
            numbers.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))
