from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchrec.distributed.mc_embedding import ShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from tests.conftest import MAX_HISTORY, make_requests
from tests.launch import torchrun
from tests.models.test_managed import MANAGED
from tests.schemas import THREE, Shapes
from tests.schemas import make_requests as requests_of_three
from tests.training.test_training import arguments, checkpoints, cut_back, losses, refused
from torchrec_amort import AmortizedScorer, ModelConfig, RequestBatch, TableConfig, build_model
from torchrec_amort.apps import evaluate, train
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.run import load_model
from torchrec_amort.training.sharding import ShardedModel, shard

# 40 items compete for 18 rows, in 10 steps of an epoch.
MORE = ["--tables.item={rows: 20, vocabulary: managed}", "--model.eviction_interval=5", "--loop.average_decay=0.9"]
MORE += ["--batch_size=60"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model() -> ShardedModel:
    config = ModelConfig(embedding_dim=8, history_length=MAX_HISTORY, eviction_interval=2)
    torch.manual_seed(0)
    model = shard(
        GlobalBatchTrain(build_model(MANAGED, config, seed=0)),
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(),
        batch_size=3,
    )
    model.module.train()
    return model


def make_batches(count: int = 8) -> Iterator[RequestBatch]:
    shapes = [(3, 2), (0, 1), (8, 4)]
    return iter([RequestBatch.from_requests(make_requests(shapes, seed), MANAGED) for seed in range(count)])


@pytest.mark.usefixtures("one_rank")
def test_torchrecs_pipeline_takes_the_managed_collection_ahead() -> None:
    results = []
    for kind in (TrainPipelineSparseDist, TrainPipelineBase):
        model, batches = make_model(), make_batches()
        pipeline = kind(model.module, model.optimizer, torch.device("cpu"))
        results.append([float(pipeline.progress(batches)[0].detach()) for _ in range(6)])
        if kind is TrainPipelineSparseDist:
            kinds = [type(module).__mro__ for module in pipeline._pipelined_modules]
            assert len(kinds) == 4
            assert sum(ShardedManagedCollisionEmbeddingCollection in mro for mro in kinds) == 1
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_rows_that_change_hands_are_drawn_anew_without_their_adagrad_state() -> None:
    model, seen = make_model(), []
    (managed,) = (m for m in model.module.modules() if isinstance(m, ShardedManagedCollisionEmbeddingCollection))
    tables, _ = managed._table_to_tbe_and_index["item"]
    (weight,), ((squares,),) = tables.split_embedding_weights(), tables.split_optimizer_states()
    evict = managed._evict

    def watched(evictions: dict[str, Any]) -> None:
        rows, before = evictions["item"], weight.clone()
        evict(evictions)
        if rows is not None:
            seen.append((squares[rows].abs().sum(), (weight[rows] != before[rows]).all(), weight[rows].std()))
            kept = torch.ones(16, dtype=torch.bool).index_fill(0, rows, False)
            assert torch.equal(weight[kept], before[kept])

    managed._evict = watched
    for batch in make_batches():
        model.module(batch)[0].backward()
    assert len(seen) == 4
    assert squares[:-1].max() > 0
    for state, all_drawn, std in seen:
        assert state == 0
        assert all_drawn
        assert 0.2 < std < 0.6  # of embedding_dim**-0.5


def test_two_ranks_train_go_on_and_are_read_by_one_process(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    torchrun(2, "train", *arguments(data_folder, whole, *MORE, "--loop.epochs=2"))
    assert losses(whole)[20] < losses(whole)[1]
    run, copy = (cut_back(whole, 10, tmp_path / name) for name in ("run", "copy"))
    torchrun(2, "train", *arguments(data_folder, run, *MORE, "--loop.epochs=2", "--resume=true"))
    assert checkpoints(run) == ["step-000000010", "step-000000020"]
    assert losses(run) == losses(whole)
    environment = (copy / "environment.json").read_text()
    with monkeypatch.context() as patch:
        # Refused before a model is built, and before the run's folder is written to.
        for job in ("train", "evaluate"):
            patch.setattr(f"torchrec_amort.jobs.{job}.build_model", None)
        line = refused(capsys, train.main, arguments(data_folder, copy, *MORE, "--loop.epochs=2", "--resume=true"))
        assert "was spread over 2 ranks, and there are 1 now: use as many as it was trained on" in line
        assert (copy / "environment.json").read_text() == environment
        assert "was spread over 2 ranks" in refused(capsys, evaluate.main, ["--run_folder", str(run)])
        line = refused(capsys, train.main, arguments(data_folder, tmp_path / "next", *MORE, f"--warm_start={run}"))
        assert "was spread over 2 ranks" in line
    torchrun(2, "evaluate", "--run_folder", str(run), "--save_predictions=true")
    model, _, schema = load_model(str(run))
    scorer, data = AmortizedScorer(model), RequestDataset(data_folder, "test", batch_size=30, schema=schema)
    scores = [scorer.score(batch) for batch in DataLoader(data, batch_size=None)]
    expected = np.load(run / "predictions-test.npz")["logits"]
    np.testing.assert_allclose(np.sort(torch.cat(scores).numpy(), 0), np.sort(expected, 0), atol=1e-5)


def test_two_ranks_train_a_managed_table_of_several_histories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    splits = {}
    for seed, (split, count) in enumerate({"train": 192, "validation": 8, "test": 30}.items()):
        shapes = [((row % 5, row % 3, row % 4), 1 + row % 3) for row in range(count)]
        requests = [
            {**request, "request_id": 1000 * seed + row}
            for row, request in enumerate(requests_of_three(THREE, shapes, seed))
        ]
        splits[split] = [pa.Table.from_pylist(requests, THREE.arrow_schema())]
    write_requests(data, THREE, splits)
    table = "--tables.film={rows: 12, width: 4, vocabulary: managed}"
    torchrun(2, "train", *arguments(data, run, table, "--model.eviction_interval=2"))
    line = refused(capsys, evaluate.main, ["--run_folder", str(run)])
    assert "the managed table 'film' was spread over 2 ranks, and there are 1 now" in line
    torchrun(2, "evaluate", "--run_folder", str(run), "--save_predictions=true")
    model, _, schema = load_model(str(run))
    (ids,) = (ids for name, ids in model.state_dict().items() if name.endswith("film._mch_sorted_raw_ids"))
    # Each rank has a row for all ids that have none.
    assert int((ids < 30).sum()) == 10
    scorer, read = AmortizedScorer(model), RequestDataset(data, "test", batch_size=30, schema=schema)
    scores = [scorer.score(batch) for batch in DataLoader(read, batch_size=None)]
    expected = np.load(run / "predictions-test.npz")["logits"]
    np.testing.assert_allclose(np.sort(torch.cat(scores).numpy(), 0), np.sort(expected, 0), atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_torchrecs_pipeline_takes_a_managed_table_of_several_histories_ahead() -> None:
    schema = THREE.with_tables({"film": TableConfig(rows=12, width=4, vocabulary="managed")})
    config = ModelConfig(embedding_dim=8, history_layers=1, history_length=6, eviction_interval=2)
    shapes: Shapes = [((3, 2, 0), 3), ((0, 0, 0), 1), ((4, 1, 5), 2)]
    results = []
    for kind in (TrainPipelineSparseDist, TrainPipelineBase):
        torch.manual_seed(0)
        train_module = GlobalBatchTrain(build_model(schema, config, seed=0))
        model = shard(train_module, device=torch.device("cpu"), optimizer=OptimizerConfig(), batch_size=3)
        model.module.train()
        batches = iter(
            [RequestBatch.from_requests(requests_of_three(THREE, shapes, seed), schema) for seed in range(8)]
        )
        pipeline = kind(model.module, model.optimizer, torch.device("cpu"))
        results.append([float(pipeline.progress(batches)[0].detach()) for _ in range(6)])
        if kind is TrainPipelineSparseDist:
            kinds = [type(module).__mro__ for module in pipeline._pipelined_modules]
            assert sum(ShardedManagedCollisionEmbeddingCollection in mro for mro in kinds) == 1
            # Two widths of plain tables, and the bags of both sides.
            assert len(kinds) == 5
    assert results[0] == pytest.approx(results[1], rel=1e-6)
