"""What is benchmarked: a model, a trained or a random one, and requests of wanted shapes for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from torchrec_amort.batch import RequestBatch
from torchrec_amort.bench.load import LoadConfig
from torchrec_amort.bench.methods import METHODS, Method
from torchrec_amort.bounds import AT_LEAST_ONE, NOT_NEGATIVE, refuse_out_of_bounds
from torchrec_amort.data.sample import first_requests, random_requests, sample_requests
from torchrec_amort.errors import InputError
from torchrec_amort.models.build import ModelConfig, build_model
from torchrec_amort.models.ranker import Ranker
from torchrec_amort.schema import Feature, RequestSchema
from torchrec_amort.stores import location
from torchrec_amort.training.run import load_model, load_run

NUM_IDS, NUM_REQUEST_DENSE, NUM_CANDIDATE_DENSE = 8, 5, 8
TABLE_ROWS, NUM_ITEMS = 20_000, 100_000


def ranking_schema() -> RequestSchema:
    """The requests of a random model: as many features as a small ranking service has."""
    return RequestSchema(
        "random",
        (
            *(Feature(f"request_id_{i}", "request", "id", TABLE_ROWS) for i in range(NUM_IDS)),
            *(Feature(f"request_dense_{i}", "request", "dense") for i in range(NUM_REQUEST_DENSE)),
            *(Feature(f"candidate_id_{i}", "candidate", "id", TABLE_ROWS) for i in range(NUM_IDS)),
            *(Feature(f"candidate_dense_{i}", "candidate", "dense") for i in range(NUM_CANDIDATE_DENSE)),
            Feature("candidate_item", "candidate", "item", NUM_ITEMS),
            Feature("history_item", "event", "item", NUM_ITEMS),
            Feature("label", "candidate", "label"),
        ),
    )


def ranking_model() -> ModelConfig:
    """The size of a random model."""
    return ModelConfig(embedding_dim=128, history_heads=4, positions="none", dense_layers=[64], over_layers=[512, 256])


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Time every way to score a request, in turns in one process, with the same weights.

    Args:
        run_folder: folder of a training run, whose model and data are used; a random model and random requests unless
            given.
        out: folder of the results; the run's, or `runs/benchmark`.
        data: prepared data folder for the run's model; the one it was trained on unless given.
        split: of that data.
        model: size of a random model.
        history_lengths: events of each history, one case each; a tower that keeps fewer reads the latest of them.
        candidates: candidates of a request, one case each.
        batches: requests that are scored in one call, one case each.
        embedding_dims: of a random model, one case each; the one of `model` if empty.
        layers: of a random model's encoder, one case each; those of `model` if empty.
        methods: what is timed. `impressions`: each candidate a request of its own, as an ordinary DLRM scores;
            `concatenation`: the same with a candidate beside every event; `model`: the model itself, which encodes a
            history once; `amortized`: the scorer, in float32, in `_bf16`, `microbatched`, all histories `cached`,
            `compiled` by torch.compile, or `exported`. And the encoder alone: as it is served, in PyTorch (`_torch`),
            in `_bf16`, its candidates only (`_cached`), a causal history only (`_causal`), and the latest 8 events of
            one (`_extended`).
        microbatch_size: candidates that `microbatched` scores at a time.
        turns: how often each method is timed in a case.
        slow_turns: how often impressions and concatenation are.
        most_pairs: candidates times events of a case above which those two are left out.
        warmup: turns that are not counted.
        memory: measure the peak memory of each method, too.
        threads: CPU threads; torch's choice unless given.
        busy: other processes that compute meanwhile: the scorer is timed beside them and without, on one thread and on
            two, five times as often as methods are; not at all if 0.
        seed: of random weights, requests and draws.
        load: many clients at once, on requests of real shapes; see its fields.
    """

    run_folder: str | None = None
    out: str | None = None
    data: str | None = None
    split: str = "test"
    model: ModelConfig = field(default_factory=ranking_model)
    history_lengths: list[int] = field(default_factory=lambda: [64, 256])
    candidates: list[int] = field(default_factory=lambda: [64, 512])
    batches: list[int] = field(default_factory=lambda: [1])
    embedding_dims: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    methods: list[Method] = field(default_factory=lambda: list(METHODS))
    microbatch_size: int = 128
    turns: int = 40
    slow_turns: int = 5
    most_pairs: int = 200_000
    warmup: int = 5
    memory: bool = True
    threads: int | None = None
    busy: int = 0
    seed: int = 0
    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self) -> None:
        shapes = ("candidates", "batches", "embedding_dims", "layers")
        at_least_one = (*shapes, "microbatch_size", "turns", "slow_turns", "threads")
        not_negative = ("history_lengths", "most_pairs", "warmup", "seed")
        refuse_out_of_bounds(self, {AT_LEAST_ONE: at_least_one, NOT_NEGATIVE: not_negative})
        if self.data is not None and self.run_folder is None:
            raise InputError(
                f"data is {self.data!r}, but a random model has random requests: give the run_folder of a model that "
                "was trained on such data, or leave data out"
            )


@dataclass(frozen=True, eq=False)
class Source:
    """A model and its requests.

    Args:
        model: in eval mode.
        schema: of the requests that it reads.
        batch: so many requests of so many events and candidates each, drawn with a seed.
        usual: so many requests of the shapes that there are, one a batch.
    """

    model: Ranker
    schema: RequestSchema
    batch: Callable[[int, int, int, int], RequestBatch]
    usual: Callable[[int], Sequence[RequestBatch]]


def sources(config: BenchmarkConfig) -> list[Source]:
    """The trained model, or a random one of each size.

    Args:
        config: says which.

    Raises:
        InputError: there is no such run or data.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_trained(config, config.run_folder, device)] if config.run_folder else _random(config, device)


def _trained(config: BenchmarkConfig, run_folder: str, device: torch.device) -> Source:
    _, data, _ = load_run(run_folder, config.data)
    model, trained, schema = load_model(run_folder)
    read = schema.without(trained.model.leave_out)
    limit = trained.model.longest_history(read)

    def batch(count: int, events: int, candidates: int, seed: int) -> RequestBatch:
        if events > limit:
            raise InputError(
                f"history_lengths has {events}, but the model of {run_folder} was trained with up to {limit} events"
            )
        drawn = sample_requests(
            data, config.split, num_requests=count, num_candidates=candidates, history_length=events, seed=seed
        )
        lengths = trained.model.history_lengths(read, events)
        return RequestBatch.from_arrow(drawn, read, lengths, source=str(location(data) / config.split)).to(device)

    def usual(count: int) -> list[RequestBatch]:
        table = first_requests(data, config.split, count)
        rows = [table.slice(row, 1) for row in range(table.num_rows)]
        lengths = trained.model.history_lengths(read)
        return [
            RequestBatch.from_arrow(row, read, lengths, source=str(location(data) / config.split)).to(device)
            for row in rows
        ]

    return Source(model.to(device), read, batch, usual)


def _random(config: BenchmarkConfig, device: torch.device) -> list[Source]:
    schema, longest = ranking_schema(), max(config.history_lengths)

    def batch(count: int, events: int, candidates: int, seed: int) -> RequestBatch:
        table = random_requests(schema, [events] * count, [candidates] * count, seed=seed)
        return RequestBatch.from_arrow(table, schema).to(device)

    def usual(count: int) -> list[RequestBatch]:
        shapes = itertools.cycle(itertools.product(config.history_lengths, config.candidates))
        return [batch(1, *shape, config.seed + i) for i, shape in enumerate(itertools.islice(shapes, count))]

    sizes = itertools.product(
        config.embedding_dims or [config.model.embedding_dim], config.layers or [config.model.history_layers]
    )
    models = [
        replace(config.model, embedding_dim=dim, history_layers=layers, history_length=longest) for dim, layers in sizes
    ]
    return [
        Source(build_model(schema, model, seed=config.seed).eval().to(device), schema, batch, usual) for model in models
    ]
