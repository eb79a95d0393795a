"""A model after its lookups, in two phases, by native code where it can and by PyTorch elsewhere.

Shape suffixes: B requests; C candidates, all requests together; I dense inputs; D embedding dimension; F slots;
S history vectors of a candidate; T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.inference.heads import Terms, build_head
from torchrec_amort.inference.native_encoder import NativeEncoder, why_not_native
from torchrec_amort.inference.native_head import NativeHead, why_not_native_head
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.modules.encoder import AmortizableEncoder, HistoryState
from torchrec_amort.modules.history import AmortizedHistoryArch

Backend = Literal["auto", "native", "eager", "compiled"]


class Phases:
    """All of a model but its lookups; with the weights of this moment, and without dropout.

    Args:
        model: whose encoder, if it has one, is amortizable.
        num_request_dense: dense inputs of a request.
        dtype: `torch.float32` or `torch.bfloat16`, of weights and states.
        backend: `native` code, PyTorch `eager` or `compiled`; `auto` is native code for what it can do, else eager.

    Raises:
        ValueError: the encoder is not amortizable, or native code is asked for and cannot.
    """

    def __init__(self, model: AmortizedDLRM, num_request_dense: int, dtype: torch.dtype, backend: Backend) -> None:
        self.dtype = dtype
        self._out = torch.promote_types(dtype, torch.float32)
        encoder, head = model.history_arch, build_head(model, num_request_dense)
        if encoder is not None and not isinstance(encoder, AmortizableEncoder):
            raise ValueError(
                f"the encoder is a {type(encoder).__name__}, which encodes a history for every candidate anew: "
                "score with the model itself"
            )
        reasons = {
            "encoder": None if encoder is None else why_not_native(encoder, dtype),
            "head": why_not_native_head(head, dtype),
        }
        self.not_native = [f"{part}: {reason}" for part, reason in reasons.items() if reason is not None]
        if backend == "native" and self.not_native:
            raise ValueError(f"no native {self.not_native[0]}; backend 'auto' leaves to PyTorch what it cannot do")
        may_be_native = backend in ("auto", "native")
        self.encoder: AmortizableEncoder | None = None
        if isinstance(encoder, AmortizedHistoryArch) and may_be_native and reasons["encoder"] is None:
            self.encoder = NativeEncoder(encoder, dtype)
        elif encoder is not None:
            self.encoder = copy.deepcopy(encoder).to(dtype)
        # Vectors that the encoder is not the last to work on are slots like any other.
        self._fused = None
        if isinstance(self.encoder, NativeEncoder) and isinstance(self.encoder.vectors, nn.Identity):
            self._fused = self.encoder
        self._native_head = None
        if may_be_native and reasons["head"] is None:
            self._native_head = NativeHead(head, self._fused, dtype)
        self.head = head.to(dtype)
        if backend == "compiled":
            _compile(self.head, "request", "candidates")
            _compile(self.encoder, "encode_history", "score_candidates", "extend_history")

    def encode(self, events: JaggedTensor) -> HistoryState:
        """Phase one of B histories, of event vectors [N, D]."""
        assert self.encoder is not None
        return self.encoder.encode_history(self._cast(events))

    def extend(self, state: HistoryState, events: JaggedTensor) -> HistoryState:
        """Phase one of the events since."""
        assert self.encoder is not None
        return self.encoder.extend_history(state, self._cast(events))

    def terms(self, dense_BI: Tensor, slots_BFD: Tensor) -> Terms:
        """Phase one of all else; see `Head.request`."""
        return self.head.request(dense_BI.to(self.dtype), slots_BFD.to(self.dtype))

    def score(
        self,
        states: Sequence[HistoryState],
        terms: Terms,
        items: JaggedTensor | None,
        num_candidates_B: Tensor,
        dense_CI: Tensor,
        slots_CFD: Tensor,
    ) -> Tensor:
        """Phase two.

        Args:
            states: of B requests together; none if the model reads no history.
            terms: of the requests.
            items: the candidates' items, values [C, D], one row of B per request; None without history.
            num_candidates_B: int64 [B]; a request may have none here.
            dense_CI: the candidates' dense inputs.
            slots_CFD: embeddings of their ids.

        Returns:
            Tensor: logits [C, T], float32 at least.
        """
        if self._native_head is not None and self._fused is not None:
            assert items is not None
            return self._native_head.candidates(terms, states, num_candidates_B, items.values(), dense_CI, slots_CFD)
        if self.encoder is not None:
            assert items is not None
            vectors_CX = self.encoder.score_states(states, self._cast(items))
            history_CSD = vectors_CX.unflatten(1, (self.encoder.num_slots, -1))
            slots_CFD = torch.cat([slots_CFD.to(history_CSD.dtype), history_CSD], dim=1)
        if self._native_head is not None:
            return self._native_head.candidates(terms, [], num_candidates_B, None, dense_CI, slots_CFD)
        dense_CI, slots_CFD = dense_CI.to(self.dtype), slots_CFD.to(self.dtype)
        return self.head.candidates(terms, num_candidates_B, dense_CI, slots_CFD).to(self._out)

    def _cast(self, rows: JaggedTensor) -> JaggedTensor:
        if isinstance(self.encoder, NativeEncoder) or rows.values().dtype == self.dtype:
            return rows
        return JaggedTensor(rows.values().to(self.dtype), lengths=rows.lengths())


def _compile(module: nn.Module | None, *methods: str) -> None:
    for method in methods if module is not None else ():
        setattr(module, method, torch.compile(getattr(module, method), dynamic=True))
