"""The interface of history encoders: from a history and candidates to what each candidate makes of it.

Shape suffixes: B requests; N history events and C candidates, all requests together; D model dimension; S vectors
of a candidate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.ops.jagged import offsets


@dataclass(frozen=True, eq=False)
class HistoryState:
    """B encoded histories: all that a candidate needs of them.

    Args:
        keys: for each layer, [N, H, K].
        values: for each layer, [N, H, K].
        lengths: int64 [B], rows of keys and values of each request.
        summary: [B, D], the pooled summaries, if the encoder makes them.

    Example::

        state = arch.encode_history(history)
        first_two = state[:2]
        again = HistoryState.cat([first_two, state[2:]])
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    summary: Tensor | None = None

    def __len__(self) -> int:
        """The number of requests, B."""
        return self.lengths.numel()

    @property
    def offsets(self) -> Tensor:
        """int64 [B + 1]: where each history starts among the N rows, and where the last one ends."""
        return offsets(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (*self.keys, *self.values, self.lengths, *(() if self.summary is None else (self.summary,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _map(self, rows: Callable[[Tensor], Tensor], requests: Callable[[Tensor], Tensor]) -> HistoryState:
        return HistoryState(
            tuple(rows(key) for key in self.keys),
            tuple(rows(value) for value in self.values),
            requests(self.lengths),
            None if self.summary is None else requests(self.summary),
        )

    def __getitem__(self, index: int | slice) -> HistoryState:
        """The state of one request, or of a contiguous range of them; a view, not a copy."""
        chosen = self.requests(index)
        first, last = (int(place) for place in self.offsets[[chosen.start, chosen.stop]])
        return self._map(lambda rows: rows[first:last], lambda requests: requests[chosen.start : chosen.stop])

    def requests(self, index: int | slice) -> range:
        """Which requests an index means.

        Raises:
            IndexError: there is no such request.
            ValueError: they are not contiguous.
        """
        if isinstance(index, int):
            position = range(len(self))[index]
            return range(position, position + 1)
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a HistoryState is sliced by contiguous requests, not with step {step}")
        return range(start, max(start, stop))

    @classmethod
    def cat(cls, states: Sequence[HistoryState]) -> HistoryState:
        """Put states together, request after request.

        Raises:
            ValueError: no state is given, or they are of different encoders: they differ in their number of
                layers, or only some have a summary.
        """
        layers = {len(state.values) for state in states}
        if len(layers) != 1:
            raise ValueError(f"states to put together need one number of layers, not {sorted(layers)}")
        summaries = [state.summary for state in states if state.summary is not None]
        if len(summaries) not in (0, len(states)):
            raise ValueError(f"{len(summaries)} of {len(states)} states have a summary: put together all or none")
        return cls(
            tuple(torch.cat(rows) for rows in zip(*(state.keys for state in states), strict=True)),
            tuple(torch.cat(rows) for rows in zip(*(state.values for state in states), strict=True)),
            torch.cat([state.lengths for state in states]),
            torch.cat(summaries) if summaries else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HistoryState:
        """Copy the state to a device."""
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        return self._map(move, move)


class HistoryEncoder(nn.Module, ABC):
    """What each candidate makes of its request's history: one function of (history, candidate).

    Args:
        embedding_dim: D, of events and candidates.
        num_slots: S, vectors that a candidate gets, each a slot of the interaction.
    """

    def __init__(self, embedding_dim: int, num_slots: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_slots = num_slots

    @property
    def is_amortizable(self) -> bool:
        """Whether the history can be encoded once and read by every candidate, scores unchanged."""
        return isinstance(self, AmortizableEncoder)

    @abstractmethod
    def forward(self, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
        """Encode histories and candidates.

        Args:
            history: values [N, D], one row of B per request, oldest event first; a history may be empty.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, S D].
        """


class AmortizableEncoder(HistoryEncoder):
    """A HistoryEncoder in two phases: the history once per request, then candidates that read it."""

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the state of those before them as it is, so that it can be extended."""
        return False

    @abstractmethod
    def encode_history(self, history: JaggedTensor) -> HistoryState:
        """Phase one, once per request.

        Args:
            history: values [N, D], one row of B per request, oldest event first; a history may be empty.

        Returns:
            HistoryState: of B requests.
        """

    @abstractmethod
    def score_candidates(self, state: HistoryState, candidates: JaggedTensor) -> Tensor:
        """Phase two: what each candidate makes of its request's history.

        Args:
            state: of B requests.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, S D].

        Raises:
            ValueError: state and candidates are of different numbers of requests.
        """

    def extend_history(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one for new events only: what encoding each whole history again would give.

        Args:
            state: of B requests.
            events: the events since, values [N, D], one row of B per request, oldest first; there may be none.

        Returns:
            HistoryState: of the longer histories.

        Raises:
            ValueError: the encoder is not extendable, or state and events are of different numbers of requests.
        """
        raise ValueError(
            f"the states of this {type(self).__name__} cannot be extended: that needs causal history attention, "
            "without summary and compression; encode the whole history again"
        )

    def score_states(self, states: Sequence[HistoryState], candidates: JaggedTensor) -> Tensor:
        """Phase two with states of some of the requests each, in the candidates' order.

        Args:
            states: of B requests together; at least one.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, S D].

        Raises:
            ValueError: states and candidates are of different numbers of requests.
        """
        return self.score_candidates(states[0] if len(states) == 1 else HistoryState.cat(states), candidates)

    def forward(self, history: JaggedTensor, candidates: JaggedTensor) -> Tensor:
        """Phase one, then phase two.

        Args:
            history: values [N, D], one row of B per request, oldest event first.
            candidates: values [C, D], one row of B per request.

        Returns:
            Tensor: [C, S D].
        """
        return self.score_candidates(self.encode_history(history), candidates)


def amortizable(encoder: HistoryEncoder) -> AmortizableEncoder:
    """An encoder that has two phases.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(encoder, AmortizableEncoder):
        raise ValueError(
            f"a {type(encoder).__name__} encodes a history for every candidate anew: score with the model itself"
        )
    return encoder


def refuse_other_requests(have: int, given: int) -> None:
    """Refuse candidates or events of another number of requests than the state's.

    Args:
        have: requests of the state. A size of a tensor, where torch.export follows: it makes a constant of a `len()`.
        given: requests of the candidates or events.
    """
    if have != given:
        raise ValueError(f"the state is of {have} requests, the candidates of {given}: they need one history each")
