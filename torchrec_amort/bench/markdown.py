"""Tables in Markdown, as reports have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        heads: of the columns.
        rows: a cell of each column.

    Example::

        table(["encoder", "AUC"], [("none", "0.7641")])
    """
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def interval(difference: Mapping[str, float] | None) -> str:
    """A `difference` between its bounds, `low` and `high`; a dash if there is none.

    Args:
        difference: of `paired_differences`.
    """
    if difference is None:
        return "-"
    return f"{difference['difference']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
