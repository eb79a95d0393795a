"""ResidualHistory: a history for models that cannot be rebuilt, as a term that is added to their logits.

Shape suffixes: B requests; C candidates, all requests together; T tasks; X widths of all towers' vectors together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows
from torchrec_amort.models.ranker import CollectionRanker, Ranker, call_model
from torchrec_amort.models.tables import refuse_tied_tables
from torchrec_amort.modules.tower import HistoryTower

# Pipelines trace the model, and traced logits have no shape to look at.
torch.fx.wrap("_add")


class ResidualHistory(CollectionRanker):
    """A model as it is, and a linear term of histories that is added to its logits.

    The term is zero at first, so that the logits are those of the model to the last bit. No layer of the model is
    widened, and its class does not matter: it is called with the ids and dense inputs of candidates, as it was called
    with those of impressions. So its own lookups are not amortized; the histories are. The state dict of the model
    loads into this one.

    Args:
        model: neither sharded nor wrapped; it gets no copy, and trains on if its weights require gradients.
        towers: the histories, at least one, each with `events` of its own, `candidate_item` among their features.
            Where a tower starts at zero, its gate is what training moves first, else the term's weights are.
        call: how the model is called, with the batch and the ids of its candidates; what it returns is [C, T].
            `model(batch.dense, ids)` if None.
        num_tasks: T.

    Raises:
        ValueError: there is no tower or one without `events`, the model reads histories already, or it shares a table
            with a tower.

    Example::

        ranker = ResidualHistory(dlrm, tower)
        logits_CT = ranker(batch)  # = dlrm(batch.dense, batch.sparse), until it is trained
    """

    def __init__(
        self,
        model: nn.Module,
        *towers: HistoryTower,
        call: Callable[[nn.Module, RequestBatch, KeyedJaggedTensor], Tensor] | None = None,
        num_tasks: int = 1,
    ) -> None:
        super().__init__()
        if not towers:
            raise ValueError("there is no tower: give the histories that are added to the model's logits")
        for module in model.modules():
            if isinstance(module, (Ranker, AmortizedEmbeddingBagCollection)):
                raise ValueError(
                    f"the {type(model).__name__} reads histories already: give its collection one tower more instead"
                )
        self.model = model
        self.call = call or call_model
        self.histories = AmortizedEmbeddingBagCollection(None, towers)
        widths = [len(tower.bags) * tower.width for tower in towers]
        device = next(towers[0].parameters(), torch.empty(0)).device
        self.term = nn.Linear(sum(widths), num_tasks, bias=False, device=device)
        with torch.no_grad():
            for weight_TX, tower in zip(self.term.weight.split(widths, dim=1), towers, strict=True):
                # Weights of zero behind a gate of zero would have no gradient, and neither would the gate.
                if tower.gate is None:
                    weight_TX.zero_()
        refuse_tied_tables(self)
        # Not the model, some of whose parts may be frozen in another mode than it.
        for module in (self, *self.histories.modules(), self.term):
            module.training = model.training
        self._register_load_state_dict_pre_hook(self._rename)

    @property
    def collection(self) -> AmortizedEmbeddingBagCollection:
        """What reads histories."""
        return self.histories

    def score_rows(self, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
        """Score every candidate of a batch; see `CollectionRanker.score_rows`.

        The model itself reads the ids of candidates and their requests of `batch`, in phase two as well.

        Raises:
            ValueError: the model's logits are not [C, T].
        """
        vectors_CX = self.histories(rows).values()
        return _add(self.call(self.model, batch, batch.sparse), self.term(vectors_CX))

    def _rename(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        """Let a state dict of the model load, which has other names, and nothing of the histories."""
        present = {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}
        if any(prefix + name in state_dict for name in present):
            return
        old = {name: state_dict.pop(prefix + name) for name in self.model.state_dict() if prefix + name in state_dict}
        state_dict.update({f"{prefix}model.{name}": value for name, value in old.items()})
        state_dict.update({prefix + name: value for name, value in present.items()})


def _add(logits_CT: Tensor, term_CT: Tensor) -> Tensor:
    """The sum of logits and a term, of one shape: broadcasting would make scores of other candidates of them."""
    if logits_CT.shape[1:] != term_CT.shape[1:]:
        have, need = tuple(logits_CT.shape[1:]), tuple(term_CT.shape[1:])
        raise ValueError(
            f"the model returns logits of {have} for each candidate, but the term of its history is of {need}: give "
            "num_tasks as many as there are logits, and a `call` that returns [C, num_tasks]"
        )
    return logits_CT + term_CT
