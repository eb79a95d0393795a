"""Starts the project's programs as a person would: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def launch(*command: str, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the path."""
    done = subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def torchrun(ranks: int, module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of the package, or a module that has a dot in its name, on some local ranks."""
    return launch(*torchrun_command(ranks, module, *args), check=check)


def torchrun_command(ranks: int, module: str, *args: str, max_restarts: int = 0) -> tuple[str, ...]:
    """The command line of `torchrun`."""
    module = module if "." in module else f"torchrec_amort.apps.{module}"
    options = ("--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts))
    return ("torchrun", *options, "-m", module, *args)


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command with this environment's programs first on the path; stdout and stderr together in a pipe."""
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def _environment() -> dict[str, str]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return environment
