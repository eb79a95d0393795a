"""Dataclasses as configs: the arguments of a command line, the fields of a YAML file, and that of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from torchrec_amort.errors import InputError
from torchrec_amort.files import write_text
from torchrec_amort.stores import local_path

Config = TypeVar("Config")
CONFIG_FILE = "config.yaml"


def parser_of(config_class: type[Any], command: str) -> ArgumentParser:
    """A parser whose arguments, `--config` file and `--print_config` are the fields of a dataclass."""
    summary = (config_class.__doc__ or "").splitlines()[0]
    parser = ArgumentParser(prog=f"torchrec-amort {command}", description=summary)
    parser.add_argument("--config", action="config", help="YAML file of these arguments")
    parser.add_class_arguments(config_class)
    return parser


def config_of(namespace: Namespace, config_class: type[Config], command: str) -> Config:
    """The dataclass of what a parser of `parser_of` has read."""
    instances = parser_of(config_class, command).instantiate_classes(namespace)
    return config_class(**{name: value for name, value in vars(instances).items() if name != "config"})


def save_config(run: str | Path, config: Any, command: str) -> None:
    """Write `config.yaml` into a run's folder."""
    parser = parser_of(type(config), command)
    write_text(local_path(run) / CONFIG_FILE, parser.dump(parser.parse_object(asdict(config))))


def load_config(run: str | Path, config_class: type[Config], command: str) -> Config:
    """Read back the `config.yaml` of a run's folder.

    Raises:
        InputError: the folder has none, or one of another kind.
    """
    path = local_path(run) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file: {run} is not the folder of a training run")
    parser = parser_of(config_class, command)
    parser.exit_on_error = False
    try:
        return config_of(parser.parse_path(str(path)), config_class, command)
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a config of this version: {error}") from error


def flat_fields(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config's sections by their dotted names, as `with_overrides` reads them.

    Args:
        record: of a config, as `asdict` makes it.
        prefix: what names start with.

    Example::

        flat_fields({"model": {"history": "none"}})  # {"model.history": "none"}
    """
    fields: dict[str, Any] = {}
    for name, value in record.items():
        fields |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return fields


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
        # A parser makes namespaces of the mappings that it is given.
        fields[last] = deepcopy(value)
    parser = parser_of(type(config), command)
    parser.exit_on_error = False
    try:
        return config_of(parser.parse_object(record), type(config), command)
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{dict(overrides)}: {' '.join(str(error).split())}") from error
