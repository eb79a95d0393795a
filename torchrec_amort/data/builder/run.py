"""Builds a prepared data folder out of raw logs."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_amort.data.builder.config import BuildConfig, FeatureConfig
from torchrec_amort.data.builder.duckdb_engine import DuckDB
from torchrec_amort.data.builder.engine import Engine
from torchrec_amort.data.builder.plan import MICROSECONDS, SPLITS, Explode, Plan, Step, tables_of
from torchrec_amort.data.builder.requests import Requests
from torchrec_amort.data.events import Events, StoredHistories, write_events
from torchrec_amort.data.parquet import visible_files
from torchrec_amort.data.writer import write_requests
from torchrec_amort.errors import InputError
from torchrec_amort.files import is_there, write_json
from torchrec_amort.hashing import Vocabulary
from torchrec_amort.progress import progress
from torchrec_amort.schema import SCHEMA_FILE, Feature, RequestSchema
from torchrec_amort.stores import Stored, location

REPORT_FILE = "build.json"
SUFFIXES = (".parquet", ".csv", ".csv.gz")


def build(config: BuildConfig) -> dict[str, dict[str, int]]:
    """Write the requests of raw logs as a prepared data folder, whole or not at all.

    Args:
        config: the logs, and what becomes of them.

    Returns:
        dict: requests, candidates and users of each split.

    Raises:
        InputError: the config does not fit itself or the logs, or the folder is there already.
    """
    out = location(config.out)
    if isinstance(out, Path):
        return _build(config, out)
    if not out.parts[1:]:
        raise InputError(f"{out}: a whole store or bucket would be replaced: give a folder in it")
    # Asked in any case: what the store refuses is told before hours of work.
    if (out.is_dir() or out.is_file()) and not config.overwrite:
        raise is_there(out)
    with tempfile.TemporaryDirectory() as folder:
        counts = _build(config, Path(folder) / out.name)
        out.put_folder(Path(folder) / out.name, first=SCHEMA_FILE)
    return counts


def _build(config: BuildConfig, out: Path) -> dict[str, dict[str, int]]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.plan.", dir=out.parent) as folder,
        _engine(config, Path(folder)) as engine,
    ):
        plan = Plan(config, _until(config), engine.instant)
        _run(plan, engine)
        schema = schema_of(config, _vocabularies(plan, engine))
        events: dict[str, Events] = {}
        files: dict[str, str] = {}
        for name in config.histories:
            path = Path(folder) / f"{len(events)}.parquet"
            events[name], files[name] = write_events(path, engine.batches(plan.events(name))), str(path)
        lengths = {name: history.length for name, history in config.histories.items()}
        sizes = dict(engine.rows("SELECT __split, count(*) FROM requests GROUP BY __split"))
        requests = Requests(engine.batches(plan.candidates()), schema, events, lengths)
        splits = {split: _shown(split, sizes.get(i, 0), requests.of_split(split)) for i, split in enumerate(SPLITS)}
        histories = StoredHistories(files if config.pointers else {})
        counts = write_requests(out, schema, splits, histories=histories, overwrite=config.overwrite)
        write_json(out / REPORT_FILE, _report(plan, engine, counts))
    return counts


def _shown(split: str, total: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    with progress(total=total, desc=split, unit="requests") as bar:
        for table in tables:
            yield table
            bar.update(table.num_rows)


def _report(plan: Plan, engine: Engine, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What was built, and what could be wrong with it."""
    histories = {}
    for name, history in plan.config.histories.items():
        known = np.concatenate([table["__seen"].to_numpy() for table in engine.batches(plan.lengths(name))])
        kept = np.minimum(known, history.length)
        histories[name] = {
            "kept": {"mean": float(kept.mean()), "median": float(np.median(kept)), "max": int(kept.max())},
            "known": {"mean": float(known.mean()), "median": float(np.median(known)), "max": int(known.max())},
            # Requests that know no event, one, two or three, four to seven, ...
            "requests_by_bits_of_known": np.bincount(np.frexp(known.astype(np.float64))[1]).tolist(),
            "requests_with_events_of_their_instant": engine.rows(plan.same_instant(name))[0][0],
            "events_available_later": engine.rows(plan.late(name))[0][0],
        }
    labels = {
        name: {"requests_without_all_their_time": engine.rows(plan.unfinished(name))[0][0]}
        for name in plan.config.labels
    }
    return {"splits": counts, "histories": histories, "labels": labels}


def _engine(config: BuildConfig, folder: Path) -> Engine:
    if config.engine == "spark":
        from torchrec_amort.data.builder.spark_engine import Spark  # noqa: PLC0415

        return Spark(folder, config.master, config.memory)
    return DuckDB(folder, config.memory, config.threads)


def _until(config: BuildConfig) -> list[int]:
    """The instants that end the splits."""
    instants = []
    for name in ("train_until", "validation_until"):
        try:
            time = datetime.fromisoformat(getattr(config, name))
        except ValueError as error:
            raise InputError(f"{name} is {getattr(config, name)!r}, not a time such as 2023-05-24 07:00") from error
        time = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
        instants.append(round(time.timestamp() * MICROSECONDS))
    if instants[0] > instants[1]:
        raise InputError(
            f"validation_until is {config.validation_until!r}, before train_until {config.train_until!r}: give a later "
            "time"
        )
    return instants


def _run(plan: Plan, engine: Engine) -> None:
    for name, source in plan.config.sources.items():
        files = source.files if isinstance(source.files, dict) else {"": source.files}
        engine.read(f"raw_{name}", {part: _files(name, given, plan.config.engine) for part, given in files.items()})
    steps = list(plan.steps())
    with progress(total=len(steps), desc="plan", unit="steps") as bar:
        for step in steps:
            if isinstance(step, Step):
                engine.run(step)
            elif isinstance(step, Explode):
                engine.explode(step)
            elif wrong := engine.rows(step.sql):
                raise InputError(step.what.format(*wrong[0]))
            bar.update()


def _files(name: str, given: str, engine: str) -> list[str]:
    """The Parquet or CSV files of a file, folder or pattern, in the order of their names."""
    path = location(given)
    if isinstance(path, Stored):
        if engine == "spark":  # It reads stores by its own connectors, and their patterns.
            return [given]
        kept = [str(file) for file in _stored(path) if file.name.endswith(SUFFIXES)]
    else:
        found = (
            [path] if path.is_file() else visible_files(path.rglob("*"), path) if path.is_dir() else glob.glob(given)
        )
        kept = sorted(str(file) for file in found if str(file).endswith(SUFFIXES))
    if not kept:
        raise InputError(f"sources.{name}.files: {given}: no such file, folder or pattern of Parquet or CSV")
    return kept


def _stored(given: Stored) -> list[Stored]:
    """The files of a file, folder or pattern on a store."""
    if given.is_file():
        return [given]
    top = given
    while "*" in top.key:
        top = top.parent
    pattern = "/".join(given.parts[len(top.parts) :])
    found = visible_files(top.glob(pattern), top, ".") if pattern else visible_files(top.rglob("*"), top)
    return sorted(found, key=lambda file: file.key)


def _vocabularies(plan: Plan, engine: Engine) -> dict[str, Vocabulary]:
    vocabularies = {}
    for table in tables_of(plan.config):
        batches = [batch["__value"] for batch in engine.batches(plan.vocabulary(table))]
        values = pa.chunked_array([chunk for column in batches for chunk in column.chunks])
        if not pa.types.is_string(values.type):
            values = values.cast(pa.int64())
        vocabularies[table] = Vocabulary(values.combine_chunks())
    return vocabularies


def schema_of(config: BuildConfig, vocabularies: Mapping[str, Vocabulary]) -> RequestSchema:
    """What the requests are made of.

    Args:
        config: what is built.
        vocabularies: of tables with vocabulary `file`.
    """
    features = [_feature(name, feature, vocabularies) for name, feature in config.features.items()]
    features += [Feature(name, "candidate", "label") for name in config.labels]
    return RequestSchema(config.dataset, tuple(features), tables=config.tables, vocabularies=vocabularies)


def _feature(name: str, given: FeatureConfig, vocabularies: Mapping[str, Vocabulary]) -> Feature:
    table = given.table or name
    size = given.table_size
    if given.vocabulary == "file" and size is None:
        size = len(vocabularies[table]) + 1
    return Feature(
        name,
        given.side,
        given.kind,
        size,
        vocabulary=given.vocabulary,
        history=given.history,
        table=given.table if given.kind in ("id", "ids", "vector") or size is not None else "",
        size=given.size,
        text=given.text,
        nullable=given.nullable,
    )
