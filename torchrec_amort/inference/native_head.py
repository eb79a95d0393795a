"""DotHead by native code, together with the encoder where that is native, too.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; W width of the dense arch's first
layer; R vectors of a request; F slots of a candidate; D embedding dimension; O width of the over arch's first layer; T
tasks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_amort.inference import native
from torchrec_amort.inference.heads import DotHead, Head, Terms
from torchrec_amort.inference.lookup import EmbeddingRows, Slots
from torchrec_amort.inference.native_encoder import NativeEncoder
from torchrec_amort.modules.encoder import HistoryState


def why_not_native_head(head: Head, dtype: torch.dtype) -> str | None:
    """Why native code cannot serve a head here, or None if it can.

    Args:
        head: of a model.
        dtype: `torch.float32` or `torch.bfloat16`, of its weights.

    Example::

        head = build_head(model, num_request_dense=0)
        assert why_not_native_head(head, torch.float32) is None
    """
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
        num_vectors, of_dense = len(head.of_candidate), head.embedding_dim if head.dense.candidate is not None else 0
        num_of_both = num_vectors * len(head.of_request)
        pairs = torch.triu_indices(num_vectors, num_vectors, 1)
        weight = head.candidate_features.weight
        of_pairs = weight[:, of_dense + num_of_both :][:, pairs[0] * num_vectors + pairs[1]]
        over = [self._linear(torch.cat([weight[:, : of_dense + num_of_both], of_pairs], dim=1), None)]
        of_over: list[Any] = list(head.others)
        *hidden, last = of_over
        over += [self._linear(layer._linear.weight, layer._linear.bias) for layer in hidden]
        over.append(self._linear(last.weight, last.bias))
        dense = []
        if head.dense.candidate is not None:
            dense.append(self._linear(head.dense.candidate.weight, None))
            others: list[Any] = list(head.dense.others)
            dense += [self._linear(layer._linear.weight, layer._linear.bias) for layer in others]
        self._over, self._dense = (native.LinearStruct * len(over))(*over), (native.LinearStruct * len(dense))(*dense)
        self.num_tasks: int = last.out_features
        self._struct = native.HeadStruct(
            head.embedding_dim,
            len(head.of_request),
            num_vectors - len(dense[:1]) - (encoder is not None),
            head.num_candidate_dense,
            len(dense),
            len(over),
            self.num_tasks,
            ctypes.addressof(self._dense),
            ctypes.addressof(self._over),
        )

    def _linear(self, weight: Tensor, bias: Tensor | None) -> native.LinearStruct:
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, inputs % 2, 0, outputs % 2))
        padded_bias = None if bias is None else self._weights.keep(F.pad(bias, (0, outputs % 2)))
        return native.LinearStruct(
            self._weights.keep(padded, self._dtype), padded_bias, padded.shape[1], padded.shape[0]
        )

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
            terms: what `DotHead.request` gave.
            states: of B requests together; read if there is an encoder.
            num_candidates_B: int64 [B].
            items: embeddings of the candidates' items, if there is an encoder.
            dense_CI: the candidates' dense inputs.
            slots: embeddings of each of their ids, and, without an encoder, their history vectors.

        Returns:
            Tensor: logits [C, T], float32.
        """
        dense_BW, first_BO, vectors_BRD = (term.float().contiguous() for term in terms)
        requests = list(zip(*map(_row_addresses, (dense_BW, vectors_BRD, first_BO)), strict=True))
        dense = dense_CI.float().contiguous()
        of_slots = native.rows(slots)
        of_items = native.RowsStruct() if items is None else native.rows([items])[0]
        given = native.CandidatesStruct(of_items, dense.data_ptr(), ctypes.addressof(of_slots))
        logits_CT = torch.empty(len(dense), self.num_tasks)
        num_candidates = num_candidates_B.tolist()
        encoder, readable = None, []
        if self._encoder is not None:
            encoder, readable = self._encoder.struct, self._encoder.readable(states, len(num_candidates))
        histories = [history for state in readable for history in state.histories()]
        return native.score(encoder, self._struct, given, num_candidates, histories, requests, logits_CT, self._dtype)


def _row_addresses(rows: Tensor) -> list[int]:
    """Where each row of a contiguous tensor starts."""
    return [rows.data_ptr() + row * rows.stride(0) * rows.element_size() for row in range(rows.shape[0])]
