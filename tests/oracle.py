"""The history encoder as plain loops over numbers, one request and one candidate at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrec_amort import AmortizedHistoryArch
from torchrec_amort.modules.history import AmortizedHistoryLayer


def encode(arch: AmortizedHistoryArch, events: list[Tensor], candidate: Tensor) -> Tensor:
    """What one candidate makes of one history.

    Args:
        arch: its weights, in float64.
        events: the history's vectors, each [D], oldest first.
        candidate: [D].

    Returns:
        Tensor: [D].
    """
    events = list(events)
    for layer in arch.layers:
        assert isinstance(layer, AmortizedHistoryLayer)
        keys = [_norm(layer.attention_norm, event) @ layer.key_value.weight.T for event in events]
        updated = []
        for i, event in enumerate(events):
            seen = keys[: i + 1] if arch.is_causal else keys
            updated.append(_row(layer, event, seen))
        candidate = _row(layer, candidate, keys)
        events = updated
    return _norm(arch.output_norm, candidate)


def _row(layer: AmortizedHistoryLayer, row: Tensor, keys_values: list[Tensor]) -> Tensor:
    dim, heads = row.numel(), layer.num_heads
    size = dim // heads
    query = _norm(layer.attention_norm, row) @ layer.query.weight.T
    attended = torch.zeros_like(row)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = [(query[part] @ kv[:dim][part]).item() / math.sqrt(size) for kv in keys_values]
        total = sum(math.exp(score) for score in scores)
        for score, kv in zip(scores, keys_values, strict=True):
            attended[part] += math.exp(score) / total * kv[dim:][part]
    row = row + attended @ layer.output.weight.T
    first, second = layer.feedforward[0], layer.feedforward[2]
    assert isinstance(first, torch.nn.Linear) and isinstance(second, torch.nn.Linear)
    hidden = torch.clamp(_norm(layer.feedforward_norm, row) @ first.weight.T + first.bias, min=0)
    return row + hidden @ second.weight.T + second.bias


def _norm(norm: torch.nn.LayerNorm, row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias
