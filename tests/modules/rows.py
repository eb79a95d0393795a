"""Random encoders, histories and candidates that the tests of the modules share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.oracle import encode
from torchrec_amort import AmortizedHistoryArch, HistoryEncoder
from torchrec_amort.modules.rivals import AppendSelfAttention, Concatenation, MeanPooling, TargetAttention
from torchrec_amort.modules.similarity import HistoryMatches, HistorySimilarity

DIM = 8
LIMIT = 9


def _append_cross(**options: object) -> Callable[[], HistoryEncoder]:
    return lambda: AmortizedHistoryArch(DIM, num_layers=3, num_heads=2, **options)  # type: ignore[arg-type]


AMORTIZABLE: dict[str, Callable[[], HistoryEncoder]] = {
    "append_cross": _append_cross(),
    "append_cross_causal": _append_cross(history_attention="causal"),
    "append_candidate_self": _append_cross(reads_itself=True),
    "rotary": _append_cross(rotary=True),
    "rotary_causal_own": _append_cross(rotary=True, history_attention="causal", reads_itself=True),
    "vectors": _append_cross(num_vectors=3),
    "summary": _append_cross(has_summary=True),
    "compressed": _append_cross(recent_events=3, summary_tokens=2),
    "everything": _append_cross(
        rotary=True, reads_itself=True, num_vectors=2, has_summary=True, recent_events=4, summary_tokens=1
    ),
    "mean_pooling": lambda: MeanPooling(DIM),
    "target_attention": lambda: TargetAttention(DIM),
    "similarity": lambda: HistorySimilarity(DIM, num_heads=2, windows=(1, 4), num_vectors=2),
    "matches": lambda: HistoryMatches(DIM, windows=(1, 4)),
}
NOT_AMORTIZABLE: dict[str, Callable[[], HistoryEncoder]] = {
    "append_self": lambda: AppendSelfAttention(DIM, num_layers=2, num_heads=2),
    "concatenation": lambda: Concatenation(DIM, num_layers=2, num_heads=2),
}
ENCODERS = AMORTIZABLE | NOT_AMORTIZABLE


def make_encoder(name: str, seed: int = 0) -> HistoryEncoder:
    """An encoder with random weights, in float64."""
    torch.manual_seed(seed)
    encoder = ENCODERS[name]().double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return encoder


# As rows of a table: events and candidates of one id have the same.
_ITEMS = torch.randn(12, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_rows(lengths: list[int], seed: int) -> JaggedTensor:
    """Rows of random items, as many for each request as wanted."""
    items = torch.randint(len(_ITEMS), (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return JaggedTensor(_ITEMS[items], lengths=torch.tensor(lengths))


def make_both(sizes: list[tuple[int, int]], seed: int) -> tuple[JaggedTensor, JaggedTensor]:
    """Histories and candidates of requests with these numbers of events and candidates."""
    return make_rows([n for n, _ in sizes], seed), make_rows([m for _, m in sizes], seed + 1)


def rows_of(rows: JaggedTensor) -> list[Tensor]:
    """The rows of each request."""
    return list(rows.values().split(rows.lengths().tolist()))


def jagged(rows: list[Tensor]) -> JaggedTensor:
    """The requests with these rows."""
    return JaggedTensor(torch.cat(rows), lengths=torch.tensor([len(row) for row in rows]))


def encode_all(encoder: HistoryEncoder, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
    """What the plain loops make of it all."""
    rows = [
        encode(encoder, list(events), candidate)
        for events, of_request in zip(rows_of(history), rows_of(candidates), strict=True)
        for candidate in of_request
    ]
    return torch.stack(rows)
