"""The tab-separated files of MIND: without a header, and without quoting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from torchrec_amort.errors import InputError


def read_tsv(path: Path, columns: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of a file as text; an empty field is null.

    Args:
        path: the file.
        columns: what they are called, in order.

    Raises:
        InputError: a line does not have as many.

    Example::

        read_tsv(Path("MINDsmall_train/behaviors.tsv"), ("impression_id", "user_id", "time", "history", "impressions"))
    """
    text = dict.fromkeys(columns, pa.string())
    try:
        table = pyarrow.csv.read_csv(
            path,
            # One thread, for only then does an error tell the line.
            pyarrow.csv.ReadOptions(column_names=list(columns), use_threads=False, block_size=2**26),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            pyarrow.csv.ConvertOptions(column_types=text, null_values=[""], strings_can_be_null=True),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not as MIND is published ({error}): download it again") from error
    return {name: table[name].combine_chunks() for name in columns}


def refuse_lines(
    path: Path, field: str, values: pa.Array, good: pa.Array, expected: str, lines: pa.Array | None = None
) -> None:
    """Refuse the first value that is not good.

    Args:
        path: the file.
        field: what the values are.
        values: text.
        good: whether each is.
        expected: what it should be.
        lines: the line of each, from 0, if there is not one for each line.

    Raises:
        InputError: names the line, and what it has.
    """
    place = pc.index(good, False).as_py()
    if place >= 0:
        line = place if lines is None else lines[place].as_py()
        raise InputError(
            f"{path}: line {line + 1}: {field} is {values[place].as_py() or ''!r}, not {expected}: "
            "mend the line or leave it out"
        )
