"""Delta packages: what has changed of a package since another one, the day before's for instance.

A folder of the files that the other package, the base, does not have as they are; in place of `tables.pt`, `rows.pt`
has of each table the rows that have changed, or are new; `delta.json` tells which base it is of, and checksums. If the
package was signed, its signature is that of the package which is made of both; `delta.sig` is that of the delta itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_amort.errors import InputError
from torchrec_amort.files import new_folder, write_json
from torchrec_amort.serving.mapped import Files, MappedTables, Tables
from torchrec_amort.serving.package import (
    DELTA_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TABLES_FILE,
    Package,
    checksum,
    parse_manifest,
    read_manifest,
    refuse_damaged,
    refuse_damaged_file,
    refuse_other_machine,
    refuse_unlisted,
    save_tables,
    signer,
    under,
)
from torchrec_amort.stores import local_path

DELTA_VERSION = 1
ROWS_FILE = "rows.pt"
DELTA_SIGNATURE_FILE = "delta.sig"
# Rows that are compared at a time.
_BLOCK = 2**16


@dataclass(frozen=True)
class DeltaSizes:
    """How large a delta is.

    Args:
        rows: that have changed or are new, in all tables.
        all_rows: of the package.
        bytes: of the delta's files.
        all_bytes: of the package's files.
    """

    rows: int
    all_rows: int
    bytes: int
    all_bytes: int


def write_delta(
    package: str | Path,
    base: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    signing_key: str | Path | None = None,
) -> DeltaSizes:
    """Write what has changed of a package since another one, whole or not at all.

    Args:
        package: what `export_package` wrote.
        base: an earlier package; tables may have had fewer rows.
        folder: the delta to make.
        overwrite: replace a folder that is there.
        signing_key: PEM file of an Ed25519 private key, which signs the delta for servers that take it as it is; see
            `load_package`. It needs the extra `sign`.

    Returns:
        DeltaSizes: of the delta, beside the package's.

    Raises:
        InputError: one is no package, or damaged; the folder cannot be written or is the base; or the key cannot be
            read.

    Example::

        write_delta("packages/tuesday", "packages/monday", "deltas/tuesday")
        apply_delta("deltas/tuesday", "packages/monday", "copies/tuesday")
    """
    package, base, sign = local_path(package), local_path(base), signer(signing_key, DELTA_FILE)
    if local_path(folder).resolve() == base.resolve():
        raise InputError(f"{folder}: is the package that the delta is since, which it needs: choose another folder")
    manifest, of_base = read_manifest(package), read_manifest(base)
    tables, before = _load(package / TABLES_FILE), _load(base / TABLES_FILE)
    changed = {name: _changed(table, before.get(name)) for name, table in tables.items()}
    with new_folder(folder, overwrite) as temporary:
        torch.save(changed, temporary / ROWS_FILE)
        for name, of_file in manifest["sha256"].items():
            if name != TABLES_FILE and of_base["sha256"].get(name) != of_file:
                shutil.copyfile(package / name, temporary / name)
        _copy_manifest(package, temporary)
        record = {
            "delta_version": DELTA_VERSION,
            "base": checksum(base / MANIFEST_FILE),
            "sha256": {path.name: checksum(path) for path in sorted(temporary.iterdir())},
        }
        write_json(temporary / DELTA_FILE, record)
        sign(temporary)
        return DeltaSizes(
            rows=sum(len(rows["places"]) for rows in changed.values()),
            all_rows=sum(map(len, tables.values())),
            bytes=_size(temporary),
            all_bytes=_size(package),
        )


def apply_delta(
    delta: str | Path,
    base: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    signing_key: str | Path | None = None,
) -> None:
    """Make the package that a delta is of, byte by byte, whole or not at all.

    Args:
        delta: what `write_delta` wrote.
        base: the package that it is since.
        folder: the package to make.
        overwrite: replace a folder that is there.
        signing_key: PEM file of an Ed25519 private key, which signs the package in place of who signed it before; see
            `load_package`. It needs the extra `sign`.

    Raises:
        InputError: it is no delta, or damaged; the base is another package, or damaged; the folder cannot be written;
            or the key cannot be read.
    """
    delta, base, sign = local_path(delta), local_path(base), signer(signing_key)
    record, _ = _record(delta)
    refuse_damaged(delta, record["sha256"])
    read_manifest(base)
    if (have := checksum(base / MANIFEST_FILE)) != record["base"]:
        raise InputError(
            f"{delta}: is since a package with manifest {record['base'][:12]}..., but that of {base} is "
            f"{have[:12]}...: apply it to the package that it was made from"
        )
    with new_folder(folder, overwrite) as temporary:
        for name in json.loads((delta / MANIFEST_FILE).read_text(encoding="utf-8"))["sha256"]:
            if name != TABLES_FILE:
                shutil.copyfile((delta if name in record["sha256"] else base) / name, temporary / name)
        before = _load(base / TABLES_FILE)
        tables = {name: _renewed(rows, before.get(name)) for name, rows in _load(delta / ROWS_FILE).items()}
        save_tables(tables, temporary / TABLES_FILE)
        _copy_manifest(delta, temporary)
        read_manifest(temporary)
        sign(temporary)


def read_delta(
    delta: str | Path,
    base_of: Callable[[str], Package],
    files_of: Callable[[str], Files],
    refuse_without_room: Callable[[int], None],
    *,
    trusted_key: str | Path | None = None,
) -> Package:
    """Read and verify the package that a delta is of, without making its folder, or loading anything of it.

    Rows that have not changed stay in the files of the base, if those are in memory.

    Args:
        delta: what `write_delta` wrote.
        base_of: gives the package whose manifest has a checksum, with files in memory for its tables; raises InputError
            if it is not here.
        files_of: files in memory for the tables of a checksum, which is that of `delta.json`.
        refuse_without_room: called with the bytes that tables will take, before they do.
        trusted_key: see `load_package`: of which one has to have signed the delta.

    Raises:
        InputError: it is no delta, or damaged; the base is not here, or a file of it is missing or damaged; or the
            package that it makes does not run here; with `trusted_key`, the delta is not signed by such a key, or has a
            file that `delta.json` does not have.

    Example::

        package = read_delta("deltas/tuesday", lambda _: monday, lambda _: FilesOfProcess(), print)
        served, package = package.load()
    """
    delta = local_path(delta).resolve()
    record, of_record = _record(delta, trusted_key)
    base = base_of(record["base"])
    refuse_damaged(delta, record["sha256"])
    content = (delta / MANIFEST_FILE).read_bytes()
    manifest = parse_manifest(delta, content)
    paths = {
        name: delta / name if name in record["sha256"] else base.paths.get(name, delta / name)
        for name in manifest["sha256"]
        if name != TABLES_FILE
    }
    for name, path in paths.items():
        refuse_damaged_file(path, manifest["sha256"][name])
    refuse_other_machine(delta, manifest)
    # The tables' own checksum is not computed: a package that has it must not read what a wrong delta has made.
    mapped = MappedTables(files_of(of_record))
    rows = cache(lambda: _load(delta / ROWS_FILE))

    def fill(tables: Tables, name: str) -> None:
        if mapped.has(tables, name):
            mapped.map(tables, name)
            return
        changed = under(rows(), name)
        # In a process that is started anew, the base's files may have to be written, too.
        before = base.tables(name) if name in base.manifest["tables"] else None
        if base.mapped is not None and manifest["tables"][name] == base.manifest["tables"].get(name):
            mapped.fill_changed(tables, name, base.mapped, changed, refuse_without_room)
            return
        state = {} if before is None else before.state_dict()
        # In the files, and beside them until they are written: as they are made, and in their place.
        refuse_without_room(3 * sum(table.nbytes for table in tables.state_dict().values()))
        mapped.fill(tables, name, lambda: {table: _renewed(of, state.get(table)) for table, of in changed.items()})

    return Package(delta, manifest, hashlib.sha256(content).hexdigest(), paths, fill, mapped)


def _copy_manifest(folder: Path, to: Path) -> None:
    """Copy a manifest, with its signature if it has one."""
    shutil.copyfile(folder / MANIFEST_FILE, to / MANIFEST_FILE)
    if (folder / SIGNATURE_FILE).is_file():
        shutil.copyfile(folder / SIGNATURE_FILE, to / SIGNATURE_FILE)


def _record(delta: Path, trusted_key: str | Path | None = None) -> tuple[dict[str, Any], str]:
    """What `delta.json` tells, once it is known who has signed it, and its checksum."""
    path = delta / DELTA_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file: {delta} is no delta (torchrec-amort export --help)")
    content = path.read_bytes()
    if trusted_key is not None:
        from torchrec_amort.serving.signing import refuse_unsigned  # noqa: PLC0415 - of the extra `sign`

        refuse_unsigned(path, content, trusted_key)
    try:
        record: dict[str, Any] = json.loads(content)
        version, _, checksums = record["delta_version"], record["base"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a delta ({error}): export it again") from error
    if version != DELTA_VERSION:
        raise InputError(
            f"{path}: delta_version is {version}, this torchrec-amort reads {DELTA_VERSION}: export it again"
        )
    if trusted_key is not None:
        refuse_unlisted(delta, (*checksums, DELTA_FILE, DELTA_SIGNATURE_FILE))
    return record, hashlib.sha256(content).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    """The file's tensors, mapped into memory; what is written to them stays in this process."""
    tensors: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return tensors


def _changed(table: Tensor, before: Tensor | None) -> dict[str, Any]:
    """The rows of a table that it did not have before, or has otherwise now."""
    kept = _kept(table, before)
    is_new = torch.ones(len(table), dtype=torch.bool)
    for start in range(0, len(kept), _BLOCK):
        stop = min(start + _BLOCK, len(kept))
        is_new[start:stop] = (table[start:stop] != kept[start:stop]).any(1)
    places = is_new.nonzero().flatten()
    return {"shape": list(table.shape), "places": places, "rows": table[places]}


def _renewed(changed: dict[str, Any], before: Tensor | None) -> Tensor:
    """The table that has such rows, and its others from before."""
    table = torch.empty(changed["shape"], dtype=changed["rows"].dtype)
    kept = _kept(table, before)
    table[: len(kept)] = kept
    table[changed["places"]] = changed["rows"]
    return table


def _kept(table: Tensor, before: Tensor | None) -> Tensor:
    """The rows from before that a table may still have: none if its vectors are of another size."""
    return table[:0] if before is None or before.shape[1:] != table.shape[1:] else before[: len(table)]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
