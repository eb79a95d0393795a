"""Packages and deltas, as the processes of a server open them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchrec_amort.errors import InputError
from torchrec_amort.files import write_text
from torchrec_amort.serving.delta import read_delta
from torchrec_amort.serving.mapped import Files, FilesInFolder, FilesOfProcess
from torchrec_amort.serving.package import DELTA_FILE, Package, read_package, tables_checksum
from torchrec_amort.serving.server.loaded import Loaded
from torchrec_amort.serving.server.memory import refuse_without_room
from torchrec_amort.serving.versions import Version
from torchrec_amort.stores import local_path


@dataclass(frozen=True, eq=False, kw_only=True)
class VersionOfPackage(Version):
    """A version that a delta may be since.

    Args:
        package: that it was loaded from.
    """

    package: Package


@dataclass(frozen=True)
class Opener:
    """Reads packages, and deltas since the package that answers.

    Args:
        mapped: a folder in memory, where several processes have tables once; None of one process.
        trusted_key: see `load_package`.

    Example::

        monday = Opener().read("packages/monday")
        tuesday = Opener().read("deltas/tuesday", since=monday)
    """

    mapped: Path | None = None
    trusted_key: str | None = None

    def read(self, folder: str, since: Package | None = None) -> Package:
        """Read and verify what is in a folder.

        Args:
            folder: of a package or a delta.
            since: the package that answers; None of a process that starts.

        Raises:
            InputError: as `load_package` and `read_delta`, or there is no room.
        """
        path = local_path(folder).resolve()
        if path.is_dir():
            refuse_without_room(path)
        return self._read(path, since)

    def _read(self, folder: Path, since: Package | None) -> Package:
        if (folder / DELTA_FILE).is_file():
            base_of, room = partial(self._base_of, folder, since), partial(refuse_without_room, folder)
            package = read_delta(folder, base_of, self._files_of, room, trusted_key=self.trusted_key)
        else:
            package = read_package(folder, self._files_of, trusted_key=self.trusted_key)
        if self.mapped is not None:
            write_text(self._record(self.mapped, package.checksum), str(folder))
        return package

    def _base_of(self, delta: Path, since: Package | None, checksum: str) -> Package:
        """The package that a delta is since: the one that answers, or what answered when others loaded the delta."""
        told = f"{delta}: is since a package with manifest {checksum[:12]}..., "
        if since is not None:
            if since.checksum == checksum:
                return since
            raise InputError(
                f"{told}but that of {since.folder.name!r}, which answers, is {since.checksum[:12]}...: switch to the "
                "package that it is since, or make the package of both (torchrec-amort apply)"
            )
        if self.mapped is None or not (record := self._record(self.mapped, checksum)).is_file():
            raise InputError(
                f"{told}and none answers yet: start the server with that package, then switch to the delta"
            )
        return self._read(Path(record.read_text(encoding="utf-8")), None)

    def _files_of(self, checksum: str) -> Files:
        return FilesOfProcess() if self.mapped is None else FilesInFolder(self.mapped / checksum)

    @staticmethod
    def _record(mapped: Path, checksum: str) -> Path:
        """Where processes tell each other which folder has the package of a manifest."""
        return mapped / f"{checksum}.folder"


def clear(mapped: Path, loaded: Loaded) -> None:
    """Remove tables of packages that do not answer any more.

    Args:
        mapped: see `Opener`.
        loaded: the packages and deltas that do, or that may be rolled back to.
    """
    checksums = {tables_checksum(local_path(folder)) for folder in loaded.folders} - {None}
    wanted = {mapped / str(checksum) for checksum in checksums}
    wanted |= {needed for folder in wanted for needed in FilesInFolder(folder).needed()}
    for folder in mapped.iterdir():
        if folder.is_dir() and folder not in wanted:
            shutil.rmtree(folder)
