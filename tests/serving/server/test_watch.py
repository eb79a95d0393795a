import logging
import os
from pathlib import Path

import pytest

from torchrec_amort import InputError
from torchrec_amort.serving.package import MANIFEST_FILE
from torchrec_amort.serving.server.watch import Watch


def put(folder: Path, name: str, time: int) -> Path:
    (folder / name).mkdir(exist_ok=True)
    manifest = folder / name / MANIFEST_FILE
    manifest.touch()
    os.utime(manifest, (time, time))
    return folder / name


def test_the_newest_package_is_switched_to_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    switched: list[str] = []

    def switch(folder: str) -> None:
        switched.append(Path(folder).name)
        if Path(folder).name == "bad":
            raise InputError("bad: is damaged")

    watch = Watch(tmp_path, put(tmp_path, "monday", 1000), switch)
    put(tmp_path, "sunday", 900)
    (tmp_path / "half").mkdir()
    (tmp_path / "notes.txt").touch()
    watch.look()
    assert switched == []
    put(tmp_path, "tuesday", 1010)
    put(tmp_path, "wednesday", 1020)
    watch.look()
    watch.look()
    assert switched == ["wednesday"]
    put(tmp_path, "bad", 1030)
    with caplog.at_level(logging.ERROR):
        watch.look()
        watch.look()
    assert switched == ["wednesday", "bad"]
    assert [record for record in caplog.messages if "bad: is not switched to" in record]
    put(tmp_path, "bad", 1040)
    watch.look()
    assert switched == ["wednesday", "bad", "bad"]
    tmp_path.rename(tmp_path.with_name("away"))
    with caplog.at_level(logging.ERROR):
        watch.look()
    assert "cannot be looked at" in caplog.messages[-1]
