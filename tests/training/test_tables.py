"""Tables that do not train, numbers that are measured, weights of candidates, and a run of several histories."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tests.schemas import THREE, make_requests
from tests.training.test_pipeline import one_rank
from torchrec_amort import AmortizedDLRMTrain, AmortizedScorer, ModelConfig, RequestBatch, TableConfig, build_model
from torchrec_amort.apps import evaluate, train
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests
from torchrec_amort.models.ranker import ModelRanker
from torchrec_amort.modules.events import Numbers
from torchrec_amort.training.loop import GlobalBatchTrain
from torchrec_amort.training.numbers import measure_numbers
from torchrec_amort.training.optimizers import OptimizerConfig
from torchrec_amort.training.run import load_model
from torchrec_amort.training.sharding import ShardingConfig, ShardingWay, TableSharding, shard

__all__ = ["one_rank"]

SIZES = [((3, 0, 2), 2), ((0, 1, 1), 1), ((5, 2, 0), 4)]
CONFIG = ModelConfig(embedding_dim=8, history_layers=1, dense_layers=[], over_layers=[8])


def make_batch(seed: int) -> RequestBatch:
    return RequestBatch.from_requests(make_requests(THREE, SIZES, seed), THREE)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", ["table_wise", "row_wise", "data_parallel"])
def test_a_table_that_does_not_train_stays_as_it_is(way: ShardingWay) -> None:
    # Sequences cannot be data-parallel on a CPU.
    name = "film_id" if way == "data_parallel" else "film"
    model = shard(
        GlobalBatchTrain(build_model(THREE, CONFIG, seed=0)),
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(table_weight_decay=0.1),
        batch_size=3,
        sharding=ShardingConfig(tables={name: TableSharding(ways=[way])}),
        frozen=frozenset([name]),
    )
    before = {key: weight.clone() for key, weight in model.module.state_dict().items()}
    for seed in range(2):
        model.optimizer.zero_grad()
        model.module(make_batch(seed))[0].backward()
        model.optimizer.step()
        model.after_step(seed + 1)
    moved = {key for key, weight in model.module.state_dict().items() if not equal(weight, before[key])}
    tables = {key for key in before if "embedding" in key and ".towers." not in key}
    assert tables - moved == {key for key in tables if f".{name}." in key}


def equal(weight: object, other: object) -> bool:
    one, two = (getattr(of, "local_shards", lambda of=of: [of])() for of in (weight, other))
    return all(torch.equal(getattr(a, "tensor", a), getattr(b, "tensor", b)) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "films"
    random = np.random.default_rng(0)
    sizes = [(random.integers(4, size=3).tolist(), int(random.integers(1, 5))) for _ in range(120)]
    table = pa.Table.from_pylist(make_requests(THREE, sizes, 0), THREE.arrow_schema())
    write_requests(folder, THREE, {"train": [table.slice(0, 80)], "test": [table.slice(80)]})
    return folder


def test_numbers_of_events_are_measured_on_the_training_split(folder: Path) -> None:
    ranker = build_model(THREE, CONFIG, seed=0)
    assert isinstance(ranker, ModelRanker)
    (batch,) = RequestDataset(folder, "train", batch_size=80)
    measure_numbers(ranker, [batch], THREE)
    requests = pa.parquet.read_table(folder / "train")
    prices = requests["buys_price"].combine_chunks().flatten().to_numpy().astype(np.float64)
    towers = {tower.name: tower for tower in ranker.collection.towers}
    measured, vectors = towers["buys"].fit("buys_price"), towers["clicks"].fit("clicks_content")
    assert isinstance(measured, Numbers)
    assert isinstance(vectors, Numbers)
    assert measured.mean.tolist() == pytest.approx([prices.mean()], rel=1e-5)
    assert measured.deviation.tolist() == pytest.approx([prices.std()], rel=1e-5)
    assert vectors.mean.tolist() == [0.0] * 4
    assert vectors.deviation.tolist() == [1.0] * 4


def test_weights_of_candidates_weigh_their_losses() -> None:
    ranker, batch = build_model(THREE, CONFIG, seed=0), make_batch(0)
    assert batch.weights is not None
    assert batch.labels is not None
    loss, (_, logits, labels) = AmortizedDLRMTrain(ranker)(batch)
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    torch.testing.assert_close(loss, (each * batch.weights).mean())
    squared, _ = AmortizedDLRMTrain(ranker, F.mse_loss)(batch)
    torch.testing.assert_close(squared, ((logits - labels).square().mean(1) * batch.weights).mean())


def test_a_run_of_several_histories_is_trained_evaluated_and_served(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "film.npy", np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32))
    run = str(tmp_path / "run")
    size = ["--model.embedding_dim=8", "--model.history_length=3", "--batch_size=20", "--loop.epochs=1"]
    tables = [f"--tables={{film: {{width: 4, pretrained: {tmp_path / 'film.npy'}, trains: false}}}}"]
    towers = ["--model.towers={clicks: {}, buys: {encoder: mean_pooling}, late: {history: views, positions: none}}"]
    train.main([f"--data={folder}", f"--run_folder={run}", *size, *tables, *towers])
    (tmp_path / "film.npy").rename(tmp_path / "gone.npy")
    evaluate.main([f"--run_folder={run}", "--split=test"])
    ranker, config, schema = load_model(run)
    assert schema.tables["film"] == TableConfig(width=4, pretrained=str(tmp_path / "film.npy"), trains=False)
    (film,) = (weight for key, weight in ranker.state_dict().items() if "embeddings.film.weight" in key)
    assert np.array_equal(film.numpy(), np.load(tmp_path / "gone.npy"))
    requests = make_requests(THREE, SIZES, 1)
    batch = RequestBatch.from_requests(requests, schema, config.model.history_lengths(schema))
    with torch.no_grad():
        torch.testing.assert_close(
            AmortizedScorer(ranker, schema=schema).score(requests), ranker(batch), rtol=0, atol=1e-5
        )
