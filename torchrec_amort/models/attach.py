"""attach_history: a trained TorchRec DLRM gains user history, its scores unchanged until training moves them.

Shape suffixes: B requests; C candidates, all requests together; D embedding dimension; F slots of the
interaction, the DLRM's own first; S new slots; I features of the over arch that the DLRM had; J new ones;
V vectors, the dense one and the slots; T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.models.dlrm import (
    DLRM,
    DenseArch,
    InteractionArch,
    InteractionDCNArch,
    InteractionProjectionArch,
    OverArch,
    SparseArch,
)
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP, Perceptron
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection, CandidateRows
from torchrec_amort.models.dlrm import HISTORY, AmortizedDLRM
from torchrec_amort.models.ranker import ModelRanker, call_model, evaluating
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.plain import ALL_HOOKS, Plain, why_other_methods, why_own_method, why_patched, why_unlike
from torchrec_amort.modules.tower import HistoryTower

_PLAIN = Plain(
    DLRM,
    SparseArch,
    InteractionDCNArch,
    InteractionProjectionArch,
    LowRankCrossNet,
    nn.ParameterList,
    DenseArch,
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
    request_features: Sequence[str] = (),
) -> AttachedDLRM | AttachedModel:
    """Give an existing, trained DLRM the history: scores are the same to the last bit, then training moves them.

    The history's vectors enter the interaction as new slots. What they add to a layer of the DLRM starts at
    zero and stands in parameters of its own, beside the old ones, which keep their names, shapes and values.
    So a state dict of the DLRM loads into the result, `strict` or not, and leaves the history as it is.

    The result reads a `RequestBatch` in which all that the DLRM read stands on the candidate side
    (`candidate_dense`, `candidate_sparse`) and only `sequences` is new. With `request_features`, these are looked up
    once per request (`request_sparse`), and `request_dense` are the first of its dense inputs.

    Nothing is copied: the DLRM keeps working, and shares its weights with the result until one of the two is
    sharded, which gives that one tables of its own.

    Args:
        dlrm: a `torchrec.models.dlrm.DLRM`, `DLRM_DCN` or `DLRM_Projection`, or of a subclass with its own forward; not
            sharded.
        history_embedding_collection: tables of history events and of `candidate_item` (`batch.sequences`),
            with the DLRM's embedding dimension.
        history_arch: makes of each candidate and its request's history one vector or several.
        event_encoder: makes one vector of each history event; if None, the sum of the embeddings of all
            features of `history_embedding_collection` but `candidate_item`.
        request_features: features of the DLRM that are of the request.

    Returns:
        AttachedDLRM | AttachedModel: in the mode (training or not) of `dlrm`. An `AmortizedDLRM` of a plain DLRM or
        DLRM_DCN without `request_features`; of any other, a ranker that calls it.

    Raises:
        ValueError: `dlrm` is not a DLRM, is sharded, or has history already; hooks, patched methods or a subclass
            change what a part computes that the result replaces; its scores would be others; embedding dimensions
            differ; `history_embedding_collection` lacks `candidate_item` or event features, or shares a table with the
            DLRM.

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
    if request_features or _why_not_plain(dlrm) or isinstance(dlrm.inter_arch, InteractionProjectionArch):
        tower = HistoryTower(
            HISTORY,
            history_arch,
            events=history_embedding_collection,
            event_encoder=event_encoder,
            starts_at_zero=False,
        )
        return AttachedModel(dlrm, tower, request_features)
    return AttachedDLRM(dlrm, history_embedding_collection, event_encoder, history_arch)


def _refuse_other_models(dlrm: nn.Module) -> None:
    if not isinstance(dlrm, DLRM):
        raise ValueError(
            f"dlrm is a {type(dlrm).__name__}, not a DLRM or DLRM_DCN: attach once, and before sharding or wrapping"
        )
    _refuse_other(dlrm.sparse_arch, SparseArch)
    _refuse_other(dlrm.sparse_arch.embedding_bag_collection, EmbeddingBagCollection)
    _refuse_other(dlrm.dense_arch, DenseArch)
    _refuse_other(dlrm.inter_arch, InteractionArch, InteractionDCNArch, InteractionProjectionArch)
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        _refuse_other(dlrm.inter_arch.crossnet, LowRankCrossNet)
    _refuse_other(dlrm.over_arch, OverArch)
    _refuse_changed_parts(dlrm)


def _why_not_plain(dlrm: DLRM) -> str | None:
    """Why a DLRM's own forward, its parts aside, may compute something else than DLRM's; or None."""
    return why_other_methods(type(dlrm), DLRM) or _PLAIN.why_replaced(DLRM) or why_patched(dlrm, "dlrm", ALL_HOOKS)


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
    if isinstance(dlrm.inter_arch, InteractionProjectionArch):
        _refuse(_PLAIN.why_not(dlrm.inter_arch, "inter_arch"))
        for branch in ("interaction_branch1", "interaction_branch2"):
            shells = (("model", MLP), ("_mlp", nn.Sequential), ("0", Perceptron))
            _refuse_other_shells(dlrm.inter_arch, branch, (branch, DenseArch), *shells)
    _refuse_other_shells(
        dlrm,
        "over_arch",
        ("over_arch", OverArch),
        ("model", nn.Sequential),
        ("0", MLP),
        ("_mlp", nn.Sequential),
        ("0", Perceptron),
    )
    if len(dlrm.over_arch.model) != 2:
        _refuse("over_arch is not an MLP of linear layers and one linear layer more")


def _refuse_other_shells(module: nn.Module, name: str, *shells: tuple[str, type[nn.Module]]) -> None:
    """Refuse other modules than those known around the first linear layer of a part."""
    path, shell = [], module
    for child, kind in shells:
        path.append(child)
        shell = shell.get_submodule(child)
        if type(shell) is not kind:
            _refuse(f"{'.'.join(path)} is a {type(shell).__name__}, not a {kind.__name__}")
        _refuse(_PLAIN.why_not(shell, ".".join(path)))
    if not isinstance(shell._linear, nn.Linear):
        _refuse(f"{name} does not start with a linear layer")


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
            num_features = num_new_slots * embedding_dim
            crossnet = AttachedCrossNet(dlrm.inter_arch.crossnet, num_features, first.weight)
            self.inter_arch = AttachedInteractionDCNArch(num_slots, crossnet)
        else:
            num_features = num_new_features(num_slots, num_new_slots)
            self.inter_arch = AttachedInteractionArch(dlrm.inter_arch, num_new_slots)
        self.over_arch = AttachedOverArch(dlrm.over_arch, num_features)
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


class AttachedModel(ModelRanker):
    """A DLRM of any class with history attached, which is called as it was: see `attach_history`.

    Args:
        dlrm: gives all its modules but those that grow.
        tower: the history.
        request_features: features that are of the request.

    Raises:
        ValueError: scores are not those of `dlrm`.
    """

    def __init__(self, dlrm: DLRM, tower: HistoryTower, request_features: Sequence[str]) -> None:
        _refuse(why_own_method(dlrm, "dlrm"))
        bags = dlrm.sparse_arch.embedding_bag_collection
        sparse = AmortizedEmbeddingBagCollection(bags, [tower], request_features)
        self._old_names = list(dlrm.state_dict())
        call = call_model if request_features else _call_with_dense_of_candidates
        super().__init__(_grown(dlrm, SparseArch(sparse), tower.encoder.num_slots), call)
        self.train(dlrm.training)
        self._register_load_state_dict_pre_hook(self._load_old)
        self._refuse_other_scores(dlrm)

    def _load_old(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        """Read a state dict of the DLRM before: its names have no `model.`, and the history is left as it is."""
        mine = [name for name in self._old_names if prefix + name in state_dict]
        for name in mine:
            state_dict[f"{prefix}model.{name}"] = state_dict.pop(prefix + name)
        if mine:
            path = f"{prefix}model.sparse_arch.embedding_bag_collection."
            old = {f"{path}{new}" for new in self.collection.renamed().values()} | {f"{prefix}model.{n}" for n in mine}
            present = {prefix + name: value for name, value in self.state_dict().items() if prefix + name not in old}
            state_dict.update(present)

    @torch.no_grad()
    def _refuse_other_scores(self, dlrm: DLRM) -> None:
        """Refuse a forward that reads more of the parts that have grown than TorchRec's does."""
        # The caller's random numbers go on as if nothing had been drawn.
        with torch.random.fork_rng():
            batch = _some_batch(dlrm, self.collection)
        if batch.num_candidates.is_meta:
            return
        with evaluating(self), evaluating(dlrm):
            difference = float((self(batch) - dlrm(batch.dense, batch.sparse)).abs().max())
        if difference != 0:
            raise ValueError(
                f"with history attached a {type(dlrm).__name__} scores otherwise, by {difference:.1e}: its forward "
                "reads its parts in ways of its own; build it on an AmortizedEmbeddingBagCollection and graft, or use "
                "ResidualHistory"
            )


def _call_with_dense_of_candidates(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
    logits_CT: Tensor = model(batch.candidate_dense, rows)
    return logits_CT


def _grown(dlrm: DLRM, sparse_arch: SparseArch, num_new_slots: int) -> DLRM:
    """The DLRM with other sparse arch and grown layers; nothing is copied, and the DLRM is left as it is."""
    dim, num_slots, over = dlrm.sparse_arch.D, dlrm.sparse_arch.F, _first_linear(dlrm.over_arch)
    grown = _replaced(dlrm, "sparse_arch", sparse_arch)
    if isinstance(dlrm.inter_arch, InteractionProjectionArch):
        for branch in ("interaction_branch1", "interaction_branch2"):
            path = f"inter_arch.{branch}.{_FIRST_OF_BRANCH}"
            linear = AttachedLinear(cast(nn.Linear, dlrm.get_submodule(path)), num_new_slots * dim)
            grown = _replaced(grown, path, linear)
        return grown
    inter: nn.Module
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        num_new = num_new_slots * dim
        inter = JoinedInteractionDCNArch(num_slots, AttachedCrossNet(dlrm.inter_arch.crossnet, num_new, over.weight))
    else:
        num_new = num_new_features(num_slots, num_new_slots)
        inter = JoinedInteractionArch(dlrm.inter_arch, num_new_slots)
    grown = _replaced(grown, "inter_arch", inter)
    return _replaced(grown, f"over_arch.{_FIRST_OF_OVER}", AttachedLinear(over, num_new))


def num_new_features(num_slots: int, num_new_slots: int) -> int:
    """Dot products of new slots with all vectors before each."""
    return num_new_slots * (num_slots + 1) + num_new_slots * (num_new_slots - 1) // 2


def _replaced(module: Any, path: str, new: nn.Module) -> Any:
    """The module with another one in place of a submodule; all on the way there are copied, their weights are not."""
    name, _, rest = path.partition(".")
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: _replaced(module._modules[name], rest, new) if rest else new}
    return copied


def _some_batch(dlrm: DLRM, collection: AmortizedEmbeddingBagCollection) -> RequestBatch:
    """Random requests for all features."""
    device = _first_linear(dlrm.over_arch).weight.device
    num_candidates = torch.tensor([3, 1], device=device)
    sizes = {f: table.num_embeddings for table in collection.embedding_bag_configs() for f in table.feature_names}
    for sequences in collection.sequences:
        sizes |= {f: table.num_embeddings for table in sequences.embedding_configs() for f in table.feature_names}  # type: ignore[operator]

    def ids(field: str, lengths: Sequence[int], is_weighted: bool) -> KeyedJaggedTensor:
        names = collection.features[field]
        values = [torch.randint(sizes[name], (sum(lengths),), device=device) for name in names]
        total = sum(lengths) * len(names)
        return KeyedJaggedTensor(
            names,
            torch.cat(values) if values else num_candidates[:0],
            torch.rand(total, device=device) if is_weighted and names else None,
            torch.tensor([*lengths] * len(names), device=device, dtype=torch.int64),
            stride=len(lengths),
        )

    is_weighted = collection.is_weighted()
    return RequestBatch(
        request_dense=torch.zeros(2, 0, device=device),
        candidate_dense=torch.randn(4, _first_linear(dlrm.dense_arch).in_features, device=device),
        request_sparse=ids("request_sparse", [1, 2], is_weighted),
        candidate_sparse=ids("candidate_sparse", [1, 2, 0, 1], is_weighted),
        sequences=ids("sequences", [3, 1], False),
        num_candidates=num_candidates,
    )


# First layers of a branch that is a `DenseArch`, and of an `OverArch`.
_FIRST_OF_BRANCH, _FIRST_OF_OVER = "model._mlp.0._linear", "model.0._mlp.0._linear"


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


class JoinedInteractionArch(AttachedInteractionArch):
    """The same, its old and new features side by side."""

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:  # type: ignore[override]
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last, to [C, I + J]."""
        return torch.cat(super().forward(dense_features, sparse_features), dim=1)


class JoinedInteractionDCNArch(AttachedInteractionDCNArch):
    """The same, its old and new features side by side."""

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:  # type: ignore[override]
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last, to [C, I + J]."""
        return torch.cat(super().forward(dense_features, sparse_features), dim=1)


class AttachedLinear(nn.Module):
    """A linear layer whose input has new columns, the last ones, whose weights are zero at first.

    Args:
        linear: its parameters keep their names.
        num_features: J, new columns.
    """

    def __init__(self, linear: nn.Linear, num_features: int) -> None:
        super().__init__()
        self.in_features, self.weight, self.bias = linear.in_features, linear.weight, linear.bias
        self.history_columns = ZeroLinear(
            num_features, linear.out_features, bias=False, device=linear.weight.device, dtype=linear.weight.dtype
        )

    def forward(self, features_CX: Tensor) -> Tensor:
        """[C, outputs] of features [C, I + J]."""
        old_CI, new_CJ = features_CX.tensor_split([self.in_features], dim=1)
        # Products with a strided view would add up in another order than the layer's own.
        return F.linear(old_CI.contiguous(), self.weight, self.bias) + self.history_columns(new_CJ)


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
