"""Tables of a package in files that processes map: in memory once, however many processes and versions read them.

A version of which a few rows have changed since another one has a file of the pages that these are in, and maps it over
the other's: what has not changed is not there twice.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from torchrec_amort.errors import InputError
from torchrec_amort.files import new_file, write_json

Tables: TypeAlias = QuantEmbeddingBagCollection | QuantEmbeddingCollection

_PAGE = mmap.PAGESIZE
# Linux: `mmap` of Python's own tells no address.
_MAP_FIXED = 0x10
# Of one file: each is a mapping of its own or two, and Linux gives a process 65,530 (`vm.max_map_count`).
_MOST_RUNS = 1024


@dataclass(frozen=True)
class Layers:
    """Where the bytes of a file of tables are.

    Args:
        whole: a file that has all of them, or others in place of some.
        pages: a file of these, one run after the other; None if there are none.
        runs: first byte, and the one after the last, of each run: whole pages, but for the end of the file.
    """

    whole: os.PathLike[str]
    pages: os.PathLike[str] | None = None
    runs: Sequence[tuple[int, int]] = ()

    def map(self, size: int) -> Tensor:
        """The bytes, mapped into memory; what is written to them stays in this process.

        Args:
            size: how many there are.

        Raises:
            InputError: the system gives no more mappings.
        """
        weights = torch.from_file(os.fspath(self.whole), shared=False, size=size, dtype=torch.uint8)
        if self.pages is not None:
            with open(self.pages, "rb") as file:
                place = 0
                for start, stop in self.runs:
                    _map_over(weights.data_ptr() + start, stop - start, file.fileno(), place)
                    place += stop - start
        return weights


class Files(Protocol):
    """Files of the tables of one version, in memory."""

    def find(self, name: str) -> Layers | None:
        """A file, if it is there."""

    def put(self, name: str, weights: Tensor) -> None:
        """Write a file, whole or not at all.

        Raises:
            InputError: there is no room for it.
        """

    def put_pages(self, name: str, whole: os.PathLike[str], runs: Sequence[tuple[int, int]], weights: Tensor) -> None:
        """Write a file as what it has in place of some pages of another one; see `Layers`.

        Raises:
            InputError: there is no room for it.
        """


@dataclass(frozen=True)
class FilesInFolder:
    """Files that several processes map, and find again when they are started anew.

    Args:
        folder: best one in memory, such as on /dev/shm.
    """

    folder: Path

    def find(self, name: str) -> Layers | None:
        """A file, if it is there, and what it has pages of."""
        if (whole := self.folder / name).is_file():
            return Layers(whole)
        if (record := self._record(name)).is_file():
            told = json.loads(record.read_text(encoding="utf-8"))
            if (whole := Path(told["whole"])).is_file():
                return Layers(whole, self._pages(name), [(start, stop) for start, stop in told["runs"]])
        return None

    def put(self, name: str, weights: Tensor) -> None:
        """Write a file."""
        self._write(self.folder / name, [weights])

    def put_pages(self, name: str, whole: os.PathLike[str], runs: Sequence[tuple[int, int]], weights: Tensor) -> None:
        """Write the pages, and then, since these are whole, what they are of."""
        self._write(self._pages(name), [weights[start:stop] for start, stop in runs])
        write_json(self._record(name), {"whole": os.fspath(whole), "runs": [list(run) for run in runs]})

    def needed(self) -> set[Path]:
        """Folders of the files that these have pages of."""
        records = [json.loads(record.read_text(encoding="utf-8")) for record in self.folder.glob("*.changes")]
        return {Path(record["whole"]).parent for record in records}

    def _pages(self, name: str) -> Path:
        return self.folder / f"{name}.pages"

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.changes"

    def _write(self, path: Path, parts: Sequence[Tensor]) -> None:
        try:
            # Not by `tofile`, which tells of no write that fails late.
            with new_file(path) as temporary, temporary.open("wb") as file:
                for part in parts:
                    file.write(part.numpy().data)
        except OSError as error:
            hint = (
                f"give {path.parent} more room; where it is memory, as /dev/shm is, it takes the size of the tables of "
                "all versions; one process alone (--processes 1) needs no files"
            )
            raise _no_room(str(path), parts, error, hint) from error


class FilesOfProcess:
    """Files that one process has by itself, without a folder; gone with all that maps them."""

    def __init__(self) -> None:
        self._files: dict[str, Layers] = {}

    def find(self, name: str) -> Layers | None:
        """A file, if it is there."""
        return self._files.get(name)

    def put(self, name: str, weights: Tensor) -> None:
        """Write a file."""
        self._files[name] = Layers(_Memory(name, [weights]))

    def put_pages(self, name: str, whole: os.PathLike[str], runs: Sequence[tuple[int, int]], weights: Tensor) -> None:
        """Write the pages."""
        self._files[name] = Layers(whole, _Memory(name, [weights[start:stop] for start, stop in runs]), runs)


class _Memory(os.PathLike[str]):
    """A file in memory, that is in no folder and not limited by the size of /dev/shm."""

    def __init__(self, name: str, parts: Sequence[Tensor]) -> None:
        self._descriptor = os.memfd_create(name)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            with open(self._descriptor, "wb", closefd=False) as file:
                for part in parts:
                    file.write(part.numpy().data)
        except OSError as error:
            raise _no_room(name, parts, error, "give the server more memory") from error

    def __fspath__(self) -> str:
        return f"/proc/self/fd/{self._descriptor}"


@dataclass(frozen=True)
class MappedTables:
    """Files of the tables of one version.

    The first process that fills its tables writes them; later ones read no weights of their own.

    Args:
        files: where they are.

    Example::

        MappedTables(FilesInFolder(Path("/dev/shm/films/1f3a"))).fill(collection, "candidate", lambda: weights)
    """

    files: Files

    def fill(self, tables: Tables, name: str, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let a collection read the files.

        Args:
            tables: that are not filled yet.
            name: tells them from others of the version.
            weights: gives their state dict, if it has to be written.

        Raises:
            InputError: there is no room for the files.
        """
        if not self.has(tables, name):
            tables.load_state_dict(weights())
            for module in _modules(tables, name):
                self.files.put(module.file, module.kernels.weights_host)
        self.map(tables, name)

    def fill_changed(
        self,
        tables: Tables,
        name: str,
        base: MappedTables,
        changed: Mapping[str, Mapping[str, Tensor]],
        refuse_without_room: Callable[[int], None],
    ) -> None:
        """Let a collection read files that are another version's, but for some rows.

        Args:
            tables: that are not filled yet.
            name: tells them from others of the version.
            base: of the other version; it has files under this name, of tables of the same shapes.
            changed: the `places` of rows, and the `rows`, by the names of the state dict.
            refuse_without_room: called with the bytes that will be taken, before they are.

        Raises:
            InputError: there is no room for the files.
        """
        modules = _modules(tables, name)
        layers = {module.file: base.layers(module.file) for module in modules}
        runs = {module.file: _runs(module, changed, layers[module.file]) for module in modules}
        sizes = {module.file: sum(stop - start for start, stop in runs[module.file]) for module in modules}
        # Most pages are of rows that have changed: without the others, the other version's file need not stay.
        whole = {module.file for module in modules if 2 * sizes[module.file] > module.size}
        # Pages that are written to are this process' own until they are in the file.
        refuse_without_room(sum(sizes[m.file] + (m.size if m.file in whole else sizes[m.file]) for m in modules))
        for module in modules:
            weights = layers[module.file].map(module.size)
            module.read(weights)
            for table, rows in module.rows().items():
                rows[changed[table]["places"]] = changed[table]["rows"]
            if module.file in whole:
                self.files.put(module.file, weights)
            else:
                self.files.put_pages(module.file, layers[module.file].whole, runs[module.file], weights)
        self.map(tables, name)

    def has(self, tables: Tables, name: str) -> bool:
        """Whether the files of a collection are there."""
        return all(self.files.find(module.file) is not None for module in _modules(tables, name))

    def map(self, tables: Tables, name: str) -> None:
        """Let a collection read the files, which are there."""
        for module in _modules(tables, name):
            module.read(self.layers(module.file).map(module.size))

    def layers(self, file: str) -> Layers:
        """A file, which is there."""
        layers = self.files.find(file)
        assert layers is not None, f"{file} is not there"
        return layers


@dataclass(frozen=True)
class _Module:
    """Tables of a collection whose rows are in one file, one table after the other.

    Args:
        file: its name.
        kernels: FBGEMM's module, which reads them.
        shown: what has a table's weight in the state dict, by its name there.
    """

    file: str
    kernels: Any
    shown: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        size: int = self.kernels.weights_host.numel()
        return size

    def rows(self) -> dict[str, Tensor]:
        """Each table's rows, where they are, by its name in the state dict."""
        split = self.kernels.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        return {name: rows for name, (rows, _, _) in zip(self.shown, split, strict=True)}

    def read(self, weights: Tensor) -> None:
        """Read other bytes; the state dict has them, too, so that no others stay in memory."""
        self.kernels.weights_host = weights
        for name, rows in self.rows().items():
            self.shown[name].weight = rows


def _modules(tables: Tables, name: str) -> list[_Module]:
    is_of_bags = isinstance(tables, QuantEmbeddingBagCollection)
    kind, shown = ("embedding_bags", tables.embedding_bags) if is_of_bags else ("embeddings", tables.embeddings)
    modules = zip(tables._emb_modules, tables._key_to_tables.values(), strict=True)
    return [
        _Module(f"{name}_{place}", kernels, {f"{kind}.{config.name}.weight": shown[config.name] for config in configs})
        for place, (kernels, configs) in enumerate(modules)
    ]


def _runs(module: _Module, changed: Mapping[str, Mapping[str, Tensor]], before: Layers) -> list[tuple[int, int]]:
    """Runs of the pages that have rows which have changed, now or before: the narrowest gaps are within them."""
    found = [np.arange(start // _PAGE, -(-stop // _PAGE)) for start, stop in before.runs]
    for name, rows in module.rows().items():
        width = rows.shape[1]
        starts = rows.storage_offset() + changed[name]["places"].numpy() * width
        last = (starts + width - 1) // _PAGE
        found += [np.minimum(starts // _PAGE + more, last) for more in range(width // _PAGE + 2)]
    pages = np.unique(np.concatenate(found))
    if len(pages) == 0:
        return []
    gaps = np.diff(pages)
    ends = np.flatnonzero(gaps > 1)
    if len(ends) >= _MOST_RUNS:
        ends = np.sort(ends[np.argsort(gaps[ends])[1 - _MOST_RUNS :]])
    firsts, lasts = pages[[0, *(ends + 1)]], pages[[*ends, -1]]
    return [
        (int(first) * _PAGE, min((int(last) + 1) * _PAGE, module.size))
        for first, last in zip(firsts, lasts, strict=True)
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


def _map_over(address: int, size: int, file: int, offset: int) -> None:
    """Map a part of a file in place of what is mapped there."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    if _libc.mmap(address, size, protection, flags, file, offset) != address:
        raise InputError(
            f"pages of tables cannot be mapped ({os.strerror(ctypes.get_errno())}): make the package of both by "
            "torchrec-amort apply, or raise vm.max_map_count"
        )


def _no_room(file: str, parts: Sequence[Tensor], error: OSError, hint: str) -> InputError:
    size = sum(part.nbytes for part in parts)
    return InputError(f"{file}: {size:,} bytes of tables cannot be written ({error}): {hint}")
