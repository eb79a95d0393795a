"""Where a run was made: what a person asks for when its figures look odd, and what a restart goes by."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from torchrec_amort.files import utc_now, write_json
from torchrec_amort.lock import job_name
from torchrec_amort.training.processes import restarts, restarts_of_all
from torchrec_amort.versions import installed_versions

ENVIRONMENT_FILE = "environment.json"


def write_environment(run: str | Path, device: torch.device) -> None:
    """Write `environment.json` into a run's folder: versions, git commit, job, ranks and command line.

    Args:
        run: the run's folder.
        device: of this rank.
    """
    record = {
        "started": utc_now(),
        "command": sys.argv,
        "packages": installed_versions(),
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "job": job_name(),
        "restarts": restarts(),
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
    write_json(Path(run) / ENVIRONMENT_FILE, record)


def track(run: str | Path, results: Mapping[str, object]) -> None:
    """Tell the job's TorchX trackers, if it has any, its results and where its run is.

    Args:
        run: the run's folder.
        results: names and values, as JSON has them.
    """
    from torchx.tracker import app_run_from_env  # noqa: PLC0415 - of the extra `train`

    job = app_run_from_env()
    job.add_metadata(**results)
    job.add_artifact("run_folder", str(Path(run).resolve()))


def is_restart_of(run: str | Path, device: torch.device) -> bool:
    """Whether torchrun started this job's ranks again, after they had begun this run. All ranks call it together."""
    path = Path(run) / ENVIRONMENT_FILE
    return restarts_of_all(device) > 0 and path.is_file() and json.loads(path.read_text())["job"] == job_name()


def git_commit() -> str | None:
    """The commit of the folder that the command was started in, with a + if files differ from it."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return commit.stdout.strip() or None
