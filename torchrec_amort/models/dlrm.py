"""AmortizedDLRM: a TorchRec DLRM that reads user history at the price of one encoding per request.

Shape suffixes: B requests; C candidates, all requests together; D embedding dimension; F features;
I dense inputs; T tasks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch, SparseArch
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_amort.batch import RequestBatch, refuse_weights
from torchrec_amort.errors import InputError
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows
from torchrec_amort.models.managed import SequenceTables
from torchrec_amort.models.ranker import CollectionRanker, Ranker
from torchrec_amort.models.sharded import refuse_tables_without_optimizer
from torchrec_amort.models.tables import refuse_tied_tables
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.losses import BatchLoss, FunctionLoss, Loss
from torchrec_amort.modules.next_action import NextAction
from torchrec_amort.modules.similarity import refuse_never_matching
from torchrec_amort.modules.tower import CANDIDATE_ITEM, HistoryTower

# The only history.
HISTORY = "history"

# Pipelines trace the model, and a traced batch has no weights to look at.
torch.fx.wrap("refuse_weights")
torch.fx.wrap("refuse_other_dense")


class AmortizedDLRM(CollectionRanker):
    """A DLRM whose interaction has one slot more: what the candidate makes of its request's history.

    Request ids are looked up once per request, candidate ids once per candidate, and the items of
    histories and candidates in one collection of sequences; request features are expanded to candidates
    after lookup. Dense, interaction and over arch are TorchRec's own.

    Args:
        candidate_embedding_bag_collection: tables of the candidates' ids (`batch.candidate_sparse`).
        request_embedding_bag_collection: tables of the requests' ids (`batch.request_sparse`), or None if
            requests have no ids.
        dense_in_features: I, dense inputs of a request and a candidate together. If 0, the dense arch
            reads a constant 1.
        dense_arch_layer_sizes: layer sizes of the `DenseArch`; the last one is D.
        over_arch_layer_sizes: layer sizes of the `OverArch`; the last one is T.
        history_embedding_collection: tables of history events and of `candidate_item`
            (`batch.sequences`); None, with the next two, for the control without history.
        event_encoder: makes one vector of each history event.
        history_arch: makes one vector of each candidate and its request's history.
        interaction: `"dot"` (`InteractionArch`) or `"dcn"` (`InteractionDCNArch`).
        dcn_num_layers: cross layers of the DCN interaction.
        dcn_low_rank_dim: rank of the cross layers.
        dense_device: where to put all weights but the tables.

    Raises:
        ValueError: some but not all of the history's three parts are given, an embedding dimension is not D, or two
            collections share a table.

    Example::

        model = AmortizedDLRM(
            candidate_embedding_bag_collection=candidate_ebc,
            request_embedding_bag_collection=request_ebc,
            dense_in_features=0,
            dense_arch_layer_sizes=[32],
            over_arch_layer_sizes=[64, 1],
            history_embedding_collection=history_ec,
            event_encoder=EventEncoder(["history_item"], embedding_dim=32, max_length=100),
            history_arch=AmortizedHistoryArch(embedding_dim=32),
        )
        logits_CT = model(batch)
    """

    def __init__(
        self,
        *,
        candidate_embedding_bag_collection: EmbeddingBagCollection,
        request_embedding_bag_collection: EmbeddingBagCollection | None,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        history_embedding_collection: EmbeddingCollection | SequenceTables | None = None,
        event_encoder: EventEncoder | None = None,
        history_arch: HistoryEncoder | None = None,
        interaction: str = "dot",
        dcn_num_layers: int = 2,
        dcn_low_rank_dim: int = 32,
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        history_parts = (history_embedding_collection, event_encoder, history_arch)
        if any(part is None for part in history_parts) and any(part is not None for part in history_parts):
            raise ValueError(
                "history_embedding_collection, event_encoder and history_arch go together: give all or none"
            )
        if history_arch is not None and event_encoder is not None:
            refuse_never_matching(history_arch, event_encoder, [CANDIDATE_ITEM])
        embedding_dim = dense_arch_layer_sizes[-1]
        tables = candidate_embedding_bag_collection.embedding_bag_configs()
        if request_embedding_bag_collection is not None:
            tables = tables + request_embedding_bag_collection.embedding_bag_configs()
        if history_embedding_collection is not None:
            tables = tables + history_embedding_collection.embedding_configs()
        for table in tables:
            if table.embedding_dim != embedding_dim:
                raise ValueError(
                    f"table {table.name!r} has embedding_dim {table.embedding_dim}, but the dense arch ends in "
                    f"{embedding_dim}: all vectors of the interaction need one size"
                )

        self.sparse_arch = SparseArch(candidate_embedding_bag_collection)
        self.request_sparse_arch = (
            None if request_embedding_bag_collection is None else SparseArch(request_embedding_bag_collection)
        )
        self.is_weighted = {
            "candidate_sparse": candidate_embedding_bag_collection.is_weighted(),
            "request_sparse": request_embedding_bag_collection is not None
            and request_embedding_bag_collection.is_weighted(),
        }
        self.history_embedding_collection = history_embedding_collection
        self.event_encoder = event_encoder
        self.history_arch = history_arch
        self.dense_in_features = dense_in_features
        self.dense_arch = DenseArch(max(1, dense_in_features), dense_arch_layer_sizes, device=dense_device)

        num_slots = self.sparse_arch.F + (history_arch.num_slots if history_arch is not None else 0)
        if self.request_sparse_arch is not None:
            num_slots += self.request_sparse_arch.F
        self.inter_arch: nn.Module
        if interaction == "dot":
            self.inter_arch = InteractionArch(num_slots).to(dense_device)
            over_in_features = embedding_dim + num_slots * (num_slots + 1) // 2
        elif interaction == "dcn":
            over_in_features = (num_slots + 1) * embedding_dim
            crossnet = LowRankCrossNet(over_in_features, dcn_num_layers, dcn_low_rank_dim)
            self.inter_arch = InteractionDCNArch(num_slots, crossnet).to(dense_device)
        else:
            raise ValueError(f"interaction is {interaction!r}, not 'dot' or 'dcn'")
        self.over_arch = OverArch(over_in_features, over_arch_layer_sizes, device=dense_device)
        refuse_tied_tables(self)

    @property
    def collection(self) -> AmortizedEmbeddingBagCollection:
        """Its tables and its history as one collection, of the same modules; not once they are sharded."""
        towers = []
        if self.history_arch is not None:
            events: Any = self.history_embedding_collection
            encoder, event_encoder = self.history_arch, self.event_encoder
            towers = [HistoryTower(HISTORY, encoder, events=events, event_encoder=event_encoder, starts_at_zero=False)]
        request = None if self.request_sparse_arch is None else self.request_sparse_arch.embedding_bag_collection
        return AmortizedEmbeddingBagCollection.of_sides(request, self.sparse_arch.embedding_bag_collection, towers)

    def forward(self, batch: RequestBatch) -> Tensor:
        """Score every candidate of every request.

        Args:
            batch: B requests with C candidates.

        Returns:
            Tensor: logits [C, T].

        Raises:
            ValueError: this is a step of training, and some tables were sharded without an optimizer.
            InputError: ids have weights where the bags have none, or none where they have some; the batch has more or
                fewer dense inputs than the model reads.
        """
        if self.training and torch.is_grad_enabled():
            refuse_tables_without_optimizer(self)
        refuse_weights("candidate_sparse", batch.candidate_sparse, self.is_weighted["candidate_sparse"])
        slots_CFD = [self.sparse_arch(batch.candidate_sparse)]
        if self.request_sparse_arch is not None:
            refuse_weights("request_sparse", batch.request_sparse, self.is_weighted["request_sparse"])
            slots_BFD = self.request_sparse_arch(batch.request_sparse)
            num_rows = batch.candidate_dense.shape[0]
            # Pipelines trace this: no function that looks at a shape.
            expanded_CFD = torch.repeat_interleave(slots_BFD, batch.num_candidates, dim=0, output_size=num_rows)
            slots_CFD.insert(0, expanded_CFD)
        if self.history_embedding_collection and self.event_encoder and self.history_arch:
            embeddings = self.history_embedding_collection(batch.sequences)
            history_CX = self.history_arch(self.event_encoder(embeddings), embeddings[CANDIDATE_ITEM])
            slots_CFD.append(history_CX.unflatten(1, (self.history_arch.num_slots, -1)))
        return self._logits(batch, torch.cat(slots_CFD, dim=1))

    def score_rows(self, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
        """Score every candidate of a batch; see `CollectionRanker.score_rows`."""
        if isinstance(rows, RequestBatch):
            return self(rows)
        return self._logits(batch, rows.bags.values().unflatten(1, (-1, self.sparse_arch.D)))

    def _logits(self, batch: RequestBatch, slots_CFD: Tensor) -> Tensor:
        logits_CT: Tensor = self.over_arch(self.inter_arch(self.dense_arch(self._dense(batch)), slots_CFD))
        return logits_CT

    def _dense(self, batch: RequestBatch) -> Tensor:
        """Dense inputs of each candidate and its request: [C, I], or [C, 1] of ones."""
        refuse_other_dense(batch, self.dense_in_features)
        if self.dense_in_features == 0:
            return batch.candidate_dense.new_ones(batch.candidate_dense.shape[0], 1)
        return batch.dense


def refuse_other_dense(batch: RequestBatch, num_inputs: int) -> None:
    """Refuse a batch with more or fewer dense inputs than a model reads.

    Args:
        batch: any.
        num_inputs: I, of a request and a candidate together.

    Raises:
        InputError: it has others.
    """
    of_request, of_candidate = batch.request_dense.shape[1], batch.candidate_dense.shape[1]
    if of_request + of_candidate != num_inputs:
        raise InputError(
            f"batch: request_dense has {of_request} columns and candidate_dense {of_candidate}, but the model reads "
            f"{num_inputs} dense inputs of request and candidate together"
        )


class AmortizedDLRMTrain(nn.Module):
    """A ranker with its loss, for TorchRec's train pipelines.

    Args:
        model: the ranker to train, an AmortizedDLRM or any other.
        loss: of logits and labels, float [C, T] each; a scalar. Their mean binary cross entropy unless given. Where
            the batch has weights, it is called with `reduction="none"`, as PyTorch's own losses are, and the mean is
            that of weight times loss. Or a `BatchLoss`, as `TaskLosses` is.
        next_action: a loss of the model's histories, which training adds; none unless given.

    Example::

        loss, (detached_loss, logits_CT, labels_CT) = AmortizedDLRMTrain(model)(batch)
    """

    def __init__(
        self,
        model: Ranker,
        loss: Loss | BatchLoss = F.binary_cross_entropy_with_logits,
        next_action: NextAction | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        # A module: pipelines trace what they train, but call a module that has no tables.
        self.loss = loss if isinstance(loss, BatchLoss) else FunctionLoss(loss)
        self.next_action = next_action

    def forward(self, batch: RequestBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Score the batch and compare with its labels.

        Args:
            batch: B requests with C candidates and their labels.

        Returns:
            tuple: the loss over all labels, and (the same detached, logits [C, T] detached, labels [C, T] detached).

        Raises:
            ValueError: the batch has no labels, or some tables were sharded without an optimizer.
        """
        if batch.labels is None:
            raise ValueError("the batch has no labels: training needs them")
        if self.training and torch.is_grad_enabled():
            refuse_tables_without_optimizer(self.model)
        logits_CT = self.model(batch)
        loss, detached = self.loss(logits_CT.float(), batch.labels, batch.weights, batch.num_candidates)
        if self.next_action is not None and self.training:
            of_histories, of_histories_detached = self.next_action(batch)
            loss, detached = loss + of_histories, detached + of_histories_detached
        return loss, (detached, logits_CT.detach(), batch.labels.detach())
