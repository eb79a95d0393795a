"""Numbers that make no sense, and splits that have nothing, are refused on one line that names them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA, make_table
from tests.training.test_training import arguments, refused
from torchrec_amort.apps import benchmark, compare, evaluate, pilot, throughput, train
from torchrec_amort.data.impressions import to_impressions, to_requests
from torchrec_amort.data.reader import RequestDataset
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError

RUN = ["--data=nowhere", "--run_folder=nowhere"]
COMPARE = ["--data=nowhere", "--out=nowhere"]
PILOT = ["--control.run_folder=nowhere", "--treatment.run_folder=nowhere", "--out=nowhere"]

REFUSALS: list[tuple[Callable[[Sequence[str]], None], list[str], str, str]] = [
    (train.main, RUN, "loop.epochs=-1", "loop.epochs is -1: give 1 or more"),
    (train.main, RUN, "loop.epochs=0", "loop.epochs is 0: give 1 or more"),
    (train.main, RUN, "loop.average_decay=1", "loop.average_decay is 1.0: give 0 or more, and less than 1"),
    (train.main, RUN, "batch_size=0", "batch_size is 0: give 1 or more"),
    (train.main, RUN, "num_workers=-1", "num_workers is -1: give 0 or more"),
    (train.main, RUN, "seed=-1", "seed is -1: give 0 or more"),
    (train.main, RUN, "optimizer.dense_lr=-0.1", "optimizer.dense_lr is -0.1: give 0 or more"),
    (train.main, RUN, "optimizer.table_lr=.nan", "optimizer.table_lr is nan: give 0 or more"),
    (
        train.main,
        RUN,
        "optimizer.table_weight_decay=1",
        "optimizer.table_weight_decay is 1.0: give 0 or more, and less",
    ),
    (train.main, RUN, "model.embedding_dim=0", "model.embedding_dim is 0: give 1 or more"),
    (train.main, RUN, "model.over_layers=[8, 0]", "model.over_layers is [8, 0]: give 1 or more"),
    (train.main, RUN, "model.history_length=0", "model.history_length is 0: give 1 or more"),
    (train.main, RUN, "model.dropout=1.5", "model.dropout is 1.5: give 0 or more, and less than 1"),
    (train.main, RUN, "sharding.default.pooling_factor=0", "sharding.pooling_factor is 0.0: give a number above 0"),
    (throughput.main, RUN, "batch_size=-2", "batch_size is -2: give 1 or more"),
    (throughput.main, RUN, "reading_steps=0", "reading_steps is 0: give 1 or more"),
    (evaluate.main, RUN[1:], "batch_size=0", "batch_size is 0: give 1 or more"),
    (compare.main, COMPARE, "seeds=[0, -1]", "seeds is [0, -1]: give 0 or more"),
    (compare.main, COMPARE, "speed.candidates=0", "speed.candidates is 0: give 1 or more"),
    (benchmark.main, [], "turns=0", "turns is 0: give 1 or more"),
    (benchmark.main, [], "load.rates=[0]", "load.rates is [0.0]: give a number above 0"),
    (pilot.main, PILOT, "threads=0", "threads is 0: give 1 or more"),
    (pilot.main, PILOT, "control.microbatch_size=0", "microbatch_size is 0: give 1 or more"),
]


@pytest.mark.parametrize(("main", "needed", "option", "message"), REFUSALS, ids=[case[2] for case in REFUSALS])
def test_a_number_that_makes_no_sense_is_refused(
    main: Callable[[Sequence[str]], None],
    needed: list[str],
    option: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(capsys, main, [*needed, f"--{option}"])


def test_sizes_that_do_not_fit_each_other_are_refused(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"--data={data_folder}", f"--run_folder={tmp_path / 'run'}", "--model.history_heads=3"]
    line = refused(capsys, train.main, command)
    assert line == "error: model: embedding_dim 32 is not a multiple of num_heads 3"
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_is_too_short_for_all_splits_says_which_one_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_requests(tmp_path / "whole", SCHEMA, {"train": [make_table(2)]})
    to_impressions(tmp_path / "whole", tmp_path / "impressions")
    counts = to_requests(str(tmp_path / "impressions" / "train"), SCHEMA, tmp_path / "films")["splits"]
    sizes = {split: count["requests"] for split, count in counts.items()}
    empty = [split for split, size in sizes.items() if size == 0]
    assert empty
    others = "".join(f", {split} has {size}" for split, size in sizes.items() if split != empty[0])
    message = f"{tmp_path}/films/{empty[0]}: has no requests{others}: take another split, or prepare a log of more"
    with pytest.raises(InputError, match=message):
        RequestDataset(tmp_path / "films", empty[0], batch_size=8)
    # And back, with its empty split.
    assert to_impressions(tmp_path / "films", tmp_path / "back")["splits"] == counts


def test_training_without_requests_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_requests(tmp_path / "films", SCHEMA, {"train": [], "test": [make_table(3)]})
    command = [f"--data={tmp_path / 'films'}", f"--run_folder={tmp_path / 'run'}"]
    expected = (
        f"error: {tmp_path}/films/train: has no requests, test has 3: take another split, or prepare a log of more"
    )
    assert refused(capsys, train.main, command).startswith(expected)
    # A file without rows is no better than no file.
    pq.write_table(pa.Table.from_pylist([], SCHEMA.arrow_schema()), tmp_path / "films" / "train" / "part-00000.parquet")
    assert refused(capsys, train.main, command).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_a_split_whose_labels_are_of_one_kind_is_refused_by_the_name_of_the_task(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "films"
    train.main(arguments(data_folder, run))
    short = make_table(3)
    bought = short.schema.get_field_index("bought")
    nobody = pa.array(
        [[0.0] * len(labels) for labels in short["bought"].to_pylist()], short.schema.field("bought").type
    )
    write_requests(data, SCHEMA, {"test": [short.set_column(bought, short.schema.field("bought"), nobody)]})
    line = refused(capsys, evaluate.main, [f"--run_folder={run}", f"--data={data}"])
    assert line.startswith("error: bought: all 6 labels are 0: ")
    assert "3 requests were scored, evaluate a split of more" in line
