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
from torchrec_amort.models.dlrm import AmortizedDLRM
from torchrec_amort.modules.encoder import AmortizableEncoder
from torchrec_amort.modules.history import AmortizedHistoryArch
from torchrec_amort.modules.rivals import Concatenation
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.cache import HistoryCache
from torchrec_amort.serving.export import export_package, load_package
from torchrec_amort.serving.native_encoder import NativeEncoder, why_not_native
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


class Methods:
    """Everything that scores with the weights of one model.

    Args:
        model: in eval mode, on a CPU or a GPU.
        schema: of its requests.
        microbatch_size: candidates that `microbatched` scores at a time.
    """

    def __init__(self, model: AmortizedDLRM, schema: RequestSchema, microbatch_size: int) -> None:
        self.model = model
        self.schema = schema
        self._microbatch_size = microbatch_size
        self._scorers: dict[str, AmortizedScorer] = {}
        self._encoders: dict[str, AmortizableEncoder] = {}

    def calls(self, batch: RequestBatch, methods: Sequence[Method]) -> dict[str, Call]:
        """Each method as a call without arguments that scores a batch.

        Args:
            batch: B requests of one number of events and candidates each.
            methods: which ones; those that this model or processor does not have are left out.

        Returns:
            dict: calls by method; those of whole models return logits [C, T].
        """
        calls: dict[str, Call] = {}
        of_encoder = self._encoder_calls(batch) if any(method.startswith("encoder") for method in methods) else {}
        for method in methods:
            if method.startswith("encoder"):
                if method in of_encoder:
                    calls[method] = of_encoder[method]
            elif method == "impressions":
                calls[method] = partial(self.model, batch.to_impressions())
            elif method == "model":
                calls[method] = partial(self.model, batch)
            elif method == "concatenation":
                if self._concatenation is not None:
                    calls[method] = partial(self._concatenation, batch)
            elif method == "exported" and next(self.model.parameters()).device.type != "cpu":
                continue  # Packages are compiled for CPUs.
            else:
                calls[method] = partial(self._scorer(method).score, batch)
        return calls

    def _scorer(self, method: Method) -> AmortizedScorer:
        if method not in self._scorers:
            self._scorers[method] = self._new_scorer(method)
        return self._scorers[method]

    def _new_scorer(self, method: Method) -> AmortizedScorer:
        if method == "exported":
            with tempfile.TemporaryDirectory() as folder:
                export_package(self.model, Path(folder) / "package", self.schema, tables="float32")
                return AmortizedScorer(load_package(Path(folder) / "package"))
        options: dict[str, dict[str, Any]] = {
            "amortized_bf16": {"dtype": torch.bfloat16},
            "microbatched": {"microbatch_size": self._microbatch_size},
            "cached": {"cache": HistoryCache(2**32)},
            "compiled": {"backend": "compiled"},
        }
        return AmortizedScorer(self.model, **options.get(method, {}))

    @cached_property
    def _concatenation(self) -> AmortizedDLRM | None:
        """The model with a candidate beside every event; of other weights, since it has other layers."""
        arch = self.model.history_arch
        if not isinstance(arch, AmortizedHistoryArch) or arch.num_slots != 1:
            return None
        model = copy.copy(self.model)
        width = arch.layers[0].feedforward[0].out_features
        assert isinstance(width, int)
        device = arch.output_norm.weight.device
        rival = Concatenation(arch.embedding_dim, len(arch.layers), arch.layers[0].num_heads, width, device=device)
        model._modules = dict(self.model._modules) | {"history_arch": rival.eval()}
        return model

    def _encoder_calls(self, batch: RequestBatch) -> dict[str, Call]:
        """The encoder alone, from the vectors of events and candidates."""
        arch = self.model.history_arch
        if not isinstance(arch, AmortizedHistoryArch):
            return {}
        assert self.model.history_embedding_collection is not None
        assert self.model.event_encoder is not None
        embeddings = self.model.history_embedding_collection(batch.sequences)
        history, candidates = self.model.event_encoder(embeddings), embeddings["candidate_item"]
        calls: dict[str, Call] = {"encoder_torch": partial(arch, history, candidates)}
        encoder = self._encoder("full")
        calls["encoder"] = partial(encoder, history, candidates)
        calls["encoder_cached"] = partial(encoder.score_candidates, encoder.encode_history(history), candidates)
        if why_not_native(arch, torch.bfloat16) is None:
            calls["encoder_bf16"] = partial(self._encoder("bf16"), history, candidates)
        causal = self._encoder("causal")
        calls["encoder_causal"] = partial(causal.encode_history, history)
        if len(batch) == 1 and history.values().shape[0] > NEW_EVENTS:
            calls["encoder_extended"] = _Growing(causal, history)
        return calls

    def _encoder(self, kind: Literal["full", "bf16", "causal"]) -> AmortizableEncoder:
        """The encoder as it is served; `causal` has the same weights and reads older events only."""
        if kind not in self._encoders:
            arch = copy.deepcopy(self.model.history_arch)
            assert isinstance(arch, AmortizedHistoryArch)
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
