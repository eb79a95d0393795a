"""`torchrec-amort backtest`: training day after day on logged requests, in several ways."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.backtest import BacktestConfig, run_backtest


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--config", "examples/backtest_kuairand.yaml", "--out", "runs/backtest"])
    """
    config = parse(BacktestConfig, "backtest", args)
    run_command(lambda: run_backtest(config), "train", "report")


if __name__ == "__main__":
    main()
