"""Served: what a scorer asks of a model, whatever its class, in this process or in a package.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.jagged_ids import JaggedIds
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.schema import RequestSchema

Backend = Literal["auto", "native", "eager", "compiled"]

Histories = Mapping[str, Sequence[HistoryState]]


class Served(ABC):
    """A model in two phases, lookups included, with the dense weights of one moment.

    Args:
        features: features that are read of each field of a batch.
        table_sizes: rows of the table of each feature.
        is_weighted: of each field with ids of bags, whether its ids have weights.
        events: features of the events of each tower, by its name.
        history_length: events that a history may have; None if any number.
        device: where batches are read.
        schema: of the requests, if it is known.
    """

    features: Mapping[str, Sequence[str]]
    table_sizes: Mapping[str, int]
    is_weighted: Mapping[str, bool]
    events: Mapping[str, Sequence[str]]
    history_length: int | None
    device: torch.device
    schema: RequestSchema | None

    @abstractmethod
    def request(self, batch: RequestBatch) -> Any:
        """Phase one of all but histories.

        Args:
            batch: B requests.

        Returns:
            Any: what `score` takes.

        Raises:
            InputError: the batch has other dense inputs than the model reads.
        """

    @abstractmethod
    def encode(self, tower: str, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of B histories.

        Args:
            tower: its name.
            events: ids of each of its features.
        """

    @abstractmethod
    def is_extendable(self, tower: str) -> bool:
        """Whether a state can be extended by the events since."""

    @abstractmethod
    def extend(self, tower: str, state: HistoryState, events: Mapping[str, JaggedIds]) -> HistoryState:
        """Phase one of the events since, where states are extendable."""

    @abstractmethod
    def score(self, request: Any, histories: Histories, batch: RequestBatch) -> Tensor:
        """Phase two.

        Args:
            request: what `request` gave for the batch's requests.
            histories: states of each tower, of B requests together.
            batch: of the requests with C candidates, all or some; a request may have none.

        Returns:
            Tensor: logits [C, T], float32 at least.
        """
