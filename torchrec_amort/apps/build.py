"""`torchrec-amort build`: raw logs as request-level Parquet."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.data.builder.config import BuildConfig
from torchrec_amort.data.counts import read_counts, split_table


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--config", "build.yaml", "--out", "data/mine"])
    """
    config = parse(BuildConfig, "build", args)
    run_command(lambda: _build(config), "build", *(["spark"] if config.engine == "spark" else []))


def _build(config: BuildConfig) -> None:
    from torchrec_amort.data.builder.run import build  # noqa: PLC0415 - of the extra `build`

    written = build(config)
    print(split_table(read_counts(config.out)))
    what = f"{sum(written.values()):,} requests"
    print(f"{what} {'appended' if config.since else 'written'} to {config.out}, whose builds/ tells of them")


if __name__ == "__main__":
    main()
