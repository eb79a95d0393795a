"""`torchrec-amort export`: a trained model as a package that serves without its code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from torchrec_amort.apps.command import parse, run_command
from torchrec_amort.apps.train import load_model
from torchrec_amort.batch import RequestBatch
from torchrec_amort.data.sample import random_requests
from torchrec_amort.inference.export import Tables, export_package, load_package
from torchrec_amort.inference.scorer import AmortizedScorer
from torchrec_amort.schema import RequestSchema

CHECKED_REQUESTS = 20


@dataclass(kw_only=True)
class ExportConfig:
    """Write a run's last checkpoint as a package: compiled phases, tables, manifest with versions and checksums.

    Args:
        run_folder: folder of a training run.
        out: the package to make.
        dtype: of dense weights and encoded histories, `float32` or `bfloat16`.
        tables: embedding tables as `int8`, each row with a scale and an offset, or `float32`.
        overwrite: replace a package that is there.
    """

    run_folder: str
    out: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    tables: Tables = "int8"
    overwrite: bool = False


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the command line; the process' own if None.

    Example::

        main(["--run_folder", "runs/first", "--out", "packages/first"])
    """
    config = parse(ExportConfig, "export", args)
    run_command(lambda: _export(config))


def _export(config: ExportConfig) -> None:
    started = time.perf_counter()
    model, trained, schema = load_model(config.run_folder)
    schema = schema.without(trained.model.leave_out)
    print(f"compiling {config.run_folder} for {config.dtype}: three phases, about 10 seconds each", flush=True)
    dtype: torch.dtype = getattr(torch, config.dtype)
    export_package(model, config.out, schema, dtype=dtype, tables=config.tables, overwrite=config.overwrite)
    package, own = AmortizedScorer(load_package(config.out)), AmortizedScorer(model)
    batch = _some_requests(schema, trained.model.history_length)
    difference = (torch.sigmoid(package.score(batch)) - torch.sigmoid(own.score(batch))).abs().max()
    size = sum(path.stat().st_size for path in Path(config.out).iterdir()) / 1e6
    print(
        f"{config.out}: {size:.1f} MB in {time.perf_counter() - started:.0f} s; probabilities of {CHECKED_REQUESTS} "
        f"random requests differ by at most {difference:.1e} from the model's in float32"
    )


def _some_requests(schema: RequestSchema, history_length: int) -> RequestBatch:
    lengths = [row * history_length // (CHECKED_REQUESTS - 1) for row in range(CHECKED_REQUESTS)]
    table = random_requests(schema, lengths, [1 + row for row in range(CHECKED_REQUESTS)], seed=0)
    return RequestBatch.from_arrow(table, schema)


if __name__ == "__main__":
    main()
