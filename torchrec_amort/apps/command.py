"""What the commands have in common: typed arguments in, one clear line out when the input is bad."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from torchrec_amort.files import write_text
from torchrec_amort.schema import InputError, RequestSchema
from torchrec_amort.training.processes import Stopped, stop_signals

Config = TypeVar("Config")
CONFIG_FILE = "config.yaml"
# What an extra of setup.cfg brings: a plain install scores without.
EXTRAS = {"train": ("tensorboard", "torchx"), "report": ("jinja2", "matplotlib")}
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


def parser_of(config_class: type[Any], command: str) -> ArgumentParser:
    """A parser whose arguments, `--config` file and `--print_config` are the fields of a dataclass."""
    summary = (config_class.__doc__ or "").splitlines()[0]
    parser = ArgumentParser(prog=f"torchrec-amort {command}", description=summary)
    parser.add_argument("--config", action="config", help="YAML file of these arguments")
    parser.add_class_arguments(config_class)
    return parser


def parse(config_class: type[Config], command: str, args: Sequence[str] | None) -> Config:
    """Read a dataclass from a command line; what it does not allow ends the process with one line."""
    try:
        return _config(parser_of(config_class, command).parse_args(args), config_class, command)
    except InputError as error:
        _end("error", error, 2)


def _config(namespace: Namespace, config_class: type[Config], command: str) -> Config:
    instances = parser_of(config_class, command).instantiate_classes(namespace)
    return config_class(**{name: value for name, value in vars(instances).items() if name != "config"})


def save_config(run: str | Path, config: Any, command: str) -> None:
    """Write `config.yaml` into a run's folder."""
    parser = parser_of(type(config), command)
    write_text(Path(run) / CONFIG_FILE, parser.dump(parser.parse_object(asdict(config))))


def load_config(run: str | Path, config_class: type[Config], command: str) -> Config:
    """Read back the `config.yaml` of a run's folder.

    Raises:
        InputError: the folder has none, or one of another kind.
    """
    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file: {run} is not the folder of a training run")
    parser = parser_of(config_class, command)
    parser.exit_on_error = False
    try:
        return _config(parser.parse_path(str(path)), config_class, command)
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a config of this version: {error}") from error


def with_overrides(config: Config, overrides: Mapping[str, Any], command: str) -> Config:
    """A config with other values of some fields.

    Args:
        config: a dataclass.
        overrides: values by field; `model.history` is field `history` of field `model`.
        command: the command that it is of.

    Raises:
        InputError: there is no such field, or the value is not of its type.
    """
    record = asdict(config)  # type: ignore[call-overload]
    for name, value in overrides.items():
        *path, last = name.split(".")
        fields = record
        for part in path:
            fields = fields.get(part, {})
        if last not in fields:
            raise InputError(f"{name}: no such field of {command}: torchrec-amort {command} --help lists them")
        fields[last] = value
    parser = parser_of(type(config), command)
    parser.exit_on_error = False
    try:
        return _config(parser.parse_object(record), type(config), command)
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{dict(overrides)}: {' '.join(str(error).split())}") from error


def refuse_other_schema(run: str | Path, data: str | Path) -> None:
    """Refuse data whose features are not those that a run was trained on.

    Raises:
        InputError: names the first feature that differs.
    """
    RequestSchema.load(run).refuse_other_data(RequestSchema.load(data), str(data))


def run_command(command: Callable[[], None], *extras: str) -> None:
    """Run a command.

    Bad input, an extra that is not installed, and a disk that is full or may not be written, end it with one line and
    exit status 2. A signal that stops it is an exception, so that what it was writing is removed; it ends with one line
    and the signal's exit status: 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        command: what to run.
        extras: what it needs, of `EXTRAS`: refused before it works for hours.
    """
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
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed: pip install 'torchrec-amort[{extra}]'") from error


def _end(kind: str, message: object, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # In one piece with its line end, or the lines of two ranks run into each other.
    sys.stderr.write(f"{kind}: {message}\n" if rank == "0" else f"{kind} (rank {rank}): {message}\n")
    sys.stderr.flush()
    sys.exit(status)
