"""Errors, told in one line."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TypeVar

Raised = TypeVar("Raised", bound=BaseException)

# What an error has the place in that was kept; pickle takes it along.
_PLACE = "place"


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
    if (kept := vars(error).get(_PLACE)) is not None:
        return str(kept)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno})"


def with_place(error: Raised, cause: BaseException) -> Raised:
    """An error that goes to another process, where it has no traceback, and still tells the place of its cause.

    Example::

        import pickle

        try:
            {}["film"]
        except KeyError as error:
            sent = pickle.dumps(with_place(error, error))
        print(place_of(pickle.loads(sent)))  # KeyError (example.py:2)
    """
    vars(error)[_PLACE] = place_of(cause)
    return error
