"""Files and folders are whole or not there, whoever writes the same one at once and whatever stops a writer."""

import errno
from pathlib import Path

import pytest

from torchrec_amort.errors import InputError
from torchrec_amort.files import new_file, new_folder, write_text


def fill(folder: Path, text: str) -> None:
    for part in range(3):
        (folder / f"part-{part}.txt").write_text(text)


def content(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.iterdir()}


def test_of_two_writers_of_one_folder_the_second_is_refused_and_nothing_is_mixed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="films: is there already"), new_folder(tmp_path / "films") as slow:
        fill(slow, "slow")
        with new_folder(tmp_path / "films") as fast:
            fill(fast, "fast")
    assert content(tmp_path / "films") == {"fast"}
    assert [path.name for path in tmp_path.iterdir()] == ["films"]


def test_of_two_writers_that_overwrite_one_folder_the_last_one_stays_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "films") as first:
        fill(first, "first")
        (first / "old.txt").write_text("first")
    with new_folder(tmp_path / "films", overwrite=True) as slow:
        fill(slow, "slow")
        with new_folder(tmp_path / "films", overwrite=True) as fast:
            fill(fast, "fast")
        assert content(tmp_path / "films") == {"fast"}
    assert content(tmp_path / "films") == {"slow"}
    assert [path.name for path in tmp_path.iterdir()] == ["films"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "films") as first:
        fill(first, "first")
    rename, is_away = Path.rename, False

    def fail_once_it_is_away(path: Path, target: Path) -> Path:
        nonlocal is_away
        if is_away and "replaced" not in path.name:
            raise OSError(errno.EIO, "the disk is gone")
        is_away = path.name == "films"
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once_it_is_away)
    with pytest.raises(OSError, match="the disk is gone"), new_folder(tmp_path / "films", overwrite=True) as second:
        fill(second, "second")
    assert content(tmp_path / "films") == {"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["films"]


def test_a_file_whose_writer_is_stopped_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["users.csv"]


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "users.csv"
    with new_file(path) as slow:
        slow.write_text("sl")
        with new_file(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
        slow.write_text("slow")
    assert path.read_text() == "slow"
    assert [file.name for file in path.parent.iterdir()] == ["users.csv"]
