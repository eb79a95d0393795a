"""Trainings that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import torchrun
from tests.training.test_training import arguments
from torchrec_amort.apps import train

# 50 steps. Every tenth checkpoint is between two reports.
SAVED_OFTEN = (
    "--loop.epochs=2",
    "--loop.log_every=4",
    "--loop.checkpoint_every=10",
    "--loop.keep_checkpoints=9",
)


@pytest.fixture(scope="session")
def run_of_one_rank(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training in this process that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train.main(arguments(data_folder, run, *SAVED_OFTEN))
    return run


@pytest.fixture(scope="session")
def run_of_two_ranks(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks of torchrun."""
    run = tmp_path_factory.mktemp("runs") / "two"
    torchrun(2, "train", *arguments(data_folder, run, *SAVED_OFTEN))
    return run
