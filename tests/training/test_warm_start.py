"""A run starts with the weights of the day before's, on any number of ranks, with larger tables or not at all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.conftest import SCHEMA, make_table
from tests.launch import torchrun
from tests.training.test_training import ROUNDING, arguments, checkpoints, losses, refused, weights
from torchrec_amort import Feature, RequestSchema, TableConfig
from torchrec_amort.apps import evaluate, train
from torchrec_amort.config import load_config, save_config, with_overrides
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.hashing import Vocabulary
from torchrec_amort.jobs.train import sharded_model
from torchrec_amort.training.run import TrainConfig
from torchrec_amort.training.sharding import ShardedModel
from torchrec_amort.training.warm_start import WarmStart

STILL = ["--optimizer.table_lr=0", "--optimizer.dense_lr=0"]
GROWN = {"item": TableConfig(rows=50), "interests": TableConfig(rows=9, vocabulary="unknown")}
ITEM, INTERESTS = "embeddings.item.weight", "embedding_bags.interests.weight"


def write(folder: Path, schema: RequestSchema, first_seed: int = 0) -> Path:
    sizes = {"train": 120, "validation": 30, "test": 40}
    splits = {split: [make_table(n, first_seed + seed)] for seed, (split, n) in enumerate(sizes.items())}
    write_requests(folder, schema, splits)
    return folder


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data of a day, with an unknown id in one table, and of the next, whose tables have more rows."""
    folder = tmp_path_factory.mktemp("days")
    first = SCHEMA.with_tables({"interests": TableConfig(vocabulary="unknown")})
    return write(folder / "first", first), write(folder / "second", first.with_tables(GROWN), 7)


@pytest.fixture(scope="module")
def run(days: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the first day, with an average of its weights."""
    run = tmp_path_factory.mktemp("runs") / "first"
    train.main(arguments(days[0], run, "--loop.average_decay=0.8", "--loop.epochs=4"))
    return run


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def managed(days: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the first day, with a table that learns which ids get a row."""
    run = tmp_path_factory.mktemp("runs") / "managed"
    table = ["--tables.item={rows: 20, vocabulary: managed}", "--model.eviction_interval=2"]
    train.main(arguments(days[0], run, *table, "--loop.average_decay=0.8"))
    return run


def named(state: dict[str, torch.Tensor], end: str) -> torch.Tensor:
    (found,) = (weight for name, weight in state.items() if name.endswith(end))
    return found


def started(run: Path, data: Path, folder: Path, **overrides: Any) -> ShardedModel:
    """A model in this process, as a run on some data would start."""
    changed = {"data": str(data), "run_folder": str(folder), "warm_start": str(run), **overrides}
    config = with_overrides(load_config(run, TrainConfig, "train"), changed, "train")
    schema = RequestSchema.load(data).with_tables(config.tables)
    start = WarmStart(config, schema)
    model = sharded_model(config, start.initial, torch.device("cpu"), is_loaded=True)
    start.load(model)
    return model


def rows_of(model: ShardedModel, end: str) -> torch.Tensor:
    """A table of a model on one rank."""
    shards: Any = named(model.module.state_dict(), end)
    rows: torch.Tensor = shards.local_shards()[0].tensor
    return rows


@pytest.mark.parametrize("average", [[], ["--loop.average_decay=0.8"]], ids=["no average", "an average"])
def test_a_run_that_has_not_moved_yet_scores_as_the_one_that_it_starts_with(
    average: list[str], days: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    train.main(arguments(days[0], second, f"--warm_start={run}", *STILL, *average))
    for folder in (run, second):
        evaluate.main(["--run_folder", str(folder), "--save_predictions=true"])
    first, other = (np.load(folder / "predictions-test.npz")["logits"] for folder in (run, second))
    assert np.array_equal(first, other)
    expected = weights(days[0], run)
    assert all(value.equal(expected[name]) for name, value in weights(days[0], second).items())


def test_two_ranks_start_as_one_with_tables_that_have_grown(days: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    one, two, still = (tmp_path / name for name in ("one", "two", "still"))
    spread = "--sharding.default.ways=[row_wise,column_wise]"
    start = (f"--warm_start={run}", spread)
    train.main(arguments(days[1], one, *start))
    torchrun(2, "train", *arguments(days[1], two, *start))
    torchrun(2, "train", *arguments(days[1], still, *start, *STILL))
    assert "row_wise" in (two / "plan.txt").read_text()
    assert losses(two) == pytest.approx(losses(one), rel=ROUNDING)
    found = weights(days[1], two)
    for name, weight in weights(days[1], one).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    first, found = weights(days[0], run), weights(days[1], still)
    for name, weight in first.items():
        assert found[name][: len(weight)].equal(weight), name
    # Items have no unknown id, interests have.
    items, interests = named(found, ITEM), named(found, INTERESTS)
    assert (len(items), len(interests)) == (50, 9)
    torch.testing.assert_close(items[40:], items[:40].mean(0).expand(10, -1))
    assert interests[7:].equal(interests[:1].expand(2, -1))


@pytest.mark.usefixtures("one_rank")
def test_new_rows_start_as_asked_for(days: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    drawn, mean = (
        rows_of(started(run, days[1], tmp_path, warm_start_rows=rows), INTERESTS) for rows in ("draw", "mean")
    )
    assert drawn[:7].equal(mean[:7])
    assert drawn[7:].unique(dim=0).shape[0] == 2
    torch.testing.assert_close(mean[7:], mean[:7].mean(0).expand(2, -1))


@pytest.fixture(scope="module")
def pretrained(days: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and tested on the first day, with items that start from a file."""
    folder = tmp_path_factory.mktemp("pretrained")
    np.save(folder / "items.npy", np.ones((40, 8), np.float32))
    train.main(arguments(days[0], folder / "run", f"--tables.item={{pretrained: {folder / 'items.npy'}}}"))
    evaluate.main(["--run_folder", str(folder / "run")])
    return folder / "run"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", ["draw", "mean"])
def test_new_rows_of_a_table_that_started_from_a_file_are_of_the_next_file_if_drawn(
    way: str, days: tuple[Path, Path], pretrained: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "items.npy", np.full((50, 8), 7, np.float32))
    tables = {"item": {"pretrained": str(tmp_path / "items.npy")}}
    found = rows_of(started(pretrained, days[1], tmp_path, warm_start_rows=way, tables=tables), ITEM)
    assert not (found[:40] == 7).any()
    assert (found[40:] == 7).all() == (way == "draw")
    if way == "mean":
        torch.testing.assert_close(found[40:], found[:40].mean(0).expand(10, -1))


def optimizers(model: ShardedModel) -> dict[str, torch.Tensor]:
    """Adagrad's sums by table, and AdamW's states by weight."""
    tables = model.module.fused_optimizer.state_dict()["state"]
    sums = {name: state.local_shards()[0].tensor for of_table in tables.values() for name, state in of_table.items()}
    dense = model.optimizer.state_dict()["state"]
    return sums | {f"{name}/{key}": state for name, states in dense.items() for key, state in states.items()}


@pytest.mark.usefixtures("one_rank")
def test_the_states_of_optimizers_are_kept_decayed_or_left(days: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    kept, decayed, fresh = (
        optimizers(started(run, days[1], tmp_path, warm_start_optimizer=factor)) for factor in (1.0, 0.25, 0.0)
    )
    saved = {"dense": torch.empty(8, 2), "sums": torch.empty(40)}
    dense = "model.dense_arch.model._mlp.0._linear.weight"
    keys = {
        f"dense_optimizer/{dense}/exp_avg_sq": saved["dense"],
        "table_optimizer/model.history_embedding_collection.embeddings.item.weight/item.momentum1": saved["sums"],
    }
    dcp.load(keys, checkpoint_id=run / "checkpoints" / checkpoints(run)[-1])
    assert kept["item.momentum1"][:40].equal(saved["sums"])
    assert kept["item.momentum1"][:40].min() > 0
    assert decayed["item.momentum1"].equal(kept["item.momentum1"] / 4)
    assert not fresh["item.momentum1"].any()
    for states in (kept, decayed, fresh):
        assert not states["item.momentum1"][40:].any()
    assert kept[f"{dense}/exp_avg_sq"].equal(saved["dense"])
    assert decayed[f"{dense}/exp_avg_sq"].equal(saved["dense"])
    assert f"{dense}/exp_avg_sq" not in fresh


def test_a_run_that_was_started_warm_goes_on_from_its_own_checkpoint(
    days: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = [f"--warm_start={run}", "--warm_start_optimizer=0.5", "--model.dropout=0"]
    train.main(arguments(days[1], whole, *more, "--loop.epochs=2"))
    train.main(arguments(days[1], stopped, *more))
    train.main(arguments(days[1], stopped, *more, "--loop.epochs=2", "--resume=true"))
    assert losses(stopped) == losses(whole)
    expected = weights(days[1], whole)
    assert all(value.equal(expected[name]) for name, value in weights(days[1], stopped).items())


@pytest.mark.usefixtures("one_rank")
def test_ids_that_a_managed_table_has_learned_are_taken_over(
    days: tuple[Path, Path], managed: Path, tmp_path: Path
) -> None:
    found = started(managed, days[0], tmp_path).module.state_dict()
    keys = {
        f"average/{name}": weight.local_shards()[0].tensor for name, weight in found.items() if ".item._mch" in name
    }
    saved = {key: torch.empty_like(weight) for key, weight in keys.items()}
    dcp.load(saved, checkpoint_id=managed / "checkpoints" / checkpoints(managed)[-1])
    assert len(saved) == 4
    assert all(weight.equal(saved[key]) for key, weight in keys.items())
    (ids,) = (weight for key, weight in saved.items() if key.endswith("_mch_sorted_raw_ids"))
    assert int((ids < 40).sum()) > 10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.history_layers=1"], "model.history_layers=2, the config says 1: use the same, or train without"),
        (["--loss.weighting=uncertainty"], "loss.weighting=fixed, the config says uncertainty"),
        (["--optimizer.dense_optimizer=adam"], "start without its state: warm_start_optimizer 0"),
        (["--tables.item={vocabulary: unknown}"], "in its place: give data of the same features"),
        (["--tables.item={width: 4}"], "table 'item' has more than rows and a vocabulary there or here alone"),
        (["--tables.user_id={rows: 30, vocabulary: hash}"], "was trained on 'user_id'"),
        (
            ["--optimizer.table_optimizer=adam", "--warm_start_optimizer=0.5"],
            "warm_start_optimizer is 0.5, but optimizer.table_optimizer adam has no sums that only grow: give 1 or 0",
        ),
        (["--warm_start_optimizer=1.5"], "warm_start_optimizer is 1.5: give 0 to 1"),
    ],
)
def test_another_model_is_refused_before_it_is_built(
    options: list[str],
    told: str,
    days: tuple[Path, Path],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchrec_amort.jobs.train.build_model", None)
    line = refused(capsys, train.main, arguments(days[0], tmp_path / "run", f"--warm_start={run}", *options))
    assert told in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rows_that_would_be_of_other_ids_are_refused(tmp_path: Path) -> None:
    words = Feature("word", "candidate", "id", 4, vocabulary="file", text=True)
    hashed = Feature("hashed", "candidate", "id", 9, vocabulary="hash")
    learned = Feature("learned", "candidate", "id", 9, vocabulary="managed")

    def start(feature: Feature, rows: int, before: list[str] | None = None, now: list[str] | None = None) -> None:
        first, second = (
            RequestSchema(
                "films",
                (one, Feature("liked", "candidate", "label")),
                vocabularies={} if known is None else {"word": Vocabulary(pa.array(known))},
            )
            for one, known in ((feature, before), (replace(feature, table_size=rows), now))
        )
        config = TrainConfig(data="data/2", run_folder=str(tmp_path), warm_start=str(tmp_path))
        save_config(tmp_path, config, "train")
        first.save(tmp_path)
        WarmStart(config, second)

    start(words, 6, ["news", "sport"], ["news", "sport", "opinion"])
    with pytest.raises(InputError, match=r"'word' has sport in row 2, where the vocabulary of data/2 has opinion"):
        start(words, 6, ["news", "sport"], ["news", "opinion", "sport"])
    with pytest.raises(InputError, match=r"has sport in row 2, where the vocabulary of data/2 has no id"):
        start(words, 4, ["news", "sport"], ["news"])
    for vocabulary in (hashed, learned):
        start(vocabulary, 9)
        with pytest.raises(InputError, match=r"has 9 rows, and 10 here, but rows of kind '\w+' are of other ids then"):
            start(vocabulary, 10)
    with pytest.raises(InputError, match=r"'hashed' has 9 rows, and 8 here: give as many or more"):
        start(hashed, 8)
