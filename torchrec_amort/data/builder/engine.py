"""What an engine of the plan has to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pyarrow as pa

from torchrec_amort.data.builder.config import SourceConfig, Unit
from torchrec_amort.data.builder.steps import Explode, Step


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs the plan for as long as it is entered."""

    def instant(self, expression: str, unit: Unit, zone: str) -> str:
        """SQL of the microseconds since 1970 UTC of a time."""

    def read(self, name: str, files: Mapping[str, Sequence[str]], source: SourceConfig) -> None:
        """Make a table of files, with column `part` if they have names.

        Args:
            name: of the table.
            files: Parquet or CSV files, by the name of their part; `""` if there is only one.
            source: how CSV is to be read.

        Raises:
            InputError: files cannot be read.
        """

    def explode(self, step: Explode) -> None:
        """Make a table of a row for each entry of another's lists."""

    def run(self, step: Step) -> None:
        """Make a table of the plan.

        Raises:
            InputError: the SQL of the config cannot be run.
        """

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Some rows."""

    def batches(self, sql: str) -> Iterator[pa.Table]:
        """Rows in their order, some thousand at a time; an empty table if there is none."""
