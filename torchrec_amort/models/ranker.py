"""Rankers: models in two phases, one once per request, the other for its candidates.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.lists import shortest
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows, RequestState
from torchrec_amort.modules.encoder import HistoryEncoder

# How a model is called: with a batch, and what stands where its KeyedJaggedTensor stood; what it returns is [C, T].
Call = Callable[[nn.Module, RequestBatch, RequestBatch | CandidateRows], Tensor]


class Ranker(nn.Module, ABC):
    """A model that scores candidates in two phases; its forward is one and then the other."""

    @property
    @abstractmethod
    def history_length(self) -> int | None:
        """Events that a history may have; None if any number."""

    @property
    def is_amortizable(self) -> bool:
        """Whether it can score in two phases, each history encoded once and read by every candidate."""
        return all(encoder.is_amortizable for encoder in encoders_of(self))

    @abstractmethod
    def encode_request(self, batch: RequestBatch) -> RequestState:
        """Phase one: all that is done once per request.

        Args:
            batch: B requests; their candidates are not read.

        Returns:
            RequestState: of B requests.
        """

    @abstractmethod
    def score_candidates(self, state: RequestState, batch: RequestBatch) -> Tensor:
        """Phase two: score candidates.

        Args:
            state: of the batch's requests.
            batch: B requests with C candidates, all or some of each; their ids and histories are not read.

        Returns:
            Tensor: logits [C, T].
        """

    @abstractmethod
    def forward(self, batch: RequestBatch) -> Tensor:
        """Score every candidate of every request.

        Args:
            batch: B requests with C candidates.

        Returns:
            Tensor: logits [C, T].
        """


class CollectionRanker(Ranker):
    """Base class of rankers that read ids and histories with an `AmortizedEmbeddingBagCollection`."""

    @property
    @abstractmethod
    def collection(self) -> AmortizedEmbeddingBagCollection:
        """What reads ids and histories."""

    @abstractmethod
    def score_rows(self, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
        """Score every candidate of a batch.

        Args:
            batch: B requests with C candidates.
            rows: what the collection is given: the batch, or, in phase two, its candidates, looked up already.

        Returns:
            Tensor: logits [C, T].
        """

    @property
    def history_length(self) -> int | None:
        """Events that a history may have, the least of several histories' limits; None if any number."""
        return shortest(self.history_lengths.values())

    @property
    def history_lengths(self) -> dict[str, int | None]:
        """Events that the history of each tower may have; None if any number."""
        return {tower.name: tower.event_encoder.max_length for tower in self.collection.towers}

    def encode_request(self, batch: RequestBatch) -> RequestState:
        """Phase one; see `Ranker.encode_request`."""
        return self.collection.encode_request(batch)

    def score_candidates(self, state: RequestState, batch: RequestBatch) -> Tensor:
        """Phase two; see `Ranker.score_candidates`."""
        return self.score_rows(batch, self.collection.candidates(state, batch))

    def forward(self, batch: RequestBatch) -> Tensor:
        """Score every candidate of every request; see `Ranker.forward`."""
        return self.score_rows(batch, batch)


class ModelRanker(CollectionRanker):
    """A model of any class that is built on an `AmortizedEmbeddingBagCollection`.

    Args:
        model: holds one such collection.
        call: how it is called, `model(batch.dense, rows)` if None: `rows` is what stands where its KeyedJaggedTensor
            stood.

    Raises:
        ValueError: the model holds no such collection, or several.

    Example::

        ranker = ModelRanker(model, lambda model, batch, rows: model(rows, batch.dense)[0])
        logits_CT = ranker.score_candidates(ranker.encode_request(batch), batch)
    """

    def __init__(self, model: nn.Module, call: Call | None = None) -> None:
        super().__init__()
        self.model = model
        self.call = call or call_model
        # Refuses what is none.
        _ = self.collection

    @property
    def collection(self) -> AmortizedEmbeddingBagCollection:
        """What the model reads ids and histories with."""
        found = [module for module in self.model.modules() if isinstance(module, AmortizedEmbeddingBagCollection)]
        if len(found) != 1:
            raise ValueError(
                f"the {type(self.model).__name__} has {len(found)} AmortizedEmbeddingBagCollections, not one: build it "
                "on one, or add a history to its logits by ResidualHistory"
            )
        return found[0]

    def score_rows(self, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
        """Call the model; see `CollectionRanker.score_rows`."""
        return self.call(self.model, batch, rows)


def ranker_of(model: nn.Module, call: Call | None = None) -> Ranker:
    """A model as a ranker: itself, if it is one.

    Args:
        model: a ranker, or built on an `AmortizedEmbeddingBagCollection`.
        call: see `ModelRanker`.

    Raises:
        ValueError: it is neither, or a ranker is given a `call`.

    Example::

        logits_CT = ranker_of(model)(batch)
    """
    if not isinstance(model, Ranker):
        return ModelRanker(model, call)
    if call is not None:
        raise ValueError(f"a {type(model).__name__} is called with a batch: leave call out")
    return model


def encoders_of(model: nn.Module) -> list[HistoryEncoder]:
    """The encoders of all histories of a model; none if it reads no history.

    Args:
        model: any.

    Example::

        assert len(encoders_of(model)) == 1
    """
    return [module for module in model.modules() if isinstance(module, HistoryEncoder)]


def call_model(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows | KeyedJaggedTensor) -> Tensor:
    """Call a model as TorchRec's own are called: with dense inputs and then ids."""
    logits_CT: Tensor = model(batch.dense, rows)
    return logits_CT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode meanwhile, and each module in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
