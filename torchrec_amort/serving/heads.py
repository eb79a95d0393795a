"""A DLRM after its lookups, by native code: what a request adds is worked out once, and then its candidates.

A request's dense inputs, what its vectors make of each other, and their columns of the first layers are the same for
all candidates. It is the function of the model's own modules, in another order, of which `dlrm_of` makes sure; where
it is not known to be, or not cheaper, these modules run.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; D embedding dimension; V vectors, the
dense one and the slots, R of them of a request and U of a candidate; X coordinates of those; O width of the over
arch's first layer; K rank of a cross layer; T tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.models.dlrm import (
    DLRM,
    DLRM_DCN,
    DenseArch,
    InteractionArch,
    InteractionDCNArch,
    OverArch,
    SparseArch,
)
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP, Perceptron

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import InputError
from torchrec_amort.models.attach import (
    AttachedCrossNet,
    AttachedInteractionArch,
    AttachedInteractionDCNArch,
    AttachedLinear,
    ZeroLinear,
    call_with_constant,
    call_with_dense_of_candidates,
)
from torchrec_amort.models.collection import AmortizedEmbeddingBagCollection
from torchrec_amort.models.dlrm import AmortizedDLRM, refuse_other_dense
from torchrec_amort.models.ranker import Call, CollectionRanker, ModelRanker, call_model
from torchrec_amort.modules.dlrm_parts import activations, linears, set_first_linear, sizes
from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.modules.plain import Plain, why_other_methods, why_unlike
from torchrec_amort.ops import native
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.serving.lookup import Embeddings, bags_of
from torchrec_amort.serving.native_encoder import NativeEncoder, of_each

_PARTS = Plain(
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
    AttachedLinear,
    ZeroLinear,
)
# Kernels read all weights for each tile of rows, PyTorch's products once for many: MLPerf's DCN, of 14 million, takes
# native code 12% longer for 2,048 candidates, although it has 16% less to compute.
_MOST_CROSS_WEIGHTS = 4_000_000
_MODELS = Plain(DLRM, DLRM_DCN, SparseArch, ModelRanker)
_READS: dict[Call, str] = {
    call_model: "both",
    call_with_dense_of_candidates: "candidate",
    call_with_constant: "constant",
}


@dataclass(frozen=True, eq=False)
class Dlrm:
    """A DLRM of any class, whose parts compute what TorchRec's do.

    Args:
        parts: has `dense_arch`, `inter_arch` and `over_arch`.
        dim: D.
        bags: of the interaction's slots, in order.
        of_request: those of the request, in the order of their lookup.
        reads: dense inputs: of request and candidate (`both`), of the `candidate` alone, or a `constant`.
    """

    parts: Any
    dim: int
    bags: Sequence[str]
    of_request: Sequence[str]
    reads: str

    @property
    def num_dense(self) -> int:
        """I, dense inputs of the dense arch."""
        return sizes(self.parts.dense_arch)[0]

    @property
    def is_crossed(self) -> bool:
        """Whether the interaction is a cross net."""
        return isinstance(self.parts.inter_arch, InteractionDCNArch | AttachedInteractionDCNArch)

    def refuse_other_dense(self, batch: RequestBatch) -> None:
        """Refuse a batch with more or fewer dense inputs than the model reads.

        Raises:
            InputError: it has others.
        """
        if self.reads != "candidate":
            refuse_other_dense(batch, self.num_dense if self.reads == "both" else 0)
        elif (have := batch.candidate_dense.shape[1]) != self.num_dense:
            raise InputError(
                f"batch: candidate_dense has {have} columns, but the model reads {self.num_dense}, all of the candidate"
            )

    def head(self, num_request_dense: int, encoder: NativeEncoder | None, dtype: torch.dtype) -> Head:
        """The head with the weights of this moment.

        Args:
            num_request_dense: dense inputs of a request.
            encoder: makes the last bag of each candidate; None if all are given.
            dtype: `torch.float32` or `torch.bfloat16`, of its weights; sums are float32 in either case.
        """
        num_of_request = {"both": num_request_dense, "candidate": 0, "constant": 1}[self.reads]
        return (CrossHead if self.is_crossed else DotHead)(self, num_of_request, encoder, dtype)


def dlrm_of(ranker: CollectionRanker, collection: AmortizedEmbeddingBagCollection) -> Dlrm | str:
    """A ranker as a DLRM that native code can serve, or why it is none.

    Args:
        ranker: any.
        collection: the one of the ranker.
    """
    parts: Any = ranker
    reads = "both"
    if isinstance(ranker, AmortizedDLRM):
        if reason := why_other_methods(type(ranker), AmortizedDLRM):
            return reason
        reads = "both" if ranker.dense_in_features else "constant"
    elif isinstance(ranker, ModelRanker):
        parts = ranker.model
        if reason := _why_other_model(ranker, collection):
            return reason
        reads = _READS[ranker.call]
    else:
        return f"it serves DLRMs, and this is a {type(ranker).__name__}"
    bags = list(collection.bags.widths)
    dim = next(iter(collection.bags.widths.values()))
    dlrm = Dlrm(parts, dim, bags, bags_of(collection, "request"), reads)
    return _why_other_parts(dlrm) or dlrm


def _why_other_model(ranker: ModelRanker, collection: AmortizedEmbeddingBagCollection) -> str | None:
    """Why a model may be called or compute otherwise than DLRM's forward says, its parts aside; or None."""
    model: Any = ranker.model
    if type(model) not in (DLRM, DLRM_DCN):
        return f"it serves DLRMs, and this is a {type(model).__name__}"
    if ranker.call not in _READS:
        return "what it is called with is not known"
    reason = why_other_methods(type(ranker), ModelRanker) or _MODELS.why_replaced(ModelRanker)
    reason = reason or _MODELS.why_not(model, "model") or _MODELS.why_not(model.sparse_arch, "sparse_arch")
    if reason is None and list(model.sparse_arch.sparse_feature_names) != list(collection.bags.widths):
        return f"its slots are {model.sparse_arch.sparse_feature_names}, not its bags"
    return reason


def _why_other_parts(dlrm: Dlrm) -> str | None:
    """Why dense, interaction and over arch may compute something else than such modules of their sizes do, or None."""
    parts = {name: getattr(dlrm.parts, name) for name in ("dense_arch", "inter_arch", "over_arch")}
    reasons = [_PARTS.why_not_any(part, name) for name, part in parts.items()]
    if not any(reasons):
        reasons = [why_unlike(parts[name], like, name) for name, like in _as_built(dlrm).items()]
    return next(filter(None, reasons), None)


def _as_built(dlrm: Dlrm) -> dict[str, nn.Module]:
    """Dense, interaction and over arch as their constructors make them for these sizes."""
    num_slots, over_arch = len(dlrm.bags), dlrm.parts.over_arch
    first = linears(over_arch)[0]
    num_new = _num_new_slots(dlrm)
    with torch.device("cpu"):
        inter: nn.Module = InteractionArch(num_slots - num_new)
    with torch.device("meta"):
        dense = DenseArch(*sizes(dlrm.parts.dense_arch))
        over = OverArch(*sizes(over_arch))
        if dlrm.is_crossed:
            down, _, _ = _cross_layers(dlrm.parts.inter_arch.crossnet)
            crossnet = LowRankCrossNet((1 + num_slots - num_new) * dlrm.dim, len(down), down[0].shape[0])
            inter = InteractionDCNArch(num_slots - num_new, crossnet)
        if isinstance(first, AttachedLinear):
            set_first_linear(over, AttachedLinear(linears(over)[0], first.history_columns.in_features))
            if isinstance(inter, InteractionDCNArch):
                attached = AttachedCrossNet(inter.crossnet, num_new * dlrm.dim, torch.empty(0))
                inter = AttachedInteractionDCNArch(num_slots - num_new, attached)
            else:
                inter = AttachedInteractionArch(inter, num_new)
    return {"dense_arch": dense, "inter_arch": inter, "over_arch": over}


def _num_new_slots(dlrm: Dlrm) -> int:
    """Slots that `attach_history` appended."""
    inter_arch = dlrm.parts.inter_arch
    if isinstance(inter_arch, AttachedInteractionDCNArch):
        return len(dlrm.bags) - inter_arch.num_slots
    return inter_arch.num_new_slots if isinstance(inter_arch, AttachedInteractionArch) else 0


def why_no_kernel(dlrm: Dlrm, dtype: torch.dtype) -> str | None:
    """Why native code cannot serve such a DLRM here, or None if it can.

    Args:
        dlrm: of any size.
        dtype: of the head's weights.
    """
    dense, over = dlrm.parts.dense_arch, dlrm.parts.over_arch
    if any(activation is not torch.relu for activation in (*activations(dense), *activations(over))):
        return "it knows ReLU only"
    if dlrm.is_crossed and (num_weights := _num_cross_weights(dlrm)) > _MOST_CROSS_WEIGHTS:
        return f"its cross net has {num_weights} weights, more than a core's cache keeps: PyTorch reads them less often"
    if dlrm.dim % 2:
        return f"embeddings are of dimension {dlrm.dim}, an odd number"
    return native.why_no_build(linears(over)[0].weight, dtype)


def _num_cross_weights(dlrm: Dlrm) -> int:
    """Weights that each candidate's coordinates are multiplied with."""
    down, up, _ = _cross_layers(dlrm.parts.inter_arch.crossnet)
    return sum(weight.numel() for weight in (*down, *up, linears(dlrm.parts.over_arch)[0].weight))


class Head(nn.Module, ABC):
    """A DLRM after its lookups, in two phases; for inference only.

    Vectors stand in the order of kernels: the dense one, if it is a candidate's, then slots, the encoder's last. The
    dense vector is a request's if candidates have no dense inputs.

    Args:
        dlrm: gives the weights, of this moment.
        num_request_dense: the first of its dense inputs, those of a request.
        encoder: makes the last bag of each candidate from its item; None if all are given.
        dtype: of weights; sums and dot products are float32 in either case.
    """

    def __init__(self, dlrm: Dlrm, num_request_dense: int, encoder: NativeEncoder | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self._first_weight: Tensor
        self._first_bias: Tensor
        self._over_bias: Tensor
        self._dim, self._reads_constant = dlrm.dim, dlrm.reads == "constant"
        self._num_request_dense = num_request_dense
        first, *dense = linears(dlrm.parts.dense_arch)
        of_request, of_candidate = first.weight.detach().float().tensor_split([num_request_dense], dim=1)
        self._is_of_request = of_candidate.shape[1] == 0
        self.register_buffer("_first_weight", _even(of_request, 0))
        self.register_buffer("_first_bias", _even(first.bias.detach().float(), 0))
        dense_layers = [tensor for layer in dense for tensor in (layer.weight, layer.bias)]
        fused = dlrm.bags[-1:] if encoder is not None else []
        self._request_bags = list(dlrm.of_request)
        self._candidate_bags = [bag for bag in dlrm.bags if bag not in (*dlrm.of_request, *fused)]
        place = {bag: 1 + slot for slot, bag in enumerate(dlrm.bags)}
        requests = [place[bag] for bag in self._request_bags]
        candidates = [place[bag] for bag in (*self._candidate_bags, *fused)]
        (requests if self._is_of_request else candidates).insert(0, 0)
        columns, *over = linears(dlrm.parts.over_arch)
        over_layers = [tensor for layer in over for tensor in (layer.weight, layer.bias)]
        self._num_tasks: int = over_layers[-1].shape[0]
        weight_OX = columns.weight.detach()
        if isinstance(columns, AttachedLinear):
            weight_OX = torch.cat([weight_OX, columns.history_columns.weight.detach()], dim=1)
        self.register_buffer("_over_bias", _even(columns.bias.detach().float(), 0))
        self._dtype = dtype
        dense_of_request, dense_of_candidate = [of_request, *dense_layers], [of_candidate, *dense_layers]
        sides = (dense_of_request, []) if self._is_of_request else ([], dense_of_candidate)
        interaction = self._set_interaction(dlrm, weight_OX, requests, candidates, sides[0])
        self._layers = _Layers(sides[1], [*interaction, *over_layers], dtype)

    @abstractmethod
    def _set_interaction(
        self, dlrm: Dlrm, weight_OX: Tensor, requests: list[int], candidates: list[int], dense: list[Tensor]
    ) -> list[Tensor]:
        """Take what phase one needs of the interaction and the over arch's first layer.

        Args:
            dlrm: the model.
            weight_OX: of the over arch's first layer.
            requests: places of the vectors that are a request's.
            candidates: places of those that are a candidate's.
            dense: the dense layers, if the dense vector is a request's.

        Returns:
            list: what phase two needs of them.
        """

    @abstractmethod
    def is_cheaper(self, num_requests: int, num_candidates: int) -> bool:
        """Whether there is less to compute than by the model's own modules."""

    @abstractmethod
    def request(self, dense_BI: Tensor, bags: Embeddings) -> tuple[Tensor, ...]:
        """Phase one, once per request.

        Args:
            dense_BI: the requests' dense inputs.
            bags: of the requests.

        Returns:
            tuple: tensors with one row of B per request: all that its candidates need of it but its history.
        """

    @abstractmethod
    def _candidates(self, terms: tuple[Tensor, ...], *given: Any) -> Tensor:
        """Logits [C, T] of rows, counts and, with an encoder, what operators read of it."""

    def candidates(
        self,
        terms: tuple[Tensor, ...],
        num_candidates_B: Tensor,
        dense_CI: Tensor,
        bags: Embeddings,
        states: Sequence[HistoryState],
        items: EmbeddingRows | None,
    ) -> Tensor:
        """Phase two.

        Args:
            terms: what `request` gave.
            num_candidates_B: int64 [B].
            dense_CI: the candidates' dense inputs.
            bags: of the candidates, but the encoder's.
            states: of B requests together; read if there is an encoder.
            items: embeddings of the candidates' items, if there is an encoder.

        Returns:
            Tensor: logits [C, T], float32.
        """
        rows = [EmbeddingRows(dense_CI.float().contiguous()), *(bags[bag] for bag in self._candidate_bags)]
        if self.encoder is None:
            return self._candidates(terms, *of_each(rows), num_candidates_B)
        assert items is not None
        encoder = self.encoder
        of_encoder = encoder.weights(), encoder.num_heads, encoder.epsilon, *encoder.of_states(states)
        return self._candidates(terms, *of_each([*rows, items]), num_candidates_B, *of_encoder)

    def _inputs(self, dense_BI: Tensor) -> Tensor:
        """Dense inputs of requests, as the first layer reads them."""
        inputs_BI = dense_BI.new_ones(dense_BI.shape[0], 1) if self._reads_constant else dense_BI
        return inputs_BI[:, : self._num_request_dense].float().contiguous()

    def _first(self, inputs_BI: Tensor) -> Tensor:
        """What requests add to the first dense layer; candidates add theirs before the activation."""
        return F.linear(inputs_BI, self._first_weight, self._first_bias)


class DotHead(Head):
    """Head of a DLRM that interacts all pairs of vectors by dot products; arguments are those of `Head`."""

    def _set_interaction(
        self, dlrm: Dlrm, weight_OX: Tensor, requests: list[int], candidates: list[int], dense: list[Tensor]
    ) -> list[Tensor]:
        of_dense_OD, of_pairs_OP = weight_OX.tensor_split([self._dim], dim=1)
        num_vectors, num_new = 1 + len(dlrm.bags), _num_new_slots(dlrm)
        weight_OVV = weight_OX.new_zeros(len(weight_OX), num_vectors, num_vectors)
        for column, (one, other) in enumerate(_pairs(num_vectors - num_new, num_new)):
            weight_OVV[:, one, other] = weight_OVV[:, other, one] = of_pairs_OP[:, column]
        of_both_OUR = weight_OVV[:, candidates][:, :, requests]
        of_request = [_of_pairs(weight_OVV, requests)]
        of_candidate = [of_both_OUR.flatten(1), _of_pairs(weight_OVV, candidates)]
        (of_request if self._is_of_request else of_candidate).insert(0, of_dense_OD)
        self._request_layers = _Layers(dense, [torch.cat(of_request, dim=1)], self._dtype)
        return [torch.cat(of_candidate, dim=1)]

    def is_cheaper(self, num_requests: int, num_candidates: int) -> bool:
        """Whether there is less to compute than by the model's own modules: always."""
        return True

    def request(self, dense_BI: Tensor, bags: Embeddings) -> tuple[Tensor, ...]:
        """Phase one; see `Head.request`."""
        inputs_BI = self._inputs(dense_BI)
        first_BO, vectors_BRD = torch.ops.torchrec_amort.dot_request(
            *self._request_layers.arguments(),
            self._first_bias,
            self._over_bias,
            self._dim,
            *of_each([EmbeddingRows(inputs_BI), *(bags[bag] for bag in self._request_bags)]),
        )
        return inputs_BI if self._is_of_request else self._first(inputs_BI), first_BO, vectors_BRD

    def _candidates(self, terms: tuple[Tensor, ...], *given: Any) -> Tensor:
        operators = torch.ops.torchrec_amort
        run = operators.dot_candidates if self.encoder is None else operators.dot_history_candidates
        logits_CT: Tensor = run(*self._layers.arguments(), self._num_tasks, *terms, *given)
        return logits_CT


class CrossHead(Head):
    """Head of a DLRM whose interaction is a low-rank cross net; arguments are those of `Head`.

    With x_0 the coordinates of all vectors and v_l = V_l x_l, a cross layer is x_(l+1) = x_0 (W_l v_l + b_l) + x_l,
    so x_l = x_0 (1 + the sum over k < l of W_k v_k + b_k): linear in the small v_k. Hence what V_l and the over arch's
    first layer make of a request's coordinates is a matrix, for each request, times the candidate's v_k. (The cross
    net is that of Wang et al., arXiv 2008.13535, section 3.2, in TorchRec's low-rank form.)
    """

    def _set_interaction(
        self, dlrm: Dlrm, weight_OX: Tensor, requests: list[int], candidates: list[int], dense: list[Tensor]
    ) -> list[Tensor]:
        down, up, bias = _cross_layers(dlrm.parts.inter_arch.crossnet)
        down, up = [_even(weight, 0) for weight in down], [_even(weight, 1) for weight in up]
        places = torch.arange(weight_OX.shape[1]).unflatten(0, (-1, self._dim))
        mine, theirs = places[requests].flatten(), places[candidates].flatten()
        self._num_layers, self._rank = len(down), down[0].shape[0]
        # Of requests, for each layer and the over arch: what it does to x, and what x_0 is multiplied by there.
        self._down = nn.ParameterList(_frozen(weight[:, mine]) for weight in (*down, _even(weight_OX, 0)))
        scales = [
            sum((vector[mine] for vector in bias[:layer]), torch.ones(len(mine))) for layer in range(len(down) + 1)
        ]
        self._factors = nn.ParameterList(
            _frozen(torch.cat([scale.unsqueeze(1), *(weight[mine] for weight in up[:layer])], dim=1))
            for layer, scale in enumerate(scales)
        )
        self._dense = nn.ParameterList(_frozen(tensor) for tensor in dense[1:])
        layers = zip(down, up, bias, strict=True)
        of_candidate = [tensor for V, W, b in layers for tensor in (V[:, theirs], W[theirs], b[theirs])]
        return [*of_candidate, weight_OX[:, theirs]]

    def is_cheaper(self, num_requests: int, num_candidates: int) -> bool:
        """Whether folding requests in costs less than it saves: multiplications of both are counted."""
        num_outputs, width = self._down[-1].shape
        rank, layers = self._rank, self._num_layers
        between, to_over = rank * rank * layers * (layers - 1) // 2, rank * layers * num_outputs
        saved = (2 * rank * layers + num_outputs) * width - between - to_over
        return num_requests * width * (between + to_over) < num_candidates * saved

    def request(self, dense_BI: Tensor, bags: Embeddings) -> tuple[Tensor, ...]:
        """Phase one; see `Head.request`."""
        inputs_BI = self._inputs(dense_BI)
        dense_BW = self._first(inputs_BI)
        vectors = [bags[bag].tensor() for bag in self._request_bags]
        if self._is_of_request:
            dense_BD = torch.relu(dense_BW)
            for weight, bias in zip(self._dense[0::2], self._dense[1::2], strict=True):
                dense_BD = torch.relu(F.linear(dense_BD, weight, bias))
            vectors.insert(0, dense_BD)
        first_BX = torch.cat(vectors, dim=1) if vectors else dense_BI.new_empty(dense_BI.shape[0], 0)
        terms = [dense_BW]
        for layer, (down_OX, factors_XK) in enumerate(zip(self._down, self._factors, strict=True)):
            # What it makes of x_0 (1 + b_0 + b_1 ...), and then of x_0 W_k, each k.
            folded_BOK = torch.ops.torchrec_amort.fold(down_OX, first_BX, factors_XK)
            constant_BO, *matrix_BOK = folded_BOK.tensor_split([1], dim=2) if layer else [folded_BOK]
            bias_O = self._over_bias if layer == self._num_layers else 0.0
            terms += [constant_BO.squeeze(2) + bias_O, *(matrix.contiguous() for matrix in matrix_BOK)]
        return tuple(terms)

    def _candidates(self, terms: tuple[Tensor, ...], *given: Any) -> Tensor:
        operators = torch.ops.torchrec_amort
        run = operators.cross_candidates if self.encoder is None else operators.cross_history_candidates
        logits_CT: Tensor = run(*self._layers.arguments(), self._num_layers, self._num_tasks, list(terms), *given)
        return logits_CT


class _Layers(nn.Module):
    """Layers as operators read them.

    Args:
        dense: of the dense ones, a weight, and then weight and bias of each that follows.
        others: of the interaction and after it, matrices and vectors.
        dtype: of the matrices. Numbers of inputs and outputs become even, by zeros.
    """

    def __init__(self, dense: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._num_dense = (len(dense) + 1) // 2
        for place, tensor in enumerate([*dense, *others]):
            padded = _even(tensor.detach(), *range(tensor.dim()))
            self.register_buffer(str(place), padded.to(dtype if tensor.dim() == 2 else torch.float32))

    def arguments(self) -> tuple[list[Tensor], int]:
        """All of them, and the number of dense layers."""
        return list(self._buffers.values()), self._num_dense  # type: ignore[arg-type]


def _cross_layers(crossnet: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """V [K, X], W [X, K] and b [X] of each layer."""
    of_layers = crossnet.V_kernels, crossnet.W_kernels, crossnet.bias
    down, up, bias = ([tensor.detach() for tensor in tensors] for tensors in of_layers)
    if isinstance(crossnet, AttachedCrossNet):
        new: Any = crossnet
        new_down = [layer.weight.detach() for layer in new.history_V_kernels]
        new_up = list(new.history_W_kernels)
        down = [torch.cat(pair, dim=1) for pair in zip(down, new_down, strict=True)]
        bias = [torch.cat([old, layer.bias.detach()]) for old, layer in zip(bias, new_up, strict=True)]
        up = [torch.cat([old, layer.weight.detach()]) for old, layer in zip(up, new_up, strict=True)]
    return down, up, bias


def _even(tensor: Tensor, *dims: int) -> Tensor:
    """A copy whose sizes of these dimensions are even, by zeros."""
    return F.pad(
        tensor, [end for dim in reversed(range(tensor.dim())) for end in (0, tensor.shape[dim] % 2 * (dim in dims))]
    ).clone()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float().contiguous().clone(), requires_grad=False)


def _pairs(num_old: int, num_new: int) -> list[tuple[int, int]]:
    """Pairs of vectors in the order of their columns: TorchRec's, then those that `attach_history` appends."""
    old = [(one, other) for one in range(num_old) for other in range(one + 1, num_old)]
    return old + [(one, other) for other in range(num_old, num_old + num_new) for one in range(other)]


def _of_pairs(weight_OVV: Tensor, vectors: list[int]) -> Tensor:
    """Columns for pairs of two different ones of some vectors."""
    one, other = torch.triu_indices(len(vectors), len(vectors), 1)
    return weight_OVV[:, vectors][:, :, vectors][:, one, other]
