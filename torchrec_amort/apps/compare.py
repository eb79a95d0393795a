"""`torchrec-amort compare`: history encoders on one data set, over several seeds, with one budget."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.compare import CompareConfig, run_comparison


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--config", "examples/compare_movielens.yaml", "--out", "runs/compare"])
    """
    config = parse(CompareConfig, "compare", args)
    run_command(lambda: run_comparison(config), "train", "report")


if __name__ == "__main__":
    main()
