"""DotHead by native code, together with the encoder where that is native, too.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; W width of the dense arch's first
layer; R vectors of a request; F slots of a candidate; D embedding dimension; O width of the over arch's first layer; T
tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.ops import native
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.serving.heads import DotHead, Head, ModuleHead, Terms
from torchrec_amort.serving.lookup import Slots
from torchrec_amort.serving.native_encoder import NativeEncoder, of_each


def why_not_native_head(head: Head, dtype: torch.dtype) -> str | None:
    """Why native code cannot serve a head here, or None if it can.

    Args:
        head: of a model.
        dtype: `torch.float32` or `torch.bfloat16`, of its weights.

    Example::

        head = build_head(model, num_request_dense=0)
        assert why_not_native_head(head, torch.float32) is None
    """
    if isinstance(head, ModuleHead):
        return head.reason
    if not isinstance(head, DotHead):
        return f"it serves dot interactions, and this is a {type(head).__name__}"
    layers = [*head.dense.others, *list(head.others)[:-1]]
    activations = [head.dense.activation, head.activation, *(layer._activation_fn for layer in layers)]
    if any(activation is not torch.relu for activation in activations):
        return "it knows ReLU only"
    widths = [head.embedding_dim, head.dense.request.out_features, head.request_pairs.out_features]
    if odd := [width for width in (*widths, *(layer._linear.out_features for layer in layers)) if width % 2]:
        return f"a layer has {odd[0]} outputs, an odd number"
    return native.why_no_build(head.request_pairs.weight, dtype)


class NativeHead(nn.Module):
    """A DotHead as native code runs it, together with the encoder if that is native, too.

    Args:
        head: on a CPU; its weights are those of the moment that this is made.
        encoder: makes the last slot of each candidate from its item; None if all slots are given.
        dtype: of weights; sums and dot products are float32 in either case.

    Raises:
        ValueError: `why_not_native_head` tells why.

    Example::

        native = NativeHead(build_head(model, num_request_dense=0), NativeEncoder(model.history_arch))
    """

    def __init__(self, head: Head, encoder: NativeEncoder | None, dtype: torch.dtype = torch.float32) -> None:
        if reason := why_not_native_head(head, dtype):
            raise ValueError(f"no native head: {reason}")
        assert isinstance(head, DotHead)
        super().__init__()
        self.encoder = encoder
        self._dim, self._reads_constant = head.embedding_dim, head.reads_constant
        # The dense vector is a candidate's, or else a request's.
        of_candidate, first = head.dense.candidate, head.dense.request
        others, of_over = _linears(head.dense.others), _linears(head.others)
        num_of_request, num_of_candidate = len(head.of_request), len(head.of_candidate)
        weight, num_fixed = head.candidate_features.weight, num_of_candidate * num_of_request
        num_fixed += 0 if of_candidate is None else head.embedding_dim
        of_pairs = _of_pairs(weight[:, num_fixed:], num_of_candidate)
        of_pairs_and_dense = torch.cat([weight[:, :num_fixed], of_pairs], dim=1)
        self._num_tasks = of_over[-1].shape[0]
        dense = [] if of_candidate is None else [of_candidate.weight, *others]
        self._layers = _Layers(dense, [of_pairs_and_dense, *of_over], dtype)
        of_pairs = _of_pairs(head.request_pairs.weight, num_of_request)
        of_dense = [] if head.request_dense is None else [head.request_dense.weight]
        dense = [] if head.request_dense is None else [first.weight, *others]
        self._request_layers = _Layers(dense, [torch.cat([*of_dense, of_pairs], dim=1)], dtype)
        self._first = copy.deepcopy(first).float()
        over_bias = head.request_pairs.bias.detach()
        self.register_buffer("_over_bias", over_bias.to(torch.float32, copy=True))
        self._is_of_request = of_candidate is None
        self._num_request_dense = first.in_features

    def request(self, dense_BI: Tensor, slots: Slots) -> Terms:
        """Phase one of all but the history; see `Head.request`.

        Args:
            dense_BI: the requests' dense inputs.
            slots: embeddings of each of their ids.

        Returns:
            tuple: tensors with one row of B per request.
        """
        inputs_BI = dense_BI.new_ones(dense_BI.shape[0], 1) if self._reads_constant else dense_BI
        inputs_BI = inputs_BI[:, : self._num_request_dense].float().contiguous()
        first_BO, vectors_BRD = torch.ops.torchrec_amort.dot_request(
            *self._request_layers.arguments(),
            self._first.bias,
            self._over_bias,
            self._dim,
            *of_each([EmbeddingRows(inputs_BI), *slots]),
        )
        # Candidates add theirs before the activation.
        dense_BW = inputs_BI if self._is_of_request else self._first(inputs_BI)
        return dense_BW, first_BO, vectors_BRD

    def candidates(
        self,
        terms: Terms,
        states: Sequence[HistoryState],
        num_candidates_B: Tensor,
        items: EmbeddingRows | None,
        dense_CI: Tensor,
        slots: Slots,
    ) -> Tensor:
        """Phase two.

        Args:
            terms: what `request` gave.
            states: of B requests together; read if there is an encoder.
            num_candidates_B: int64 [B].
            items: embeddings of the candidates' items, if there is an encoder.
            dense_CI: the candidates' dense inputs.
            slots: embeddings of each of their ids, and, without an encoder, their history vectors.

        Returns:
            Tensor: logits [C, T], float32.
        """
        rows = [EmbeddingRows(dense_CI.float().contiguous()), *slots]
        of_head = *self._layers.arguments(), self._num_tasks, *terms
        logits_CT: Tensor
        if self.encoder is None:
            logits_CT = torch.ops.torchrec_amort.dot_candidates(*of_head, *of_each(rows), num_candidates_B)
            return logits_CT
        assert items is not None
        encoder = self.encoder
        of_encoder = encoder.weights(), encoder.num_heads, encoder.epsilon, *encoder.of_states(states)
        logits_CT = torch.ops.torchrec_amort.dot_history_candidates(
            *of_head, *of_each([*rows, items]), num_candidates_B, *of_encoder
        )
        return logits_CT


class _Layers(nn.Module):
    """Layers as operators read them.

    Args:
        dense: of the dense ones, a weight, and then weight and bias of each that follows.
        over: of those after the interaction, the same.
        dtype: of the weights. Numbers of inputs and outputs become even, by zeros.
    """

    def __init__(self, dense: Sequence[Tensor], over: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._num_dense = (len(dense) + 1) // 2
        for place, tensor in enumerate([*dense, *over]):
            padding = [end for size in reversed(tensor.shape) for end in (0, size % 2)]
            padded = F.pad(tensor.detach(), padding).to(dtype if tensor.dim() == 2 else torch.float32)
            self.register_buffer(str(place), padded.contiguous())

    def arguments(self) -> tuple[list[Tensor], int]:
        """All of them, and the number of dense layers."""
        return list(self._buffers.values()), self._num_dense  # type: ignore[arg-type]


def _linears(layers: nn.Module) -> list[Tensor]:
    """Weight and bias of each linear layer, in turn."""
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


def _of_pairs(weight_OX: Tensor, num_vectors: int) -> Tensor:
    """Columns for pairs of two different vectors, of those for all pairs [O, V V]."""
    one, other = torch.triu_indices(num_vectors, num_vectors, 1)
    return weight_OX[:, one * num_vectors + other]
