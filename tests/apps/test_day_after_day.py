"""What a team does every day: train on the new requests from the day before, and send what changed."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.conftest import SCHEMA, make_table
from tests.serving.test_scorer import make_batch
from tests.serving.test_signing import make_key
from tests.training.test_training import MODEL, losses, refused
from torchrec_amort import AmortizedScorer, load_package
from torchrec_amort.apps import apply, export, train
from torchrec_amort.data.writer import write_requests


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two days of requests, one each half hour."""
    table = make_table(96)
    times = pa.array([20 * 86_400 + 1800 * row for row in range(len(table))])
    table = table.set_column(table.column_names.index("time"), "time", times)
    write_requests(tmp_path / "data", SCHEMA, {"train": [table[:60]], "test": [table[60:]]})
    return tmp_path / "data"


@pytest.mark.usefixtures("uncompiled")
def test_a_day_more_is_trained_on_and_sent_as_what_changed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, packages = tmp_path / "runs", tmp_path / "packages"
    common = ["--data", str(data), "--batch_size=24", "--loop.epochs=1", *MODEL]
    monday = [f"--run_folder={runs / 'monday'}", "--until=1970-01-22"]
    tuesday = [f"--run_folder={runs / 'tuesday'}", "--since=1970-01-22", "--until=1970-01-23"]
    train.main([*common, *monday])
    train.main([*common, *tuesday, f"--warm_start={runs / 'monday'}"])
    assert [max(losses(runs / day)) for day in ("monday", "tuesday")] == [2, 2]
    assert f"starts with {runs / 'monday' / 'checkpoints' / 'step-000000002'}" in capsys.readouterr().out
    export.main([f"--run_folder={runs / 'monday'}", f"--out={packages / 'monday'}"])
    export.main([f"--run_folder={runs / 'tuesday'}", f"--out={packages / 'whole'}"])
    since = [f"--run_folder={runs / 'tuesday'}", f"--out={packages / 'delta'}", f"--since={packages / 'monday'}"]
    make_key(tmp_path)
    export.main([*since, f"--signing_key={tmp_path / 'signing.pem'}"])
    assert "rows have changed since" in capsys.readouterr().out
    apply.main([f"--delta={packages / 'delta'}", f"--base={packages / 'monday'}", f"--out={packages / 'tuesday'}"])
    # Traced programs have the names of temporary files; tables and schema are the same bytes.
    sums = [json.loads((packages / name / "manifest.json").read_text())["sha256"] for name in ("whole", "tuesday")]
    assert sums[0].keys() == sums[1].keys()
    for name in ("tables.pt", "schema.json"):
        assert sums[0][name] == sums[1][name]
    batch = make_batch([(5, 4), (0, 1)])
    scores = [AmortizedScorer(load_package(packages / name)).score(batch) for name in ("whole", "tuesday", "monday")]
    load_package(packages / "tuesday", trusted_key=tmp_path / "trusted.pem")
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    line = refused(capsys, export.main, since)
    assert "is there already" in line
    line = refused(capsys, export.main, [*since[:1], f"--out={packages / 'other'}", f"--since={runs}"])
    assert "is no package" in line


def test_a_run_of_some_times_is_not_validated_on_what_it_is_trained_on_and_goes_on_with_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), f"--run_folder={tmp_path / 'run'}", "--batch_size=24", "--loop.epochs=1", *MODEL]
    line = refused(capsys, train.main, [*common, "--since=1970-01-22", "--loop.validate_every=1"])
    assert "loop.validate_every is 1, but requests from 1970-01-22 until the end may be of the validation split" in line
    train.main([*common, "--since=1970-01-22"])
    line = refused(capsys, train.main, [*common, "--since=1970-01-21", "--resume=true"])
    assert (
        "is of a run with since=1970-01-22, the config says 1970-01-21, which are other batches: use the same" in line
    )
    line = refused(capsys, train.main, [*common, "--since=1970-01-22", "--resume=true", "--warm_start=elsewhere"])
    assert "is of a run with warm_start=None, the config says elsewhere, which is another start" in line
