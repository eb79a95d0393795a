"""Optimizers, their rates over the steps, and what resumes them."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.launch import torchrun
from tests.training.test_pipeline import one_rank
from tests.training.test_training import (
    ROUNDING,
    arguments,
    cut_back,
    losses,
    refused,
    up_to,
    weights,
)
from torchrec_amort.apps import train
from torchrec_amort.config import load_config
from torchrec_amort.errors import InputError
from torchrec_amort.training.optimizers import (
    Decay,
    DenseOptimizer,
    OptimizerConfig,
    ParameterGroup,
    ScheduleConfig,
    TableOptimizer,
    copied_table_optimizer,
)
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.run import TrainConfig
from torchrec_amort.training.sharding import ShardedModel, ShardingConfig, ShardingWay, TableSharding, shard

__all__ = ["one_rank"]

CPU = torch.device("cpu")
ROWS, DIM, RATE = 6, 4, 0.1


def rates_of_steps(warmup: int, decay: Decay, end: int, left: float, size: int, fall: float) -> Iterator[float]:
    """The share of the rate of each step, one after the other."""
    for step in range(warmup):
        yield (step + 1) / warmup
    rate = 1.0
    for since in range(1, end - warmup + 1):
        yield rate
        share = since / (end - warmup)
        if decay == "linear":
            rate = 1.0 + (left - 1.0) * share
        elif decay == "cosine":
            rate = left + (1.0 - left) * 0.5 * (1.0 + math.cos(share * math.pi))
        elif since % size == 0:
            rate *= fall
    while True:
        yield rate


@given(
    warmup=st.integers(0, 7),
    length=st.integers(1, 20),
    decay=st.sampled_from(["linear", "cosine", "step"]),
    left=st.floats(0, 0.9),
    size=st.integers(1, 9),
    fall=st.floats(0.1, 0.9),
)
def test_a_rate_rises_and_falls_as_its_schedule_says(
    warmup: int, length: int, decay: Decay, left: float, size: int, fall: float
) -> None:
    end = warmup + length
    schedule = ScheduleConfig(
        warmup_steps=warmup, decay=decay, end_step=end, end_factor=left, step_size=size, step_factor=fall
    )
    expected = rates_of_steps(warmup, decay, end, left, size, fall)
    found = [schedule.factor(step) for step in range(1, end + 5)]
    assert found == pytest.approx([next(expected) for _ in found], abs=1e-12)
    constant = ScheduleConfig(warmup_steps=warmup)
    assert {constant.factor(step) for step in range(warmup + 1, 100)} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "linear"}, "schedule.decay is linear and schedule.end_step None: a decay needs the step"),
        ({"end_step": 9}, "schedule.decay is constant and schedule.end_step 9"),
        ({"decay": "cosine", "end_step": 9, "warmup_steps": 9}, "schedule.end_step is 9, but the warm-up takes 9"),
        ({"decay": "cosine", "end_step": 9, "end_factor": 1.0}, "schedule.end_factor is 1.0: give 0 or more, and less"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ScheduleConfig(**options)
    assert message in str(error.value)


class Lookup(nn.Module):
    """A table, a linear layer with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = EmbeddingBagConfig(name="bag", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])
        self.bags = EmbeddingBagCollection(tables=[table])
        self.norm = nn.LayerNorm(DIM)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        bags = self.bags(ids).values().to(self.norm.weight.dtype)
        loss: Tensor = self.linear(self.norm(bags)).square().sum()
        return loss


def make_ids(seed: int) -> KeyedJaggedTensor:
    values = torch.randint(ROWS, (3,), generator=torch.Generator().manual_seed(seed))
    return KeyedJaggedTensor(["f"], values, lengths=torch.ones(3, dtype=torch.int64))


def sharded(optimizer: OptimizerConfig, way: ShardingWay = "table_wise", device: torch.device = CPU) -> ShardedModel:
    return shard(
        Lookup(),
        device=device,
        optimizer=optimizer,
        batch_size=3,
        sharding=ShardingConfig(default=TableSharding(ways=[way])),
    )


def take_steps(model: ShardedModel, steps: range) -> dict[str, Tensor]:
    """The weights after some steps."""
    for step in steps:
        model.before_step(step)
        model.optimizer.zero_grad()
        model.module(make_ids(step).to(model.module.device)).backward()
        model.optimizer.step()
        model.after_step(step)
    return weights_of(model.module)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's weights."""
    found = {}
    for name, weight in module.state_dict().items():
        shards = weight.local_shards() if hasattr(weight, "local_shards") else []
        found[name] = (shards[0].tensor if shards else weight).detach().cpu().clone()
    return found


WARM = ScheduleConfig(warmup_steps=2, decay="linear", end_step=6, end_factor=0.5)
FALLS = ScheduleConfig(warmup_steps=3, decay="step", end_step=9, step_size=2, step_factor=0.1)
TABLE = "bags.embedding_bags.bag.weight"


def step_table(
    name: TableOptimizer, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int, rate: float
) -> None:
    """A float64 step of a table's optimizer on the rows that have a gradient."""
    for row in gradient.abs().sum(1).nonzero().flatten().tolist():
        slope = gradient[row]
        if name == "rowwise_adagrad":
            state["squares"][row] += slope.square().mean()
            weight[row] -= rate * slope / (state["squares"][row].sqrt() + 1e-8)
            continue
        state["first"][row] = 0.9 * state["first"][row] + 0.1 * slope
        squares = slope.square().mean() if name == "partial_rowwise_adam" else slope.square()
        state["second"][row] = 0.999 * state["second"][row] + 0.001 * squares
        direction = state["first"][row] / (1 - 0.9**step)
        direction = direction / ((state["second"][row] / (1 - 0.999**step)).sqrt() + 1e-8)
        trust = weight[row].norm() / direction.norm() if name == "lamb" else 1.0
        weight[row] -= rate * trust * direction


def expected_table(name: TableOptimizer, schedule: ScheduleConfig, steps: int) -> Tensor:
    """The table after steps of which a plain model's dense weights stay as they are."""
    model = Lookup().double()
    weight = model.bags.embedding_bags["bag"].weight
    state = {key: torch.zeros(ROWS, DIM, dtype=torch.float64) for key in ("squares", "first", "second")}
    for step in range(1, steps + 1):
        model.zero_grad()
        model(make_ids(step)).backward()
        with torch.no_grad():
            step_table(name, weight, weight.grad, state, step, RATE * schedule.factor(step))
    return weight.detach()


def of_table(name: TableOptimizer, schedule: ScheduleConfig) -> OptimizerConfig:
    """Moves the table alone."""
    return OptimizerConfig(
        table_optimizer=name, table_lr=RATE, table_schedule=schedule, dense_optimizer="sgd", dense_lr=0, weight_decay=0
    )


@pytest.mark.usefixtures("one_rank")
def test_the_defaults_are_row_wise_adagrad_and_adamw_at_constant_rates() -> None:
    found, model, losses_of_steps = sharded(OptimizerConfig()), Lookup(), []
    adagrad = {"lr": 0.05, "eps": 1e-8}
    apply_optimizer_in_backward(RowWiseAdagrad, model.bags.parameters(), adagrad)
    module = DistributedModelParallel(model, device=CPU, plan=found.plan)
    module.load_state_dict({**module.state_dict(), **Lookup().state_dict()})
    dense = dict(in_backward_optimizer_filter(module.named_parameters()))
    adamw = torch.optim.AdamW(dense.values(), lr=2e-3, weight_decay=0.01)
    for step in range(1, 9):
        adamw.zero_grad()
        loss = module(make_ids(step))
        loss.backward()
        adamw.step()
        losses_of_steps.append(loss.item())
    expected = weights_of(module)
    for name, weight in take_steps(found, range(1, 9)).items():
        assert torch.equal(weight, expected[name]), name
    assert losses_of_steps[-1] < losses_of_steps[0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", ["table_wise", "data_parallel"])
def test_a_tables_rate_follows_its_schedule_however_it_is_spread(way: ShardingWay) -> None:
    found = take_steps(sharded(of_table("rowwise_adagrad", WARM), way), range(1, 9))
    expected = expected_table("rowwise_adagrad", WARM, 8)
    torch.testing.assert_close(found[TABLE].double(), expected, rtol=1e-5, atol=1e-6)


def expected_dense(config: OptimizerConfig, rates: dict[str, float], decays: dict[str, float]) -> dict[str, Tensor]:
    """Dense weights after 8 steps in float64, of which the table stays as it is."""
    model = Lookup().double()
    dense = {name: weight for name, weight in model.named_parameters() if name != TABLE}
    first = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    second = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    for step in range(1, 9):
        gradients = dict(zip(dense, torch.autograd.grad(model(make_ids(step)), list(dense.values())), strict=True))
        if config.clip_norm is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
            gradients = {name: g * min(1.0, config.clip_norm / (norm + 1e-6)) for name, g in gradients.items()}
        with torch.no_grad():
            for name, weight in dense.items():
                rate, decay = rates[name] * config.dense_schedule.factor(step), decays[name]
                slope = gradients[name] if config.dense_optimizer == "adamw" else gradients[name] + decay * weight
                if config.dense_optimizer == "sgd":
                    weight.sub_(rate * slope)
                    continue
                if config.dense_optimizer == "adamw":
                    weight.mul_(1 - rate * decay)
                first[name] = 0.9 * first[name] + 0.1 * slope
                second[name] = 0.999 * second[name] + 0.001 * slope.square()
                deviation = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                weight.sub_(rate * first[name] / (1 - 0.9**step) / deviation)
    return {name: weight.detach() for name, weight in dense.items()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_dense_weights_move_by_their_optimizer_group_schedule_and_bound(kind: DenseOptimizer) -> None:
    config = OptimizerConfig(
        table_lr=0,
        dense_optimizer=kind,
        dense_lr=0.02,
        dense_schedule=FALLS,
        weight_decay=0.1,
        groups=[
            ParameterGroup(pattern="norm.*", weight_decay=0),
            ParameterGroup(pattern="*.bias", lr=0.05, weight_decay=0.2),
        ],
        clip_norm=0.5,
    )
    found = take_steps(sharded(config), range(1, 9))
    rates = {"norm.weight": 0.02, "norm.bias": 0.02, "linear.weight": 0.02, "linear.bias": 0.05}
    decays = {"norm.weight": 0.0, "norm.bias": 0.0, "linear.weight": 0.1, "linear.bias": 0.2}
    for name, expected in expected_dense(config, rates, decays).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            OptimizerConfig(table_optimizer="adam"),
            "optimizer.table_optimizer is adam, which fbgemm does not have on a CPU",
        ),
        (OptimizerConfig(table_optimizer="lamb"), "lamb, which fbgemm does not have on a CPU: use rowwise_adagrad"),
        (
            OptimizerConfig(table_optimizer="partial_rowwise_adam"),
            "partial_rowwise_adam, which fbgemm does not have on a CPU",
        ),
        (
            OptimizerConfig(groups=[ParameterGroup(pattern="*"), ParameterGroup(pattern="*.bias")]),
            "optimizer.groups: no weight is left for the pattern '*.bias'; the weights are linear.bias, linear.weight",
        ),
    ],
)
def test_what_cannot_move_weights_is_refused(optimizer: OptimizerConfig, message: str) -> None:
    with pytest.raises(InputError) as error:
        sharded(optimizer)
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"])
def test_a_gpu_steps_tables_by_each_optimizer_whatever_it_scored_between(name: TableOptimizer) -> None:
    with process_group() as device:
        model = sharded(of_table(name, WARM), device=device)
        take_steps(model, range(1, 5))
        with torch.no_grad():
            model.module(make_ids(0).to(device))
        found = take_steps(model, range(5, 9))
    expected = expected_table(name, WARM, 8)
    torch.testing.assert_close(found[TABLE].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_a_data_parallel_table_takes_row_wise_adagrad_alone() -> None:
    with pytest.raises(InputError) as error:
        copied_table_optimizer({TABLE: torch.zeros(ROWS, DIM)}, OptimizerConfig(table_optimizer="adam"))
    assert "optimizer.table_optimizer is adam, but table 'bag' is data_parallel" in str(error.value)


# 12 steps, of which 4 warm up; after 10 the rates change no more. One table is stepped by the dense side. The average
# of the weights is validated.
SCHEDULED = (
    "--batch_size=100",
    "--loop.epochs=2",
    "--loop.checkpoint_every=1",
    "--loop.keep_checkpoints=99",
    "--optimizer.table_schedule={warmup_steps: 4, decay: linear, end_step: 10}",
    "--optimizer.dense_schedule={warmup_steps: 4, decay: cosine, end_step: 10, end_factor: 0.1}",
    "--optimizer.groups=[{pattern: '*.bias', weight_decay: 0}, {pattern: '*event_encoder*', lr: 0.01}]",
    "--optimizer.clip_norm=0.1",
    "--sharding.tables.user_id.ways=[data_parallel]",
    "--loop.average_decay=0.9",
    "--loop.validate_every=2",
)


def validated(run: Path) -> dict[int, float]:
    """The value of each validation."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["validation/ne"] for record in records if "validation/ne" in record}


@pytest.fixture(scope="module")
def scheduled(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "scheduled"
    train.main(arguments(data_folder, run, *SCHEDULED))
    return run


@pytest.mark.parametrize("step", [2, 7], ids=["in the warm-up", "in the decay"])
def test_a_schedule_goes_on_where_it_was(step: int, data_folder: Path, scheduled: Path, tmp_path: Path) -> None:
    run = cut_back(scheduled, step, tmp_path / "run")
    train.main(arguments(data_folder, run, *SCHEDULED, "--resume=true"))
    assert losses(run) == losses(scheduled)
    assert validated(run) == validated(scheduled)
    expected = weights(data_folder, scheduled)
    assert all(torch.equal(value, expected[name]) for name, value in weights(data_folder, run).items())


def test_schedules_groups_and_clipping_are_the_same_on_1_2_and_3_ranks(
    data_folder: Path, scheduled: Path, tmp_path: Path
) -> None:
    torchrun(2, "train", *arguments(data_folder, tmp_path / "two", *SCHEDULED, "--loop.checkpoint_every=3"))
    three = cut_back(tmp_path / "two", 3, tmp_path / "three")
    torchrun(3, "train", *arguments(data_folder, three, *SCHEDULED, "--loop.epochs=1", "--resume=true"))
    for run, last in ((tmp_path / "two", 12), (three, 6)):
        for found, expected in ((losses(run), losses(scheduled)), (validated(run), validated(scheduled))):
            assert max(found) == last
            assert found == pytest.approx(up_to(last, expected), rel=ROUNDING)


def test_a_run_does_not_go_on_by_another_optimizer(
    data_folder: Path, scheduled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data_folder, scheduled, *SCHEDULED, "--resume=true", "--optimizer.dense_optimizer=sgd")
    line = refused(capsys, train.main, command)
    assert "its checkpoint has the state of optimizer.dense_optimizer=adamw, the config says sgd: use the same" in line


def test_a_config_from_before_schedules_is_read(scheduled: Path, tmp_path: Path) -> None:
    record = yaml.safe_load((scheduled / "config.yaml").read_text())
    record["optimizer"] = {"table_lr": 0.2, "table_eps": 1e-8, "table_weight_decay": 0.0, "dense_lr": 0.1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    assert load_config(tmp_path, TrainConfig, "train").optimizer == OptimizerConfig(table_lr=0.2, dense_lr=0.1)
