"""The arms of a pilot: a trained model, and the way in which it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bounds import AT_LEAST_ONE, refuse_out_of_bounds
from torchrec_amort.errors import InputError
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.schema import RequestSchema
from torchrec_amort.serving.scorer import AmortizedScorer
from torchrec_amort.training.loop import Precision
from torchrec_amort.training.run import load_model

Serving = Literal["amortized", "model", "impressions"]


@dataclass(kw_only=True)
class ArmConfig:
    """One arm of a pilot.

    Args:
        run_folder: folder of the training run whose best or, if it did not validate, last checkpoint is served.
        serving: `amortized`: by the scorer; `model`: by the model itself, request by request, which is the only way
            for encoders that cannot be amortized; `impressions`: by the model, each candidate a request of its own, as
            an ordinary DLRM scores.
        dtype: of the scorer's encoders and native heads.
        microbatch_size: candidates that the scorer scores at a time; all at once unless given.
    """

    run_folder: str
    serving: Serving = "amortized"
    dtype: Precision = "float32"
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self, {AT_LEAST_ONE: ("microbatch_size",)})
        if self.serving != "amortized" and (self.dtype != "float32" or self.microbatch_size is not None):
            raise InputError(f"{self.run_folder}: dtype and microbatch_size are the scorer's: use serving: amortized")


@dataclass(frozen=True, eq=False)
class Arm:
    """A trained model, ready to score.

    Args:
        config: what it was made by.
        history: the kind of its encoder, or `none`; the function that built it, if it is of another class.
        schema: of the requests that it reads.
        limits: events that it reads of each history, the latest ones.
        history_length: of the history that may have most.
        device: where it is.
        parameter_bytes: of tables and dense weights.
        score: what is timed: from what `read` returned to logits [C, T].
    """

    config: ArmConfig
    history: str
    schema: RequestSchema
    limits: Mapping[str, int]
    history_length: int
    device: torch.device
    parameter_bytes: int
    score: Callable[[RequestBatch], Tensor]

    def read(self, requests: pa.Table, history_length: int | None = None) -> RequestBatch:
        """What the arm scores of some requests.

        Args:
            requests: with the columns of `schema.arrow_schema()`; labels may be absent.
            history_length: events of each history, where that is less than what the arm can read.
        """
        most = self.history_length if history_length is None else history_length
        lengths = {history: min(limit, most) for history, limit in self.limits.items()}
        batch = RequestBatch.from_arrow(requests, self.schema, lengths).to(self.device)
        return batch.to_impressions() if self.config.serving == "impressions" else batch


def load_arm(config: ArmConfig) -> Arm:
    """Load the model of an arm.

    Args:
        config: which one, served how.

    Raises:
        InputError: there is no such run, or its encoder cannot be amortized.

    Example::

        arm = load_arm(ArmConfig(run_folder="runs/movielens-1m"))
        logits_CT = arm.score(arm.read(table))
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, trained, schema = load_model(config.run_folder)
    read = schema.without(trained.model.leave_out)
    parameters = [*model.parameters(), *model.buffers()]
    return Arm(
        config=config,
        history=trained.model.build or trained.model.history,
        schema=read,
        limits=trained.model.history_lengths(read),
        history_length=trained.model.longest_history(read),
        device=device,
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in parameters),
        score=_way_to_score(model.to(device), config, read),
    )


def _way_to_score(model: Ranker, config: ArmConfig, schema: RequestSchema) -> Callable[[RequestBatch], Tensor]:
    if config.serving != "amortized":
        return model
    if not model.is_amortizable:
        raise InputError(
            f"{config.run_folder}: its encoder reads the candidate beside every event and cannot be amortized: use "
            "serving: model, or impressions"
        )
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return AmortizedScorer(model, config.microbatch_size, schema=schema, dtype=dtype).score
