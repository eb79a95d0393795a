"""`torchrec-amort serve`: a server of scores over the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.serving.server.config import ServeConfig


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--package", "packages/films", "--cache_bytes", "1000000000"])
    """
    config = parse(ServeConfig, "serve", args)
    needed = {"trace": config.trace_to, "tier": config.shared_histories}
    run_command(lambda: _serve(config), "serve", *(extra for extra, option in needed.items() if option))


def _serve(config: ServeConfig) -> None:
    from torchrec_amort.jobs.serve import serve_until_told  # noqa: PLC0415 - of the extra `serve`

    serve_until_told(config)


if __name__ == "__main__":
    main()
