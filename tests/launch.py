"""Starts the project's programs as a person would: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def launch(*command: str, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the path."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def torchrun(ranks: int, module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a module of the package on some local ranks."""
    launcher = ("torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", f"torchrec_amort.apps.{module}")
    return launch(*launcher, *args, check=check)
