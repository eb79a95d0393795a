"""What the numbers of a config may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchrec_amort.errors import InputError


@dataclass(frozen=True)
class Bounds:
    """What a number may be: how to say it, and how to find out."""

    text: str
    hold: Callable[[float], bool]


AT_LEAST_ONE = Bounds("1 or more", lambda number: number >= 1)
NOT_NEGATIVE = Bounds("0 or more", lambda number: number >= 0)
POSITIVE = Bounds("a number above 0", lambda number: number > 0)
UP_TO_ONE = Bounds("0 to 1", lambda number: 0 <= number <= 1)
BELOW_ONE = Bounds("0 or more, and less than 1", lambda number: 0 <= number < 1)


def refuse_out_of_bounds(config: object, bounds: Mapping[Bounds, tuple[str, ...]], section: str = "") -> None:
    """Refuse numbers of a config that are out of their bounds, or not finite.

    Args:
        config: its fields are a number, a list of numbers, or None, which may always be.
        bounds: the fields that have each.
        section: what the fields' names start with on the command line.

    Raises:
        InputError: names the field, its value and what it may be.

    Example::

        refuse_out_of_bounds(ModelConfig(history_layers=2), {AT_LEAST_ONE: ("history_layers",)}, "model.")
    """
    for bound, names in bounds.items():
        for name in names:
            value = getattr(config, name)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(math.isfinite(number) and bound.hold(number) for number in numbers):
                raise InputError(f"{section}{name} is {value}: give {bound.text}")
