"""``python -m bench.readme``: the performance tables of the documentation, from the JSON that they name.

What stands between ``<!-- benchmark: results/NAME.json -->`` (a path in this folder) and ``<!-- end -->`` is
replaced by the tables of that report; after ``<!-- summary: A.json B.json ... -->`` come the few rows of
:data:`SUMMARY`. With ``--check`` nothing is written; the exit status is 1 if anything would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .report import documentation, duration
from .rows import Report
from .tables import table

FOLDER = Path(__file__).resolve().parent
PAGES = (FOLDER.parent / "README.md", FOLDER.parent / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- (benchmark|summary): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


class Line(NamedTuple):
    """A line of the summary: what it says, and which rows of which case it is about."""

    text: str
    title: str
    theirs: str = "transformers"
    ours: str = "bitfast"


R50X1, BFLOAT16 = "R50x1 224x224 batch", ("transformers bfloat16", "bitfast bfloat16")
SUMMARY = (
    Line("inference, batch 1, float32", f"inference: {R50X1} 1, 2 threads"),
    Line("inference, batch 1, bfloat16", f"inference: {R50X1} 1, 2 threads", *BFLOAT16),
    Line("inference, batch 8, float32", f"inference: {R50X1} 8, 2 threads"),
    Line("inference, batch 8, bfloat16", f"inference: {R50X1} 8, 2 threads", *BFLOAT16),
    Line("training step, batch 8, float32", f"training: {R50X1} 8, 2 threads"),
    Line("training step, batch 8, autocast", f"training: {R50X1} 8, 2 threads", "transformers autocast",
         "bitfast autocast"),
    Line("32 photographs to `pixel_values`", "preprocessing: 32 photographs of mixed size, 2 threads",
         "transformers slow"),
    Line("inference, batch 128, bfloat16, eager", f"inference: {R50X1} 128 bfloat16, GPU"),
    Line("inference, batch 128, bfloat16, bitfast in a CUDA graph", f"inference: {R50X1} 128 bfloat16, GPU",
         ours="bitfast, CUDA graph"),
    Line("training step, batch 128, bfloat16, eager", f"training: {R50X1} 128 bfloat16, GPU"),
    Line("training step, batch 128, autocast, eager", f"training: {R50X1} 128 autocast, GPU"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if it would")
    arguments = parser.parse_args(argv)
    status = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        renewed = renew(text)
        if arguments.check and renewed != text:
            print(f"{page} does not agree with its JSON: run make readme-table", file=sys.stderr)
            status = 1
        elif not arguments.check:
            page.write_text(renewed, encoding="utf-8")
    return status


def renew(text: str) -> str:
    """Return a text with its tables made anew; a ValueError tells that it has no place for one."""
    if not BLOCK.search(text):
        raise ValueError("no <!-- benchmark: results/NAME.json --> ... <!-- end --> in the text")

    def tables(match: re.Match[str]) -> str:
        reports = [Report.read(FOLDER / name) for name in match[3].split()]
        lines = summary(reports) if match[2] == "summary" else documentation(*reports)
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return BLOCK.sub(tables, text)


def summary(reports: Sequence[Report]) -> list[str]:
    """Return the lines of :data:`SUMMARY`; of a row that several reports have, that of the first."""
    found = [row for report in reversed(reports) for row in report.rows]
    rows = {(row.title, row.contestant): row for row in found}
    cells = []
    for line in SUMMARY:
        theirs, ours = (rows[line.title, name].seconds for name in (line.theirs, line.ours))
        if theirs is None or ours is None:
            raise ValueError(f"{line.title}: not both {line.theirs} and {line.ours} have a time")
        threads = rows[line.title, line.ours].threads
        place = f"CPU, {threads} threads" if threads else "H100"
        ratio = f"{theirs / ours:.{2 if theirs / ours < 10 else 1}f}x"
        cells.append([line.text, place, duration(theirs, 3), duration(ours, 3), ratio])
    return table(["", "device", "transformers", "bitfast", "ratio"], cells, "llrrr")


if __name__ == "__main__":
    sys.exit(main())
