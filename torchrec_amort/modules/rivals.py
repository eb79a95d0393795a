"""The rivals: other ways to let a candidate read a history, behind the same interface.

Shape suffixes: B requests; N history events and C candidates, all requests together; P pairs of a candidate and an
event of its request's history, R rows of candidates' own sequences; D model dimension, W width of a hidden layer.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.history import history_layers
from torchrec_amort.ops.attention import Backend, JaggedAttention
from torchrec_amort.ops.jagged import expand, mean_by_request, pairs, positions


class MeanPooling(AmortizableEncoder):
    """The mean of the events, the same for all candidates; zero for an empty history.

    Args:
        embedding_dim: D.

    Example::

        vectors_CD = MeanPooling(embedding_dim=32)(history, candidates)
    """

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one: one row per request; see `AmortizableEncoder.encode_history`."""
        means_BD = mean_by_request(history.values(), history.lengths())
        return HistoryState((), (means_BD.unsqueeze(1),), torch.ones_like(history.lengths()))

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: [C, D]; see `AmortizableEncoder.score_candidates`."""
        refuse_other_requests(state.lengths.shape[0], candidates.lengths().shape[0])
        return expand(state.values[0].squeeze(1), candidates.lengths(), candidates.values().shape[0])


class TargetAttention(AmortizableEncoder):
    """A weighted sum of the events, their weights from a network over candidate and event.

    The weights are not normalized, so that a history full of kindred events weighs more (Deep Interest Network, Zhou
    et al., arXiv 1706.06978, section 4.3). Nothing of a history can be worked out ahead: its state is its events.

    Args:
        embedding_dim: D.
        hidden_dim: width of the network's hidden layer; 2 D unless given.
        device: where to put the weights.

    Example::

        vectors_CD = TargetAttention(embedding_dim=32)(history, candidates)
    """

    def __init__(self, embedding_dim: int, hidden_dim: int | None = None, device: torch.device | None = None) -> None:
        super().__init__(embedding_dim)
        hidden_dim = hidden_dim or 2 * embedding_dim
        self.weight = nn.Sequential(
            nn.Linear(4 * embedding_dim, hidden_dim, device=device),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1, device=device),
        )

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one: the events themselves; see `AmortizableEncoder.encode_history`."""
        return HistoryState((), (history.values().unsqueeze(1),), history.lengths())

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: [C, D]; see `AmortizableEncoder.score_candidates`."""
        refuse_other_requests(state.lengths.shape[0], candidates.lengths().shape[0])
        event_of_pair, candidate_of_pair, _ = pairs(state.lengths, candidates.lengths(), candidates.values().shape[0])
        events_ND, candidates_CD = state.values[0].squeeze(1), candidates.values()
        events_PD = events_ND.index_select(0, event_of_pair)
        candidates_PD = candidates_CD.index_select(0, candidate_of_pair)
        first, activation, second = cast(tuple[nn.Linear, nn.Module, nn.Linear], tuple(self.weight))
        # The product with [e, c, e - c, e * c] is a sum, of which only the last term is another one for every pair.
        of_event, of_candidate, of_difference, of_product = first.weight.split(self.embedding_dim, dim=1)
        of_events_NW = F.linear(events_ND, of_event + of_difference)
        of_candidates_CW = F.linear(candidates_CD, of_candidate - of_difference, first.bias)
        hidden_PW = F.linear(events_PD * candidates_PD, of_product)
        hidden_PW = hidden_PW + of_events_NW.index_select(0, event_of_pair)
        hidden_PW = hidden_PW + of_candidates_CW.index_select(0, candidate_of_pair)
        weights_P1 = second(activation(hidden_PW))
        weighted_PD = (weights_P1 * events_PD).to(candidates_CD.dtype)
        return torch.zeros_like(candidates_CD).index_add(0, candidate_of_pair, weighted_PD)


class TransformerPerCandidate(HistoryEncoder):
    """What the Transformers have in common whose events are other ones for every candidate.

    Each candidate is encoded in a sequence of its own, and nothing of a history can be shared.

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_layers: number of layers.
        num_heads: attention heads.
        feedforward_dim: width of the feed-forward networks; 2 D unless given.
        dropout: probability of dropping an entry of a residual branch, in training.
        device: where to put the weights.
        backend: see `JaggedAttention`.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `num_heads`, or `num_layers` is below 1.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
        backend: Backend = "packed",
    ) -> None:
        super().__init__(embedding_dim)
        self.layers = history_layers(embedding_dim, num_layers, num_heads, feedforward_dim, dropout, device)
        self.output_norm = nn.LayerNorm(embedding_dim, device=device)
        self.backend: Backend = backend


class AppendSelfAttention(TransformerPerCandidate):
    """A Transformer over the history with the candidate as its last row, all rows reading all rows.

    Events read the candidate, so a history's keys and values are other ones for every candidate. Arguments are those
    of `TransformerPerCandidate`.

    Example::

        vectors_CD = AppendSelfAttention(embedding_dim=32)(history, candidates)
    """

    def forward(self, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
        """Encode each candidate with its history: [C, D]; see `HistoryEncoder.forward`."""
        event_of_pair, candidate_of_pair, lengths_C = pairs(
            history.lengths(), candidates.lengths(), candidates.values().shape[0]
        )
        last_C = torch.cumsum(lengths_C + 1, 0) - 1
        # Each candidate's sequence is its events and then itself.
        place_of_pair = torch.arange(len(event_of_pair), device=lengths_C.device) + candidate_of_pair
        rows_RD = candidates.values().new_empty(len(event_of_pair) + len(last_C), self.embedding_dim)
        rows_RD = rows_RD.index_copy(0, place_of_pair, history.values().index_select(0, event_of_pair))
        rows_RD = rows_RD.index_copy(0, last_C, candidates.values())
        attention = JaggedAttention(lengths_C + 1, lengths_C + 1, backend=self.backend)
        for layer in self.layers[:-1]:
            rows_RD = layer(rows_RD, attention, *layer.keys_and_values(rows_RD))
        # Of the last layer's rows only the candidates are needed.
        attention = JaggedAttention(torch.ones_like(lengths_C), lengths_C + 1, backend=self.backend)
        keys_and_values = self.layers[-1].keys_and_values(rows_RD)
        return self.output_norm(self.layers[-1](rows_RD.index_select(0, last_C), attention, *keys_and_values))


class Concatenation(TransformerPerCandidate):
    """A Transformer over events that each have the candidate beside them.

    As TransAct (Xia et al., arXiv 2306.00248, section 3.2): the candidate is concatenated to every event, and the
    encoded events are pooled by their maximum, with the latest event beside it. An empty history gives zeros.
    Arguments are those of `TransformerPerCandidate`.

    Example::

        vectors_CD = Concatenation(embedding_dim=32)(history, candidates)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
        backend: Backend = "packed",
    ) -> None:
        super().__init__(embedding_dim, num_layers, num_heads, feedforward_dim, dropout, device, backend)
        self.concatenated = nn.Linear(2 * embedding_dim, embedding_dim, device=device)
        self.pooled = nn.Linear(2 * embedding_dim, embedding_dim, bias=False, device=device)

    def forward(self, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
        """Encode each candidate's events with it: [C, D]; see `HistoryEncoder.forward`."""
        event_of_pair, candidate_of_pair, lengths_C = pairs(
            history.lengths(), candidates.lengths(), candidates.values().shape[0]
        )
        # The product with [event, candidate] is the sum of two, each worked out once and not for every pair.
        of_event, of_candidate = self.concatenated.weight.split(self.embedding_dim, dim=1)
        events_PD = F.linear(history.values(), of_event).index_select(0, event_of_pair)
        candidates_CD = F.linear(candidates.values(), of_candidate, self.concatenated.bias)
        rows_PD = events_PD + candidates_CD.index_select(0, candidate_of_pair)
        attention = JaggedAttention(lengths_C, lengths_C, backend=self.backend)
        for layer in self.layers:
            rows_PD = layer(rows_PD, attention, *layer.keys_and_values(rows_PD))
        return self.pooled(self._pool(self.output_norm(rows_PD), candidate_of_pair, lengths_C))

    def _pool(self, rows_PD: Tensor, candidate_of_pair: Tensor, lengths_C: Tensor) -> Tensor:
        """[C, 2 D]: the maximum over each candidate's rows, and the latest of them."""
        zeros_CD = rows_PD.new_zeros(len(lengths_C), self.embedding_dim)
        most_CD = torch.segment_reduce(rows_PD, "max", lengths=lengths_C, unsafe=True)
        most_CD = torch.where(lengths_C[:, None] > 0, most_CD, zeros_CD)
        is_latest_P = positions(lengths_C, len(rows_PD)) + 1 == lengths_C[candidate_of_pair]
        latest_CD = zeros_CD.index_copy(0, candidate_of_pair[is_latest_P], rows_PD[is_latest_P])
        return torch.cat([most_CD, latest_CD], dim=1)
