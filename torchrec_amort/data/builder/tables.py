"""What the files of a source look like, before an engine reads them."""

from __future__ import annotations

from collections.abc import Iterable

import duckdb
import pyarrow as pa

from torchrec_amort.data.builder.config import SourceConfig
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.stores import Stored, location, open_parquet, reading


def is_csv(path: str) -> bool:
    """Whether a file is CSV, by its name."""
    return not path.endswith(".parquet")


def refuse_other_types(name: str, paths: Iterable[str], engine: str) -> None:
    """Refuse Parquet files of one source whose columns are of different kinds: an engine would take both for text.

    Args:
        name: of the source.
        paths: of its files.
        engine: `spark` reads stores by its own connectors, and looks at their types itself.

    Raises:
        InputError: names the files and the column; or a file cannot be read.
    """
    first: dict[str, tuple[str, pa.DataType]] = {}
    for path in paths:
        where = location(path)
        if is_csv(path) or (engine == "spark" and isinstance(where, Stored)):
            continue
        with (
            reading(where, f"sources.{name}: not a complete Parquet file", "copy it again, or leave it out"),
            open_parquet(where) as file,
        ):
            schema = file.schema_arrow
        for field in schema:
            before, kind = first.setdefault(field.name, (path, field.type))
            if _kind(kind) != _kind(field.type):
                raise InputError(
                    f"sources.{name}: column {field.name!r} is {kind} in {before}, but {field.type} in {path}: mend "
                    "one of the files, or leave it out"
                )


def _kind(given: pa.DataType) -> str:
    """What an engine may take for each other without a loss."""
    if pa.types.is_list(given) or pa.types.is_large_list(given):
        return f"list of {_kind(given.value_type)}"
    if pa.types.is_dictionary(given):
        return _kind(given.value_type)
    kinds = {
        "integer": pa.types.is_integer,
        "number": pa.types.is_floating,
        "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    }
    for kind, holds in kinds.items():
        if holds(given):
            return kind
    if pa.types.is_timestamp(given):
        return f"timestamp of {'a zone' if given.tz else 'no zone'}"
    return str(given)


def csv_reader(source: SourceConfig, paths: Iterable[str]) -> str:
    """DuckDB's way to read CSV of a source."""
    listed = ", ".join(map(text, paths))
    options = ["union_by_name = true"]
    if source.separator is not None:
        options.append(f"delim = {text(source.separator)}")
    if source.names:
        options.append(f"header = false, names = [{', '.join(map(text, source.names))}]")
    if source.types:
        types = ", ".join(f"{text(column)}: {text(kind)}" for column, kind in source.types.items())
        options.append(f"types = {{{types}}}")
    return f"read_csv([{listed}], {', '.join(options)})"


def csv_types(source: SourceConfig, paths: Iterable[str]) -> dict[str, str]:
    """The SQL types of CSV's columns, so that all engines read it alike."""
    try:
        found = duckdb.execute(f"DESCRIBE SELECT * FROM {csv_reader(source, paths)}").fetchall()
    except duckdb.Error as error:
        raise InputError(f"CSV: {one_line(error)}") from error
    return {column: kind for column, kind, *_ in found}


def text(value: str) -> str:
    """A text as SQL has it."""
    return "'" + value.replace("'", "''") + "'"
