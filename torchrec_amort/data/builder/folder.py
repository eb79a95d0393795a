"""The folder that builds write: what each of them added, and what is there of one that did not come to its end.

`builds/0001`, `builds/0002`, ... have the report of a build, `build.json`, and what it counted, for those that go on.
A build is part of the folder once `counts.json` names its files, which is written last; what is not named there is what
a build left that was killed, and goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_amort.data.counts import COUNTS_FILE, SplitCounts, files_of, read_counts
from torchrec_amort.data.events import EVENTS_FILE, EVENTS_FOLDER, StoredHistories, save_histories
from torchrec_amort.data.writer import WrittenSplit, write_counts
from torchrec_amort.errors import InputError, one_line
from torchrec_amort.files import new_folder, write_json
from torchrec_amort.schema import RequestSchema
from torchrec_amort.stores import Stored

BUILDS_FOLDER = "builds"
REPORT_FILE = "build.json"


@dataclass(frozen=True)
class BuiltFolder:
    """A folder of builds.

    Args:
        path: of it.
        builds: the records of its builds, in their order.
        schema: of its requests.
    """

    path: Path
    builds: Sequence[Mapping[str, Any]]
    schema: RequestSchema

    @classmethod
    def load(cls, path: Path) -> BuiltFolder:
        """What is there, after what a killed build left has been removed.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        if not path.is_dir():
            raise InputError(f"{path}: no such folder, so there is nothing to go on from: build it without since")
        schema, counts = RequestSchema.load(path), read_counts(path)
        # The record of a build is the last that it writes there.
        builds = [_record(file) for file in sorted((path / BUILDS_FOLDER).glob(f"*/{REPORT_FILE}"))]
        named = {(split, file) for split, count in counts.items() for file in count.get("files", [])}
        done = [build for build in builds if {tuple(file) for file in build["files"]} <= named]
        if not done:
            raise InputError(f"{path}: was not built by builds that can go on: build it anew, without since")
        folder = cls(path, done, schema)
        folder._remove_others(named)
        return folder

    def _remove_others(self, named: set[tuple[str, str]]) -> None:
        for split in {split for split, _ in named}:
            for file in (self.path / split).glob("*.parquet"):
                if (split, file.name) not in named:
                    file.unlink()
        for folder in sorted((self.path / BUILDS_FOLDER).iterdir())[len(self.builds) :]:
            shutil.rmtree(folder)
        events = self._events()
        known = {file for files in events.values() for file in files}
        for path in (self.path / EVENTS_FOLDER).glob("*.parquet") if events else ():
            if f"{EVENTS_FOLDER}/{path.name}" not in known:
                path.unlink()
        if events:
            save_histories(self.path, events)

    def _events(self) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for build in self.builds:
            for history, file in build["events"].items():
                files.setdefault(history, []).append(file)
        return files

    def append(
        self, parts: Path, written: Mapping[str, WrittenSplit], histories: StoredHistories, record: Mapping[str, Any]
    ) -> None:
        """Make requests that were written elsewhere requests of the folder.

        Args:
            parts: folder of their files.
            written: splits.
            histories: those whose events were stored once.
            record: of the build.
        """
        for split in written:
            (self.path / split).mkdir(exist_ok=True)
            for file in (parts / split).iterdir():
                file.rename(self.path / split / file.name)
        number = len(self.builds) + 1
        record = {**record, "files": _names(written), "events": histories.save(self.path, number)}
        _save(self.path, number, written, record)
        folder = BuiltFolder(self.path, [*self.builds, record], self.schema)
        if histories.files:
            save_histories(self.path, folder._events())
        write_counts(self.path, folder._counted(), names_files=True)

    def _counted(self) -> dict[str, WrittenSplit]:
        """All splits, as all builds have counted them."""
        splits = list(dict.fromkeys(split for build in self.builds for split in build["sizes"]))
        return {split: WrittenSplit(self._counts(split), self._files(split)) for split in splits}

    def _counts(self, split: str) -> SplitCounts:
        counts = SplitCounts(split, self.schema, is_finer=True)
        for place, build in enumerate(self.builds):
            if split in build["sizes"]:
                counts.add_saved(_counts_file(self.path, place + 1, split))
        return counts

    def _files(self, split: str) -> list[str]:
        return [file for build in self.builds for of_split, file in build["files"] if of_split == split]

    def first_files(self) -> dict[str, int]:
        """Of each split, the number of the next file."""
        return {split: len(files_of(self.path, split)) for split in read_counts(self.path)}


def fetch_state(folder: Stored, here: Path) -> set[str]:
    """Copy what a build that goes on reads of a folder on a store: all but requests and their events.

    Args:
        folder: there.
        here: the folder to make.

    Returns:
        set: names of the files there.
    """
    named = {file.key.removeprefix(f"{folder.key}/"): file for file in folder.rglob("*")}
    for name, file in named.items():
        of_requests = name.endswith(".parquet") and "/" in name and not name.startswith(f"{BUILDS_FOLDER}/")
        if not of_requests:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(file.open().read())
    return {*named} - {COUNTS_FILE, EVENTS_FILE}


def make_folder(
    path: Path,
    parts: Path,
    schema: RequestSchema,
    written: Mapping[str, WrittenSplit],
    histories: StoredHistories,
    record: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Make a folder of its first build, whole or not at all.

    Args:
        path: of the folder.
        parts: folder of the files of requests.
        schema: of the requests.
        written: splits.
        histories: those whose events were stored once.
        record: of the build.
        overwrite: replace a folder that is there.
    """
    with new_folder(path, overwrite) as temporary:
        schema.save(temporary)
        BuiltFolder(temporary, [], schema).append(parts, written, histories, record)


def _save(path: Path, number: int, written: Mapping[str, WrittenSplit], record: Mapping[str, Any]) -> None:
    folder = _counts_file(path, number, "").parent
    folder.mkdir(parents=True)
    for split, one in written.items():
        one.counts.save(_counts_file(path, number, split))
    write_json(folder / REPORT_FILE, dict(record))


def _counts_file(path: Path, number: int, split: str) -> Path:
    return path / BUILDS_FOLDER / f"{number:04d}" / f"{split}.parquet"


def _names(written: Mapping[str, WrittenSplit]) -> list[list[str]]:
    return [[split, file] for split, one in written.items() for file in one.files]


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}): copy the folder again") from error
    return record
