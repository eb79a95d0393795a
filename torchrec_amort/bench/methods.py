"""The ways to score a request that the benchmark compares, all with the same weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.errors import one_line
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.modules.encoder import AmortizableEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import Concatenation
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.cache import HistoryCache
from torchrec_amort.serving.export import export_package
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native
from torchrec_amort.serving.package import load_package
from torchrec_amort.serving.scorer import AmortizedScorer

Method = Literal[
    "impressions",
    "concatenation",
    "model",
    "amortized",
    "amortized_bf16",
    "microbatched",
    "cached",
    "compiled",
    "exported",
    "encoder",
    "encoder_torch",
    "encoder_bf16",
    "encoder_cached",
    "encoder_causal",
    "encoder_extended",
]
METHODS: tuple[Method, ...] = get_args(Method)
SLOW: tuple[Method, ...] = ("impressions", "concatenation")
NEW_EVENTS = 8

Call = Callable[[], Any]
# A method as a call, or why there is none.
CallOrReason = Call | str


def amortized_arch(model: Ranker) -> AmortizedHistoryArch | None:
    """The encoder that the methods of an encoder alone are of; None if the model has no such, or several."""
    arch = model.history_arch if isinstance(model, AmortizedDLRM) else None
    return arch if isinstance(arch, AmortizedHistoryArch) else None


class Methods:
    """Everything that scores with the weights of one model.

    Args:
        model: in eval mode, on a CPU or a GPU.
        schema: of its requests.
        microbatch_size: candidates that `microbatched` scores at a time.
    """

    def __init__(self, model: Ranker, schema: RequestSchema, microbatch_size: int) -> None:
        self.model = model
        self.schema = schema
        self._microbatch_size = microbatch_size
        self._scorers: dict[str, AmortizedScorer | str] = {}
        self._encoders: dict[str, AmortizableEncoder] = {}

    def calls(self, batch: RequestBatch, methods: Sequence[Method]) -> tuple[dict[str, Call], dict[str, str]]:
        """Each method as a call without arguments that scores a batch.

        Args:
            batch: B requests of one number of events and candidates each.
            methods: which ones.

        Returns:
            tuple: calls by method, those of whole models return logits [C, T]; and of each method that is left out,
            since this model or processor does not have it, why.
        """
        of_encoder = self._encoder_calls(batch) if any(method.startswith("encoder") for method in methods) else {}
        found: dict[str, CallOrReason] = {
            method: of_encoder[method] if method in of_encoder else self._call(batch, method) for method in methods
        }
        calls = {method: call for method, call in found.items() if not isinstance(call, str)}
        return calls, {method: reason for method, reason in found.items() if isinstance(reason, str)}

    def _call(self, batch: RequestBatch, method: Method) -> CallOrReason:
        if method == "impressions":
            return partial(self.model, batch.to_impressions())
        if method == "model":
            return partial(self.model, batch)
        if method == "concatenation":
            rival = self._concatenation
            return rival if isinstance(rival, str) else partial(rival, batch)
        if method not in self._scorers:
            self._scorers[method] = self._new_scorer(method)
        scorer = self._scorers[method]
        return scorer if isinstance(scorer, str) else partial(scorer.score, batch)

    def _new_scorer(self, method: Method) -> AmortizedScorer | str:
        options: dict[str, dict[str, Any]] = {
            "amortized_bf16": {"dtype": torch.bfloat16},
            "microbatched": {"microbatch_size": self._microbatch_size},
            "cached": {"cache": HistoryCache(2**32)},
            "compiled": {"backend": "compiled"},
        }
        try:
            if method != "exported":
                return AmortizedScorer(self.model, **options.get(method, {}))
            with tempfile.TemporaryDirectory() as folder:
                export_package(self.model, Path(folder) / "package", self.schema, tables="float32")
                return AmortizedScorer(load_package(Path(folder) / "package"))
        except ValueError as error:
            return one_line(error)

    @cached_property
    def _concatenation(self) -> AmortizedDLRM | str:
        """The model with a candidate beside every event; of other weights, since it has other layers."""
        arch = amortized_arch(self.model)
        if not isinstance(self.model, AmortizedDLRM) or arch is None or arch.num_slots != 1:
            return "it puts another encoder into an AmortizedDLRM with an AmortizedHistoryArch of one vector"
        model = copy.copy(self.model)
        width = arch.layers[0].feedforward[0].out_features
        assert isinstance(width, int)
        device = arch.output_norm.weight.device
        rival = Concatenation(arch.embedding_dim, len(arch.layers), arch.layers[0].num_heads, width, device=device)
        model._modules = dict(self.model._modules) | {"history_arch": rival.eval()}
        return model

    def _encoder_calls(self, batch: RequestBatch) -> dict[str, CallOrReason]:
        """The encoder alone, from the vectors of events and candidates."""
        arch = amortized_arch(self.model)
        if not isinstance(self.model, AmortizedDLRM) or arch is None:
            reason = "it is of the AmortizedHistoryArch of an AmortizedDLRM alone"
            return {method: reason for method in METHODS if method.startswith("encoder")}
        assert self.model.history_embedding_collection is not None
        assert self.model.event_encoder is not None
        embeddings = self.model.history_embedding_collection(batch.sequences)
        history, candidates = self.model.event_encoder(embeddings), embeddings["candidate_item"]
        encoder, causal = self._encoder("full"), self._encoder("causal")
        is_long = len(batch) == 1 and history.values().shape[0] > NEW_EVENTS
        return {
            "encoder_torch": partial(arch, history, candidates),
            "encoder": partial(encoder, history, candidates),
            "encoder_cached": partial(encoder.score_candidates, encoder.encode_history(history), candidates),
            "encoder_bf16": why_not_native(arch, torch.bfloat16) or partial(self._encoder("bf16"), history, candidates),
            "encoder_causal": partial(causal.encode_history, history),
            "encoder_extended": _Growing(causal, history)
            if is_long
            else f"it extends the history of one request, which needs more than {NEW_EVENTS} events",
        }

    def _encoder(self, kind: Literal["full", "bf16", "causal"]) -> AmortizableEncoder:
        """The encoder as it is served; `causal` has the same weights and reads older events only."""
        if kind not in self._encoders:
            arch = copy.deepcopy(amortized_arch(self.model))
            assert arch is not None
            arch.is_causal = arch.is_causal or kind == "causal"
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            self._encoders[kind] = arch if why_not_native(arch, dtype) else NativeEncoder(arch, dtype)
        return self._encoders[kind]


class _Growing:
    """A history to which each call adds events; after so many calls it starts anew."""

    def __init__(self, encoder: AmortizableEncoder, history: JaggedTensor) -> None:
        self._encoder = encoder
        self._new = _one_request(history.values()[-NEW_EVENTS:])
        self._start = self._state = encoder.encode_history(_one_request(history.values()[:-NEW_EVENTS]))
        self._calls = 0

    def __call__(self) -> None:
        starts_anew = self._calls % 16 == 0
        self._state = self._encoder.extend_history(self._start if starts_anew else self._state, self._new)
        self._calls += 1


def _one_request(rows_ND: Tensor) -> JaggedTensor:
    return JaggedTensor(rows_ND, lengths=torch.tensor([rows_ND.shape[0]], device=rows_ND.device))
