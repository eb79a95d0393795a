"""What the commands have in common: typed arguments in, one clear line out when the input is bad."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from torchrec_amort.config import Config, config_of, parser_of
from torchrec_amort.errors import InputError
from torchrec_amort.training.processes import Stopped, stop_signals

# What an extra of setup.cfg brings: a plain install scores without.
EXTRAS = {
    "train": ("tensorboard", "torchx"),
    "report": ("jinja2", "matplotlib"),
    "build": ("duckdb",),
    "spark": ("pyspark", "sqlglot"),
    "client": ("grpcio", "protobuf"),
    "sign": ("cryptography",),
    "trace": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    "serve": (
        "cryptography",
        "grpcio",
        "grpcio-health-checking",
        "msgspec",
        "prometheus-client",
        "starlette",
        "uvicorn",
    ),
    "tier": ("cryptography", "redis"),
}
# Packages whose module has another name.
MODULES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "prometheus-client": "prometheus_client",
    "protobuf": "google.protobuf",
}
# No space, over quota, file too large, read-only, not permitted (twice), a file where a folder should be (twice).
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)


def parse(config_class: type[Config], command: str, args: Sequence[str] | None) -> Config:
    """Read a dataclass from a command line; what it does not allow ends the process with one line."""
    try:
        return config_of(parser_of(config_class, command).parse_args(args), config_class, command)
    except InputError as error:
        _end("error", error, 2)


def run_command(command: Callable[[], None], *extras: str) -> None:
    """Run a command.

    Bad input, an extra that is not installed, and a disk that is full or may not be written, end it with one line and
    exit status 2. A signal that stops it is an exception, so that what it was writing is removed; it ends with one line
    and the signal's exit status: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        command: what to run.
        extras: what it needs, of `EXTRAS`: refused before it works for hours.
    """
    # As `python -m` has it: the module of model.build may be there.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    # What TorchRec and torch deprecate of each other is not for who runs a command.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for library in ("torchrec", "torch.fx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        for extra in extras:
            _require(extra)
        with stop_signals(_stop):
            command()
    except InputError as error:
        _end("error", error, 2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _end("error", f"{error}: make room, or choose a folder that can be written", 2)
    except Stopped as stop:
        _end("interrupted" if stop.number == signal.SIGINT else "terminated", stop, 128 + stop.number)
    except KeyboardInterrupt:
        _end("interrupted", "at once, by a second Ctrl-C", 128 + signal.SIGINT)


def _stop(number: signal.Signals) -> NoReturn:
    raise Stopped(number, f"by {number.name}")


def _require(extra: str) -> None:
    for package in EXTRAS[extra]:
        try:
            importlib.import_module(MODULES.get(package, package))
        except ModuleNotFoundError as error:
            raise InputError(f"{package} is not installed: pip install 'torchrec-amort[{extra}]'") from error


def _end(kind: str, message: object, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # In one piece with its line end, or the lines of two ranks run into each other.
    sys.stderr.write(f"{kind}: {message}\n" if rank == "0" else f"{kind} (rank {rank}): {message}\n")
    sys.stderr.flush()
    sys.exit(status)
