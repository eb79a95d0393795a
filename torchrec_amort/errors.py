"""Bad input, told in one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: where, which field, the two numbers that disagree, what to do."""


def one_line(error: Exception) -> str:
    """The message of another error on one line, to be told in an `InputError`."""
    return " ".join(str(error).split())
