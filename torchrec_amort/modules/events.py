"""EventEncoder: from the embeddings of an event's features to one vector per event.

Shape suffixes: B requests; N history events, all requests together; D model dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor


class EventEncoder(nn.Module):
    """An event is the sum of its features' embeddings and of its place, counted from the latest event.

    Args:
        features: keys of the event features to add up (`history_item`, `history_action`, ...).
        embedding_dim: D.
        max_length: events that a history may have; each place has a learned vector.
        dropout: probability of dropping an entry of an event's vector, in training.
        device: where to put the weights.

    Example::

        encoder = EventEncoder(["history_item", "history_action"], embedding_dim=32, max_length=100)
        history = encoder(history_embedding_collection(batch.sequences))
    """

    def __init__(
        self,
        features: Sequence[str],
        embedding_dim: int,
        max_length: int,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.recency = nn.Embedding(max_length, embedding_dim, device=device)
        nn.init.normal_(self.recency.weight, std=embedding_dim**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Mapping[str, JaggedTensor]) -> JaggedTensor:
        """Sum up each event.

        Args:
            embeddings: for each feature, values [N, D] with one row of B per request, oldest event first.

        Returns:
            JaggedTensor: values [N, D], the same rows.

        Raises:
            ValueError: a history is longer than `max_length`.
        """
        first = embeddings[self.features[0]]
        recency_N = recency(first.lengths(), first.values().shape[0])
        self._refuse_too_long(first.lengths())
        events_ND = self.recency(recency_N)
        for feature in self.features:
            events_ND = events_ND + embeddings[feature].values()
        return JaggedTensor(self.dropout(events_ND), lengths=first.lengths())

    def _refuse_too_long(self, lengths_B: Tensor) -> None:
        max_length = self.recency.num_embeddings
        if lengths_B.numel() and int(lengths_B.max()) > max_length:
            request = int(lengths_B.argmax())
            raise ValueError(
                f"request {request} has a history of {int(lengths_B[request])} events, but the encoder knows "
                f"places for {max_length}: keep the latest {max_length} (history_length), or build it for more"
            )


def recency(lengths_B: Tensor, num_events: int) -> Tensor:
    """int64 [N]: how many later events each event has in its history; 0 for the latest."""
    ends_N = torch.repeat_interleave(torch.cumsum(lengths_B, 0), lengths_B, output_size=num_events)
    return ends_N - 1 - torch.arange(num_events, device=lengths_B.device)
