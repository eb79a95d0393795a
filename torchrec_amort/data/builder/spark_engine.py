"""Apache Spark runs the plan, here or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from torchrec_amort.data.builder.config import SourceConfig, Unit
from torchrec_amort.data.builder.steps import MICROSECONDS_PER, Explode, Step
from torchrec_amort.data.builder.tables import csv_types, is_csv
from torchrec_amort.data.parquet import visible_files
from torchrec_amort.errors import InputError

ROWS_PER_BATCH = 65_536


class Spark:
    """An `Engine`.

    Args:
        folder: where it keeps tables that several steps read; all workers have to see it.
        master: the cluster's URL, or `local[2]`.
        memory: of each worker's process, such as `4g`.
    """

    def __init__(self, folder: Path, master: str, memory: str) -> None:
        self._folder, self._master, self._memory = folder, master, memory

    def __enter__(self) -> Spark:
        builder = SparkSession.builder.appName("torchrec-amort build").master(self._master)
        options = {
            "spark.driver.memory": self._memory,
            "spark.executor.memory": self._memory,
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.enabled": "true",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        for name, value in options.items():
            builder = builder.config(name, value)
        self._spark = builder.getOrCreate()
        self._spark.sparkContext.setLogLevel("ERROR")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._spark.stop()

    def read(self, name: str, files: Mapping[str, Sequence[str]], source: SourceConfig) -> None:
        with _telling(name, ": check the source's files, and that Spark has their connector"):
            table = reduce(DataFrame.unionByName, self._parts(files, source))
        table.createOrReplaceTempView(f"`{name}`")

    def _parts(self, files: Mapping[str, Sequence[str]], source: SourceConfig) -> Iterator[DataFrame]:
        for part, paths in files.items():
            if any(map(is_csv, paths)):
                types = csv_types(source, paths)
                schema = ", ".join(f"`{column}` {_spark_type(kind)}" for column, kind in types.items())
                separator = source.separator or ","
                table = self._spark.read.csv(list(paths), schema, sep=separator, header=not source.names)
            else:
                table = self._spark.read.option("mergeSchema", "true").parquet(*paths)
            yield table.withColumn("part", F.lit(part)) if part else table

    @staticmethod
    def instant(expression: str, unit: Unit, zone: str) -> str:
        if unit != "timestamp":
            return f"CAST({expression} AS BIGINT) * {MICROSECONDS_PER[unit]}"
        return f"UNIX_MICROS(TO_UTC_TIMESTAMP(CAST({expression} AS TIMESTAMP), '{zone}'))"

    def run(self, step: Step) -> None:
        table = self._table(step.sql, step.name)
        if step.kept:
            path = str(self._folder / step.name)
            with _telling(step.name):
                table.write.parquet(path)
            table = self._spark.read.parquet(path)
        table.createOrReplaceTempView(f"`{step.name}`")

    def explode(self, step: Explode) -> None:
        table = self._spark.table(f"`{step.of}`")
        kept = [f"`{column}`" for column in table.columns if column not in step.columns]
        zipped = F.arrays_zip(*(F.col(f"`{column}`") for column in step.columns))
        table.select(*kept, F.inline(zipped).alias(*step.columns)).createOrReplaceTempView(f"`{step.name}`")

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        table = self._table(sql, "a check")
        with _telling("a check"):
            return [tuple(row) for row in table.collect()]

    def batches(self, sql: str) -> Iterator[pa.Table]:
        folder = self._folder / f"result{len(list(self._folder.glob('result*')))}"
        table = self._table(sql, "the result")
        with _telling("the result"):
            table.write.parquet(str(folder))
        # A sort puts ranges of rows into files, which are numbered in their order.
        for path in visible_files(folder.glob("*.parquet"), folder):
            with pq.ParquetFile(path) as file:
                # Without what Spark tells of itself.
                schema = file.schema_arrow.remove_metadata()
                yield schema.empty_table()
                for batch in file.iter_batches(ROWS_PER_BATCH):
                    yield pa.Table.from_batches([batch]).replace_schema_metadata(None)

    def _table(self, sql: str, what: str) -> DataFrame:
        with _telling(what):
            return self._spark.sql(sqlglot.transpile(sql, read="duckdb", write="spark")[0])


@contextmanager
def _telling(what: str, advice: str = "") -> Iterator[None]:
    """Tell on one line what Spark refuses, without the lines of Java that raised it."""
    try:
        yield
    except (PySparkException, Py4JError, sqlglot.errors.SqlglotError) as error:
        told = " ".join(str(error).partition("\n\tat ")[0].split())
        raise InputError(f"{what}: {told}{advice}") from error


def _spark_type(kind: str) -> str:
    return sqlglot.exp.DataType.build(kind, dialect="duckdb").sql("spark")
