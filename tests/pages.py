"""The code on the project's pages, for the tests that run it."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

from tests.launch import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page that are in a language."""
    text = (ROOT / page).read_text()
    return [textwrap.dedent(block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(page: str) -> list[str]:
    """The lines of a page's `bash` blocks, each with its continuation lines, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def small_clone(folder: Path, data: Path) -> Path:
    """Make a folder look like a clone of the project with MovieLens-1M prepared, but with other data in its place."""
    for name in ("examples", "torchx_components"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / ".torchxignore", folder)
    (folder / "data").mkdir()
    (folder / "data" / "movielens-1m").symlink_to(data)
    return folder
