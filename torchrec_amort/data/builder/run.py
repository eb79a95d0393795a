"""Builds a prepared data folder out of raw logs."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_amort.data.builder import histories as history_sql
from torchrec_amort.data.builder.config import BuildConfig, FeatureConfig
from torchrec_amort.data.builder.counted import unfinished
from torchrec_amort.data.builder.duckdb_engine import DuckDB
from torchrec_amort.data.builder.engine import Engine
from torchrec_amort.data.builder.folder import BuiltFolder, fetch_state, make_folder
from torchrec_amort.data.builder.plan import SPLITS, Plan, Span, tables_of
from torchrec_amort.data.builder.requests import Requests
from torchrec_amort.data.builder.steps import MICROSECONDS, Explode, Step
from torchrec_amort.data.builder.tables import refuse_other_types
from torchrec_amort.data.counts import COUNTS_FILE
from torchrec_amort.data.events import StoredHistories, write_events
from torchrec_amort.data.parquet import visible_files
from torchrec_amort.data.tables import of_sizes
from torchrec_amort.data.writer import ROWS_PER_GROUP, WrittenSplit, write_splits
from torchrec_amort.errors import InputError
from torchrec_amort.files import is_there, refuse_existing
from torchrec_amort.hashing import Vocabulary
from torchrec_amort.lock import LOCK_FILE, FolderLock
from torchrec_amort.progress import progress
from torchrec_amort.schema import SCHEMA_FILE, Feature, RequestSchema
from torchrec_amort.stores import Location, Stored, files_below, location
from torchrec_amort.times import instant

SUFFIXES = (".parquet", ".csv", ".csv.gz")
# What may be another one when a build goes on.
_OF_A_RUN = ("out", "sources", "since", "until", "engine", "master", "memory", "threads", "overwrite")


def build(config: BuildConfig) -> dict[str, int]:
    """Write the requests of raw logs as a prepared data folder, or append them to one, whole or not at all.

    Args:
        config: the logs, and what becomes of them.

    Returns:
        dict: requests that were written of each split.

    Raises:
        InputError: the config does not fit itself, the logs or the folder, or another process builds it.
    """
    out = location(config.out)
    return _build_here(config, out, out) if isinstance(out, Path) else _build_on_store(config, out)


def _build_on_store(config: BuildConfig, out: Stored) -> dict[str, int]:
    """Build a folder here and put it there, or what is new of it."""
    if not out.parts[1:]:
        raise InputError(f"{out}: a whole store or bucket would be replaced: give a folder in it")
    # Asked in any case: what the store refuses is told before hours of work.
    if (out.is_dir() or out.is_file()) and not config.overwrite and config.since is None:
        raise is_there(out)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / out.name
        if config.since is None:
            written = _build_here(config, here, here)
            out.put_folder(here, first=SCHEMA_FILE)
            return written
        counts = out / COUNTS_FILE
        version = counts.version
        before = fetch_state(out, here)
        written = _build_here(config, here, out)
        if counts.version != version:
            raise InputError(f"{out}: another process has added to it meanwhile: build again")
        out.put_files(here, [file for file in files_below(here) if file not in before], last=COUNTS_FILE)
    return written


def _build_here(config: BuildConfig, out: Path, whole: Location) -> dict[str, int]:
    """Build a folder on this machine; if it goes on, `whole` has the files of what it goes on from.

    `out` may lack what is not written again.
    """
    # One place for all that is not finished: who comes next removes what a killed build left.
    work = out.with_name(f".{out.name}.build")
    try:
        with FolderLock(work):
            _clear(work)
            try:
                return _build(config, out, work, whole)
            finally:
                _clear(work)
    finally:
        with suppress(OSError):
            work.rmdir()


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _build(config: BuildConfig, out: Path, work: Path, whole: Location) -> dict[str, int]:
    ends = _time("train_until", config.train_until), _time("validation_until", config.validation_until)
    if ends[0] > ends[1]:
        raise InputError(
            f"validation_until is {config.validation_until!r}, before train_until {config.train_until!r}: give a later "
            "time"
        )
    since, until = (
        None if value is None else _time(name, value)
        for name, value in (("since", config.since), ("until", config.until))
    )
    folder = None
    if since is None:
        refuse_existing(out, config.overwrite)
        span = Span(ends, until=until)
    else:
        folder = BuiltFolder.load(out)
        _refuse_other_config(config, folder, since)
        stored = StoredHistories.load(whole).num_events()
        num_requests = sum(sum(build["sizes"].values()) for build in folder.builds)
        span = Span(ends, since, until, folder.builds[-1]["end"], num_requests, stored)
    # What cannot be a schema is told before the logs are read.
    schema_of(config, {name: _any_vocabulary(feature) for name, feature in tables_of(config).items()})
    with _engine(config, work / "plan") as engine:
        plan = Plan(config, span, engine.instant)
        _run(plan, engine)
        schema = schema_of(config, _vocabularies(plan, engine)) if folder is None else folder.schema
        written, histories = _write(plan, engine, schema, work, {} if folder is None else folder.first_files())
        record = _record(plan, engine, written)
    if folder is None:
        make_folder(out, work / "requests", schema, written, histories, record, overwrite=config.overwrite)
    else:
        if not sum(record["sizes"].values()):
            raise InputError(f"since is {config.since!r}, but there are no requests from then on: give other logs")
        folder.append(work / "requests", written, histories, record)
    return dict(record["sizes"])


def _time(name: str, value: str) -> int:
    """The instant of a time of the config."""
    return round(instant(name, value) * MICROSECONDS)


def _refuse_other_config(config: BuildConfig, folder: BuiltFolder, since: int) -> None:
    """Refuse to append requests that would not be those of one build of all logs."""
    mine = _comparable(config)
    for name, value in folder.builds[0]["config"].items():
        if mine[name] != value:
            raise InputError(f"since: {name} is {mine[name]}, but the folder was built with {value}: build it anew")
    end = folder.builds[-1]["end"]
    if since < end:
        last = datetime.fromtimestamp(end / MICROSECONDS, timezone.utc).isoformat()
        raise InputError(f"since is {config.since!r}, but there are requests until {last} already: give a later time")
    for build in folder.builds:
        for name, label in build["labels"].items():
            if late := label["requests_without_all_their_time"]:
                raise InputError(
                    f"since: {late} requests that are there were built before their time for label {name} was up, so "
                    "it may be wrong: build them anew, with an earlier until"
                )


def _comparable(config: BuildConfig) -> dict[str, Any]:
    """What all builds of a folder have alike; sources but for their files."""
    given = dataclasses.asdict(config)
    sources = {name: {**source, "files": None} for name, source in given["sources"].items()}
    return {"sources": sources} | {name: value for name, value in given.items() if name not in _OF_A_RUN}


def _engine(config: BuildConfig, folder: Path) -> Engine:
    if config.engine == "spark":
        from torchrec_amort.data.builder.spark_engine import Spark  # noqa: PLC0415

        return Spark(folder, config.master, config.memory)
    return DuckDB(folder, config.memory, config.threads)


def _run(plan: Plan, engine: Engine) -> None:
    for name, source in plan.config.sources.items():
        files = source.files if isinstance(source.files, dict) else {"": source.files}
        parts = {part: _files(name, given, plan.config.engine) for part, given in files.items()}
        refuse_other_types(name, [path for paths in parts.values() for path in paths], plan.config.engine)
        engine.read(f"raw_{name}", parts, source)
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
        if engine == "spark":
            return [given]
        kept = [str(file) for file in _stored(path) if path == file or file.name.endswith(SUFFIXES)]
    else:
        found = (
            [path] if path.is_file() else visible_files(path.rglob("*"), path) if path.is_dir() else glob.glob(given)
        )
        kept = sorted(str(file) for file in found if path.is_file() or str(file).endswith(SUFFIXES))
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


def _write(
    plan: Plan, engine: Engine, schema: RequestSchema, work: Path, first_files: Mapping[str, int]
) -> tuple[dict[str, WrittenSplit], StoredHistories]:
    """Write the files of events and of requests."""
    config, events, files = plan.config, {}, {}
    for place, name in enumerate(config.histories):
        path = work / f"events-{place}.parquet"
        ((total,),) = engine.rows(history_sql.num_written(name))
        tables = _shown(f"events of {name}", total, "events", engine.batches(history_sql.events(config, name)))
        events[name], files[name] = write_events(path, tables), str(path)
    sizes = dict(engine.rows("SELECT __split, count(*) FROM requests GROUP BY __split"))
    lengths = {name: history.length for name, history in config.histories.items()}
    requests = Requests(engine.batches(plan.candidates()), schema, events, lengths, plan.span.num_events)
    splits = {
        split: _shown(split, sizes.get(i, 0), "requests", requests.of_split(split)) for i, split in enumerate(SPLITS)
    }
    if plan.span.since is not None:
        splits = {split: tables for i, (split, tables) in enumerate(splits.items()) if i in sizes}
    # Cut anew, whatever the engine gave at a time: the same requests are the same files.
    splits = {split: _in_pieces(tables) for split, tables in splits.items()}
    histories = StoredHistories({name: [file] for name, file in files.items()} if config.pointers else {})
    (work / "requests").mkdir()
    written = write_splits(
        work / "requests", schema, splits, histories=histories, first_files=first_files, is_finer=True
    )
    return written, histories


def _in_pieces(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for table in of_sizes(tables, itertools.repeat(ROWS_PER_GROUP)):
        yield table.combine_chunks()


def _shown(what: str, total: int, unit: str, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    with progress(total=total, desc=what, unit=unit) as bar:
        for table in tables:
            yield table
            bar.update(table.num_rows)


def _record(plan: Plan, engine: Engine, written: Mapping[str, WrittenSplit]) -> dict[str, Any]:
    """What was built, and what could be wrong with it."""
    config = plan.config
    histories = {}
    for name, history in config.histories.items():
        known = np.concatenate([table["__seen"].to_numpy() for table in engine.batches(history_sql.lengths(name))])
        kept = np.minimum(known, history.length)
        histories[name] = {
            "kept": _shape(kept),
            "known": _shape(known),
            # Requests that know no event, one, two or three, four to seven, ...
            "requests_by_bits_of_known": np.bincount(np.frexp(known.astype(np.float64))[1]).tolist(),
            "requests_with_events_of_their_instant": engine.rows(history_sql.same_instant(config, name))[0][0],
            "events_available_later": engine.rows(history_sql.late(name))[0][0],
        }
    labels = {
        name: {"requests_without_all_their_time": engine.rows(unfinished(config, name))[0][0]} for name in config.labels
    }
    ((latest,),) = engine.rows("SELECT max(__time) FROM requests")
    return {
        "sizes": {split: one.counts.requests for split, one in written.items()},
        "end": (0 if latest is None else latest + 1) if plan.span.until is None else plan.span.until,
        "histories": histories,
        "labels": labels,
        "config": _comparable(config),
    }


def _shape(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {"mean": 0.0, "median": 0.0, "max": 0}
    return {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _vocabularies(plan: Plan, engine: Engine) -> dict[str, Vocabulary]:
    vocabularies = {}
    for table in tables_of(plan.config):
        batches = [batch["__value"] for batch in engine.batches(plan.vocabulary(table))]
        values = pa.chunked_array([chunk for column in batches for chunk in column.chunks])
        if not pa.types.is_string(values.type):
            values = values.cast(pa.int64())
        vocabularies[table] = Vocabulary(values.combine_chunks())
    return vocabularies


def _any_vocabulary(feature: FeatureConfig) -> Vocabulary:
    return Vocabulary(pa.array(["?"]) if feature.text else pa.array([0], pa.int64()))


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
