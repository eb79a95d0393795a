"""`torchrec-amort export`: a trained model as a package that serves without its code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.files import refuse_existing
from torchrec_amort.serving.delta import write_delta
from torchrec_amort.serving.export import CHECKED_REQUESTS, Tables, export_package
from torchrec_amort.serving.package import read_manifest
from torchrec_amort.stores import local_path
from torchrec_amort.training.run import load_model


@dataclass(kw_only=True)
class ExportConfig:
    """Write a run as a package: compiled phases, tables, manifest with versions and checksums.

    The weights are those of its best checkpoint if it validated, else of the last one.

    Args:
        run_folder: folder of a training run.
        out: the package to make.
        dtype: of encoders, encoded histories and native heads, `float32` or `bfloat16`.
        tables: embedding tables as `int8`, each row with a scale and an offset, or `float32`.
        overwrite: replace a package that is there.
        since: an earlier package, which has what is not in `out` then: that has the rows of tables that have changed
            and all other weights, and `torchrec-amort apply` makes the whole package of both.
        signing_key: PEM file of an Ed25519 private key, which signs the package for servers that have its public key
            (`serve --trusted_key`).
    """

    run_folder: str
    out: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    tables: Tables = "int8"
    overwrite: bool = False
    since: str | None = None
    signing_key: str | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--out", "packages/first"])
    """
    config = parse(ExportConfig, "export", args)
    run_command(lambda: _export(config), *(["sign"] if config.signing_key else []))


def _export(config: ExportConfig) -> None:
    started = time.perf_counter()
    model, trained, schema = load_model(config.run_folder)
    schema = schema.without(trained.model.leave_out)
    out = local_path(config.out)
    # Refused, if they are, before minutes of compiling.
    refuse_existing(out, config.overwrite)
    if config.since is not None:
        read_manifest(local_path(config.since))
    print(f"compiling {config.run_folder} for {config.dtype}: its phases, about 10 seconds each", flush=True)
    dtype: torch.dtype = getattr(torch, config.dtype)
    with tempfile.TemporaryDirectory() as folder:
        package = out if config.since is None else Path(folder) / "package"
        difference = export_package(
            model,
            package,
            schema,
            dtype=dtype,
            tables=config.tables,
            overwrite=config.overwrite,
            signing_key=config.signing_key,
        )
        if config.since is not None:
            sizes = write_delta(package, config.since, out, overwrite=config.overwrite, signing_key=config.signing_key)
            print(
                f"{out}: {sizes.rows:,} of {sizes.all_rows:,} rows have changed since {config.since}; the package of "
                f"both has {sizes.all_bytes / 1e6:.1f} MB"
            )
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(
        f"{config.out}: {size:.1f} MB in {time.perf_counter() - started:.0f} s; probabilities of {CHECKED_REQUESTS} "
        f"random requests differ by at most {difference:.1e} from the model's in float32"
    )


if __name__ == "__main__":
    main()
