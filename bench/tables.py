"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> list[str]:
    """Return the lines of a table.

    Args:
        heads: Of the columns.
        rows: The cells of each line.
        align: "l" (left) or "r" (right) for each column; default: left for the first, right for the others.
    """
    marks = {"l": "---|", "r": "--:|"}
    align = align or "l" + "r" * (len(heads) - 1)
    ruler = "|" + "".join(marks[side] for side in align)
    lines = [
        "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)
        for cells in (heads, *rows)
    ]
    return [lines[0], ruler, *lines[1:]]
