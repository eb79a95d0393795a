"""HistoryTower: from the embeddings of one history's events and of candidates' items to vectors of each candidate.

Shape suffixes: B requests; N events of the history and C candidates, all requests together; D width of the encoder;
S vectors of a candidate; W width of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.errors import InputError
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryEncoder, HistoryState, amortizable
from torchrec_amort.modules.events import EventEncoder, Numbers
from torchrec_amort.modules.similarity import HistoryMatches, refuse_never_matching

# Candidates' items in `RequestBatch.sequences`.
CANDIDATE_ITEM = "candidate_item"

# Rows of candidates: of each feature, or of the only one.
Items: TypeAlias = JaggedTensor | Mapping[str, JaggedTensor]


def _collections(
    events: EmbeddingCollection | Sequence[EmbeddingCollection] | None,
) -> tuple[EmbeddingCollection, ...]:
    if events is None:
        return ()
    return tuple(events) if isinstance(events, list | tuple) else (events,)


class HistoryTower(nn.Module):
    """One history of a request: what its events are, and what each candidate makes of them.

    An `AmortizedEmbeddingBagCollection` looks up the embeddings that towers read. Tables of another width than the
    encoder's are fitted to it by a linear layer without bias each, and so are numbers.

    Args:
        name: of the history, and of the bags that the collection reports for it.
        encoder: makes S vectors of a candidate and its request's history.
        events: tables of the events' features, of `RequestBatch.sequences`, and of the candidate's unless `item` is
            given; a collection for each width of tables.
        item: the candidate's feature whose table in the bags serves events as well, if one does. It is looked up by
            the ids of `candidate_item`.
        history_item: the events' feature that reads that table.
        event_encoder: makes one vector of each event, of the features that it names; if None, the sum of all features
            of events.
        width: W, of the vectors that the model gets; by a linear layer if it is not D.
        starts_at_zero: whether a gate, zero at first, scales the vectors. A model that is trained already then scores
            as before until training opens it.
        candidate_features: the candidate's features, whose sum reads the history. Of a mapping, each is fitted to the
            encoder by the same layer as the event's feature that it names.
        numbers: keys of `RequestBatch.dense_sequences` that events or candidates have, and how many numbers each is.

    Raises:
        ValueError: there is no feature of events, one that is to be read is not there, the name cannot be a
            module's, or the encoder is a `HistoryMatches` and would never find a candidate among the events.

    Example::

        tower = HistoryTower("clicks", AmortizedHistoryArch(32), events=history_embedding_collection)
    """

    def __init__(
        self,
        name: str,
        encoder: HistoryEncoder,
        *,
        events: EmbeddingCollection | Sequence[EmbeddingCollection] | None = None,
        item: str | None = None,
        history_item: str = "history_item",
        event_encoder: EventEncoder | None = None,
        width: int | None = None,
        starts_at_zero: bool = True,
        candidate_features: Sequence[str] | Mapping[str, str] = (CANDIDATE_ITEM,),
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"tower {name!r}: a module cannot have this name: give it another one")
        # Not among its modules: the collection that takes the tower looks up, once for all its towers.
        self._events = _collections(events)
        self.name, self.item, self.history_item = name, item, history_item
        self.candidate_features, self.numbers = list(candidate_features), dict(numbers or {})
        tables = [table for collection in self._events for table in collection.embedding_configs()]
        widths = {feature: table.embedding_dim for table in tables for feature in table.feature_names}
        known = [*([] if item is None else [history_item, CANDIDATE_ITEM]), *widths, *self.numbers]
        for feature in self.candidate_features:
            if feature not in known:
                of_events = [*widths, *self.numbers]
                hint = f"it needs {feature!r}, or an item of bags"
                raise ValueError(f"tower {name!r}: events has {of_events}: {hint}")
        features = [feature for feature in dict.fromkeys(known) if feature not in (CANDIDATE_ITEM, *candidate_features)]
        if not features:
            of_candidates = ", ".join(map(repr, self.candidate_features))
            raise ValueError(f"tower {name!r}: events has no feature but {of_candidates}: it needs one of events")
        device = next(encoder.parameters(), torch.empty(0)).device
        self.event_encoder = event_encoder or EventEncoder(features, encoder.embedding_dim, device=device)
        for feature in self.event_encoder.features:
            if feature not in features:
                raise ValueError(f"tower {name!r}: event_encoder reads {feature!r}, but events has {features}")
        refuse_never_matching(encoder, self.event_encoder, self.candidate_features)
        self.encoder = encoder
        # Of each of the candidate's features, the event's that says the same of an item, if there is one.
        self.likes = self._likes(candidate_features)
        self._fit_of = self._places(candidate_features)
        # A list, since a ModuleDict takes no names like "type" and "a.b".
        self.fits = nn.ModuleList(nn.Identity() for _ in set(self._fit_of.values()))
        self.width = width or encoder.embedding_dim
        self.out: nn.Module = nn.Identity()
        if self.width != encoder.embedding_dim:
            self.out = nn.Linear(encoder.embedding_dim, self.width, bias=False, device=device)
        self.gate = nn.Parameter(torch.zeros(1, device=device)) if starts_at_zero else None
        for feature, size in self.numbers.items():
            if feature in self._fit_of:
                self.fits[self._fit_of[feature]] = Numbers(size, encoder.embedding_dim, device)
        # With an item of the bags, candidates are read from their table.
        self._fit({feature: width for feature, width in widths.items() if item is None or feature != CANDIDATE_ITEM})

    def _places(self, candidate_features: Sequence[str] | Mapping[str, str]) -> dict[str, int]:
        """Which of `fits` each feature has."""
        places = {feature: place for place, feature in enumerate(self.event_encoder.features)}
        for feature in candidate_features:
            like = candidate_features[feature] if isinstance(candidate_features, Mapping) else feature
            if isinstance(candidate_features, Mapping) and like not in self.event_encoder.features:
                raise ValueError(
                    f"tower {self.name!r}: candidate_features has {feature!r} like {like!r}, but events are of "
                    f"{self.event_encoder.features}"
                )
            places[feature] = places.get(like, len(places))
        return places

    def _likes(self, candidate_features: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
        if isinstance(candidate_features, Mapping):
            return dict(candidate_features)
        tables = [table.feature_names for events in self._events for table in events.embedding_configs()]
        if self.item is not None:
            tables.insert(0, [CANDIDATE_ITEM, self.history_item])
        return {
            feature: like
            for feature in candidate_features
            for of_table in tables[::-1]
            for like in self.event_encoder.features[::-1]
            if feature in of_table and like in of_table
        }

    def _fit(self, widths: Mapping[str, int]) -> None:
        dim, device = self.encoder.embedding_dim, next(self.encoder.parameters(), torch.empty(0)).device
        for feature, place in self._fit_of.items():
            width = widths.get(feature, dim)
            # A tower may stand in a second collection: what it has learned stays.
            if width not in (dim, getattr(self.fits[place], "in_features", None)):
                self.fits[place] = nn.Linear(width, dim, bias=False, device=device)
        if isinstance(self.encoder, HistoryMatches) and not all(isinstance(fit, nn.Identity) for fit in self.fits):
            # A linear layer may round equal rows of events and candidates in two ways.
            raise ValueError(
                f"tower {self.name!r}: HistoryMatches (matches) compares rows as they are looked up, but "
                f"{self.event_encoder.features[0]!r} is not of a table of width {dim}: give its table the encoder's "
                "width, and compare numbers by similarity"
            )

    def fit(self, feature: str) -> nn.Module:
        """What fits a feature of events or candidates to the encoder."""
        return self.fits[self._fit_of[feature]]

    def fitted(self, feature: str, rows: Tensor) -> Tensor:
        """Rows of a feature of events or candidates, fitted to the encoder.

        Args:
            feature: its name.
            rows: as they are looked up, or numbers, [entries, their number].

        Raises:
            InputError: there are more or fewer numbers than the tower reads.
        """
        refuse_other_numbers(self.name, feature, rows, self.numbers)
        fitted: Tensor = self.fit(feature)(rows)
        return fitted

    @property
    def events(self) -> EmbeddingCollection | None:
        """Tables of the events' features, as given; the first of several collections."""
        return next(iter(self._events), None)

    @property
    def collections(self) -> tuple[EmbeddingCollection, ...]:
        """Tables of the events' features, as given, a collection for each width."""
        return self._events

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

    def score_candidates(self, state: HistoryState, items: Items) -> Sequence[Tensor]:
        """Phase two.

        Args:
            state: of B requests.
            items: of each of the candidate's features, or of the one that there is, values [C, width of its table],
                one row of B per request.

        Returns:
            Sequence[Tensor]: S times [C, W].
        """
        return self.score_states([state], items)

    def score_states(self, states: Sequence[HistoryState], items: Items) -> Sequence[Tensor]:
        """Phase two with states of some of the requests each, in the candidates' order; see `score_candidates`."""
        return self._vectors(amortizable(self.encoder).score_states(states, self.items(items)))

    def forward(self, events: Mapping[str, JaggedTensor], items: Items) -> Sequence[Tensor]:
        """Phase one, then phase two."""
        return self._vectors(self.encoder(self._history(events), self.items(items)))

    def items(self, items: Items) -> JaggedTensor:
        """What candidates read histories by: values [C, D], one row of B per request."""
        if isinstance(items, JaggedTensor):
            (feature,) = self.candidate_features
            items = {feature: items}
        first, *others = (self._fitted(feature, items[feature]) for feature in self.candidate_features)
        if not others:
            return first
        rows_CD = sum((other.values() for other in others), first.values())
        return JaggedTensor(rows_CD, lengths=first.lengths())

    @property
    def is_extendable(self) -> bool:
        """Whether new events leave the state of those before them as it is."""
        # Places are counted from the latest event, so that every new event moves all others.
        encoder = self.encoder
        return isinstance(encoder, AmortizableEncoder) and encoder.is_extendable and self.event_encoder.recency is None

    def _history(self, events: Mapping[str, JaggedTensor]) -> JaggedTensor:
        fitted = {feature: self._fitted(feature, events[feature]) for feature in self.event_encoder.features}
        return cast(JaggedTensor, self.event_encoder(fitted))

    def _fitted(self, feature: str, rows: JaggedTensor) -> JaggedTensor:
        return JaggedTensor(self.fitted(feature, rows.values()), lengths=rows.lengths())

    def _vectors(self, encoded_CX: Tensor) -> Sequence[Tensor]:
        vectors_CSW = self.out(encoded_CX.unflatten(1, (self.encoder.num_slots, -1)))
        if self.gate is not None:
            vectors_CSW = vectors_CSW * self.gate
        return vectors_CSW.unbind(1)


def refuse_other_numbers(tower: str, feature: str, rows: Tensor, numbers: Mapping[str, int]) -> None:
    """Refuse more or fewer numbers than a tower reads.

    Args:
        tower: its name, for the error message.
        feature: of its events or candidates.
        rows: that the feature has, [entries, their number].
        numbers: of an entry of each feature that is numbers.

    Raises:
        InputError: there are others.
    """
    expected = numbers.get(feature)
    if expected is not None and rows.shape[1] != expected:
        raise InputError(
            f"batch: dense_sequences[{feature!r}] has {rows.shape[1]} numbers for each entry, but tower {tower!r} "
            f"reads {expected}"
        )
