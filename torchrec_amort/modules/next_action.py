"""NextAction: the loss of causal histories whose events predict the item of the next one.

Shape suffixes: B requests; N events and C candidates, all requests together; S samples, which are events that have a
next one; R rows of items; U items, each once; K negatives; T towers; D width of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.modules.events import recency
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.losses import means_over_ranks
from torchrec_amort.modules.tower import HistoryTower
from torchrec_amort.ops.fingerprints import fingerprints, mixed
from torchrec_amort.ops.jagged import requests


class NextAction(nn.Module):
    """The loss of what events predict: the item of the next event of their request.

    A sample is an event that has a next one: the cross entropy of the next event's item in a softmax over it and
    negatives. A logit is the product of the event's row after the last layer with the item's vector, which is what a
    candidate that has this item reads the history by. Negatives are the items of the global batch: of all samples' next
    events, and of all candidates.

    The logit of a negative is less the logarithm of the item's share of them (Bengio and Senécal, IEEE TNN 2008; Yi et
    al., RecSys 2019), and the next item is none. The terms of all that are of one item then add up to one term, so
    each item is there once. If there are more items than `num_negatives`, so many are drawn, the same for all samples,
    and stand for all.

    It has no weights of its own, and costs nothing but in training: the last layer's work on events, which nothing else
    needs, and the softmax. It keeps what towers read and make in each forward pass of training, and goes into
    `AmortizedDLRMTrain` before the model is sharded.

    Args:
        towers: of a model; those with causal history attention have a loss each, of which this is the mean.
        weight: factor of the loss.
        num_negatives: K, at most.

    Raises:
        InputError: no tower is causal, or one that is compresses older events, or its candidates have a feature that is
            fitted unlike any of its events.

    Example::

        model = build_model(schema, ModelConfig(history="append_cross_causal"))
        loss = NextAction(model.collection.towers, weight=0.1)
        train = AmortizedDLRMTrain(model, next_action=loss)
    """

    # Of ranks that train together: the sum of a tensor, and the rows of all, in order, with their gradients.
    over_ranks: Callable[[Tensor], Tensor] | None = None
    of_all_ranks: Callable[[Tensor], Tensor] | None = None

    def __init__(self, towers: Sequence[HistoryTower], weight: float, num_negatives: int = 1024) -> None:
        super().__init__()
        self.weight, self.num_negatives = weight, num_negatives
        self._towers = [_Tower(tower, arch) for tower in towers if (arch := _causal(tower)) is not None]
        if not self._towers:
            raise InputError(
                f"loss.next_action is {weight}, but no history of the model has causal attention, by which an event "
                "does not know the next one: set model.history to append_cross_causal, or leave it out"
            )

    def forward(self, batch: RequestBatch) -> tuple[Tensor, Tensor]:
        """The loss of the batch that the model has read last; ranks that train together call it together.

        Args:
            batch: of B requests.

        Returns:
            tuple: the loss, and the same detached; see `BatchLoss.forward`.
        """
        with torch.autocast(batch.num_candidates.device.type, enabled=False):
            sums_T, numbers_T = zip(*(self._sum(tower, batch) for tower in self._towers), strict=True)
            shares_T, means_T, _ = means_over_ranks(torch.stack(sums_T), torch.stack(numbers_T), self.over_ranks)
            return self.weight * shares_T.mean(), self.weight * means_T.mean()

    def _sum(self, tower: _Tower, batch: RequestBatch) -> tuple[Tensor, Tensor]:
        """The sum of a tower's samples, and their number, float64."""
        rows_ND, items_ND, items_CD, lengths_B = tower.take()
        events_S = (recency(lengths_B, len(rows_ND)) > 0).nonzero().flatten()
        prints_S = item_fingerprints(batch, tower.likes.values())[events_S + 1]
        prints_R = torch.cat([prints_S, item_fingerprints(batch, tower.likes)])
        prints_U, items_UD = _once(prints_R, torch.cat([items_ND[events_S + 1], items_CD]))
        if self.of_all_ranks is not None:
            prints_U, items_UD = _once(self.of_all_ranks(prints_U), self.of_all_ranks(items_UD))
        next_S, drawn_K = torch.searchsorted(prints_U, prints_S), self._drawn(prints_U)
        losses_S = softmax_losses(rows_ND[events_S], items_UD, next_S, drawn_K)
        return losses_S.sum(), losses_S.new_full((), len(losses_S), dtype=torch.float64)

    def _drawn(self, prints_U: Tensor) -> Tensor:
        """int64 [K]: places of the negatives among all items; by the batch alone, so that ranks draw the same."""
        if len(prints_U) <= self.num_negatives:
            return torch.arange(len(prints_U), device=prints_U.device)
        return mixed(prints_U.sum(), prints_U).topk(self.num_negatives, largest=False).indices


def softmax_losses(rows_SD: Tensor, items_UD: Tensor, next_S: Tensor, drawn_K: Tensor) -> Tensor:
    """[S]: the cross entropy of each row's next item, in a softmax over it and the negatives.

    Args:
        rows_SD: of events.
        items_UD: vectors of items, each once.
        next_S: int64, the place of each row's next item among them.
        drawn_K: int64, the places of negatives, which stand for all items but the next one.
    """
    positive_S1 = (rows_SD * items_UD[next_S]).sum(1, keepdim=True)
    is_next_SK = drawn_K == next_S[:, None]
    drawn_S1 = (len(drawn_K) - is_next_SK.sum(1, keepdim=True)).clamp(min=1)
    log_share_S1 = (drawn_S1 / (len(items_UD) - 1)).log().to(rows_SD.dtype)
    negatives_SK = (rows_SD @ items_UD[drawn_K].T - log_share_S1).masked_fill(is_next_SK, -torch.inf)
    return F.cross_entropy(torch.cat([positive_S1, negatives_SK], 1), torch.zeros_like(next_S), reduction="none")


def item_fingerprints(batch: RequestBatch, features: Iterable[str]) -> Tensor:
    """int64 [R]: the same for events or candidates that have the same ids and numbers, and so for those of one item.

    Args:
        batch: of B requests.
        features: of the events of a history, or of candidates, with one row each.
    """
    prints_R = torch.zeros((), dtype=torch.int64, device=batch.num_candidates.device)
    for feature in features:
        if feature in batch.dense_sequences:
            rows = batch.dense_sequences[feature].values()
            prints_R = fingerprints(rows, prints_R.expand(len(rows)))
            continue
        ids = batch.sequences[feature].values()
        if feature in batch.num_ids:
            # The mean of some ids' rows does not depend on their order.
            num_ids_R = batch.num_ids[feature].values()
            hashes = mixed(torch.zeros_like(ids), ids)
            sums_R = torch.zeros_like(num_ids_R).index_add(0, requests(num_ids_R, len(ids)), hashes)
            # Not the bare sum, which could undo what one id of another feature has put in.
            ids = mixed(num_ids_R, sums_R)
        prints_R = mixed(prints_R, ids)
    return prints_R


def _once(prints_R: Tensor, items_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Fingerprints, rising, and vectors [U, D] of items that may be there several times."""
    prints_U, places_R = prints_R.unique(return_inverse=True)
    rows_R = torch.arange(len(prints_R), device=prints_R.device)
    first_U = torch.zeros_like(prints_U).scatter_reduce(0, places_R, rows_R, "amin", include_self=False)
    return prints_U, items_RD[first_U]


def _causal(tower: HistoryTower) -> AmortizedHistoryArch | None:
    """The encoder of a tower whose events predict the next one, if it has one."""
    arch = tower.encoder
    if not isinstance(arch, AmortizedHistoryArch) or not arch.is_causal:
        return None
    if arch.compression is not None:
        raise InputError(
            f"loss.next_action: tower {tower.name!r} keeps {arch.compression.recent_events} recent_events, and makes "
            "others of the older ones, which have no next: leave out model.recent_events, or loss.next_action"
        )
    return arch


class _Tower:
    """What a tower reads and makes in a forward pass."""

    def __init__(self, tower: HistoryTower, arch: AmortizedHistoryArch) -> None:
        self.likes = tower.likes
        for feature in tower.candidate_features:
            like = self.likes.get(feature)
            if like is None or not _is_one_layer(tower.fit(feature), tower.fit(like)):
                raise InputError(
                    f"loss.next_action: tower {tower.name!r}: the candidate's {feature!r} is fitted like no feature of "
                    f"events, {tower.event_encoder.features}: give candidate_features as a mapping that names one"
                )
        self._arch = arch
        self._features: Mapping[str, JaggedTensor] = {}
        self._items_CD: Tensor | None = None
        arch.keeps_events = True
        arch.register_forward_pre_hook(self._keep_items)
        tower.event_encoder.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            (self._features,) = args

    def _keep_items(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            self._items_CD = args[1].values()

    def take(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoded events [N, D], items of events [N, D] and of candidates [C, D], and lengths_B; kept no longer."""
        rows_ND, items_CD, features = self._arch.encoded_events, self._items_CD, self._features
        self._arch.encoded_events, self._items_CD, self._features = None, None, {}
        if rows_ND is None or items_CD is None:
            raise ValueError("the model has read no batch in training since the last loss of next actions")
        first, *others = (features[like] for like in self.likes.values())
        items_ND = sum((other.values() for other in others), first.values())
        # Under autocast some are of half precision.
        dtype = torch.promote_types(rows_ND.dtype, torch.float32)
        return rows_ND.to(dtype), items_ND.to(dtype), items_CD.to(dtype), first.lengths()


def _is_one_layer(fit: nn.Module, other: nn.Module) -> bool:
    return fit is other or all(isinstance(one, nn.Identity) for one in (fit, other))
