"""From EB-NeRD's raw files to a served model, as docs/building.md has it."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data.ebnerd_loops import make_raw, write_folder
from tests.launch import ROOT
from tests.pages import commands
from torchrec_amort.apps import build
from torchrec_amort.data import ebnerd
from torchrec_amort.data.counts import read_counts, sizes

SMALL = {
    "train": ["--model.embedding_dim=8", "--model.history_layers=1", "--loop.epochs=1", "--batch_size=64"],
    # Few of its articles are in train as often as the page's config asks for.
    "build": ["--vocabularies={article: 1}", "--threads=1"],
}


def ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("uncompiled")
def test_the_pages_commands_make_a_served_model_of_raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "ebnerd_demo", make_raw(0))
    ready(tmp_path, monkeypatch)
    lines = [shlex.split(line) for line in commands("docs/building.md") if line.startswith("torchrec-amort ")]
    assert [line[1] for line in lines] == ["build", "train", "export"]
    for _, name, *arguments in lines:
        importlib.import_module(f"torchrec_amort.apps.{name}").main([*arguments, *SMALL.get(name, [])])
    assert (tmp_path / "packages" / "ebnerd-built" / "manifest.json").is_file()
    ebnerd.prepare(tmp_path / "ebnerd_demo", tmp_path / "prepared")
    for split in ("train", "validation", "test"):
        built, prepared = (pq.read_table(folder / split) for folder in (Path("data/ebnerd-built"), Path("prepared")))
        assert built.num_rows > 0
        assert built["time"].equals(prepared["time"])
        assert built["user"].equals(prepared["user"])
        assert built["clicked_age"].equals(prepared["clicked_time"])


def test_the_public_demo_has_its_known_counts(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (demo := shared_data / "ebnerd-demo").is_dir():
        pytest.skip(f"no {demo}")
    (tmp_path / "ebnerd_demo").symlink_to(demo)
    ready(tmp_path, monkeypatch)
    build.main(["--config", "examples/build_ebnerd.yaml"])
    assert sizes(read_counts("data/ebnerd-built")) == {
        "train": {"requests": 21_318, "candidates": 240_288, "users": 1_547},
        "validation": {"requests": 3_406, "candidates": 37_851, "users": 850},
        "test": {"requests": 25_356, "candidates": 304_915, "users": 1_562},
    }


def test_the_public_log_of_videos_has_the_counts_of_prepare(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (data := shared_data / "kuairand-pure").is_dir():
        pytest.skip(f"no {data}")
    (tmp_path / "KuaiRand-Pure").symlink_to(data)
    ready(tmp_path, monkeypatch)
    build.main(["--config", "examples/build_kuairand.yaml"])
    assert sizes(read_counts("data/kuairand-built")) == {
        "train": {"requests": 176_579, "candidates": 177_952, "users": 24_389},
        "validation": {"requests": 22_096, "candidates": 22_244, "users": 10_555},
        "test": {"requests": 22_084, "candidates": 22_245, "users": 10_782},
    }
