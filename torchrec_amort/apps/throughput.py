"""`torchrec-amort throughput`: candidates per second in training, on this process alone or as one rank of torchrun."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.throughput import ThroughputConfig, measure_throughput


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--data", "data/movielens-1m", "--run_folder", "runs/throughput"])
    """
    config = parse(ThroughputConfig, "throughput", args)
    run_command(lambda: measure_throughput(config))


if __name__ == "__main__":
    main()
