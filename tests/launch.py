"""Starts the project's programs as a person would: in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
APPS = "torchrec_amort.apps"
TIMEOUT = 500


# Torch and TorchRec take seconds to import: commands start as forks of one process that has.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torchrec_amort.apps.command", "torchrec_amort.training.loop"])


def launch(*command: str, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's programs first on the path."""
    if command[0] in ("torchrec-amort", "torchx", "torchrun"):
        return _fork(_run_program, *command, cwd=cwd, check=check)
    done = subprocess.run(
        command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return _checked(done, check)


def torchrun(
    ranks: int, module: str, *args: str, max_restarts: int = 0, cwd: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command of the package, or a module that has a dot in its name, on some local ranks.

    As `launch` with `torchrun_command`, whose launcher starts them here too, but forks them.
    """
    module = module if "." in module else f"{APPS}.{module}"
    return _fork(_run_ranks, str(ranks), str(max_restarts), module, *args, cwd=cwd, check=check)


def torchrun_command(ranks: int, module: str, *args: str) -> tuple[str, ...]:
    """The command line of `torchrun`."""
    module = module if "." in module else f"{APPS}.{module}"
    return ("torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", module, *args)


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


def _fork(
    target: Callable[..., None], *args: str, cwd: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKS.Process(target=_run_fork, args=(streams, cwd, _environment(), target, args))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        done = subprocess.CompletedProcess(args, process.exitcode or 0, *(path.read_text() for path in streams))
    return _checked(done, check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    assert not check or done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def _run_fork(
    streams: tuple[Path, Path],
    cwd: Path,
    environment: dict[str, str],
    target: Callable[..., None],
    args: tuple[str, ...],
) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _run_program(*command: str) -> None:
    sys.argv = list(command)
    (program,) = entry_points(group="console_scripts", name=command[0])
    program.load()()


def _run_ranks(ranks: str, max_restarts: str, *command: str) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(ranks),
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=int(max_restarts),
        start_method="fork",
    )
    elastic_launch(config, _run_module)(*command)


def _run_module(*command: str) -> None:
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
