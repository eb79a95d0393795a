"""Encoders of how a candidate compares with a history as a whole: how alike it is, and whether it is there already.

Nothing of the candidate itself gets through to their vectors, only how it compares with events. What is new this week
cannot be learned by heart then, and a table of items that changes every day does no harm.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; H heads of
dimension K; W windows of the latest events; S vectors of a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryEncoder, HistoryState, refuse_other_requests
from torchrec_amort.modules.events import EventEncoder, recency
from torchrec_amort.ops.fingerprints import fingerprints, mixed
from torchrec_amort.ops.jagged import add_up, expand, requests

# Latest events of each window; one more is of all events.
WINDOWS = (10, 50, 200)


class _ByWindow(AmortizableEncoder):
    """What candidates get of numbers that are told of the latest events, of more of them, and of all.

    Args:
        embedding_dim: D.
        windows: numbers of latest events; all events are one window more.
        numbers: of each window.
        num_vectors: S.
        device: where to put the weights.
    """

    def __init__(
        self,
        embedding_dim: int,
        windows: Sequence[int],
        numbers: int,
        num_vectors: int,
        device: torch.device | None,
    ) -> None:
        if list(windows) != sorted({window for window in windows if window >= 1}):
            raise ValueError(f"windows are {list(windows)}: give numbers of latest events, 1 or more, in rising order")
        if num_vectors < 1:
            raise ValueError(f"num_vectors is {num_vectors}, not 1 or more")
        super().__init__(embedding_dim, num_vectors)
        self.windows = tuple(windows)
        self.num_windows = len(windows) + 1
        self.vectors = nn.Linear(self.num_windows * numbers, num_vectors * embedding_dim, bias=False, device=device)

    def _window_of(self, lengths_B: Tensor, num_events: int) -> Tensor:
        """int64 [N]: the narrowest window that has each event."""
        bounds = torch.tensor(self.windows, dtype=torch.int64, device=lengths_B.device)
        return torch.bucketize(recency(lengths_B, num_events), bounds, right=True)


class HistorySimilarity(_ByWindow):
    """How alike a candidate is to the user's latest events, to more of them, and to all.

    In each head and window: the product of the candidate's vector with the mean of the events' vectors, which is the
    mean of its products with them. All that candidates need of a history is one mean for each window, whatever its
    length. An empty history gives zeros.

    Args:
        embedding_dim: D, a multiple of `num_heads`.
        num_heads: H, each of which compares other entries of the vectors.
        windows: numbers of latest events; all events are one window more.
        num_vectors: S, vectors that a candidate gets, each a slot of the interaction.
        device: where to put the weights.

    Raises:
        ValueError: `embedding_dim` is not a multiple of `num_heads`, `windows` do not rise from 1, or `num_vectors` is
            below 1.

    Example::

        encoder = HistorySimilarity(embedding_dim=32, windows=(10, 50))
        vectors_CD = encoder(history, candidates)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 4,
        windows: Sequence[int] = WINDOWS,
        num_vectors: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if embedding_dim % num_heads:
            raise ValueError(f"embedding_dim {embedding_dim} is not a multiple of num_heads {num_heads}")
        super().__init__(embedding_dim, windows, num_heads, num_vectors, device)
        self.num_heads = num_heads

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one: the mean of each window; see `AmortizableEncoder.encode_history`."""
        events_ND, lengths_B = history.values(), history.lengths()
        num_events = events_ND.shape[0]
        # Events of the narrowest window that has them; wider ones are sums of these.
        places_N = requests(lengths_B, num_events) * self.num_windows + self._window_of(lengths_B, num_events)
        sums = add_up(events_ND, places_N, lengths_B.shape[0] * self.num_windows)
        sums_BWD = sums.unflatten(0, (-1, self.num_windows)).cumsum(1)
        widths = [lengths_B.clamp(max=window) for window in self.windows]
        counts_BW = torch.stack([*widths, lengths_B], 1).clamp(min=1)
        means_BWD = (sums_BWD / counts_BW[:, :, None]).to(events_ND.dtype)
        return HistoryState((), (means_BWD,), torch.ones_like(lengths_B))

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: [C, S D]; see `AmortizableEncoder.score_candidates`."""
        refuse_other_requests(state.lengths.shape[0], candidates.lengths().shape[0])
        candidates_CHK = candidates.values().unflatten(1, (self.num_heads, -1))
        means_CWD = expand(state.values[0], candidates.lengths(), candidates_CHK.shape[0])
        means_CWHK = means_CWD.unflatten(2, (self.num_heads, -1))
        products_CWH = torch.einsum("chk,cwhk->cwh", candidates_CHK, means_CWHK)
        vectors_CX: Tensor = self.vectors(products_CWH.flatten(1))
        return vectors_CX


class HistoryMatches(_ByWindow):
    """How often a candidate is among the user's latest events already, among more of them, and among all.

    An event matches if its vector is the candidate's, entry by entry, as two rows of one table are for one id, trained
    or not. What else an event has would be in its vector, so events are of one feature, whose table is D wide. In each
    window it is the logarithm of 1 + the number of events that match, and whether one does. A history without a match
    gives zeros. Ids that share the row of unknown ids match each other: give such an encoder ids with a row each, or
    hashed into a large table.

    Args:
        embedding_dim: D.
        windows: numbers of latest events; all events are one window more.
        num_vectors: S, vectors that a candidate gets, each a slot of the interaction.
        device: where to put the weights.

    Raises:
        ValueError: `windows` do not rise from 1, or `num_vectors` is below 1.

    Example::

        encoder = HistoryMatches(embedding_dim=32, windows=(10, 50))
        vectors_CD = encoder(history, candidates)
    """

    def __init__(
        self,
        embedding_dim: int,
        windows: Sequence[int] = WINDOWS,
        num_vectors: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(embedding_dim, windows, 2, num_vectors, device)

    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one: a fingerprint of each event, int64 [N, 1, 1]; see `AmortizableEncoder.encode_history`."""
        return HistoryState((), (_fingerprints(history)[:, None, None],), history.lengths())

    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: [C, S D]; see `AmortizableEncoder.score_candidates`."""
        refuse_other_requests(state.lengths.shape[0], candidates.lengths().shape[0])
        with torch.no_grad():
            counts_CW = self._counts(state, candidates).to(candidates.values().dtype)
        vectors_CX: Tensor = self.vectors(torch.cat([counts_CW.log1p(), counts_CW.clamp(max=1)], 1))
        return vectors_CX

    def _counts(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """int64 [C, W]: events of each window that match."""
        keys_N = _of_requests(state.values[0].flatten(), state.lengths)
        keys_C = _of_requests(_fingerprints(candidates), candidates.lengths())
        sorted_N, order_N = keys_N.sort()
        window_N = self._window_of(state.lengths, keys_N.shape[0]).index_select(0, order_N)
        is_of_window_NW = torch.arange(self.num_windows, device=keys_N.device) >= window_N.unsqueeze(1)
        below_NW = torch.cat([keys_N.new_zeros(1, self.num_windows), is_of_window_NW.long().cumsum(0)])
        first_C, stop_C = (torch.searchsorted(sorted_N, keys_C, right=right) for right in (False, True))
        return below_NW.index_select(0, stop_C) - below_NW.index_select(0, first_C)


def refuse_never_matching(encoder: HistoryEncoder, events: EventEncoder, candidate_features: Sequence[str]) -> None:
    """Refuse events among which `HistoryMatches` would never find a candidate.

    Args:
        encoder: of the events.
        events: makes their vectors.
        candidate_features: that make the candidates' vectors.

    Raises:
        ValueError: it compares more than one feature, or events with more in them than that.
    """
    if not isinstance(encoder, HistoryMatches):
        return
    if len(events.features) != 1 or len(candidate_features) != 1:
        raise ValueError(
            f"HistoryMatches (matches) compares one feature of candidates with one of events, not "
            f"{list(candidate_features)} with {events.features}: leave the others out, or name a tower's features"
        )
    if events.recency is not None or events.combine != "sum" or events.dropout.p:
        raise ValueError(
            "HistoryMatches (matches) compares rows as they are looked up: give an EventEncoder without max_length, "
            "dropout and combine"
        )


def _fingerprints(rows: JaggedTensor) -> Tensor:
    """int64 [R]: the same for equal rows, and for others as good as never."""
    rows_RD = rows.values()
    return fingerprints(rows_RD, torch.zeros(rows_RD.shape[0], dtype=torch.int64, device=rows_RD.device))


def _of_requests(prints_R: Tensor, lengths_B: Tensor) -> Tensor:
    """int64 [R]: fingerprints that are other ones in another request."""
    return mixed(prints_R, requests(lengths_B, prints_R.shape[0]))
