"""AmortizedHistoryArch: a history encoded once per request, read by every candidate.

Shape suffixes: B requests; N rows of histories, C candidates and R rows of either, all requests together; D model
dimension; H attention heads of dimension K; S vectors of a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.compression import HistoryCompression
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState, refuse_other_requests
from torchrec_amort.ops.attention import Backend, JaggedAttention
from torchrec_amort.ops.jagged import append, expand, mean_by_request, positions

HistoryAttention = Literal["full", "causal"]

ROTARY_BASE = 10_000.0


class Rotation:
    """Turns queries and keys by angles that grow with their places.

    Their products then depend on the distance of their places alone (rotary positions, Su et al., arXiv 2104.09864,
    section 3.2.2).

    Args:
        positions_R: int64 [R].
        head_dim: K, even.
        dtype: in which rows are turned.
    """

    def __init__(self, positions_R: Tensor, head_dim: int, dtype: torch.dtype) -> None:
        steps = torch.arange(0, head_dim, 2, device=positions_R.device, dtype=torch.float64) / head_dim
        angles_R1K = (positions_R[:, None] * ROTARY_BASE**-steps)[:, None, :]
        self.cos, self.sin = angles_R1K.cos().to(dtype), angles_R1K.sin().to(dtype)

    def __call__(self, rows_RHK: Tensor) -> Tensor:
        """Turn rows [R, H, K]."""
        first, second = rows_RHK.chunk(2, dim=-1)
        turned_RHK = torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)
        # Autocast makes rows of half precision of events in float32, and leaves products with both in float32: queries
        # and keys would not be of the values' dtype, which variable-length attention needs.
        return turned_RHK.to(rows_RHK.dtype)


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

    def keys_and_values(self, rows_ND: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of rows [N, D], each [N, H, K]."""
        keys_values_N2D = self.key_value(self.attention_norm(rows_ND))
        keys_NHK, values_NHK = (rows.unflatten(-1, (self.num_heads, -1)) for rows in keys_values_N2D.chunk(2, dim=-1))
        return keys_NHK if rotation is None else rotation(keys_NHK), values_NHK

    def forward(
        self,
        rows_RD: Tensor,
        attention: JaggedAttention,
        keys_NHK: Tensor,
        values_NHK: Tensor,
        rotation: Rotation | None = None,
        reads_itself: bool = False,
    ) -> Tensor:
        """Let rows read keys and values, each row those of its own request.

        Args:
            rows_RD: [R, D]: candidates, or the events themselves.
            attention: of these rows to these keys.
            keys_NHK: [N, H, K].
            values_NHK: [N, H, K].
            rotation: of the rows.
            reads_itself: each row's own key and value are read, too.

        Returns:
            Tensor: [R, D].
        """
        queries_RHK = self.query(self.attention_norm(rows_RD)).unflatten(-1, (self.num_heads, -1))
        if rotation is not None:
            queries_RHK = rotation(queries_RHK)
        own = self.keys_and_values(rows_RD, rotation) if reads_itself else None
        read_RHK = attention(queries_RHK, keys_NHK, values_NHK, own)
        rows_RD = rows_RD + self.dropout(self.output(read_RHK.flatten(1)))
        return rows_RD + self.dropout(self.feedforward(self.feedforward_norm(rows_RD)))


def history_layers(
    embedding_dim: int,
    num_layers: int,
    num_heads: int,
    feedforward_dim: int | None,
    dropout: float,
    device: torch.device | None,
) -> Sequence[AmortizedHistoryLayer]:
    """A module list of layers.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `num_heads`, or `num_layers` is below 1.
    """
    if embedding_dim % num_heads:
        raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}")
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}, not 1 or more")
    layers: Sequence[AmortizedHistoryLayer] = nn.ModuleList(  # type: ignore[assignment]
        AmortizedHistoryLayer(embedding_dim, num_heads, feedforward_dim or 2 * embedding_dim, dropout, device)
        for _ in range(num_layers)
    )
    return layers


class AmortizedHistoryArch(AmortizableEncoder):
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
        reads_itself: a candidate's attention has one term more, its own key and value (the mask of M-FALCON,
            Zhai et al., arXiv 2402.17152).
        rotary: turn queries and keys by their places; candidates stand right after the latest event. D / H is even.
        num_vectors: vectors that a candidate gets, each a slot of the interaction.
        has_summary: the mean of the encoded events is one slot more, the same for all candidates of a request and
            worked out once; it costs the last layer's work on events, which is not done otherwise.
        recent_events: longer histories keep these latest events, and the older ones become `summary_tokens` rows,
            so that the cost of a history is bounded; all events are kept if None.
        summary_tokens: learned queries that read the older events.
        backend: see `JaggedAttention`.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `num_heads`, `num_layers`, `num_vectors`, `recent_events` or
            `summary_tokens` is below 1, `history_attention` is neither word, or `rotary` and D / H is odd.

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
        *,
        reads_itself: bool = False,
        rotary: bool = False,
        num_vectors: int = 1,
        has_summary: bool = False,
        recent_events: int | None = None,
        summary_tokens: int = 4,
        backend: Backend = "packed",
    ) -> None:
        super().__init__(embedding_dim, num_vectors + has_summary)
        if history_attention not in ("full", "causal"):
            raise ValueError(f"history_attention is {history_attention!r}, not 'full' or 'causal'")
        if num_vectors < 1:
            raise ValueError(f"num_vectors is {num_vectors}, not 1 or more")
        self.layers = history_layers(embedding_dim, num_layers, num_heads, feedforward_dim, dropout, device)
        if rotary and embedding_dim // num_heads % 2:
            raise ValueError(f"rotary positions turn pairs, but a head has {embedding_dim // num_heads} entries")
        self.head_dim = embedding_dim // num_heads
        self.is_causal = history_attention == "causal"
        self.reads_itself = reads_itself
        self.is_rotary = rotary
        self.has_summary = has_summary
        self.backend: Backend = backend
        self.compression = (
            None
            if recent_events is None
            else HistoryCompression(embedding_dim, num_heads, recent_events, summary_tokens, device, backend)
        )
        self.output_norm = nn.LayerNorm(embedding_dim, device=device)
        self.vectors = (
            nn.Linear(embedding_dim, num_vectors * embedding_dim, device=device) if num_vectors > 1 else nn.Identity()
        )

    # Whether training keeps the events after the last layer, for a loss of them.
    keeps_events = False
    encoded_events: Tensor | None = None

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the keys and values of those before them as they are."""
        return self.is_causal and self.compression is None and not self.has_summary

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one, once per request: the keys and values of its events in every layer.

        Args:
            history: values [N, D], one row of B per request, oldest event first; a history may be empty.

        Returns:
            HistoryState: of B requests.
        """
        return self._encode(history if self.compression is None else self.compression(history), None)

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only: what encoding each whole history again would give.

        Args:
            state: of B requests.
            events: the events since, values [N, D], one row of B per request, oldest first; there may be none.

        Returns:
            HistoryState: of the longer histories.

        Raises:
            ValueError: the arch is not extendable, or state and events are of different numbers of requests.

        Example::

            state = arch.extend_history(arch.encode_history(history), new_events)
        """
        if not self.is_extendable:
            return super().extend_history(state, events)
        refuse_other_requests(state.lengths.shape[0], events.lengths().shape[0])
        return self._encode(events, state)

    def _encode(self, history: JaggedTensor, past: HistoryState | None) -> HistoryState:
        """Encode events that come after the `past` ones."""
        events_ND, new_lengths_B = history.values(), history.lengths()
        lengths_B = new_lengths_B if past is None else past.lengths + new_lengths_B
        attention = JaggedAttention(new_lengths_B, lengths_B, is_causal=self.is_causal, backend=self.backend)
        rotation = None
        if self.is_rotary:
            places_N = positions(new_lengths_B, events_ND.shape[0])
            if past is not None:
                places_N = places_N + expand(past.lengths, new_lengths_B, events_ND.shape[0])
            rotation = Rotation(places_N, self.head_dim, events_ND.dtype)
        keeps_events = self.keeps_events and self.training
        keys, values = [], []
        for depth, layer in enumerate(self.layers):
            keys_NHK, values_NHK = layer.keys_and_values(events_ND, rotation)
            if past is not None:
                keys_NHK = append(past.keys[depth], past.lengths, keys_NHK, new_lengths_B)
                values_NHK = append(past.values[depth], past.lengths, values_NHK, new_lengths_B)
            keys.append(keys_NHK)
            values.append(values_NHK)
            # Nothing but a summary or a loss of events reads them after the last layer's keys and values.
            if depth + 1 < len(self.layers) or self.has_summary or keeps_events:
                events_ND = layer(events_ND, attention, keys_NHK, values_NHK, rotation)
        if keeps_events:
            self.encoded_events = self.output_norm(events_ND)
        summary = mean_by_request(self.output_norm(events_ND), lengths_B) if self.has_summary else None
        return HistoryState(tuple(keys), tuple(values), lengths_B, summary)

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: what each candidate makes of its request's history.

        Args:
            state: of B requests.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, S D], the history vectors of each candidate, and then the summary if there is one.

        Raises:
            ValueError: state and candidates are of different numbers of requests.
        """
        refuse_other_requests(state.lengths.shape[0], candidates.lengths().shape[0])
        vectors_CD, lengths_B = candidates.values(), candidates.lengths()
        num_candidates = vectors_CD.shape[0]
        attention = JaggedAttention(lengths_B, state.lengths, backend=self.backend)
        rotation = None
        if self.is_rotary:
            rotation = Rotation(expand(state.lengths, lengths_B, num_candidates), self.head_dim, vectors_CD.dtype)
        for layer, keys_NHK, values_NHK in zip(self.layers, state.keys, state.values, strict=True):
            vectors_CD = layer(vectors_CD, attention, keys_NHK, values_NHK, rotation, self.reads_itself)
        vectors_CSD = self.vectors(self.output_norm(vectors_CD))
        if state.summary is None:
            return vectors_CSD
        return torch.cat([vectors_CSD, expand(state.summary, lengths_B, num_candidates)], dim=1)
