"""HistoryCompression: the older part of a long history as a few rows.

Shape suffixes: B requests; N history events and R rows, all requests together; D model dimension; H attention heads
of dimension K; Q summary tokens of a request.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.ops.attention import Backend, JaggedAttention
from torchrec_amort.ops.jagged import expand, positions


class HistoryCompression(nn.Module):
    """Keeps the latest events and lets learned queries read the older ones.

    A history of up to `recent_events` stays as it is. Of a longer one the older events become `summary_tokens` rows
    before the latest `recent_events`: each row is a learned vector plus its attention over the older events.

    Args:
        embedding_dim: D.
        num_heads: H.
        recent_events: events that are kept, 1 or more.
        summary_tokens: rows that stand for the older ones, Q, 1 or more.
        device: where to put the weights.
        backend: see `JaggedAttention`.

    Raises:
        ValueError: `recent_events` or `summary_tokens` is below 1.

    Example::

        compression = HistoryCompression(embedding_dim=32, num_heads=4, recent_events=64, summary_tokens=4)
        shorter = compression(JaggedTensor(torch.randn(500, 32), lengths=torch.tensor([480, 20])))
        shorter.lengths()  # 68, 20
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        recent_events: int,
        summary_tokens: int,
        device: torch.device | None = None,
        backend: Backend = "packed",
    ) -> None:
        super().__init__()
        if recent_events < 1 or summary_tokens < 1:
            raise ValueError(
                f"recent_events is {recent_events} and summary_tokens is {summary_tokens}: both need 1 or more"
            )
        self.recent_events = recent_events
        self.num_heads = num_heads
        self.backend: Backend = backend
        self.tokens = nn.Parameter(torch.empty(summary_tokens, embedding_dim, device=device))
        nn.init.normal_(self.tokens, std=embedding_dim**-0.5)
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        self.query = nn.Linear(embedding_dim, embedding_dim, bias=False, device=device)
        self.key_value = nn.Linear(embedding_dim, 2 * embedding_dim, bias=False, device=device)
        self.output = nn.Linear(embedding_dim, embedding_dim, bias=False, device=device)

    def forward(self, history: JaggedTensor) -> JaggedTensor:
        """Shorten the long histories.

        Args:
            history: values [N, D], one row of B per request, oldest event first.

        Returns:
            JaggedTensor: values [R, D], at most `summary_tokens` + `recent_events` rows of each request.
        """
        events_ND, lengths_B = history.values(), history.lengths()
        num_events, num_tokens = events_ND.shape[0], self.tokens.shape[0]
        num_old_B = (lengths_B - self.recent_events).clamp(min=0)
        is_old_N = positions(lengths_B, num_events) < expand(num_old_B, lengths_B, num_events)
        summaries_RD = self._read(events_ND[is_old_N], num_old_B)
        # Summaries before events, request by request; those of short histories and old events are left out.
        requests_B = torch.arange(lengths_B.numel(), device=lengths_B.device)
        requests_R = torch.cat([requests_B.repeat_interleave(num_tokens), expand(requests_B, lengths_B, num_events)])
        is_kept_R = torch.cat([(num_old_B > 0).repeat_interleave(num_tokens), ~is_old_N])
        order_R = torch.argsort(requests_R, stable=True)
        rows_R = order_R[is_kept_R[order_R]]
        kept_RD = torch.cat([summaries_RD, events_ND]).index_select(0, rows_R)
        return JaggedTensor(kept_RD, lengths=lengths_B - num_old_B + num_tokens * (num_old_B > 0))

    def _read(self, old_ND: Tensor, lengths_B: Tensor) -> Tensor:
        """[B Q, D]: what each learned vector makes of its request's old events."""
        tokens_RD = self.tokens.repeat(lengths_B.numel(), 1)
        num_tokens_B = torch.full_like(lengths_B, self.tokens.shape[0])
        attention = JaggedAttention(num_tokens_B, lengths_B, backend=self.backend)
        queries_RHK = self.query(tokens_RD).unflatten(-1, (self.num_heads, -1))
        keys_ND, values_ND = self.key_value(self.norm(old_ND)).chunk(2, dim=-1)
        read_RHK = attention(
            queries_RHK, keys_ND.unflatten(-1, (self.num_heads, -1)), values_ND.unflatten(-1, (self.num_heads, -1))
        )
        return tokens_RD + self.output(read_RHK.flatten(1))
