"""A folder of packages, of which the newest one answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torchrec_amort.errors import place_of
from torchrec_amort.serving.package import MANIFEST_FILE

logger = logging.getLogger(__name__)


class Watch:
    """Finds packages that are newer than the one that answers, by the time of their manifest.

    Args:
        folder: whose folders are packages, put there whole: copied beside it, and then renamed.
        package: the one that answers.
        switch: lets another one answer.

    Example::

        watch = Watch(Path("packages"), Path("packages/monday"), endpoint.switch)
        watch.look()  # from time to time
    """

    def __init__(self, folder: Path, package: Path, switch: Callable[[str], object]) -> None:
        self._folder, self._switch = folder, switch
        self._newest = _time_of(package)

    def look(self) -> None:
        """Switch to the newest package, if it is newer than all that were tried; what fails is logged."""
        try:
            packages = [folder for folder in self._folder.iterdir() if (folder / MANIFEST_FILE).is_file()]
            time, newest = max(((_time_of(package), package) for package in packages), default=(0, self._folder))
        except OSError as error:
            # Such as of a package that was just taken away.
            logger.error("%s: cannot be looked at: %s", self._folder, place_of(error))
            return
        if time <= self._newest:
            return
        self._newest = time
        try:
            self._switch(str(newest))
        except Exception as error:  # noqa: BLE001 - the version that answers goes on, and so does the watch
            logger.error("%s: is not switched to: %s", newest, place_of(error))


def _time_of(package: Path) -> int:
    return (package / MANIFEST_FILE).stat().st_mtime_ns
