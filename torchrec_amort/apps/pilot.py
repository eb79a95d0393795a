"""`torchrec-amort pilot`: two arms replay the same logged requests; latency, quality and cost side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.bench.pilot import PilotConfig, run_pilot
from torchrec_amort.bench.timing import threads


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--control.run_folder", "runs/none", "--treatment.run_folder", "runs/history", "--out", "runs/pilot"])
    """
    config = parse(PilotConfig, "pilot", args)
    with threads(config.threads):
        run_command(lambda: run_pilot(config), "report")


if __name__ == "__main__":
    main()
