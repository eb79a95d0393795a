"""EventEncoder: from the vectors of an event's features to one vector per event.

Shape suffixes: B requests; N history events, all requests together; F features of an event; D model dimension;
I numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.ops.jagged import expand, positions

Combine: TypeAlias = Literal["sum", "concatenate", "product"]


class EventEncoder(nn.Module):
    """An event is the sum of its features' vectors and of its place, counted from the latest event.

    Args:
        features: keys of the event features (`history_item`, `history_action`, ...).
        embedding_dim: D.
        max_length: events that a history may have; each place has a learned vector. If None, places are left out and
            a history may have any length.
        dropout: probability of dropping an entry of an event's vector, in training.
        device: where to put the weights.
        combine: `sum` of the features; `concatenate` and then a linear layer to D; or `product`, the first feature
            times, entry by entry, 1 + the sum of the others: an item counts by what was done with it.

    Example::

        encoder = EventEncoder(["history_item", "history_action"], embedding_dim=32, max_length=100)
        history = encoder(history_embedding_collection(batch.sequences))
    """

    def __init__(
        self,
        features: Sequence[str],
        embedding_dim: int,
        max_length: int | None = None,
        dropout: float = 0.0,
        device: torch.device | None = None,
        combine: Combine = "sum",
    ) -> None:
        super().__init__()
        self.features, self.combine = list(features), combine
        self.joined = None
        if combine == "concatenate":
            self.joined = nn.Linear(len(self.features) * embedding_dim, embedding_dim, bias=False, device=device)
        self.recency = None
        if max_length is not None:
            self.recency = nn.Embedding(max_length, embedding_dim, device=device)
            nn.init.normal_(self.recency.weight, std=embedding_dim**-0.5)
        self.dropout = nn.Dropout(dropout)

    @property
    def max_length(self) -> int | None:
        """Events that a history may have; None if any number."""
        return None if self.recency is None else self.recency.num_embeddings

    def forward(self, embeddings: Mapping[str, JaggedTensor]) -> JaggedTensor:
        """Make one vector of each event.

        Args:
            embeddings: for each feature, values [N, D] with one row of B per request, oldest event first.

        Returns:
            JaggedTensor: values [N, D], the same rows.

        Raises:
            ValueError: a history is longer than `max_length`.
        """
        lengths_B = embeddings[self.features[0]].lengths()
        events_ND = self._combined([embeddings[feature].values() for feature in self.features])
        if self.recency is not None:
            self._refuse_too_long(lengths_B, self.recency.num_embeddings)
            events_ND = events_ND + self.recency(recency(lengths_B, events_ND.shape[0]))
        return JaggedTensor(self.dropout(events_ND), lengths=lengths_B)

    def _combined(self, of_features: list[Tensor]) -> Tensor:
        """[N, D]: what the features of each event make together, without its place."""
        first, *others = of_features
        if self.joined is not None:
            events_ND: Tensor = self.joined(torch.cat(of_features, 1))
            return events_ND
        if self.combine == "product" and others:
            return first * (1 + sum(others[1:], others[0]))
        return sum(others, first)

    def _refuse_too_long(self, lengths_B: Tensor, max_length: int) -> None:
        # To a compiler the lengths are not known; what is too long is out of the table's range there.
        if not torch.compiler.is_compiling() and lengths_B.numel() and int(lengths_B.max()) > max_length:
            request = int(lengths_B.argmax())
            raise ValueError(
                f"request {request} has a history of {int(lengths_B[request])} events, but the encoder knows "
                f"places for {max_length}: keep the latest {max_length} (history_length), or build it for more"
            )


class Numbers(nn.Module):
    """Numbers of events or candidates, less their mean and over their deviation, in a linear layer to D.

    Args:
        size: I.
        embedding_dim: D.
        device: where to put the weights.

    Example::

        events_ND = Numbers(1, embedding_dim=32)(torch.rand(5, 1))
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, size: int, embedding_dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(size, embedding_dim, bias=False, device=device)
        self.register_buffer("mean", torch.zeros(size, device=device))
        self.register_buffer("deviation", torch.ones(size, device=device))

    def forward(self, numbers_NI: Tensor) -> Tensor:
        """[N, I] to [N, D]."""
        rows_ND: Tensor = self.linear((numbers_NI - self.mean) / self.deviation)
        return rows_ND


def recency(lengths_B: Tensor, num_events: int) -> Tensor:
    """int64 [N]: how many later events each event has in its history; 0 for the latest."""
    if lengths_B.shape[0] == 1:
        return torch.arange(num_events - 1, -1, -1, device=lengths_B.device)
    return expand(lengths_B, lengths_B, num_events) - 1 - positions(lengths_B, num_events)
