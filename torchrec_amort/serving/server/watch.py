"""A folder of packages and deltas, of which the newest one answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torchrec_amort.errors import place_of
from torchrec_amort.serving.package import DELTA_FILE, MANIFEST_FILE

logger = logging.getLogger(__name__)


class Watch:
    """Finds packages that are newer than the one that answers, by the time of their manifest.

    Args:
        folder: whose folders are packages or deltas, put there whole: copied beside it, and then renamed.
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
        """Switch to the newest package, if it is newer than all that were tried, and to deltas since.

        What fails is logged.
        """
        try:
            times = {
                folder: _time_of(folder) for folder in self._folder.iterdir() if (folder / MANIFEST_FILE).is_file()
            }
            new = sorted((time, folder) for folder, time in times.items() if time > self._newest)
            packages = [place for place, (_, folder) in enumerate(new) if not (folder / DELTA_FILE).is_file()]
        except OSError as error:
            # Such as of a package that was just taken away.
            logger.error("%s: cannot be looked at: %s", self._folder, place_of(error))
            return
        # Each delta is since the one before it, or since the package.
        for time, folder in new[max(packages, default=0) :]:
            self._newest = time
            try:
                self._switch(str(folder))
            except Exception as error:  # noqa: BLE001 - the version that answers goes on, and so does the watch
                logger.error("%s: is not switched to: %s", folder, place_of(error))


def _time_of(package: Path) -> int:
    return (package / MANIFEST_FILE).stat().st_mtime_ns
