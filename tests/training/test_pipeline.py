from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.conftest import MAX_HISTORY, SCHEMA, make_requests
from torchrec_amort import ModelConfig, RequestBatch, build_model
from torchrec_amort.models.build import ENCODERS, Encoder
from torchrec_amort.modules.losses import LossConfig, TaskLossConfig, TaskLosses
from torchrec_amort.modules.next_action import NextAction
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.sharding import ShardedModel, shard


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model(history: Encoder, summary: bool, next_action: float) -> ShardedModel:
    config = ModelConfig(embedding_dim=8, history_length=MAX_HISTORY, history=history, history_summary=summary)
    tasks = {"liked": TaskLossConfig(kind="listwise"), "bought": TaskLossConfig(kind="pairwise")}
    loss = TaskLosses(LossConfig(tasks=tasks, weighting="uncertainty"), SCHEMA)
    ranker: Any = build_model(SCHEMA, config, seed=0)
    of_histories = NextAction(ranker.collection.towers, next_action) if next_action else None
    return shard(
        GlobalBatchTrain(ranker, loss=loss, next_action=of_histories),
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(),
        batch_size=3,
    )


def make_batches() -> Iterator[RequestBatch]:
    return iter(
        [RequestBatch.from_requests(make_requests([(3, 2), (0, 1), (8, 4)], seed), SCHEMA) for seed in range(5)]
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("history", "summary", "next_action"),
    [
        # `matches` reads one feature of events, and these have more.
        *((word, False, 0.0) for word in ENCODERS if word not in ("none", "matches")),
        ("append_cross", True, 0.0),
        ("append_cross_causal", True, 0.5),
    ],
)
def test_torchrecs_pipeline_takes_all_three_collections_ahead(
    history: Encoder, summary: bool, next_action: float
) -> None:
    model = make_model(history, summary, next_action)
    pipeline = TrainPipelineSparseDist(model.module, model.optimizer, torch.device("cpu"))
    batches = make_batches()
    losses = [float(pipeline.progress(batches)[0].detach()) for _ in range(4)]
    kinds = [type(module) for module in pipeline._pipelined_modules]
    assert sorted(kinds, key=str) == sorted([ShardedEmbeddingBagCollection] * 2 + [ShardedEmbeddingCollection], key=str)
    plain = make_model(history, summary, next_action)
    expected = []
    for _, batch in zip(range(4), make_batches(), strict=False):
        plain.optimizer.zero_grad()
        loss, _ = plain.module(batch)
        loss.backward()
        plain.optimizer.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-6)
