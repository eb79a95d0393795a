"""What a run is trained with, and its model, read back from its folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, UP_TO_ONE, refuse_out_of_bounds
from torchrec_amort.config import flat_fields, load_config
from torchrec_amort.errors import InputError
from torchrec_amort.models.build import ModelConfig, build_model
from torchrec_amort.models.dlrm import AmortizedDLRMTrain
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.modules.losses import LossConfig, TaskLosses
from torchrec_amort.schema import RequestSchema, TableConfig
from torchrec_amort.stores import local_path
from torchrec_amort.times import Span
from torchrec_amort.training.checkpoint import load_weights
from torchrec_amort.training.loop import LoopConfig
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import ShardingConfig

NewRows = Literal["unknown", "mean", "draw"]


@dataclass(kw_only=True)
class TrainConfig:
    """Train a model on the train split of a prepared data folder.

    Args:
        data: prepared data folder, on this machine or a store.
        run_folder: folder of this machine for config, plan, checkpoints, metrics and TensorBoard events.
        since: train on requests of all splits, those from this time on; on the train split unless this or `until` is
            given. Times are UTC if they tell no zone.
        until: time of the first request that is left out.
        warm_start: folder of another run, whose best checkpoint if it validated, else its last one, is what this run
            starts with: its weights, averaged if there is an average, which are those that it is evaluated with.
        warm_start_optimizer: what is kept of the optimizers' states: 1 all; 0 nothing; in between all, and row-wise
            Adagrad's sums, which only grow, times this.
        warm_start_rows: what rows start as that tables have more than those of `warm_start`: `unknown`, as row 0, by
            which their ids were scored so far, or as `mean` where no id is unknown; `mean`, as the mean of the rows
            that are there; or `draw`, as a new table's: at random, or as its `pretrained` file says.
        model: size and kind of the model.
        loss: what is minimized.
        optimizer: how weights are moved.
        loop: how long and how.
        sharding: how tables are spread over ranks.
        batch_size: requests in a global batch, all ranks together.
        balance_work: whether global batches have equal work, which is candidates and events, and not equal numbers
            of requests, which are `batch_size` on average then.
        seed: of the initial weights and the order of the data.
        tables: other sizes and vocabularies of tables of ids than the data's, by the name of the table: the feature's,
            or `item` for the one that history and candidates share. `docs/data.md` tells of vocabularies.
        unknown_rate: for a request id, the share of training requests in which it is replaced by 0, the
            unknown id.
        num_workers: processes of each rank that read data.
        resume: go on from the run's last good checkpoint if it has one; without it, a run that has one is refused,
            unless torchrun started this job's ranks again.
    """

    data: str
    run_folder: str
    since: str | None = None
    until: str | None = None
    warm_start: str | None = None
    warm_start_optimizer: float = 1.0
    warm_start_rows: NewRows = "unknown"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    batch_size: int = 32
    balance_work: bool = False
    seed: int = 0
    tables: dict[str, TableConfig] = field(default_factory=dict)
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_workers: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        local_path(self.run_folder)
        refuse_out_of_bounds(
            self,
            {
                AT_LEAST_ONE: ("batch_size",),
                NOT_NEGATIVE: ("seed", "num_workers"),
                UP_TO_ONE: ("warm_start_optimizer",),
            },
        )
        if self.span is not None and self.loop.validate_every is not None:
            raise InputError(
                f"loop.validate_every is {self.loop.validate_every}, but requests {self.span} may be of the validation "
                "split: leave out one of them"
            )

    @property
    def span(self) -> Span | None:
        """The times of the requests that are trained on; None if they are those of the train split."""
        return None if self.since is None and self.until is None else Span(self.since, self.until)


def schema_of(config: TrainConfig) -> RequestSchema:
    """The schema of a config's data, with its tables.

    Args:
        config: of a run that may not have started.

    Raises:
        InputError: there is no such data, or no such table.
    """
    return RequestSchema.load(config.data).with_tables(config.tables)


def load_run(run_folder: str, data: str | None) -> tuple[TrainConfig, str, RequestSchema]:
    """What a run was trained with, and the data folder to use it on.

    Args:
        run_folder: folder of a training run.
        data: prepared data folder; the one it was trained on if None.

    Returns:
        tuple: the run's config, the data folder and the schema of both.

    Raises:
        InputError: it is no such folder, or the data has other features.
    """
    trained = load_config(run_folder, TrainConfig, "train")
    data = data or trained.data
    schema = RequestSchema.load(run_folder)
    schema.refuse_other_data(RequestSchema.load(data), data)
    return trained, data, schema


def load_model(run_folder: str) -> tuple[Ranker, TrainConfig, RequestSchema]:
    """A run's model with the weights of its best checkpoint if it validated, else of the last one, for inference.

    Args:
        run_folder: folder of a training run.

    Returns:
        tuple: the model, the run's config and its schema.

    Raises:
        InputError: it is no such folder.
    """
    trained, schema = load_config(run_folder, TrainConfig, "train"), RequestSchema.load(run_folder)
    model = build_model(schema.without_pretrained(), trained.model)
    load_weights(run_folder, AmortizedDLRMTrain(model, TaskLosses(trained.loss, schema)))
    return model.eval(), trained, schema


def refuse_other(
    run: str | Path,
    saved: Any,
    given: Any,
    names: Iterable[str],
    told: str,
    why: str = "",
    instead: str = "choose another run folder",
) -> None:
    """Refuse to go on from a run with other values of some options.

    Args:
        run: the run's folder, for error messages.
        saved: the run's options.
        given: the config's.
        names: of the options.
        told: what the run's value is of.
        why: they have to be the same.
        instead: what to do beside that.

    Raises:
        InputError: names the first that differs, and both values.
    """
    for name in names:
        if (value := getattr(saved, name)) != (other := getattr(given, name)):
            raise InputError(f"{run}: {told}{name}={value}, the config says {other}{why}: use the same, or {instead}")


def refuse_other_config(run: str | Path, saved: TrainConfig, given: TrainConfig, *, told: str, instead: str) -> None:
    """Refuse a run that was trained with another config than is asked for.

    Args:
        run: the run's folder, for error messages.
        saved: the run's config.
        given: the one that is asked for.
        told: who asks for it.
        instead: what to do.

    Raises:
        InputError: names the first field that differs, and both values.
    """
    of_run, asked = (flat_fields(asdict(config)) for config in (saved, given))
    # A field of a mapping may be in one of them alone.
    for name in of_run | asked:
        if (value := of_run.get(name)) != (other := asked.get(name)):
            raise InputError(f"{run}: was trained with {name}={value}, {told} {other}: {instead}")
