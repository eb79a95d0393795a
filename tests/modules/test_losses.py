"""Losses are what plain loops say, on any number of ranks, and a run is trained, stopped and evaluated with them."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import SCHEMA, make_requests
from tests.launch import torchrun
from tests.training.test_training import arguments, cut_back, losses, quality
from torchrec_amort import (
    AmortizedDLRMTrain,
    Feature,
    InputError,
    ModelConfig,
    RequestBatch,
    RequestSchema,
    build_model,
)
from torchrec_amort.apps import compare, evaluate, train
from torchrec_amort.bench.replay import Log
from torchrec_amort.bench.speed import ways_to_train
from torchrec_amort.config import load_config
from torchrec_amort.data.sample import drawn_requests
from torchrec_amort.data.writer import write_requests
from torchrec_amort.modules.losses import REGRESSIONS, LossConfig, TaskLossConfig, TaskLosses
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.processes import process_group, sum_over_ranks
from torchrec_amort.training.run import TrainConfig, load_model
from torchrec_amort.training.sharding import shard

# One task of each kind, which is named after it; targets stand among labels.
KINDS: tuple[Any, ...] = ("binary", "squared", "pairwise", "poisson", "listwise", "huber", "joint")
OPTIONS: dict[str, dict[str, float]] = {"huber": {"delta": 0.7}, "joint": {"ranking_weight": 0.3}}
TASKS = {kind: TaskLossConfig(kind=kind, **OPTIONS.get(kind, {})) for kind in KINDS}
SIZES = [1, 4, 2, 7, 1, 3, 3, 5, 2]

Loops = list[tuple[int, float]]


def schema_of(*kinds: str) -> RequestSchema:
    labels = [Feature(kind, "candidate", "target" if kind in REGRESSIONS else "label") for kind in kinds]
    numbers = (Feature("price", "candidate", "dense"), Feature("length", "candidate", "dense"))
    return RequestSchema("films", (*numbers, *labels, Feature("worth", "candidate", "weight")))


def losses_of(*kinds: str, **options: Any) -> TaskLosses:
    return TaskLosses(LossConfig(tasks={kind: TASKS[kind] for kind in kinds}, **options), schema_of(*kinds))


def labels_of(kind: str, count: int, random: np.random.Generator) -> np.ndarray:
    if kind == "poisson":
        return random.poisson(1.5, count).astype(np.float64)
    if kind in REGRESSIONS:
        return 3 * random.standard_normal(count)
    return random.choice([0.0, 0.0, 1.0, 0.25], count)


def pointwise(kind: str, x: float, y: float) -> float:
    if kind == "squared":
        return (x - y) ** 2
    if kind == "huber":
        return 0.5 * (x - y) ** 2 if abs(x - y) < 0.7 else 0.7 * (abs(x - y) - 0.35)
    if kind == "poisson":
        return math.exp(x) - y * x + math.lgamma(y + 1)
    return -y * math.log(1 / (1 + math.exp(-x))) - (1 - y) * math.log(1 / (1 + math.exp(x)))


def samples_in_loops(kind: str, x: list[float], y: list[float], w: list[float], sizes: list[int]) -> Loops:
    """The request and the loss of each sample."""
    samples, start = [], 0
    for request, size in enumerate(sizes):
        mine = range(start, start + size)
        start += size
        if kind == "pairwise":
            for i in mine:
                samples += [(request, w[i] * math.log(1 + math.exp(x[j] - x[i]))) for j in mine if y[i] > y[j]]
        elif kind == "listwise":
            if (total := sum(y[i] for i in mine)) > 0:
                normalizer = sum(math.exp(x[j]) for j in mine)
                terms = [w[i] * y[i] / total * -math.log(math.exp(x[i]) / normalizer) for i in mine]
                samples.append((request, sum(terms)))
        else:
            samples += [(request, w[i] * pointwise(kind, x[i], y[i])) for i in mine]
    return samples


def in_loops(kind: str, x: list[float], y: list[float], w: list[float], sizes: list[int], mean_over: str) -> float:
    if kind == "joint":
        return in_loops("binary", x, y, w, sizes, mean_over) + 0.3 * in_loops("listwise", x, y, w, sizes, mean_over)
    samples = samples_in_loops(kind, x, y, w, sizes)
    values = [value for _, value in samples]
    if mean_over == "requests":
        of_requests = [[value for at, value in samples if at == request] for request in {at for at, _ in samples}]
        values = [sum(some) / len(some) for some in of_requests]
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("mean_over", ["samples", "requests"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 999), is_weighted=st.booleans())
def test_values_and_gradients_are_those_of_plain_loops(
    kind: str, mean_over: str, sizes: list[int], seed: int, is_weighted: bool
) -> None:
    random, count = np.random.default_rng(seed), sum(sizes)
    logits, labels = random.standard_normal(count), labels_of(kind, count, random)
    weights = random.random(count) + 0.1 if is_weighted else np.ones(count)
    x = torch.tensor(logits[:, None], requires_grad=True)
    loss, detached = losses_of(kind, mean_over=mean_over).eval()(
        x, torch.tensor(labels[:, None]), torch.tensor(weights) if is_weighted else None, torch.tensor(sizes)
    )
    loss.backward()

    def at(place: int, step: float) -> float:
        moved = [value + step * (i == place) for i, value in enumerate(logits.tolist())]
        return in_loops(kind, moved, labels.tolist(), weights.tolist(), sizes, mean_over)

    assert float(detached) == float(loss.detach()) == pytest.approx(at(0, 0), rel=1e-12, abs=1e-12)
    slopes = [(at(place, 1e-5) - at(place, -1e-5)) / 2e-5 for place in range(count)]
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("mean_over", ["samples", "requests"])
@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        ("pairwise", [0, 0, 0, 1], 0.0),  # no positive in the list of three, and one candidate alone
        ("listwise", [0, 0, 0, 0], 0.0),
        ("listwise", [1, 1, 1, 0], math.log(3)),  # no negative
        ("listwise", [0, 0, 0, 1], 0.0),
    ],
)
def test_requests_without_a_positive_or_a_negative_are_finite(
    kind: str, mean_over: str, labels: list[float], expected: float
) -> None:
    logits = torch.zeros(4, 1, requires_grad=True)
    loss, _ = losses_of(kind, mean_over=mean_over)(logits, torch.tensor(labels)[:, None], None, torch.tensor([3, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["binary", "pairwise", "listwise", "joint"])
def test_logits_of_any_size_have_finite_losses(kind: str) -> None:
    logits = torch.tensor([[3e4], [-3e4], [2e4]], requires_grad=True)
    loss, _ = losses_of(kind)(logits, torch.tensor([[0.0], [1.0], [0.0]]), None, torch.tensor([3]))
    loss.backward()
    assert float(loss.detach()) > 1e4
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_likely_counts_have_no_loss_below_zero() -> None:
    # Else a learned variance would go to zero, and the loss to minus infinity.
    counts = torch.tensor([0.1, 1.0, 20.0, 500.0])[:, None]
    loss, _ = losses_of("poisson", weighting="uncertainty")(counts.log(), counts, None, torch.tensor([4]))
    assert float(loss.detach()) > 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_pairs_are_made_within_requests_alone() -> None:
    sizes, random = [4] * 300, np.random.default_rng(0)
    labels = torch.tensor(random.integers(2, size=(1200, 1)), dtype=torch.float32)
    with Largest() as largest:
        losses_of("pairwise")(torch.randn(1200, 1), labels, None, torch.tensor(sizes))
    assert largest.elements <= sum(size**2 for size in sizes)


def test_tasks_are_added_up_by_their_weights_and_learned_variances() -> None:
    kinds = ("binary", "squared", "listwise")
    random, count = np.random.default_rng(0), sum(SIZES)
    logits = torch.tensor(random.standard_normal((count, 3)))
    labels = torch.tensor(np.stack([labels_of(kind, count, random) for kind in kinds], 1))
    batch = (logits, labels, None, torch.tensor(SIZES))
    each = [
        in_loops(kind, logits[:, t].tolist(), labels[:, t].tolist(), [1.0] * count, SIZES, "samples")
        for t, kind in enumerate(kinds)
    ]
    tasks = {kind: replace(TASKS[kind], weight=weight) for kind, weight in zip(kinds, (2.0, 0.5, 0.0), strict=True)}
    fixed = TaskLosses(LossConfig(tasks=tasks), schema_of(*kinds))
    assert not list(fixed.parameters())
    assert float(fixed(*batch)[0]) == pytest.approx((2 * each[0] + 0.5 * each[1]) / 3)
    uncertain = TaskLosses(LossConfig(tasks=tasks, weighting="uncertainty"), schema_of(*kinds))
    assert uncertain.log_variances is not None
    with torch.no_grad():
        uncertain.log_variances.copy_(torch.tensor([0.5, -1.0, 2.0]))
    loss = uncertain(*batch)[0]
    first, second = each[0] * math.exp(-0.5) + 0.25, each[1] / 2 * math.exp(1.0) - 0.5
    assert float(loss.detach()) == pytest.approx((2 * first + 0.5 * second) / 3)
    loss.backward()
    assert uncertain.log_variances.grad is not None
    slopes = [2 * (0.5 - each[0] * math.exp(-0.5)) / 3, 0.5 * (0.5 - each[1] / 2 * math.exp(1.0)) / 3, 0.0]
    assert uncertain.log_variances.grad.tolist() == pytest.approx(slopes, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"tasks": {"like": TaskLossConfig()}}, r"the data has no label 'like', but \['binary', 'squared'\]"),
        ({}, "loss.tasks.squared.kind is binary, but 'squared' is a target, any number: give squared, huber, poisson"),
        (
            {"tasks": {"binary": TaskLossConfig(kind="huber")}},
            "kind is huber, but 'binary' is a label from 0 to 1: give",
        ),
    ],
)
def test_a_loss_that_does_not_go_with_the_labels_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        TaskLosses(LossConfig(**config), schema_of("binary", "squared"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight": -1.0}, "weight is -1.0: give 0 or more"),
        ({"kind": "huber", "delta": 0.0}, "delta is 0.0: give a number above 0"),
        ({"delta": 1.0}, "delta is of kind huber, not of binary: leave it out"),
        ({"kind": "listwise", "ranking_weight": 1.0}, "ranking_weight is of kind joint, not of listwise"),
    ],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        TaskLossConfig(**options)


def make_batch() -> RequestBatch:
    random, requests = np.random.default_rng(1), []
    for request, size in enumerate(SIZES):
        columns = {kind: labels_of(kind, size, random).tolist() for kind in KINDS}
        if request % 3 == 0:
            # One of three ranks has no pair.
            columns |= dict.fromkeys(("pairwise", "listwise", "joint"), [0.0] * size)
        numbers = {name: random.standard_normal(size).tolist() for name in ("price", "length")}
        requests.append({**columns, **numbers, "worth": random.random(size).tolist()})
    return RequestBatch.from_requests(requests, schema_of(*KINDS))


class Linear(nn.Module):
    """The smallest ranker."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, num_tasks)
        nn.init.zeros_(self.linear.weight)

    def forward(self, batch: RequestBatch) -> Tensor:
        logits_CT: Tensor = self.linear(batch.candidate_dense)
        return logits_CT


CASES = [{"mean_over": over, "weighting": way} for over in ("samples", "requests") for way in ("fixed", "uncertainty")]


def train_by_hand(case: dict[str, Any]) -> dict[str, Any]:
    """Some steps on this rank's requests, with the mean of the ranks' gradients."""
    ranks, batch = dist.get_world_size(), make_batch()
    mine = batch.select(torch.arange(len(batch))[dist.get_rank() :: ranks])
    torch.manual_seed(0)
    model: Any = Linear(len(KINDS))
    module = GlobalBatchTrain(model, loss=losses_of(*KINDS, **case))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss, (of_all, _, _) = module(mine)
        loss.backward()
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad = sum_over_ranks(parameter.grad) / ranks
        optimizer.step()
        found.append(float(of_all))
    return {"losses": found, "weights": module.state_dict()}


def train_all(folder: Path) -> None:
    records = [train_by_hand(case) for case in CASES]
    if dist.get_rank() == 0:
        torch.save(records, folder / f"{dist.get_world_size()}.pt")


def test_any_number_of_ranks_has_the_losses_and_the_weights_of_one(tmp_path: Path) -> None:
    with process_group():
        expected = [train_by_hand(case) for case in CASES]
    torchrun(3, "tests.modules.test_losses", str(tmp_path))
    for ranks in (2, 3):
        for one, other in zip(expected, torch.load(tmp_path / f"{ranks}.pt"), strict=True):
            assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
            assert len(set(one["losses"])) == 3
            for name, value in one["weights"].items():
                torch.testing.assert_close(other["weights"][name], value, rtol=1e-6, atol=1e-6)


def test_targets_are_read_like_labels_and_in_order_with_them() -> None:
    schema, batch = schema_of("binary", "squared"), make_batch()
    assert schema.labels == ("binary", "squared")
    assert RequestSchema.from_json(schema.to_json()) == schema
    assert schema.num_dense["candidate"] == 2
    request = {"price": [0.0], "length": [0.0], "worth": [1.0], "binary": [1.0], "squared": [-70.5]}
    read = RequestBatch.from_requests([request], schema)
    assert read.labels is not None
    assert read.labels.tolist() == [[1.0, -70.5]]
    # Whatever batches are made of a batch, they know their targets.
    for made in (batch.select(torch.tensor([1, 3])), batch.to_impressions(), batch.to(torch.device("cpu"))):
        targets = made.validate().targets
        assert targets is not None
        assert [kind for kind, is_target in zip(KINDS, targets, strict=True) if is_target] == [
            "squared",
            "poisson",
            "huber",
        ]
    for place, value, told in ((0, 1.5, "a number from 0 to 1"), (1, math.inf, "a finite number")):
        wrong = read.labels.clone()
        wrong[0, place] = value
        with pytest.raises(InputError, match=f"request 0, candidate 0: labels column {place} is {value}, not {told}"):
            replace(read, labels=wrong).validate()


def test_batches_that_a_loss_cannot_be_of_are_refused() -> None:
    model: Any = Linear(7)
    impressions = make_batch().to_impressions()
    module = AmortizedDLRMTrain(model, losses_of(*KINDS))
    with pytest.raises(InputError, match="batch: each of 28 requests has 1 candidate, but loss.tasks.pairwise.kind"):
        module(impressions)
    module(make_batch())
    # A later batch may be so by chance.
    module(impressions)
    batch = make_batch()
    assert batch.labels is not None
    batch.labels[5, KINDS.index("poisson")] = -2
    with pytest.raises(InputError, match="candidate 5 has target -2.0, but loss.tasks kind poisson is of counts"):
        module(batch)
    with pytest.raises(InputError, match=r"7 labels and 7 logits of a candidate, but the loss is of 1, \['binary'\]"):
        AmortizedDLRMTrain(model, losses_of("binary"))(make_batch())


LOSS = (
    "--loss={tasks: {liked: {kind: joint, ranking_weight: 0.5}, bought: {kind: pairwise, weight: 2}, "
    "plays: {kind: poisson}}, mean_over: requests, weighting: uncertainty}"
)


def write_plays(folder: Path, candidates: int = 4) -> Path:
    """Requests whose candidates have a count as a target."""
    schema = RequestSchema("films", (*SCHEMA.features, Feature("plays", "candidate", "target")))
    splits = {}
    for seed, split in enumerate(("train", "test")):
        random = np.random.default_rng(seed)
        requests = make_requests([(3, candidates)] * 60, seed)
        plays = [{"plays": random.poisson(2.0, candidates).astype(float).tolist()} for _ in requests]
        rows = [{**one, **more, "request_id": i} for i, (one, more) in enumerate(zip(requests, plays, strict=True))]
        splits[split] = [pa.Table.from_pylist(rows, schema.arrow_schema())]
    write_requests(folder, schema, splits)
    return folder


def test_a_run_is_trained_stopped_resumed_and_evaluated_with_any_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole = write_plays(tmp_path / "data"), tmp_path / "whole"
    options = (LOSS, "--loop.checkpoint_every=1", "--loop.keep_checkpoints=3", "--loop.epochs=2")
    train.main(arguments(data, whole, *options))
    assert len(losses(whole)) == 6
    assert set(json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])) >= {"ne/liked", "ne/bought"}
    assert "ne/plays" not in (whole / "metrics.jsonl").read_text()
    stopped = cut_back(whole, 4, tmp_path / "stopped")
    train.main(arguments(data, stopped, *options, "--resume=true"))
    assert losses(stopped) == losses(whole)
    saved = FileSystemReader(stopped / "checkpoints" / "step-000000006").read_metadata()
    assert "model/loss.log_variances" in saved.state_dict_metadata
    evaluate.main(["--run_folder", str(stopped)])
    metrics = quality(stopped)["tasks"]
    assert list(metrics["plays"]) == ["mse"]
    assert 0 < metrics["plays"]["mse"] < 100
    assert metrics["liked"].keys() == metrics["bought"].keys() >= {"auc", "ne"}
    (model, config, _), (undisturbed, *_) = load_model(str(stopped)), load_model(str(whole))
    assert config.loss.weighting == "uncertainty"
    # What is served and exported.
    assert not [name for name in model.state_dict() if "log_variances" in name]
    expected = undisturbed.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    other = LOSS.replace("uncertainty", "fixed")
    with pytest.raises(SystemExit):
        train.main(arguments(data, whole, other, "--resume=true"))
    assert "is of a run with loss.weighting=uncertainty, the config says fixed, which has" in capsys.readouterr().err


def test_impressions_are_refused_before_a_run_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_plays(tmp_path / "data", candidates=1)
    with pytest.raises(SystemExit):
        train.main(arguments(data, tmp_path / "run", LOSS))
    told = capsys.readouterr().err
    assert "train: each of 60 requests has 1 candidate, but loss.tasks.liked.kind joint compares those of a" in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_comparisons_of_labels_refuse_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_plays(tmp_path / "data")
    with pytest.raises(SystemExit):
        compare.main([f"--data={data}", f"--out={tmp_path / 'compared'}"])
    assert "'plays' is a target, and compare compares labels from 0 to 1: give it data" in capsys.readouterr().err
    with pytest.raises(InputError, match="'plays' is a target, and pilot compares"):
        Log.of(drawn_requests(str(data), "test", 5, seed=0), RequestSchema.load(data))


@pytest.mark.parametrize(
    ("config", "is_of_requests"),
    [
        (LossConfig(), False),
        (LossConfig(mean_over="requests"), True),
        (LossConfig(tasks={"liked": TaskLossConfig(kind="joint")}), True),
    ],
)
def test_steps_by_impressions_are_timed_where_they_are_the_same(config: LossConfig, is_of_requests: bool) -> None:
    sizes = ModelConfig(embedding_dim=8, history_length=8)
    batch = RequestBatch.from_requests(make_requests([(2, 3)]), SCHEMA)
    with process_group() as device:
        train = GlobalBatchTrain(build_model(SCHEMA, sizes), loss=TaskLosses(config, SCHEMA))
        model = shard(train, device=device, optimizer=OptimizerConfig(), batch_size=1)
        assert ("impressions" in ways_to_train(model, batch)) != is_of_requests


def test_a_run_from_before_there_were_losses_has_the_default(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {tmp_path}\nrun_folder: {tmp_path}\n")
    assert load_config(tmp_path, TrainConfig, "train").loss == LossConfig()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with process_group():
        rank = dist.get_rank()
        train_all(folder)
    if rank < 2:
        # Two of them again, by themselves.
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
        train_all(folder)
        dist.destroy_process_group()
