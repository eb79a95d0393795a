"""`torchrec-amort apply`: a package out of an earlier one and what has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.serving.delta import apply_delta


@dataclass(kw_only=True)
class ApplyConfig:
    """Make the package that a delta of `export --since` is of, byte by byte.

    Args:
        delta: what `export --since` wrote.
        base: the package that it is since.
        out: the package to make.
        overwrite: replace a package that is there.
        signing_key: PEM file of an Ed25519 private key, which signs the package in place of who signed it before.
    """

    delta: str
    base: str
    out: str
    overwrite: bool = False
    signing_key: str | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--delta", "deltas/tuesday", "--base", "packages/monday", "--out", "packages/tuesday"])
    """
    config = parse(ApplyConfig, "apply", args)
    run_command(lambda: _apply(config), *(["sign"] if config.signing_key else []))


def _apply(config: ApplyConfig) -> None:
    apply_delta(config.delta, config.base, config.out, overwrite=config.overwrite, signing_key=config.signing_key)
    print(f"{config.out}: {config.base} with what {config.delta} has changed")


if __name__ == "__main__":
    main()
