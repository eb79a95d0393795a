"""`torchrec-amort train`: one training run, on this process alone or as one rank of torchrun."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.jobs.train import train_run
from torchrec_amort.training.processes import process_group
from torchrec_amort.training.run import TrainConfig


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--data", "data/movielens-1m", "--run_folder", "runs/first", "--loop.epochs", "1"])
    """
    config = parse(TrainConfig, "train", args)
    run_command(lambda: _train(config), "train")


@record
def _train(config: TrainConfig) -> None:
    with process_group() as device:
        train_run(config, device)


if __name__ == "__main__":
    main()
