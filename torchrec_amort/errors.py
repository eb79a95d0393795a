"""Errors, told in one line."""

from __future__ import annotations

import traceback
from pathlib import Path


class InputError(ValueError):
    """Bad input, told in one line: where, which field, the two numbers that disagree, what to do."""


def one_line(error: Exception) -> str:
    """The message of another error on one line, to be told in an `InputError`."""
    return " ".join(str(error).split())


def place_of(error: BaseException) -> str:
    """An error's kind and the line that raised it; its message may tell ids.

    Example::

        try:
            {}["film"]
        except KeyError as error:
            print(place_of(error))  # KeyError (example.py:2)
    """
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno})"
