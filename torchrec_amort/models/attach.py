"""attach_history: a trained TorchRec DLRM gains user history, its scores unchanged until training moves them.

Shape suffixes: B requests; C candidates, all requests together; D embedding dimension; F slots of the
interaction, the DLRM's own first; S new slots; I features of the over arch that the DLRM had; J new ones;
V vectors, the dense one and the slots; T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import DLRM, DenseArch, InteractionArch, InteractionDCNArch, OverArch, SparseArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP, Perceptron

from torchrec_amort.batch import RequestBatch
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.plain import ALL_HOOKS, Plain, why_other_methods, why_patched, why_unlike

_PLAIN = Plain(
    DLRM,
    SparseArch,
    InteractionDCNArch,
    LowRankCrossNet,
    nn.ParameterList,
    OverArch,
    nn.Sequential,
    MLP,
    Perceptron,
    hooks=ALL_HOOKS,
)


def attach_history(
    dlrm: DLRM,
    history_embedding_collection: EmbeddingCollection,
    history_arch: HistoryEncoder,
    *,
    event_encoder: EventEncoder | None = None,
) -> AttachedDLRM:
    """Give an existing, trained DLRM the history: scores are the same to the last bit, then training moves them.

    The history's vectors enter the interaction as new slots. What they add to a layer of the DLRM starts at
    zero and stands in parameters of its own, beside the old ones, which keep their names, shapes and values.
    So a state dict of the DLRM loads into the result, `strict` or not, and leaves the history as it is.

    The result reads a `RequestBatch` in which all that the DLRM read stands on the candidate side
    (`candidate_dense`, `candidate_sparse`) and only `sequences` is new; it does not read the request side.

    Nothing is copied: the DLRM keeps working, and shares its weights with the result until one of the two is
    sharded, which gives that one tables of its own.

    Args:
        dlrm: a `torchrec.models.dlrm.DLRM` or `DLRM_DCN`, not sharded.
        history_embedding_collection: tables of history events and of `candidate_item` (`batch.sequences`),
            with the DLRM's embedding dimension.
        history_arch: makes of each candidate and its request's history one vector or several.
        event_encoder: makes one vector of each history event; if None, the sum of the embeddings of all
            features of `history_embedding_collection` but `candidate_item`.

    Returns:
        AttachedDLRM: an `AmortizedDLRM`, in the mode (training or not) of `dlrm`.

    Raises:
        ValueError: `dlrm` is not a DLRM of these two kinds, is sharded, or has history already; hooks, patched
            methods or a subclass change what it or a part computes that the result replaces; embedding dimensions
            differ; `history_embedding_collection` lacks `candidate_item` or event features, or shares a table with
            the DLRM.

    Example::

        dlrm.load_state_dict(torch.load("dlrm.pt"))
        model = attach_history(
            dlrm,
            EmbeddingCollection(
                tables=[
                    EmbeddingConfig(
                        name="item",
                        num_embeddings=1000,
                        embedding_dim=32,
                        feature_names=["history_item", "candidate_item"],
                    )
                ]
            ),
            AmortizedHistoryArch(embedding_dim=32),
        )
        logits_CT = model(batch)  # = dlrm(batch.candidate_dense, batch.candidate_sparse)
    """
    _refuse_other_models(dlrm)
    embedding_dim = dlrm.sparse_arch.D
    if history_arch.embedding_dim != embedding_dim:
        raise ValueError(
            f"history_arch has embedding_dim {history_arch.embedding_dim}, but the DLRM's tables have {embedding_dim}"
        )
    features = [name for table in history_embedding_collection.embedding_configs() for name in table.feature_names]
    events = [name for name in features if name != "candidate_item"]
    if "candidate_item" not in features or not events:
        raise ValueError(
            f"history_embedding_collection has the features {features}: it needs 'candidate_item' and at least "
            "one feature of events"
        )
    if event_encoder is None:
        event_encoder = EventEncoder(events, embedding_dim, device=_first_linear(dlrm.over_arch).weight.device)
    return AttachedDLRM(dlrm, history_embedding_collection, event_encoder, history_arch)


def _refuse_other_models(dlrm: nn.Module) -> None:
    if not isinstance(dlrm, DLRM):
        raise ValueError(
            f"dlrm is a {type(dlrm).__name__}, not a DLRM or DLRM_DCN: attach once, and before sharding or wrapping"
        )
    _refuse(why_other_methods(type(dlrm), DLRM) or _PLAIN.why_replaced(DLRM) or why_patched(dlrm, "dlrm", ALL_HOOKS))
    _refuse_other(dlrm.sparse_arch, SparseArch)
    _refuse_other(dlrm.sparse_arch.embedding_bag_collection, EmbeddingBagCollection)
    _refuse_other(dlrm.dense_arch, DenseArch)
    _refuse_other(dlrm.inter_arch, InteractionArch, InteractionDCNArch)
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        _refuse_other(dlrm.inter_arch.crossnet, LowRankCrossNet)
    _refuse_other(dlrm.over_arch, OverArch)
    _refuse_changed_parts(dlrm)


def _refuse_other(part: nn.Module, *known: type[nn.Module]) -> None:
    if type(part) not in known:
        names = " or ".join(kind.__name__ for kind in known)
        raise ValueError(
            f"dlrm has a {type(part).__name__} where {names} is known: attach before sharding, compiling or "
            "quantizing, and to a DLRM or DLRM_DCN as TorchRec builds it"
        )


def _refuse_changed_parts(dlrm: DLRM) -> None:
    """Refuse changes to what a class computes in parts that the result replaces.

    What it calls may be anything: the dense arch, the dot products, the collection, and of the over arch all but the
    shells around the first layer.
    """
    _refuse(_PLAIN.why_not(dlrm.sparse_arch, "sparse_arch"))
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        crossnet = dlrm.inter_arch.crossnet
        with torch.device("meta"):
            num_features = (dlrm.sparse_arch.F + 1) * dlrm.sparse_arch.D
            like = LowRankCrossNet(num_features, crossnet._num_layers, crossnet._low_rank)
        _refuse(_PLAIN.why_not(dlrm.inter_arch, "inter_arch"))
        _refuse(
            _PLAIN.why_not_any(crossnet, "inter_arch.crossnet") or why_unlike(crossnet, like, "inter_arch.crossnet")
        )
    path, shell = "over_arch", cast(nn.Module, dlrm.over_arch)
    for child, kind in (("model", nn.Sequential), ("0", MLP), ("_mlp", nn.Sequential), ("0", Perceptron)):
        _refuse(_PLAIN.why_not(shell, path))
        path, shell = f"{path}.{child}", shell.get_submodule(child)
        if type(shell) is not kind:
            _refuse(f"{path} is a {type(shell).__name__}, not a {kind.__name__}")
    _refuse(_PLAIN.why_not(shell, path))
    if not isinstance(shell._linear, nn.Linear) or len(dlrm.over_arch.model) != 2:
        _refuse("over_arch is not an MLP of linear layers and one linear layer more")


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(
            f"{reason}, and a model with history would do without: attach to a DLRM or DLRM_DCN as TorchRec builds it"
        )


class AttachedDLRM(AmortizedDLRM):
    """A DLRM with history attached: see `attach_history`.

    Args:
        dlrm: gives all its modules but the interaction's and the over arch's shells.
        history_embedding_collection: tables of history events and of `candidate_item`.
        event_encoder: makes one vector of each history event.
        history_arch: makes the new slots of each candidate.
    """

    def __init__(
        self,
        dlrm: DLRM,
        history_embedding_collection: EmbeddingCollection,
        event_encoder: EventEncoder,
        history_arch: HistoryEncoder,
    ) -> None:
        embedding_dim, num_slots, num_new_slots = dlrm.sparse_arch.D, dlrm.sparse_arch.F, history_arch.num_slots
        # The dense, interaction and over arch made here are on meta and give way to the DLRM's.
        super().__init__(
            candidate_embedding_bag_collection=dlrm.sparse_arch.embedding_bag_collection,
            request_embedding_bag_collection=None,
            dense_in_features=_first_linear(dlrm.dense_arch).in_features,
            dense_arch_layer_sizes=[embedding_dim],
            over_arch_layer_sizes=[1, 1],
            history_embedding_collection=history_embedding_collection,
            event_encoder=event_encoder,
            history_arch=history_arch,
            dense_device=torch.device("meta"),
        )
        self.dense_arch = dlrm.dense_arch
        first = _first_linear(dlrm.over_arch)
        if isinstance(dlrm.inter_arch, InteractionDCNArch):
            num_new_features = num_new_slots * embedding_dim
            crossnet = AttachedCrossNet(dlrm.inter_arch.crossnet, num_new_features, first.weight)
            self.inter_arch = AttachedInteractionDCNArch(num_slots, crossnet)
        else:
            num_new_features = num_new_slots * (num_slots + 1) + num_new_slots * (num_new_slots - 1) // 2
            self.inter_arch = AttachedInteractionArch(dlrm.inter_arch, num_new_slots)
        self.over_arch = AttachedOverArch(dlrm.over_arch, num_new_features)
        self.train(dlrm.training)
        self._history_keys = frozenset(self.state_dict()) - frozenset(dlrm.state_dict())
        self.register_load_state_dict_pre_hook(_keep_history)

    def _dense(self, batch: RequestBatch) -> Tensor:
        """Dense inputs of each candidate, [C, I], as the DLRM read them."""
        return batch.candidate_dense


def _keep_history(module: AttachedDLRM, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Complete a state dict that has nothing of the history, as that of the DLRM before, with the present values."""
    if not any(prefix + key in state_dict for key in module._history_keys):
        present: Mapping[str, Any] = module.state_dict()
        state_dict.update({prefix + key: present[key] for key in module._history_keys})


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class AttachedInteractionArch(nn.Module):
    """`InteractionArch`, and the dot products of each new slot with all slots before it and the dense vector.

    Args:
        inter_arch: of the DLRM's own slots.
        num_new_slots: S.
    """

    def __init__(self, inter_arch: InteractionArch, num_new_slots: int) -> None:
        super().__init__()
        self.inter_arch = inter_arch
        self.num_new_slots = num_new_slots

    def forward(self, dense_CD: Tensor, slots_CFD: Tensor) -> tuple[Tensor, Tensor]:
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last, to old [C, I], new [C, J]."""
        # As a DLRM calls it: hooks may read keywords.
        old_CI = self.inter_arch(dense_features=dense_CD, sparse_features=slots_CFD[:, : self.inter_arch.F])
        vectors_CVD = torch.cat([dense_CD.unsqueeze(1), slots_CFD], dim=1)
        num_old = 1 + self.inter_arch.F
        dots_CSV = torch.bmm(vectors_CVD[:, num_old:], vectors_CVD.transpose(1, 2))
        new = [dots_CSV[:, slot, : num_old + slot] for slot in range(self.num_new_slots)]
        return old_CI, torch.cat(new, dim=1)


class AttachedInteractionDCNArch(nn.Module):
    """`InteractionDCNArch` with new slots.

    Args:
        num_slots: slots that the DLRM had.
        crossnet: crosses their coordinates and the new ones.
    """

    def __init__(self, num_slots: int, crossnet: AttachedCrossNet) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.crossnet = crossnet

    def forward(self, dense_CD: Tensor, slots_CFD: Tensor) -> tuple[Tensor, Tensor]:
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last, to old [C, I], new [C, J]."""
        vectors_CVD = torch.cat([dense_CD.unsqueeze(1), slots_CFD], dim=1)
        old_CVD, new_CSD = vectors_CVD.tensor_split([1 + self.num_slots], dim=1)
        # Products with a strided view would add up in another order than the DLRM's.
        old_CI = old_CVD.flatten(1).contiguous()
        return cast(tuple[Tensor, Tensor], self.crossnet(old_CI, new_CSD.flatten(1)))


class AttachedCrossNet(nn.Module):
    """`LowRankCrossNet` with new coordinates: with V = [V_old | 0], W = [W_old; 0] and b = [b_old; 0] at first.

    Args:
        crossnet: of the old coordinates; its parameters keep their names.
        num_features: J, new coordinates.
        like: gives the new parameters' device and dtype.
    """

    def __init__(self, crossnet: LowRankCrossNet, num_features: int, like: Tensor) -> None:
        super().__init__()
        self.W_kernels, self.V_kernels, self.bias = crossnet.W_kernels, crossnet.V_kernels, crossnet.bias
        ranks = [kernel.shape[0] for kernel in crossnet.V_kernels]
        self.history_W_kernels = nn.ModuleList(
            ZeroLinear(rank, num_features, device=like.device, dtype=like.dtype) for rank in ranks
        )
        self.history_V_kernels = nn.ModuleList(
            ZeroLinear(num_features, rank, bias=False, device=like.device, dtype=like.dtype) for rank in ranks
        )

    def forward(self, old_CI: Tensor, new_CJ: Tensor) -> tuple[Tensor, Tensor]:
        """Cross coordinates [C, I] and [C, J] with each other."""
        first_old_CI, first_new_CJ = old_CI, new_CJ
        layers = zip(
            self.W_kernels, self.V_kernels, self.bias, self.history_W_kernels, self.history_V_kernels, strict=True
        )
        for W, V, bias, history_W, history_V in layers:
            low_rank = F.linear(old_CI, V) + history_V(new_CJ)
            old_CI = first_old_CI * (F.linear(low_rank, W) + bias) + old_CI
            new_CJ = first_new_CJ * history_W(low_rank) + new_CJ
        return old_CI, new_CJ


class AttachedOverArch(nn.Module):
    """`OverArch` whose first layer has new columns, zero at first.

    Args:
        over_arch: its parameters keep their names.
        num_features: J, new columns.
    """

    def __init__(self, over_arch: OverArch, num_features: int) -> None:
        super().__init__()
        self.model = over_arch.model
        first = _first_linear(over_arch)
        self.history_columns = ZeroLinear(
            num_features, first.out_features, bias=False, device=first.weight.device, dtype=first.weight.dtype
        )

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [C, T] of old features [C, I] and new ones [C, J]."""
        old_CI, new_CJ = features
        mlp, last = self.model
        first, *others = mlp._mlp
        hidden = first._activation_fn(first._linear(old_CI) + self.history_columns(new_CJ))
        for layer in (*others, last):
            hidden = layer(hidden)
        return hidden


def _first_linear(arch: nn.Module) -> nn.Linear:
    return next(module for module in arch.modules() if isinstance(module, nn.Linear))
