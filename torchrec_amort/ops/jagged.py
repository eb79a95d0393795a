"""Where the rows of a jagged tensor stand: small helpers of the encoders.

Shape suffixes: B requests; R rows of all requests together; C candidates; P pairs of a candidate and an event of
its request's history; D any trailing dimensions.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def starts(lengths_B: Tensor) -> Tensor:
    """int64 [B]: where each request's rows start."""
    return torch.cumsum(lengths_B, 0) - lengths_B


def requests(lengths_B: Tensor, num_rows: int) -> Tensor:
    """int64 [R]: whose row each row is."""
    # Unlike repeat_interleave, torch.export follows this for any B and R.
    rows_R = torch.arange(num_rows, device=lengths_B.device)
    return torch.searchsorted(torch.cumsum(lengths_B, 0), rows_R, right=True)


def expand(per_request_BD: Tensor, lengths_B: Tensor, num_rows: int) -> Tensor:
    """[B, D] to [R, D]: what belongs to a request, repeated for each of its rows."""
    if per_request_BD.shape[0] == 1:
        return per_request_BD.expand(num_rows, *per_request_BD.shape[1:])
    return per_request_BD.index_select(0, requests(lengths_B, num_rows))


def positions(lengths_B: Tensor, num_rows: int) -> Tensor:
    """int64 [R]: place of each row among its request's, from 0."""
    return torch.arange(num_rows, device=lengths_B.device) - expand(starts(lengths_B), lengths_B, num_rows)


def add_up(rows_RD: Tensor, places_R: Tensor, num_places: int) -> Tensor:
    """[R, D] to [P, D]: the sum of the rows of each place, in float32 if they are of half precision."""
    # Thousands of rows added up in bfloat16 would lose all but the first ones.
    rows_RD = rows_RD.float() if rows_RD.dtype in (torch.bfloat16, torch.float16) else rows_RD
    return rows_RD.new_zeros(num_places, rows_RD.shape[1]).index_add(0, places_R, rows_RD)


def mean_by_request(rows_RD: Tensor, lengths_B: Tensor) -> Tensor:
    """[R, D] to [B, D]: the mean of each request's rows; exactly zero where it has none."""
    if lengths_B.shape[0] == 1:
        sums_BD = rows_RD.sum(0, keepdim=True)
    else:
        sums_BD = add_up(rows_RD, requests(lengths_B, rows_RD.shape[0]), lengths_B.shape[0])
    return (sums_BD / lengths_B.clamp(min=1)[:, None]).to(rows_RD.dtype)


def pairs(history_lengths_B: Tensor, num_candidates_B: Tensor, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every candidate beside every event of its request's history, candidate by candidate.

    Returns:
        tuple: the event of each pair, int64 [P]; its candidate, int64 [P]; events of each candidate, int64 [C].
    """
    lengths_C = expand(history_lengths_B, num_candidates_B, num_candidates)
    starts_C = expand(starts(history_lengths_B), num_candidates_B, num_candidates)
    # Not int(): torch.export needs a number that it can follow.
    num_pairs = cast(int, lengths_C.sum().item())
    candidates_P = expand(torch.arange(num_candidates, device=lengths_C.device), lengths_C, num_pairs)
    return positions(lengths_C, num_pairs) + starts_C[candidates_P], candidates_P, lengths_C


def offsets(lengths_B: Tensor) -> Tensor:
    """int64 [B + 1]: where each request's rows start, and where the last one's end."""
    return F.pad(torch.cumsum(lengths_B, 0), (1, 0))


def append(rows: Tensor, lengths_B: Tensor, more: Tensor, more_lengths_B: Tensor) -> Tensor:
    """Rows of each request followed by `more` of the same request."""
    if lengths_B.shape[0] == 1:
        return torch.cat([rows, more])
    owners = torch.cat([requests(lengths_B, rows.shape[0]), requests(more_lengths_B, more.shape[0])])
    return torch.cat([rows, more]).index_select(0, torch.argsort(owners, stable=True))
