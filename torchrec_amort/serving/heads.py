"""All of a DLRM but its lookups and its history encoder, in two phases: what a request adds, and then its candidates.

A request's embeddings, its dense inputs, what its vectors make of each other, and their columns of the first layers
are worked out once per request; candidates add their own. Same function as the model's own layers, in another order.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; W width of the dense arch's first
layer; D embedding dimension; F slots; R vectors of a request and U of a candidate; X coordinates of those; O width of
the over arch's first layer; K rank of a cross layer; T tasks.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP, Perceptron

from torchrec_amort.models.attach import (
    AttachedCrossNet,
    AttachedDLRM,
    AttachedInteractionArch,
    AttachedInteractionDCNArch,
    ZeroLinear,
)
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.modules.plain import Plain, why_unlike
from torchrec_amort.ops.jagged import expand
from torchrec_amort.schema import InputError

Terms = tuple[Tensor, ...]

_PLAIN = Plain(
    DenseArch,
    OverArch,
    MLP,
    Perceptron,
    nn.Sequential,
    nn.Linear,
    InteractionArch,
    InteractionDCNArch,
    LowRankCrossNet,
    nn.ParameterList,
    nn.ModuleList,
    AttachedInteractionArch,
    AttachedInteractionDCNArch,
    AttachedCrossNet,
    ZeroLinear,
)


def build_head(model: AmortizedDLRM, num_request_dense: int) -> Head:
    """The head of a model, with the weights of this moment.

    Args:
        model: an `AmortizedDLRM`, or what `attach_history` returned.
        num_request_dense: dense inputs of a request, columns of `RequestBatch.request_dense`.

    Raises:
        InputError: the model has fewer dense inputs.

    Example::

        head = build_head(model, num_request_dense=batch.request_dense.shape[1])
    """
    if reason := _why_not_folded(model):
        return ModuleHead(model, num_request_dense, reason)
    if isinstance(model.inter_arch, InteractionDCNArch | AttachedInteractionDCNArch):
        return CrossHead(model, num_request_dense)
    return DotHead(model, num_request_dense)


def _why_not_folded(model: AmortizedDLRM) -> str | None:
    """Why dense, interaction and over arch may compute something else than such modules of their sizes do, or None."""
    names = ("dense_arch", "inter_arch", "over_arch")
    reasons = [_PLAIN.why_not_any(model.get_submodule(name), name) for name in names]
    if not any(reasons):
        reasons = [why_unlike(model.get_submodule(name), like, name) for name, like in _as_built(model)]
    return next(filter(None, reasons), None)


def _as_built(model: AmortizedDLRM) -> list[tuple[str, nn.Module]]:
    """Dense, interaction and over arch as their constructors make them for a model's sizes."""
    dim, num_slots = model.sparse_arch.D, sum(_num_slots(model))
    num_new = _num_slots(model)[-1] if isinstance(model, AttachedDLRM) else 0
    inter: nn.Module = InteractionArch(num_slots - num_new)
    with torch.device("meta"):
        dense, over = DenseArch(*_sizes(model.dense_arch)), OverArch(*_sizes(model.over_arch))
        if isinstance(model.inter_arch, InteractionDCNArch | AttachedInteractionDCNArch):
            kernels: Any = model.inter_arch.crossnet.V_kernels
            crossnet = LowRankCrossNet((1 + num_slots - num_new) * dim, len(kernels), kernels[0].shape[0])
            inter = InteractionDCNArch(num_slots - num_new, crossnet)
        if isinstance(model, AttachedDLRM):
            if isinstance(inter, InteractionDCNArch):
                attached = AttachedCrossNet(inter.crossnet, num_new * dim, torch.empty(0))
                inter = AttachedInteractionDCNArch(num_slots - num_new, attached)
            else:
                inter = AttachedInteractionArch(inter, num_new)
    return [("dense_arch", dense), ("inter_arch", inter), ("over_arch", over)]


def _sizes(arch: nn.Module) -> tuple[int, list[int]]:
    """Inputs of an arch, and outputs of each of its layers."""
    layers = [module for module in arch.modules() if type(module) is nn.Linear]
    return layers[0].in_features, [layer.out_features for layer in layers]


def _num_slots(model: AmortizedDLRM) -> tuple[int, int, int]:
    """Slots of request, candidate and history."""
    of_request = 0 if model.request_sparse_arch is None else model.request_sparse_arch.F
    of_history = 0 if model.history_arch is None else model.history_arch.num_slots
    return of_request, model.sparse_arch.F, of_history


class DenseHalves(nn.Module):
    """A DenseArch whose first layer is a sum: what the request's inputs give, and what the candidate's do.

    Args:
        dense_arch: the model's.
        num_of_request: its first inputs, those of the request. If it has no others, all of it is the request's.
    """

    def __init__(self, dense_arch: DenseArch, num_of_request: int) -> None:
        super().__init__()
        first, *others = dense_arch.model._mlp
        self.activation = first._activation_fn
        of_request, of_candidate = first._linear.weight.detach().tensor_split([num_of_request], dim=1)
        self.request = _linear(of_request, first._linear.bias)
        self.candidate = _linear(of_candidate) if of_candidate.shape[1] else None
        self.others = nn.Sequential(*copy.deepcopy(others))

    def of_requests(self, inputs_BI: Tensor) -> Tensor:
        """The request's part of the first layer, [B, W]; or its dense vector [B, D], if candidates have no inputs."""
        hidden_BW = self.request(inputs_BI)
        return hidden_BW if self.candidate is not None else self.others(self.activation(hidden_BW))

    def of_candidates(self, hidden_CW: Tensor, inputs_CI: Tensor) -> Tensor:
        """Dense vectors [C, D]."""
        assert self.candidate is not None
        return self.others(self.activation(hidden_CW + self.candidate(inputs_CI)))


class Head(nn.Module, ABC):
    """All of a model but its lookups and its history encoder, in two phases.

    Args:
        model: gives the weights, of this moment.
        num_request_dense: dense inputs of a request.
    """

    def __init__(self, model: AmortizedDLRM, num_request_dense: int) -> None:
        super().__init__()
        is_attached = isinstance(model, AttachedDLRM)
        if not is_attached and num_request_dense > model.dense_in_features:
            raise InputError(
                f"batch: request_dense has {num_request_dense} columns, but the model reads {model.dense_in_features} "
                "dense inputs of request and candidate together"
            )
        self.reads_constant = model.dense_in_features == 0 and not is_attached
        self.num_request_dense = 0 if is_attached else num_request_dense
        self.num_candidate_dense = model.dense_in_features - self.num_request_dense
        self.embedding_dim = model.sparse_arch.D

    @abstractmethod
    def request(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        """Phase one, once per request.

        Args:
            dense_BI: the requests' dense inputs, [B, I_r].
            slots_BFD: embeddings of their ids, [B, F_r, D].

        Returns:
            tuple: tensors with one row of B per request: all that its candidates need of it but its history.
        """

    @abstractmethod
    def candidates(self, terms: Terms, num_candidates_B: Tensor, dense_CI: Tensor, slots_CFD: Tensor) -> Tensor:
        """Phase two.

        Args:
            terms: what `request` gave.
            num_candidates_B: int64 [B].
            dense_CI: the candidates' dense inputs, [C, I_c].
            slots_CFD: embeddings of their ids and then their history vectors, [C, F_c + S, D].

        Returns:
            Tensor: logits [C, T].
        """


class ModuleHead(Head):
    """Head that runs the model's own modules on candidates, a request's inputs repeated for each of its candidates.

    Args:
        model: see `Head`.
        num_request_dense: see `Head`.
        reason: why they cannot be put in another order.
    """

    def __init__(self, model: AmortizedDLRM, num_request_dense: int, reason: str) -> None:
        super().__init__(model, num_request_dense)
        self.reason = reason
        self.dense_arch, self.inter_arch, self.over_arch = (
            copy.deepcopy(arch) for arch in (model.dense_arch, model.inter_arch, model.over_arch)
        )

    def request(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        """Phase one; see `Head.request`."""
        return dense_BI[:, : self.num_request_dense], slots_BFD

    def candidates(self, terms: Terms, num_candidates_B: Tensor, dense_CI: Tensor, slots_CFD: Tensor) -> Tensor:
        """Phase two; see `Head.candidates`."""
        of_request_CI, of_request_CFD = (expand(term, num_candidates_B, dense_CI.shape[0]) for term in terms)
        inputs_CI = torch.cat([of_request_CI, dense_CI], dim=1)
        if self.reads_constant:
            inputs_CI = dense_CI.new_ones(dense_CI.shape[0], 1)
        vectors_CFD = torch.cat([of_request_CFD, slots_CFD], dim=1)
        logits_CT: Tensor = self.over_arch(self.inter_arch(self.dense_arch(inputs_CI), vectors_CFD))
        return logits_CT


class FoldedHead(Head):
    """What the heads have in common that work out a request's part once.

    Vectors stand in the model's order: the dense one, then the slots of request, candidate and history. The dense
    vector is a request's if candidates have no dense inputs, else a candidate's. Arguments are those of `Head`.
    """

    def __init__(self, model: AmortizedDLRM, num_request_dense: int) -> None:
        super().__init__(model, num_request_dense)
        self.dense = DenseHalves(model.dense_arch, 1 if self.reads_constant else self.num_request_dense)
        num_request_slots, *others = _num_slots(model)
        slots_of_request = list(range(1, 1 + num_request_slots))
        self.of_request = slots_of_request if self.dense.candidate is not None else [0, *slots_of_request]
        num_vectors = 1 + num_request_slots + sum(others)
        self.of_candidate = [vector for vector in range(num_vectors) if vector not in self.of_request]
        mlp, last = model.over_arch.model
        first, *layers = mlp._mlp
        self.activation = first._activation_fn
        self.others = nn.Sequential(*copy.deepcopy(layers), copy.deepcopy(last))
        columns = [first._linear.weight.detach()]
        if isinstance(model, AttachedDLRM):
            columns.append(model.over_arch.history_columns.weight.detach())
        self._set_interaction(model, torch.cat(columns, dim=1), first._linear.bias.detach())

    @abstractmethod
    def _set_interaction(self, model: AmortizedDLRM, weight_OX: Tensor, bias_O: Tensor) -> None:
        """Take the weights of the interaction and of the over arch's first layer."""

    def request(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        """Phase one; see `Head.request`."""
        inputs_BI = slots_BFD.new_ones(slots_BFD.shape[0], 1) if self.reads_constant else dense_BI
        dense_BW = self.dense.of_requests(inputs_BI[:, : self.dense.request.in_features])
        if self.dense.candidate is None:
            return dense_BW, *self._request(torch.cat([dense_BW.unsqueeze(1), slots_BFD], dim=1))
        return dense_BW, *self._request(slots_BFD)

    def candidates(self, terms: Terms, num_candidates_B: Tensor, dense_CI: Tensor, slots_CFD: Tensor) -> Tensor:
        """Phase two; see `Head.candidates`."""
        if self.dense.candidate is not None:
            dense_CD = self.dense.of_candidates(_to_candidates(terms[0], num_candidates_B, dense_CI.shape[0]), dense_CI)
            slots_CFD = torch.cat([dense_CD.unsqueeze(1), slots_CFD], dim=1)
        return self.others(self.activation(self._candidates(terms[1:], num_candidates_B, slots_CFD)))

    @abstractmethod
    def _request(self, vectors_BRD: Tensor) -> Terms:
        """The interaction's part of phase one."""

    @abstractmethod
    def _candidates(self, terms: Terms, num_candidates_B: Tensor, vectors_CUD: Tensor) -> Tensor:
        """What the over arch's first layer gives, before its activation: [C, O]."""


class DotHead(FoldedHead):
    """Head of a model whose interaction is the dot products of all pairs of vectors; arguments are those of `Head`."""

    def _set_interaction(self, model: AmortizedDLRM, weight_OX: Tensor, bias_O: Tensor) -> None:
        dim, num_vectors = self.embedding_dim, len(self.of_request) + len(self.of_candidate)
        num_new = model.history_arch.num_slots if isinstance(model, AttachedDLRM) and model.history_arch else 0
        of_dense_OD, of_pairs_OP = weight_OX.tensor_split([dim], dim=1)
        weight_OVV = weight_OX.new_zeros(len(weight_OX), num_vectors, num_vectors)
        for column, (one, other) in enumerate(_pairs(num_vectors - num_new, num_new)):
            weight_OVV[:, one, other] = of_pairs_OP[:, column]
        requests, candidates = self.of_request, self.of_candidate
        # A pair of a request's and a candidate's vector stands on either side of the diagonal.
        of_both_OUR = (weight_OVV + weight_OVV.transpose(1, 2))[:, candidates][:, :, requests]
        self.request_pairs = _linear(weight_OVV[:, requests][:, :, requests].flatten(1), bias_O)
        of_candidates_OX = [of_both_OUR.flatten(1), weight_OVV[:, candidates][:, :, candidates].flatten(1)]
        is_of_request = self.dense.candidate is None
        self.request_dense = _linear(of_dense_OD) if is_of_request else None
        self.candidate_features = _linear(torch.cat([*([] if is_of_request else [of_dense_OD]), *of_candidates_OX], 1))

    def _request(self, vectors_BRD: Tensor) -> Terms:
        first_BO = self.request_pairs((vectors_BRD @ vectors_BRD.transpose(1, 2)).flatten(1))
        if self.request_dense is not None:
            first_BO = first_BO + self.request_dense(vectors_BRD[:, 0])
        return first_BO, vectors_BRD

    def _candidates(self, terms: Terms, num_candidates_B: Tensor, vectors_CUD: Tensor) -> Tensor:
        first_BO, vectors_BRD = terms
        num_candidates, num_vectors, _ = vectors_CUD.shape
        features = [] if self.dense.candidate is None else [vectors_CUD[:, 0]]
        with_request = _multiply(vectors_CUD.flatten(0, 1), vectors_BRD.transpose(1, 2), num_candidates_B * num_vectors)
        features.append(with_request.reshape(num_candidates, -1))
        features.append((vectors_CUD @ vectors_CUD.transpose(1, 2)).flatten(1))
        first_CO = _to_candidates(first_BO, num_candidates_B, num_candidates)
        return self.candidate_features(torch.cat(features, dim=1)) + first_CO


class CrossHead(FoldedHead):
    """Head of a model whose interaction is a low-rank cross net; arguments are those of `Head`.

    With x_0 the coordinates of all vectors and v_l = V_l x_l, a cross layer is x_(l+1) = x_0 (W_l v_l + b_l) + x_l,
    so x_l = x_0 (1 + the sum over k < l of W_k v_k + b_k): linear in the small v_k. Hence what V_l and the over arch's
    first layer make of a request's coordinates is a matrix, for each request, times the candidate's v_k. (The cross
    net is that of Wang et al., arXiv 2008.13535, section 3.2, in TorchRec's low-rank form.)
    """

    request_down: nn.ModuleList
    request_up: nn.ModuleList
    request_first: nn.Linear
    candidate_down: nn.ModuleList
    candidate_up: nn.ModuleList
    candidate_first: nn.Linear

    def _set_interaction(self, model: AmortizedDLRM, weight_OX: Tensor, bias_O: Tensor) -> None:
        crossnet: Any = model.inter_arch.crossnet
        down, up = ([kernel.detach() for kernel in kernels] for kernels in (crossnet.V_kernels, crossnet.W_kernels))
        bias = [vector.detach() for vector in crossnet.bias]
        if isinstance(model, AttachedDLRM):
            down = [torch.cat([old, new.weight.detach()], 1) for old, new in _zip(down, crossnet.history_V_kernels)]
            bias = [torch.cat([old, new.bias.detach()]) for old, new in _zip(bias, crossnet.history_W_kernels)]
            up = [torch.cat([old, new.weight.detach()]) for old, new in _zip(up, crossnet.history_W_kernels)]
        places = torch.arange(weight_OX.shape[1]).unflatten(0, (-1, self.embedding_dim))
        self.first_bias = nn.Parameter(bias_O.clone(), requires_grad=False)
        for side, vectors in (("request", self.of_request), ("candidate", self.of_candidate)):
            mine = places[vectors].flatten().to(weight_OX.device)
            setattr(self, f"{side}_down", nn.ModuleList(_linear(kernel[:, mine]) for kernel in down))
            setattr(self, f"{side}_up", nn.ModuleList(_linear(up[k][mine], bias[k][mine]) for k in range(len(up))))
            setattr(self, f"{side}_first", _linear(weight_OX[:, mine]))

    def _request(self, vectors_BRD: Tensor) -> Terms:
        first_BX = vectors_BRD.flatten(1)
        # For each layer, then for the over arch: what it makes of x_0 (1 + b_0 + b_1 ...) and of x_0 W_k, each k.
        scale_BX = first_BX
        ups_KX: list[Tensor] = []
        terms: list[Tensor] = []
        for layer, down in enumerate([*self.request_down, self.request_first]):
            terms.append(down(scale_BX))
            if ups_KX:
                scaled_BKX = torch.cat(ups_KX) * first_BX.unsqueeze(1)
                terms.append(down(scaled_BKX))
            if layer < len(self.request_up):
                up = cast(nn.Linear, self.request_up[layer])
                scale_BX = scale_BX + first_BX * up.bias
                ups_KX.append(up.weight.t())
        return tuple(terms)

    def _candidates(self, terms: Terms, num_candidates_B: Tensor, vectors_CUD: Tensor) -> Tensor:
        first_CX = vectors_CUD.flatten(1)
        crossed_CX = first_CX
        low_ranks: list[Tensor] = []
        constant, *others = terms
        constants, matrices = [constant, *others[0::2]], others[1::2]
        for layer, (down, up) in enumerate(_zip(self.candidate_down, self.candidate_up)):
            low_rank_CK = down(crossed_CX) + _to_candidates(constants[layer], num_candidates_B, first_CX.shape[0])
            if low_ranks:
                past = torch.cat(low_ranks, dim=1)
                low_rank_CK = low_rank_CK + _multiply(past, matrices[layer - 1], num_candidates_B)
            low_ranks.append(low_rank_CK)
            crossed_CX = first_CX * up(low_rank_CK) + crossed_CX
        first_CO = self.candidate_first(crossed_CX) + self.first_bias
        first_CO = first_CO + _to_candidates(constants[-1], num_candidates_B, first_CX.shape[0])
        return first_CO + _multiply(torch.cat(low_ranks, dim=1), matrices[-1], num_candidates_B)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with a copy of these weights."""
    with warnings.catch_warnings():
        # A request without dense features has no columns.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _zip(one: Iterable[Any], other: Iterable[Any]) -> list[tuple[Any, Any]]:
    return list(zip(one, other, strict=True))


def _pairs(num_old: int, num_new: int) -> list[tuple[int, int]]:
    """Pairs of vectors in the order of their columns: TorchRec's, then those that `attach_history` appends."""
    old = [(one, other) for one in range(num_old) for other in range(one + 1, num_old)]
    return old + [(one, other) for other in range(num_old, num_old + num_new) for one in range(other)]


def _to_candidates(per_request: Tensor, num_candidates_B: Tensor, num_candidates: int) -> Tensor:
    """What belongs to a request, for each of its candidates; a single request's stands for all."""
    return per_request if per_request.shape[0] == 1 else expand(per_request, num_candidates_B, num_candidates)


def _multiply(rows: Tensor, matrices_B: Tensor, num_rows_B: Tensor) -> Tensor:
    """Each row times the matrix of its request."""
    if matrices_B.shape[0] == 1:
        return rows @ matrices_B[0]
    parts = rows.split(num_rows_B.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices_B, strict=True)])
