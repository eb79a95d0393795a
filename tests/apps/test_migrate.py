import json
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import SCHEMA, make_table
from tests.launch import launch
from tests.pages import blocks, commands, small_clone
from torchrec_amort.apps import migrate
from torchrec_amort.data.log import SPLITS
from torchrec_amort.data.writer import write_requests

PAGE = "docs/migration.md"


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder whose request ids are those of one request each."""
    folder = tmp_path_factory.mktemp("data") / "films"
    table = make_table(750)
    splits = {"train": table.slice(0, 600), "validation": table.slice(600, 60), "test": table.slice(660)}
    write_requests(folder, SCHEMA, {split: [part] for split, part in splits.items()})
    return folder


def logs_of(folder: Path) -> list[str]:
    return [f"--log.{split}={folder / split}" for split in SPLITS]


def test_impressions_and_back_is_the_same_folder(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    migrate.main(["impressions", "--data", str(data_folder), "--out", str(there)])
    record = json.loads((there / "migration.json").read_text())
    shown = capsys.readouterr().out
    assert f"750 requests of 10 users, {record['impressions']:,} impressions" in shown
    assert f"written to {there}, with migration.json" in shown
    migrate.main(["requests", *logs_of(there), "--schema", str(there / "schema.json"), "--out", str(back)])
    for split in SPLITS:
        assert pq.read_table(back / split).equals(pq.read_table(data_folder / split))
    shown = capsys.readouterr().out
    values = record["columns"]["history_item"]["values"]
    (line,) = (line for line in shown.splitlines() if line.startswith("history_item"))
    assert line.split()[1:3] == [f"{values['impressions']:,}", f"{values['requests']:,}"]
    saved = record["arrow_bytes"]["impressions"] - record["arrow_bytes"]["requests"]
    assert f"saved: {saved / 1e6:,.2f} MB in memory" in shown
    # candidate_item is no repetition.
    assert not any(line.startswith("candidate_item") for line in shown.splitlines())


def test_every_option_reaches_the_conversion(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.main(["impressions", "--data", str(data_folder), "--out", str(tmp_path / "there")])
    table = pq.read_table(tmp_path / "there" / "test")
    places = table["request_id"].cast("string")
    table = table.append_column("session", places).set_column(
        table.column_names.index("price"), "price", table["price"].cast("float64")
    )
    pq.write_table(table, tmp_path / "log.parquet")
    schema = str(tmp_path / "there" / "schema.json")
    args = ["requests", "--log", str(tmp_path / "log.parquet"), "--schema", schema, "--out", str(tmp_path / "back")]
    options = ["--request_key=[session]", "--drop=[request_id,session]", "--rounded=[price]"]
    migrate.main([*args, *options])
    record = json.loads((tmp_path / "back" / "migration.json").read_text())
    assert record["requests"] == 90
    assert [len(pq.read_table(tmp_path / "back" / split)) for split in SPLITS] == [
        record["splits"][split]["requests"] for split in SPLITS
    ]
    assert (record["request_key"], record["dropped"]) == (["session"], ["request_id", "session"])
    assert "columns that were dropped: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        migrate.main([*args, *options])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'back'}: is there already")
    migrate.main([*args, *options, "--overwrite=true"])


def test_bad_input_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for args, message in {
        ("requests", "--log=nowhere", "--schema=nowhere.json", *out): "nowhere.json: no such file: give the JSON file",
        ("impressions", "--data=nowhere", *out): "nowhere/schema.json: no such file",
    }.items():
        with pytest.raises(SystemExit) as stop:
            migrate.main(args)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_page_runs(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_clone(tmp_path, data_folder)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands(PAGE) if not line.startswith("torchrec-amort prepare")]
    assert len(lines) == 2
    for line in lines:
        launch(*shlex.split(line), cwd=tmp_path)
    for block in blocks(PAGE, "python"):
        exec(compile(block, PAGE, "exec"), {"__name__": "migration"})
