"""HistoryTower: from the embeddings of one history's events and of candidates' items to vectors of each candidate.

Shape suffixes: B requests; N events of the history and C candidates, all requests together; D width of the encoder;
S vectors of a candidate; W width of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryEncoder, HistoryState, amortizable
from torchrec_amort.modules.events import EventEncoder

# Candidates' items in `RequestBatch.sequences`.
CANDIDATE_ITEM = "candidate_item"


class HistoryTower(nn.Module):
    """One history of a request: what its events are, and what each candidate makes of them.

    An `AmortizedEmbeddingBagCollection` looks up the embeddings that towers read. Tables of another width than the
    encoder's are fitted to it by a linear layer without bias each.

    Args:
        name: of the history, and of the bags that the collection reports for it.
        encoder: makes S vectors of a candidate and its request's history.
        events: tables of the events' features, of `RequestBatch.sequences`, and of `candidate_item` unless `item` is
            given.
        item: the candidate's feature whose table in the bags serves events as well, if one does. It is looked up by
            the ids of `candidate_item`.
        history_item: the events' feature that reads that table.
        event_encoder: makes one vector of each event; if None, the sum of the embeddings of all features of events.
        width: W, of the vectors that the model gets; by a linear layer if it is not D.
        starts_at_zero: whether a gate, zero at first, scales the vectors. A model that is trained already then scores
            as before until training opens it.

    Raises:
        ValueError: there is no feature of events, `event_encoder` reads one that is not there, or the name cannot be a
            module's.

    Example::

        tower = HistoryTower("clicks", AmortizedHistoryArch(32), events=history_embedding_collection)
    """

    def __init__(
        self,
        name: str,
        encoder: HistoryEncoder,
        *,
        events: EmbeddingCollection | None = None,
        item: str | None = None,
        history_item: str = "history_item",
        event_encoder: EventEncoder | None = None,
        width: int | None = None,
        starts_at_zero: bool = True,
    ) -> None:
        super().__init__()
        if "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"tower {name!r}: a module cannot have this name: give it another one")
        # Not one of its modules: the collection that takes the tower looks up, once for all its towers.
        self._events = (events,)
        self.name, self.item, self.history_item = name, item, history_item
        tables = [] if events is None else events.embedding_configs()
        widths = {feature: table.embedding_dim for table in tables for feature in table.feature_names}
        features = [*([] if item is None else [history_item]), *widths]
        if item is None and CANDIDATE_ITEM not in features:
            raise ValueError(f"tower {name!r}: events has {features}: it needs {CANDIDATE_ITEM!r}, or an item of bags")
        features = [feature for feature in features if feature != CANDIDATE_ITEM]
        if not features:
            raise ValueError(f"tower {name!r}: events has no feature but {CANDIDATE_ITEM!r}: it needs one of events")
        device = next(encoder.parameters(), torch.empty(0)).device
        self.event_encoder = event_encoder or EventEncoder(features, encoder.embedding_dim, device=device)
        for feature in self.event_encoder.features:
            if feature not in features:
                raise ValueError(f"tower {name!r}: event_encoder reads {feature!r}, but events has {features}")
        self.encoder = encoder
        # A list, since a ModuleDict takes no names like "type" and "a.b".
        self._fitted_features = [*self.event_encoder.features, CANDIDATE_ITEM]
        self.fits = nn.ModuleList(nn.Identity() for _ in self._fitted_features)
        self.width = width or encoder.embedding_dim
        self.out: nn.Module = nn.Identity()
        if self.width != encoder.embedding_dim:
            self.out = nn.Linear(encoder.embedding_dim, self.width, bias=False, device=device)
        self.gate = nn.Parameter(torch.zeros(1, device=device)) if starts_at_zero else None
        # With an item of the bags, candidates are read from their table.
        self._fit({feature: width for feature, width in widths.items() if item is None or feature != CANDIDATE_ITEM})

    def _fit(self, widths: Mapping[str, int]) -> None:
        dim, device = self.encoder.embedding_dim, next(self.encoder.parameters(), torch.empty(0)).device
        for place, feature in enumerate(self._fitted_features):
            width = widths.get(feature, dim)
            # A tower may stand in a second collection: what it has learned stays.
            if width not in (dim, getattr(self.fits[place], "in_features", None)):
                self.fits[place] = nn.Linear(width, dim, bias=False, device=device)

    def fit(self, feature: str) -> nn.Module:
        """What fits embeddings of a feature of events, or of `candidate_item`, to the encoder."""
        return self.fits[self._fitted_features.index(feature)]

    @property
    def events(self) -> EmbeddingCollection | None:
        """Tables of the events' features, as given."""
        return self._events[0]

    @property
    def bags(self) -> list[str]:
        """Names of the bags that a model gets, one for each of the S vectors."""
        others = range(1, self.encoder.num_slots)
        return [self.name, *(f"{self.name}_{vector}" for vector in others)]

    def share(self, width: int) -> None:
        """Read `candidate_item` and `history_item` from one table of the bags.

        Args:
            width: of the table.
        """
        self._fit({CANDIDATE_ITEM: width, self.history_item: width})

    def encode_history(self, events: Mapping[str, JaggedTensor]) -> HistoryState:
        """Phase one.

        Args:
            events: of each feature, values [N, width of its table], one row of B per request, oldest first.

        Raises:
            ValueError: the encoder encodes a history for every candidate anew.
        """
        return amortizable(self.encoder).encode_history(self._history(events))

    def extend_history(self, state: HistoryState, events: Mapping[str, JaggedTensor]) -> HistoryState:
        """Phase one for the events since; see `AmortizableEncoder.extend_history`."""
        return amortizable(self.encoder).extend_history(state, self._history(events))

    def score_candidates(self, state: HistoryState, items: JaggedTensor) -> Sequence[Tensor]:
        """Phase two.

        Args:
            state: of B requests.
            items: embeddings of the candidates' items, values [C, width of their table], one row of B per request.

        Returns:
            Sequence[Tensor]: S times [C, W].
        """
        return self.score_states([state], items)

    def score_states(self, states: Sequence[HistoryState], items: JaggedTensor) -> Sequence[Tensor]:
        """Phase two with states of some of the requests each, in the candidates' order; see `score_candidates`."""
        return self._vectors(amortizable(self.encoder).score_states(states, self._items(items)))

    def forward(self, events: Mapping[str, JaggedTensor], items: JaggedTensor) -> Sequence[Tensor]:
        """Phase one, then phase two."""
        return self._vectors(self.encoder(self._history(events), self._items(items)))

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the state of those before them as it is."""
        # Places are counted from the latest event, so that every new event moves all others.
        encoder = self.encoder
        return isinstance(encoder, AmortizableEncoder) and encoder.is_extendable and self.event_encoder.recency is None

    def _history(self, events: Mapping[str, JaggedTensor]) -> JaggedTensor:
        fitted = {feature: self._fitted(feature, events[feature]) for feature in self.event_encoder.features}
        return cast(JaggedTensor, self.event_encoder(fitted))

    def _items(self, items: JaggedTensor) -> JaggedTensor:
        return self._fitted(CANDIDATE_ITEM, items)

    def _fitted(self, feature: str, rows: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(self.fit(feature)(rows.values()), lengths=rows.lengths())

    def _vectors(self, encoded_CX: Tensor) -> Sequence[Tensor]:
        vectors_CSW = self.out(encoded_CX.unflatten(1, (self.encoder.num_slots, -1)))
        if self.gate is not None:
            vectors_CSW = vectors_CSW * self.gate
        return vectors_CSW.unbind(1)
