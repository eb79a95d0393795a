"""Apache Spark gives the rows of DuckDB, bit for bit; on the cluster of SPARK_MASTER, or on cores of this machine."""

from __future__ import annotations

import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("duckdb")

from tests.data.test_builder import config_of, expected_rows, found_rows, small_config, with_source, write_logs
from torchrec_amort.config import config_of as read_config
from torchrec_amort.config import parser_of
from torchrec_amort.data.builder.config import BuildConfig
from torchrec_amort.data.builder.run import build
from torchrec_amort.errors import InputError

MASTER = os.environ.get("SPARK_MASTER", "local[2]")
EXAMPLES = Path(__file__).parents[2] / "examples"


def assert_same_files(one: Path, other: Path) -> None:
    files = [sorted(folder.rglob("*.parquet")) for folder in (one, other)]
    assert len(files[0]) == len(files[1]) > 1
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes(), first


@pytest.mark.spark
@pytest.mark.parametrize("seed", range(3))
def test_spark_gives_the_same_rows_bit_for_bit(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    random = np.random.default_rng(seed)

    def some(most: int) -> list[int]:
        return random.integers(20, size=random.integers(1, most)).tolist()

    def who() -> str:
        return str(random.choice(["ann", "bob", "cyd"]))

    def item() -> int:
        return int(random.integers(1, 7))

    clicks = [(who(), second, item(), int(random.integers(7))) for second in some(40)]
    buys = [(who(), second, item()) for second in some(30)]
    shown = [(who(), second, sorted({item() for _ in range(4)})) for second in some(20)]
    prices = {(item(), second - 5): item() for second in some(15)}
    found = []
    for engine in ("duckdb", "spark"):
        (tmp_path / engine).mkdir()
        write_logs(tmp_path / engine, clicks, buys, shown, prices)
        build(replace(config_of(tmp_path / engine, engine), master=MASTER))
        found.append(found_rows(tmp_path / engine / "out"))
    assert found[1] == found[0] == expected_rows(clicks, buys, shown, prices)
    assert_same_files(tmp_path / "duckdb" / "out", tmp_path / "spark" / "out")


@pytest.mark.spark
def test_spark_gives_the_same_rows_of_many(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    events = int(float(os.environ.get("EVENTS", "1e7")))
    generate = runpy.run_path(str(EXAMPLES / "generate_logs.py"))["generate"]
    generate(tmp_path / "logs", events, events // 10, events // 50, days=10, seed=0)
    config = read_config(
        parser_of(BuildConfig, "build").parse_args(["--config", str(EXAMPLES / "build_logs.yaml")]),
        BuildConfig,
        "build",
    )
    sources = {
        name: replace(source, files=str(source.files).replace("logs/", f"{tmp_path}/logs/"))
        for name, source in config.sources.items()
    }
    for engine in ("duckdb", "spark"):
        build(replace(config, out=str(tmp_path / engine), sources=sources, engine=engine, master=MASTER, memory="2g"))
    assert_same_files(tmp_path / "duckdb", tmp_path / "spark")


@pytest.mark.spark
@pytest.mark.parametrize("files", ["file:///nowhere/clicks.parquet", "none://films/clicks.parquet"])
def test_what_spark_cannot_read_is_told_on_one_line(tmp_path: Path, files: str) -> None:
    pytest.importorskip("pyspark")
    config = replace(small_config(tmp_path), engine="spark", master=MASTER)
    with pytest.raises(InputError, match="^raw_clicks: .*check the source's files, and that Spark has") as refused:
        build(with_source(config, "clicks", files=files))
    assert "\n" not in str(refused.value)
