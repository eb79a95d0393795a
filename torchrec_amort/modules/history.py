"""AmortizedHistoryArch: a history encoded once per request, read by every candidate.

Shape suffixes: B requests; N history events and C candidates, all requests together; S rows of the longest
request; D model dimension; H attention heads of dimension K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.padding import Padding

HistoryAttention = Literal["full", "causal"]


@dataclass(frozen=True, eq=False)
class HistoryState:
    """Keys and values of B encoded histories: all that a candidate needs of them.

    Args:
        keys: for each layer, [N, H, K].
        values: for each layer, [N, H, K].
        lengths: int64 [B], events of each history.

    Example::

        state = arch.encode_history(history)
        first_two = state[:2]
        again = HistoryState.cat([first_two, state[2:]])
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor

    def __len__(self) -> int:
        """The number of requests, B."""
        return self.lengths.numel()

    @property
    def offsets(self) -> Tensor:
        """int64 [B + 1]: where each history starts among the N events, and where the last one ends."""
        return F.pad(torch.cumsum(self.lengths, 0), (1, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, the values and the lengths."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values, self.lengths))

    def _map(self, function: Callable[[Tensor], Tensor], lengths: Tensor) -> HistoryState:
        return HistoryState(
            tuple(function(key) for key in self.keys),
            tuple(function(value) for value in self.values),
            lengths,
        )

    def __getitem__(self, index: int | slice) -> HistoryState:
        """The state of one request, or of a contiguous range of them; a view, not a copy."""
        if isinstance(index, int):
            position = range(len(self))[index]
            index = slice(position, position + 1)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a HistoryState is sliced by contiguous requests, not with step {step}")
        offsets = self.offsets
        first, last = int(offsets[start]), int(offsets[max(start, stop)])
        return self._map(lambda rows_NHK: rows_NHK[first:last], self.lengths[index])

    @classmethod
    def cat(cls, states: Sequence[HistoryState]) -> HistoryState:
        """Put states together, request after request.

        Raises:
            ValueError: no state is given, or they differ in their number of layers.
        """
        layers = {len(state.keys) for state in states}
        if len(layers) != 1:
            raise ValueError(f"states to put together need one number of layers, not {sorted(layers)}")
        return cls(
            tuple(torch.cat(rows) for rows in zip(*(state.keys for state in states), strict=True)),
            tuple(torch.cat(rows) for rows in zip(*(state.values for state in states), strict=True)),
            torch.cat([state.lengths for state in states]),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HistoryState:
        """Copy the state to a device."""
        return self._map(
            lambda rows_NHK: rows_NHK.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
        )


class AmortizedHistoryLayer(nn.Module):
    """One pre-norm Transformer layer whose rows read keys and values of history events only.

    The same weights serve events and candidates. No projection of the attention has a bias, so that
    attending to an empty history adds exactly zero.

    Args:
        embedding_dim: D.
        num_heads: H.
        feedforward_dim: width of the feed-forward network.
        dropout: probability of dropping an entry of either residual branch.
        device: where to put the weights.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(embedding_dim, device=device)
        self.query = nn.Linear(embedding_dim, embedding_dim, bias=False, device=device)
        self.key_value = nn.Linear(embedding_dim, 2 * embedding_dim, bias=False, device=device)
        self.output = nn.Linear(embedding_dim, embedding_dim, bias=False, device=device)
        self.feedforward_norm = nn.LayerNorm(embedding_dim, device=device)
        self.feedforward = nn.Sequential(
            nn.Linear(embedding_dim, feedforward_dim, device=device),
            nn.ReLU(),
            nn.Linear(feedforward_dim, embedding_dim, device=device),
        )
        self.dropout = nn.Dropout(dropout)

    def keys_and_values(self, events_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of events [N, D], each [N, H, K]."""
        keys_values_N2D = self.key_value(self.attention_norm(events_ND))
        keys_ND, values_ND = keys_values_N2D.chunk(2, dim=-1)
        return keys_ND.unflatten(-1, (self.num_heads, -1)), values_ND.unflatten(-1, (self.num_heads, -1))

    def forward(
        self,
        rows_RD: Tensor,
        padding: Padding,
        keys_NHK: Tensor,
        values_NHK: Tensor,
        history_padding: Padding,
        is_causal: bool = False,
    ) -> Tensor:
        """Let rows read the history's keys and values, each row those of its own request.

        Args:
            rows_RD: [R, D]: candidates, or the events themselves.
            padding: of the rows.
            keys_NHK: [N, H, K].
            values_NHK: [N, H, K].
            history_padding: of the keys and values.
            is_causal: row i of a request reads events 0 to i only; the rows are the events.

        Returns:
            Tensor: [R, D].
        """
        queries_RHK = self.query(self.attention_norm(rows_RD)).unflatten(-1, (self.num_heads, -1))
        # Under a causal mask no event reads a later row, hence none reads padding, which comes last.
        attended_BHSK = F.scaled_dot_product_attention(
            padding.pad(queries_RHK).transpose(1, 2),
            history_padding.pad(keys_NHK).transpose(1, 2),
            history_padding.pad(values_NHK).transpose(1, 2),
            attn_mask=None if is_causal else history_padding.key_mask(),
            is_causal=is_causal,
        )
        attended_RD = padding.unpad(attended_BHSK.transpose(1, 2)).flatten(1)
        rows_RD = rows_RD + self.dropout(self.output(attended_RD))
        return rows_RD + self.dropout(self.feedforward(self.feedforward_norm(rows_RD)))


class AmortizedHistoryArch(nn.Module):
    """A Transformer over [history, candidates] whose keys and values come from the history alone.

    Hence a candidate's vector depends on its own embedding and the history, on nothing else in the batch;
    the history's keys and values are worked out once per request and read by all of its candidates
    (Hertel et al., arXiv 2412.06924, the append encoding with cross-attention).

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_layers: number of layers, L.
        num_heads: attention heads, H.
        feedforward_dim: width of the feed-forward networks; 2 D unless given.
        history_attention: `"full"`: events read each other both ways; `"causal"`: an event reads itself
            and older ones, so that a new event changes nothing for those before it.
        dropout: probability of dropping an entry of a residual branch, in training.
        device: where to put the weights.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `num_heads`, `num_layers` is below 1, or
            `history_attention` is neither word.

    Example::

        arch = AmortizedHistoryArch(embedding_dim=32)
        history = JaggedTensor(torch.randn(5, 32), lengths=torch.tensor([3, 0, 2]))
        candidates = JaggedTensor(torch.randn(4, 32), lengths=torch.tensor([1, 1, 2]))
        state = arch.encode_history(history)
        vectors_CD = arch.score_candidates(state, candidates)  # = arch(history, candidates)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward_dim: int | None = None,
        history_attention: HistoryAttention = "full",
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}")
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, not 1 or more")
        if history_attention not in ("full", "causal"):
            raise ValueError(f"history_attention is {history_attention!r}, not 'full' or 'causal'")
        self.embedding_dim = embedding_dim
        self.is_causal = history_attention == "causal"
        self.layers: Sequence[AmortizedHistoryLayer] = nn.ModuleList(  # type: ignore[assignment]
            AmortizedHistoryLayer(embedding_dim, num_heads, feedforward_dim or 2 * embedding_dim, dropout, device)
            for _ in range(num_layers)
        )
        self.output_norm = nn.LayerNorm(embedding_dim, device=device)

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one, once per request: the keys and values of its events in every layer.

        Args:
            history: values [N, D], one row of B per request, oldest event first; a history may be empty.

        Returns:
            HistoryState: of B requests.
        """
        events_ND, lengths_B = history.values(), history.lengths()
        padding = Padding(lengths_B)
        keys, values = [], []
        for depth, layer in enumerate(self.layers):
            keys_NHK, values_NHK = layer.keys_and_values(events_ND)
            keys.append(keys_NHK)
            values.append(values_NHK)
            # Nothing reads the events after the last layer's keys and values.
            if depth + 1 < len(self.layers):
                events_ND = layer(events_ND, padding, keys_NHK, values_NHK, padding, self.is_causal)
        return HistoryState(tuple(keys), tuple(values), lengths_B)

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: what each candidate makes of its request's history.

        Args:
            state: of B requests.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, D], the history vector of each candidate.

        Raises:
            ValueError: state and candidates are of different numbers of requests.
        """
        vectors_CD, lengths_B = candidates.values(), candidates.lengths()
        if len(state) != lengths_B.numel():
            raise ValueError(
                f"the state is of {len(state)} requests, the candidates of {lengths_B.numel()}: "
                "they need one history each"
            )
        padding, history_padding = Padding(lengths_B), Padding(state.lengths)
        for layer, keys_NHK, values_NHK in zip(self.layers, state.keys, state.values, strict=True):
            vectors_CD = layer(vectors_CD, padding, keys_NHK, values_NHK, history_padding)
        return self.output_norm(vectors_CD)

    def forward(self, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
        """Phase one, then phase two.

        Args:
            history: values [N, D], one row of B per request, oldest event first.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, D].
        """
        return self.score_candidates(self.encode_history(history), candidates)
