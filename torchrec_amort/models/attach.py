"""attach_history: a trained TorchRec DLRM gains user history, its scores unchanged until training moves them.

Shape suffixes: B requests; C candidates, all requests together; D embedding dimension; F slots of the interaction, the
DLRM's own first; S new slots; I features of a layer that the DLRM had; J new ones; V vectors, the dense one and the
slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

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
from torchrec_amort.models.dlrm import HISTORY
from torchrec_amort.models.ranker import ModelRanker, call_model, evaluating
from torchrec_amort.modules.dlrm_parts import FIRST_OF_BRANCHES, FIRST_OF_OVER, crossnet_like
from torchrec_amort.modules.encoder import HistoryEncoder
from torchrec_amort.modules.events import EventEncoder
from torchrec_amort.modules.plain import ALL_HOOKS, Plain, why_own_method, why_unlike
from torchrec_amort.modules.tower import HistoryTower

# First layers, which read what the interaction gives, or in a projection the slots; and what stands around them.
_AROUND_OVER = (OverArch, nn.Sequential, MLP, nn.Sequential, Perceptron)
_AROUND_BRANCH = (InteractionProjectionArch, DenseArch, MLP, nn.Sequential, Perceptron)
_BAGS = "sparse_arch.embedding_bag_collection"

_CROSSNET = (InteractionDCNArch, LowRankCrossNet, nn.ParameterList)
_PLAIN = Plain(SparseArch, EmbeddingBagCollection, *_CROSSNET, *_AROUND_OVER, *_AROUND_BRANCH, hooks=ALL_HOOKS)


def attach_history(
    dlrm: DLRM,
    history_embedding_collection: EmbeddingCollection,
    history_arch: HistoryEncoder,
    *,
    event_encoder: EventEncoder | None = None,
    request_features: Sequence[str] = (),
) -> AttachedDLRM:
    """Give an existing, trained DLRM the history: scores are the same to the last bit, then training moves them.

    The history's vectors enter the interaction as new slots. What they add to a layer of the DLRM starts at
    zero and stands in parameters of its own, beside the old ones, which keep their shapes and values.
    So a state dict of the DLRM loads into the result, `strict` or not, and leaves the history as it is.

    The result reads a `RequestBatch` in which all that the DLRM read stands on the candidate side
    (`candidate_dense`, `candidate_sparse`) and only `sequences` is new. With `request_features`, these are looked up
    once per request (`request_sparse`), and `request_dense` are the first of its dense inputs.

    Nothing is copied: the DLRM keeps working, and shares its weights with the result until one of the two is
    sharded, which gives that one tables of its own.

    Args:
        dlrm: a `torchrec.models.dlrm.DLRM`, `DLRM_DCN` or `DLRM_Projection`, or of a subclass with its own forward; not
            sharded.
        history_embedding_collection: tables of history events and of `candidate_item` (`batch.sequences`), of any
            embedding dimension.
        history_arch: makes of each candidate and its request's history one vector or several, with the DLRM's
            embedding dimension.
        event_encoder: makes one vector of each history event; if None, the sum of the embeddings of all
            features of `history_embedding_collection` but `candidate_item`.
        request_features: features of the DLRM that are of the request.

    Returns:
        AttachedDLRM: a ranker that calls the DLRM, in its mode (training or not).

    Raises:
        ValueError: `dlrm` is not a DLRM, is sharded, or has history already; hooks, patched methods or a subclass
            change what a part computes that the result replaces; its scores would be others, which is found by
            running both, unless some weights are on meta; embedding dimensions differ; `history_embedding_collection`
            lacks `candidate_item` or event features, or shares a table with the DLRM.

    Example::

        dlrm.load_state_dict(torch.load("dlrm.pt"))
        model = attach_history(dlrm, history_embedding_collection, AmortizedHistoryArch(embedding_dim=32))
        logits_CT = model(batch)  # = dlrm(batch.candidate_dense, batch.candidate_sparse)
    """
    _refuse_other_models(dlrm)
    if history_arch.embedding_dim != (dim := dlrm.sparse_arch.D):
        raise ValueError(
            f"history_arch has embedding_dim {history_arch.embedding_dim}, but the DLRM's tables have {dim}"
        )
    tower = HistoryTower(
        _free_name(dlrm.sparse_arch.embedding_bag_collection, history_arch.num_slots),
        history_arch,
        events=history_embedding_collection,
        event_encoder=event_encoder,
        starts_at_zero=False,
    )
    return AttachedDLRM(dlrm, tower, request_features)


def _free_name(bags: EmbeddingBagCollection, num_slots: int) -> str:
    """A name for the history that no table and no feature of the bags has, nor any of its slots."""
    taken = {name for table in bags.embedding_bag_configs() for name in (table.name, *table.feature_names)}
    name = HISTORY
    while taken & {name, *(f"{name}_{slot}" for slot in range(1, num_slots))}:
        name += "_"
    return name


class AttachedDLRM(ModelRanker):
    """A DLRM of any class with history attached, which is called as it was: see `attach_history`.

    Args:
        dlrm: gives all its modules but those that grow.
        tower: the history.
        request_features: features that are of the request.

    Raises:
        ValueError: scores are not those of `dlrm`.
    """

    def __init__(self, dlrm: DLRM, tower: HistoryTower, request_features: Sequence[str] = ()) -> None:
        _refuse(why_own_method(dlrm, "dlrm"))
        bags = dlrm.sparse_arch.embedding_bag_collection
        collection = AmortizedEmbeddingBagCollection(bags, [tower], request_features)
        layers = _grown_layers(dlrm, tower.encoder.num_slots)
        grown = _replaced(dlrm, "sparse_arch", SparseArch(collection))
        for path, layer in layers.items():
            grown = _replaced(grown, path, layer)
        super().__init__(grown, call_model if request_features else call_with_dense_of_candidates)
        self.train(dlrm.training)
        # Prefixes of names as they are now, and as they were.
        of_tower = f"{_BAGS}.bags.towers.{tower.name}"
        former = {
            f"{of_tower}.encoder.": "history_arch.",
            f"{of_tower}.event_encoder.": "event_encoder.",
            f"{_BAGS}.sequences.0.": "history_embedding_collection.",
            f"{_BAGS}.candidate_bags.": f"{_BAGS}.",
            f"{_BAGS}.request_bags.": f"{_BAGS}.",
            f"{FIRST_OF_OVER}.history_columns.": "over_arch.history_columns.",
            **{f"{path}.linear.": f"{path}." for path in layers},
        }
        self._renamed = {_with_former_prefix(name.removeprefix("model."), former): name for name in self.state_dict()}
        of_dlrm = dlrm.state_dict()
        self._names_of_history = [name for old, name in self._renamed.items() if old not in of_dlrm]
        self._register_load_state_dict_pre_hook(self._load_old)
        self._refuse_other_scores(dlrm)

    def renamed(self) -> dict[str, str]:
        """Names of all weights in state dicts of version 0.1, the DLRM's own among them, and their names in this one's.

        `load_state_dict` knows them; a distributed checkpoint is loaded under the names that it was saved with.

        Example::

            weights = model.state_dict()
            state = {old: weights[new] for old, new in model.renamed().items()}
            torch.distributed.checkpoint.load({"model": state}, checkpoint_id="old")
        """
        return self._renamed

    def _load_old(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        """Rename what has another name by now; a state dict without any history, as a DLRM's, leaves it as it is."""
        for old, new in self._renamed.items():
            for name in (old, f"model.{old}"):
                if prefix + name in state_dict:
                    state_dict[prefix + new] = state_dict.pop(prefix + name)
        if not any(prefix + name in state_dict for name in self._names_of_history):
            present: Mapping[str, Any] = self.state_dict()
            state_dict.update({prefix + name: present[name] for name in self._names_of_history})

    @torch.no_grad()
    def _refuse_other_scores(self, dlrm: DLRM) -> None:
        """Refuse a forward that reads more of the parts that have grown than TorchRec's does."""
        if any(weight.is_meta for weight in self.parameters()):
            return
        # Whatever the caller's default device.
        with torch.device("cpu"):
            batch = _some_batch(dlrm, self.collection)
        with evaluating(self), evaluating(dlrm):
            logits_CT, expected_CT = self(batch), dlrm(batch.dense, batch.sparse)
        if not torch.allclose(logits_CT, expected_CT, rtol=0, atol=0, equal_nan=True):
            difference = float((logits_CT - expected_CT).abs().max())
            raise ValueError(
                f"with history attached a {type(dlrm).__name__} scores otherwise, by {difference:.1e}: its forward "
                "reads its parts in ways of its own; build it on an AmortizedEmbeddingBagCollection and graft, or use "
                "ResidualHistory"
            )


def call_with_dense_of_candidates(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
    """Call a model of whose dense inputs all are the candidates'."""
    logits_CT: Tensor = model(batch.candidate_dense, rows)
    return logits_CT


def call_with_constant(model: nn.Module, batch: RequestBatch, rows: RequestBatch | CandidateRows) -> Tensor:
    """Call a model of requests and candidates without dense inputs: it reads a 1."""
    logits_CT: Tensor = model(batch.candidate_dense.new_ones(batch.stride(), 1), rows)
    return logits_CT


def _with_former_prefix(name: str, former: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in former if name.startswith(prefix)), "")
    return former.get(prefix, "") + name.removeprefix(prefix)


def _grown_layers(dlrm: DLRM, num_new_slots: int) -> dict[str, nn.Module]:
    """What reads the slots, or what is made of them, grown by the new ones; by its path."""
    num_slots, inter_arch, num_new = dlrm.sparse_arch.F, dlrm.inter_arch, num_new_slots * dlrm.sparse_arch.D
    if isinstance(inter_arch, InteractionProjectionArch):
        return {path: AttachedLinear(dlrm.get_submodule(path), num_new) for path in FIRST_OF_BRANCHES}
    first: Any = dlrm.get_submodule(FIRST_OF_OVER)
    if isinstance(inter_arch, InteractionDCNArch):
        crossnet = AttachedCrossNet(inter_arch.crossnet, num_new, first.weight)
        inter: nn.Module = AttachedInteractionDCNArch(num_slots, crossnet)
    else:
        inter = AttachedInteractionArch(inter_arch, num_new_slots)
        # Of each new slot with all vectors before it.
        num_new = num_new_slots * (num_slots + 1) + num_new_slots * (num_new_slots - 1) // 2
    return {"inter_arch": inter, FIRST_OF_OVER: AttachedLinear(first, num_new)}


def _replaced(module: Any, path: str, new: nn.Module) -> Any:
    """The module with another one in place of a submodule; all on the way there are copied, their weights are not."""
    name, _, rest = path.partition(".")
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: _replaced(module._modules[name], rest, new) if rest else new}
    return copied


def _some_batch(dlrm: DLRM, collection: AmortizedEmbeddingBagCollection) -> RequestBatch:
    """Two random requests with two candidates and two events each, for all features."""
    # The caller's random numbers go on as if nothing had been drawn.
    random = torch.Generator()
    dense = next(module for module in dlrm.dense_arch.modules() if isinstance(module, nn.Linear))
    tables: list[Any] = [*collection.embedding_bag_configs()]
    tables += [table for sequences in collection.sequences for table in sequences.embedding_configs()]  # type: ignore[operator]
    sizes = {feature: table.num_embeddings for table in tables for feature in table.feature_names}

    def ids(field: str, num_rows: int) -> KeyedJaggedTensor:
        names = collection.features[field]
        lengths = torch.full((num_rows * len(names),), 2)
        values = [torch.randint(sizes[name], (2 * num_rows,), generator=random) for name in names]
        is_weighted = collection.is_weighted() and field != "sequences" and names
        weights = torch.rand(2 * len(lengths), generator=random) if is_weighted else None
        return KeyedJaggedTensor(names, torch.cat([lengths[:0], *values]), weights, lengths, stride=num_rows)

    return RequestBatch(
        request_dense=torch.zeros(2, 0, dtype=dense.weight.dtype),
        candidate_dense=torch.randn(4, dense.in_features, generator=random, dtype=dense.weight.dtype),
        request_sparse=ids("request_sparse", 2),
        candidate_sparse=ids("candidate_sparse", 4),
        sequences=ids("sequences", 2),
        num_candidates=torch.tensor([2, 2]),
    ).to(dense.weight.device)


def _refuse_other_models(dlrm: nn.Module) -> None:
    """Refuse what is no DLRM, and changes to what a class computes in parts that the result replaces.

    What it calls may be anything: the dense arch, the dot products, and of the over arch all but what is around the
    first layer.
    """
    if not isinstance(dlrm, DLRM):
        raise ValueError(
            f"dlrm is a {type(dlrm).__name__}, not a DLRM or DLRM_DCN: attach once, and before sharding or wrapping"
        )
    _refuse_changed(dlrm, "sparse_arch", SparseArch)
    _refuse_changed(dlrm, _BAGS, EmbeddingBagCollection)
    _refuse_unknown(dlrm, "dense_arch", DenseArch)
    _refuse_unknown(dlrm, "inter_arch", InteractionArch, InteractionDCNArch, InteractionProjectionArch)
    if isinstance(dlrm.inter_arch, InteractionDCNArch):
        _refuse_unknown(dlrm, "inter_arch.crossnet", LowRankCrossNet)
        crossnet, num_features = dlrm.inter_arch.crossnet, (dlrm.sparse_arch.F + 1) * dlrm.sparse_arch.D
        with torch.device("meta"):
            like = crossnet_like(crossnet, num_features)
        _refuse(_PLAIN.why_not_any(dlrm.inter_arch, "inter_arch") or why_unlike(crossnet, like, "inter_arch.crossnet"))
    if isinstance(dlrm.inter_arch, InteractionProjectionArch):
        for path in FIRST_OF_BRANCHES:
            _refuse_changed_around(dlrm, path, _AROUND_BRANCH)
    _refuse_changed_around(dlrm, FIRST_OF_OVER, _AROUND_OVER)


def _refuse_unknown(dlrm: DLRM, path: str, *known: type[nn.Module]) -> None:
    if type(part := dlrm.get_submodule(path)) not in known:
        names = " or ".join(kind.__name__ for kind in known)
        raise ValueError(
            f"dlrm has a {type(part).__name__} where {names} is known ({path}): attach before sharding, compiling or "
            "quantizing, and to a DLRM or DLRM_DCN as TorchRec builds it"
        )


def _refuse_changed(dlrm: DLRM, path: str, known: type[nn.Module]) -> None:
    _refuse_unknown(dlrm, path, known)
    _refuse(_PLAIN.why_not(dlrm.get_submodule(path), path))


def _refuse_changed_around(dlrm: DLRM, path: str, known: Sequence[type[nn.Module]]) -> None:
    """Refuse other modules than those known around a linear layer."""
    *names, _ = path.split(".")
    for depth, kind in enumerate(known, 1):
        _refuse_changed(dlrm, ".".join(names[:depth]), kind)
    if not isinstance(layer := dlrm.get_submodule(path), nn.Linear):
        _refuse(f"{path} is a {type(layer).__name__}, not a linear layer")


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(
            f"{reason}, and a model with history would do without: attach to a DLRM or DLRM_DCN as TorchRec builds it"
        )


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class AttachedLinear(nn.Module):
    """A linear layer whose input has new columns, the last ones, whose weights are zero at first.

    Args:
        linear: of the old columns; it is called, so that it may have hooks.
        num_features: J, new columns.
    """

    def __init__(self, linear: nn.Linear, num_features: int) -> None:
        super().__init__()
        self.in_features, self.linear = linear.in_features, linear
        self.history_columns = ZeroLinear(
            num_features, linear.out_features, bias=False, device=linear.weight.device, dtype=linear.weight.dtype
        )

    @property
    def weight(self) -> Tensor:
        """Of the old columns."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        return self.linear.bias

    def forward(self, features_CX: Tensor) -> Tensor:
        """[C, outputs] of features [C, I + J]."""
        old_CI, new_CJ = features_CX.tensor_split([self.in_features], dim=1)
        # Products with a strided view would add up in another order than the layer's own.
        logits: Tensor = self.linear(old_CI.contiguous()) + self.history_columns(new_CJ)
        return logits


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

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last: old and new features [C, I + J]."""
        num_old = self.inter_arch.F
        # As a DLRM calls it: hooks may read keywords.
        old_CI = self.inter_arch(dense_features=dense_features, sparse_features=sparse_features[:, :num_old])
        vectors_CVD = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        dots_CSV = torch.bmm(vectors_CVD[:, 1 + num_old :], vectors_CVD.transpose(1, 2))
        new = [dots_CSV[:, slot, : 1 + num_old + slot] for slot in range(self.num_new_slots)]
        return torch.cat([old_CI, *new], dim=1)


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

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Interact the dense vector [C, D] and slots [C, F, D], the new ones last: old and new features [C, I + J]."""
        vectors_CVD = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        old_CVD, new_CSD = vectors_CVD.tensor_split([1 + self.num_slots], dim=1)
        # Products with a strided view would add up in another order than the DLRM's.
        old_CI = old_CVD.flatten(1).contiguous()
        return torch.cat(self.crossnet(old_CI, new_CSD.flatten(1)), dim=1)


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
