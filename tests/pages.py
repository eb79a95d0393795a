"""The code on the project's pages, for the tests that run it."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import textwrap
from pathlib import Path

from tests.launch import APPS, ROOT

LAUNCHING = "docs/launching.md"
# Schedulers that need a cluster, and the packages without which TorchX makes no dry run for them.
CLUSTERS = {"slurm": None, "kubernetes": "kubernetes", "aws_batch": None, "ray": "ray"}
# What makes our commands quick on the tests' data, whatever their page says.
SMALL = {
    "train": ["--model.embedding_dim=8", "--loop.epochs=1", "--batch_size=100"],
    "evaluate": [],
    "export": [],
    "migrate": [],
    "benchmark": ["--history_lengths=[5]", "--candidates=[4]", "--turns=2", "--methods=[impressions,amortized]"],
    "pilot": ["--candidates=[2,3,4]", "--turns=3", "--warmup=2", "--requests=20", "--bootstrap_samples=20"],
    "compare": [
        *("--model.embedding_dim=8", "--loop.epochs=1", "--batch_size=100", "--model.leave_out=[]", "--seeds=[0]"),
        *("--grid=[{}]", "--speed.history_length=5", "--speed.requests=2", "--speed.train_steps=2"),
        "--bootstrap_samples=5",
    ],
}


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


def scheduler_of(command: str) -> str:
    """The scheduler that TorchX is to ask; empty where it is not TorchX."""
    found = re.search(r"torchx run .*?-s (\w+)", command)
    return found.group(1) if found else ""


def local_commands() -> list[str]:
    """What docs/launching.md runs on this machine."""
    return [command for command in commands(LAUNCHING) if scheduler_of(command) not in CLUSTERS]


def run_here(command: str) -> None:
    """Run a command of ours on small data, in this process."""
    _, name, *arguments = shlex.split(command)
    importlib.import_module(f"{APPS}.{name}").main([*arguments, *SMALL[name]])
