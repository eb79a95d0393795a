"""`torchrec-amort load`: latency and goodput of servers of scores at given rates, every request accounted for."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.server_load import ServerLoadConfig, run_load


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--addresses=[localhost:8001]", "--data", "data/movielens-1m", "--rates=[100,200]", "--out", "runs/load"])
    """
    config = parse(ServerLoadConfig, "load", args)
    run_command(lambda: run_load(config), "client", "report")


if __name__ == "__main__":
    main()
