"""DotHead by native code, together with the encoder where that is native, too.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; W width of the dense arch's first
layer; R vectors of a request; F slots of a candidate; D embedding dimension; O width of the over arch's first layer; T
tasks.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_amort.modules.encoder import HistoryState
from torchrec_amort.ops import native
from torchrec_amort.ops.native import EmbeddingRows
from torchrec_amort.serving.heads import DotHead, Head, ModuleHead, Terms
from torchrec_amort.serving.lookup import Slots
from torchrec_amort.serving.native_encoder import NativeEncoder


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


_Layer = tuple[Tensor, Tensor | None]  # weight and bias


class NativeHead:
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
        self._encoder = encoder
        self._weights = native.Weights()
        self._dtype = dtype
        self._arrays: list[Any] = []
        self._dim, self._reads_constant = head.embedding_dim, head.reads_constant
        self._num_of_request, self._num_of_candidate = len(head.of_request), len(head.of_candidate)
        # The dense vector is a candidate's, or else a request's.
        of_candidate, first = head.dense.candidate, head.dense.request
        others: list[Any] = list(head.dense.others)
        rest = [(layer._linear.weight, layer._linear.bias) for layer in others]
        weight, num_fixed = head.candidate_features.weight, self._num_of_candidate * self._num_of_request
        num_fixed += 0 if of_candidate is None else head.embedding_dim
        of_pairs = _of_pairs(weight[:, num_fixed:], self._num_of_candidate)
        over: list[_Layer] = [(torch.cat([weight[:, :num_fixed], of_pairs], dim=1), None)]
        of_over: list[Any] = list(head.others)
        over += [(layer._linear.weight, layer._linear.bias) for layer in of_over[:-1]]
        over.append((of_over[-1].weight, of_over[-1].bias))
        dense: list[_Layer] = [] if of_candidate is None else [(of_candidate.weight, None), *rest]
        self._struct = self._head(self._num_of_request, self._num_of_candidate - (encoder is not None), dense, over)
        of_pairs = _of_pairs(head.request_pairs.weight, self._num_of_request)
        of_dense = [] if head.request_dense is None else [head.request_dense.weight]
        over = [(torch.cat([*of_dense, of_pairs], dim=1), head.request_pairs.bias)]
        dense = [] if head.request_dense is None else [(first.weight, first.bias), *rest]
        self._request_struct = self._head(0, self._num_of_request, dense, over)
        self._first = None if of_candidate is None else copy.deepcopy(first).float()
        self._num_request_dense = first.in_features

    def _head(self, num_others: int, num_vectors: int, dense: list[_Layer], over: list[_Layer]) -> native.HeadStruct:
        layers = [native.array(native.LinearStruct, [self._linear(*layer) for layer in side]) for side in (dense, over)]
        self._arrays += layers
        return native.HeadStruct(
            self._dim,
            num_others,
            num_vectors - len(dense[:1]),
            dense[0][0].shape[1] if dense else 0,
            len(dense),
            len(over),
            over[-1][0].shape[0],
            *map(ctypes.addressof, layers),
        )

    def _linear(self, weight: Tensor, bias: Tensor | None) -> tuple[int, int | None, int, int]:
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, inputs % 2, 0, outputs % 2))
        padded_bias = None if bias is None else self._weights.keep(F.pad(bias, (0, outputs % 2)))
        return self._weights.keep(padded, self._dtype), padded_bias, padded.shape[1], padded.shape[0]

    def request(self, dense_BI: Tensor, slots: Slots) -> Terms:
        """Phase one of all but the history; see `Head.request`.

        Args:
            dense_BI: the requests' dense inputs.
            slots: embeddings of each of their ids.

        Returns:
            tuple: tensors with one row of B per request.
        """
        num_requests = dense_BI.shape[0]
        inputs_BI = dense_BI.new_ones(num_requests, 1) if self._reads_constant else dense_BI
        inputs_BI = inputs_BI[:, : self._num_request_dense].float().contiguous()
        vectors_BRD = torch.empty(num_requests, self._num_of_request, self._dim)
        first_BO = self._score(
            None, self._request_struct, [num_requests], [], [(None, None, None)], None, inputs_BI, slots, vectors_BRD
        )
        # Candidates add theirs before the activation.
        dense_BW = inputs_BI if self._first is None else self._first(inputs_BI)
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
        dense_BW, first_BO, vectors_BRD = terms
        requests = list(zip(*map(_row_addresses, (dense_BW, vectors_BRD, first_BO)), strict=True))
        num_candidates = num_candidates_B.tolist()
        encoder, readable = None, []
        if self._encoder is not None:
            encoder, readable = self._encoder.struct, self._encoder.readable(states, len(num_candidates))
        histories = [history for state in readable for history in state.histories()]
        dense_CI = dense_CI.float().contiguous()
        return self._score(encoder, self._struct, num_candidates, histories, requests, items, dense_CI, slots)

    def _score(
        self,
        encoder: native.EncoderStruct | None,
        head: native.HeadStruct,
        num_candidates: Sequence[int],
        histories: Sequence[native.History],
        requests: Sequence[native.Request],
        items: EmbeddingRows | None,
        dense_CI: Tensor,
        slots: Slots,
        interacted: Tensor | None = None,
    ) -> Tensor:
        given = native.Candidates(items, dense_CI, slots)
        return native.score(encoder, head, given, num_candidates, histories, requests, self._dtype, interacted)


def _of_pairs(weight_OX: Tensor, num_vectors: int) -> Tensor:
    """Columns for pairs of two different vectors, of those for all pairs [O, V V]."""
    one, other = torch.triu_indices(num_vectors, num_vectors, 1)
    return weight_OX[:, one * num_vectors + other]


def _row_addresses(rows: Tensor) -> list[int]:
    """Where each row of a contiguous tensor starts."""
    first = native.address(rows, "what requests add")
    return [first + row * rows.stride(0) * rows.element_size() for row in range(rows.shape[0])]
