"""Served: what a scorer asks of a model, whatever its class, in this process or in a package.

Shape suffixes: B requests; C candidates, all requests together; T tasks.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import DLRM, SparseArch
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from torchrec_amort.batch import RequestBatch
from torchrec_amort.lists import Entries
from torchrec_amort.models.bags import Bags
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.models.ranker import Call, CollectionRanker, ModelRanker, Ranker, ranker_of
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.modules.plain import Plain, why_own_method, why_patched
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.lookup import Lookups
from torchrec_amort.serving.phases import Backend, Histories, Phases, RankerPhases, RequestTerms

_TABLES = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    QuantEmbeddingBagCollection,
    QuantEmbeddingCollection,
    SequenceTables,
)
# Serving calls what they call, and not them.
_RANKERS = Plain(AmortizedDLRM, CollectionRanker)
_SHELLS = Plain(SparseArch, AmortizedEmbeddingBagCollection, Bags, HistoryTower)


@dataclass(frozen=True, eq=False)
class Served:
    """A model in two phases, lookups included, with the dense weights of one moment.

    Args:
        lookups: in its tables, where they are.
        phases: all else.
        history_lengths: events that the history of each tower may have; None if any number.
        device: where batches are read.
        schema: of the requests, if it is known.
    """

    lookups: Lookups
    phases: Phases
    history_lengths: Mapping[str, int | None]
    device: torch.device
    schema: RequestSchema | None = None

    def request(self, batch: RequestBatch) -> RequestTerms:
        """Phase one of all but histories; see `Phases.request`."""
        return self.phases.request(batch, self.lookups.of_requests(batch))

    def encode(self, terms: RequestTerms, tower: str, events: Mapping[str, Entries]) -> HistoryState:
        """Phase one of B histories, given what each of the tower's features has; see `Phases.encode`."""
        return self.phases.encode(terms, tower, self.lookups.of_events(tower, events), _lengths(events))

    def extend(
        self, terms: RequestTerms, tower: str, state: HistoryState, events: Mapping[str, Entries]
    ) -> HistoryState:
        """Phase one of the events since, where states are extendable."""
        return self.phases.extend(terms, tower, state, self.lookups.of_events(tower, events), _lengths(events))

    def score(self, terms: RequestTerms, histories: Histories, batch: RequestBatch) -> Tensor:
        """Phase two: logits [C, T]; see `Phases.score`."""
        return self.phases.score(terms, histories, batch, *self.lookups.of_candidates(batch))


def _lengths(events: Mapping[str, Entries]) -> Tensor:
    return next(iter(events.values())).lengths.long()


def serve(model: nn.Module, dtype: torch.dtype, backend: Backend, call: Call | None = None) -> Served:
    """A model in two phases, with the dense weights of this moment, and its tables where they are.

    Args:
        model: a ranker, or built on an `AmortizedEmbeddingBagCollection`; not sharded.
        dtype: `torch.float32` or `torch.bfloat16`, of encoders, states and what native code does after them.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.
        call: how a model that is no ranker is called.

    Raises:
        ValueError: the model, or a part of it, may compute something else than what is served.

    Example::

        served = serve(model, torch.float32, "auto")
    """
    ranker = _ranker_of(model, call)
    collection = ranker.collection
    names = {module: name or "the model" for name, module in ranker.named_modules()}
    if reason := _why_not_served(ranker, collection, names):
        raise ValueError(f"{reason}: score with the model itself")
    _refuse_other_limits(collection)
    lookups = Lookups.of(collection, names)
    ranker = _snapshot(ranker)
    return Served(
        lookups,
        RankerPhases(ranker, ranker.collection, dtype, backend),
        ranker.history_lengths,
        next((weight.device for weight in [*model.parameters(), *model.buffers()]), torch.device("cpu")),
    )


def _ranker_of(model: nn.Module, call: Call | None) -> CollectionRanker:
    is_built_on_one = any(isinstance(module, AmortizedEmbeddingBagCollection) for module in model.modules())
    if not isinstance(model, Ranker) and not is_built_on_one:
        hint = "attach_history makes one of a DLRM" if isinstance(model, DLRM) else "unwrap it, or build it on"
        hint += "" if isinstance(model, DLRM) else " an AmortizedEmbeddingBagCollection"
        raise ValueError(f"the model is a {type(model).__name__}, which is no ranker: {hint}")
    if not isinstance(model, Ranker) and any(isinstance(module, Ranker) for module in model.modules()):
        raise ValueError(
            f"the model is a {type(model).__name__} around a ranker: unwrap it, or, if it is sharded, score with it"
        )
    ranker = ranker_of(model, call)
    if not isinstance(ranker, CollectionRanker):
        raise ValueError(
            f"the model is a {type(ranker).__name__}, a ranker of no known kind: score with the model itself"
        )
    return ranker


def _refuse_other_limits(collection: AmortizedEmbeddingBagCollection) -> None:
    limited = [tower.event_encoder for tower in collection.towers if tower.event_encoder.max_length is not None]
    for one, other in itertools.combinations(limited, 2):
        if set(one.features) & set(other.features) and one.max_length != other.max_length:
            raise ValueError(
                f"towers read one history, {one.features} and {other.features}, and know places for other numbers of "
                f"events, {one.max_length} and {other.max_length}: give both the same max_length, or score with the "
                "model itself"
            )


def _why_not_served(
    ranker: CollectionRanker, collection: AmortizedEmbeddingBagCollection, names: Mapping[nn.Module, str]
) -> str | None:
    """Why a ranker may compute something else than what is served, or None."""
    base = AmortizedDLRM if isinstance(ranker, AmortizedDLRM) else CollectionRanker
    reasons = [_RANKERS.why_replaced(base), _why_other_phases(type(ranker), base), why_patched(ranker, "the model")]
    shells = [collection, collection.bags, *collection.towers]
    if isinstance(ranker, AmortizedDLRM):
        shells = [arch for arch in (ranker.sparse_arch, ranker.request_sparse_arch) if arch is not None]
    reasons += [_SHELLS.why_not(shell, names[shell]) for shell in shells]
    of_tables = {module for table in _tables(ranker) for module in table.modules()}
    # A method that a module has of its own is most often a function of that very module, and would be of no copy.
    reasons += [why_own_method(module, name) for module, name in names.items() if module not in of_tables]
    if isinstance(ranker, ModelRanker):
        reasons.append(_why_of_this_model(ranker.call, names))
    return next(filter(None, reasons), None)


def _why_of_this_model(call: Call, names: Mapping[nn.Module, str]) -> str | None:
    """Why a call would not call a copy of the model, or None."""
    if not inspect.isfunction(call):
        # Bound methods and other objects are copied with the model.
        return None
    variables = inspect.getclosurevars(call)
    for variable, value in {**variables.nonlocals, **variables.globals}.items():
        if isinstance(value, nn.Module) and value in names:
            return f"call reads {names[value]} from its variable {variable!r}, and not from the model that it is given"
    return None


def _why_other_phases(kind: type[Ranker], base: type[CollectionRanker]) -> str | None:
    others = ("collection", "score_rows") if base is AmortizedDLRM else ()
    for name in ("forward", "encode_request", "score_candidates", *others):
        if getattr(kind, name) is not getattr(base, name):
            return f"{kind.__name__} overrides {base.__name__}.{name}"
    return None


def _tables(ranker: nn.Module) -> list[nn.Module]:
    return [module for module in ranker.modules() if isinstance(module, _TABLES)]


def _snapshot(ranker: CollectionRanker) -> CollectionRanker:
    """The ranker with copies of all weights but its tables, for inference."""
    tables = _tables(ranker)
    copied = copy.deepcopy(ranker, {id(table): table for table in tables})
    of_tables = {module for table in tables for module in table.modules()}
    for module in copied.modules():
        if module not in of_tables:
            module.training = False
    return copied
