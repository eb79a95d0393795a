"""The history encoders as plain loops over numbers, one request and one candidate at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchrec_amort import AmortizedHistoryArch, HistoryEncoder
from torchrec_amort.modules.compression import HistoryCompression
from torchrec_amort.modules.history import AmortizedHistoryLayer
from torchrec_amort.modules.rivals import AppendSelfAttention, Concatenation, MeanPooling, TargetAttention
from torchrec_amort.modules.similarity import HistoryMatches, HistorySimilarity


def encode(encoder: HistoryEncoder, events: list[Tensor], candidate: Tensor) -> Tensor:
    """What one candidate makes of one history.

    Args:
        encoder: its weights, in float64.
        events: the history's vectors, each [D], oldest first.
        candidate: [D].

    Returns:
        Tensor: [S D].
    """
    if isinstance(encoder, MeanPooling):
        return sum(events, torch.zeros_like(candidate)) / max(1, len(events))
    if isinstance(encoder, TargetAttention):
        return _target_attention(encoder, events, candidate)
    if isinstance(encoder, AppendSelfAttention):
        rows = [*events, candidate]
        for layer in encoder.layers:
            rows = _self_attention(layer, rows)
        return _norm(encoder.output_norm, rows[-1])
    if isinstance(encoder, Concatenation):
        return _concatenation(encoder, events, candidate)
    if isinstance(encoder, HistorySimilarity | HistoryMatches):
        return _compared(encoder, events, candidate)
    assert isinstance(encoder, AmortizedHistoryArch)
    return _append_cross(encoder, events, candidate)


def _compared(encoder: HistorySimilarity | HistoryMatches, events: list[Tensor], candidate: Tensor) -> Tensor:
    windows = [events[max(0, len(events) - window) :] for window in (*encoder.windows, len(events))]
    if isinstance(encoder, HistorySimilarity):
        numbers = [
            _mean_product(encoder.num_heads, head, window, candidate)
            for window in windows
            for head in range(encoder.num_heads)
        ]
    else:
        counts = [sum(event.tolist() == candidate.tolist() for event in window) for window in windows]
        numbers = [math.log(1 + count) for count in counts] + [float(count > 0) for count in counts]
    return _linear(encoder.vectors, torch.tensor(numbers, dtype=candidate.dtype))


def _mean_product(num_heads: int, head: int, events: list[Tensor], candidate: Tensor) -> float:
    dim = candidate.numel() // num_heads
    entries = range(head * dim, (head + 1) * dim)
    return sum(sum((event[d] * candidate[d]).item() for d in entries) for event in events) / max(1, len(events))


def _target_attention(encoder: TargetAttention, events: list[Tensor], candidate: Tensor) -> Tensor:
    first, _, second = encoder.weight
    pooled = torch.zeros_like(candidate)
    for event in events:
        beside = torch.cat([event, candidate, event - candidate, event * candidate])
        pooled += _linear(second, torch.clamp(_linear(first, beside), min=0)).item() * event
    return pooled


def _concatenation(encoder: Concatenation, events: list[Tensor], candidate: Tensor) -> Tensor:
    if not events:
        return torch.zeros_like(candidate)
    rows = [_linear(encoder.concatenated, torch.cat([event, candidate])) for event in events]
    for layer in encoder.layers:
        rows = _self_attention(layer, rows)
    rows = [_norm(encoder.output_norm, row) for row in rows]
    most = torch.tensor([max(row[d].item() for row in rows) for d in range(candidate.numel())], dtype=candidate.dtype)
    return _linear(encoder.pooled, torch.cat([most, rows[-1]]))


def _self_attention(layer: AmortizedHistoryLayer, rows: list[Tensor]) -> list[Tensor]:
    keys_values = [_key_value(layer, row) for row in rows]
    return [_row(layer, row, keys_values) for row in rows]


def _append_cross(arch: AmortizedHistoryArch, events: list[Tensor], candidate: Tensor) -> Tensor:
    if arch.compression is not None:
        events = _compress(arch.compression, events)
    events, place = list(events), len(events) if arch.is_rotary else None
    for layer in arch.layers:
        keys = [_key_value(layer, event, i if arch.is_rotary else None) for i, event in enumerate(events)]
        updated = []
        for i, event in enumerate(events):
            seen = keys[: i + 1] if arch.is_causal else keys
            updated.append(_row(layer, event, seen, i if arch.is_rotary else None))
        own = [_key_value(layer, candidate, place)] if arch.reads_itself else []
        candidate = _row(layer, candidate, [*keys, *own], place)
        events = updated
    vector = _norm(arch.output_norm, candidate)
    if isinstance(arch.vectors, nn.Linear):
        vector = _linear(arch.vectors, vector)
    if not arch.has_summary:
        return vector
    encoded = [_norm(arch.output_norm, event) for event in events]
    return torch.cat([vector, sum(encoded, torch.zeros_like(candidate)) / max(1, len(events))])


def _compress(compression: HistoryCompression, events: list[Tensor]) -> list[Tensor]:
    old = events[: max(0, len(events) - compression.recent_events)]
    if not old:
        return events
    keys_values = [_norm(compression.norm, event) @ compression.key_value.weight.T for event in old]
    summaries = []
    for token in compression.tokens:
        read = _attend(token @ compression.query.weight.T, keys_values, compression.num_heads)
        summaries.append(token + read @ compression.output.weight.T)
    return [*summaries, *events[len(old) :]]


def _key_value(layer: AmortizedHistoryLayer, row: Tensor, place: int | None = None) -> Tensor:
    key_value = _norm(layer.attention_norm, row) @ layer.key_value.weight.T
    dim = row.numel()
    return torch.cat([_turn(key_value[:dim], layer.num_heads, place), key_value[dim:]])


def _turn(row: Tensor, heads: int, place: int | None) -> Tensor:
    """Turn entries d and d + K / 2 of each head by the angle of the place and of d."""
    if place is None:
        return row
    turned, size = row.clone(), row.numel() // heads
    for head in range(heads):
        for d in range(size // 2):
            first, second = head * size + d, head * size + d + size // 2
            angle = place * 10_000.0 ** (-2 * d / size)
            turned[first] = row[first] * math.cos(angle) - row[second] * math.sin(angle)
            turned[second] = row[second] * math.cos(angle) + row[first] * math.sin(angle)
    return turned


def _row(layer: AmortizedHistoryLayer, row: Tensor, keys_values: list[Tensor], place: int | None = None) -> Tensor:
    query = _turn(_norm(layer.attention_norm, row) @ layer.query.weight.T, layer.num_heads, place)
    row = row + _attend(query, keys_values, layer.num_heads) @ layer.output.weight.T
    hidden = torch.clamp(_linear(layer.feedforward[0], _norm(layer.feedforward_norm, row)), min=0)
    return row + _linear(layer.feedforward[2], hidden)


def _attend(query: Tensor, keys_values: list[Tensor], heads: int) -> Tensor:
    dim = query.numel()
    size = dim // heads
    attended = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = [(query[part] @ kv[:dim][part]).item() / math.sqrt(size) for kv in keys_values]
        total = sum(math.exp(score) for score in scores)
        for score, kv in zip(scores, keys_values, strict=True):
            attended[part] += math.exp(score) / total * kv[dim:][part]
    return attended


def _linear(linear: nn.Module, row: Tensor) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return row @ linear.weight.T + (0 if linear.bias is None else linear.bias)


def _norm(norm: nn.LayerNorm, row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias
