"""``python -m bench.readme``: the performance tables of the READMEs, made from the JSON that they name.

What stands between ``<!-- benchmark: results/NAME.json -->`` (a path in this folder) and ``<!-- end -->`` is
replaced. With ``--check`` nothing is written; the exit status is 1 if anything would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .registry import OURS, PLAIN
from .report import IMAGE_NOTES, duration, image_table, percent, ratio_cell, short_cell
from .rows import Report, Row, cases_of

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
BLOCK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if it would")
    arguments = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    renewed = renew(text)
    if arguments.check and renewed != text:
        print(f"{README} does not agree with its JSON: run make readme-table", file=sys.stderr)
        return 1
    if not arguments.check:
        README.write_text(renewed, encoding="utf-8")
    return 0


def renew(text: str) -> str:
    """Return a text with its tables made anew.

    Raises:
        ValueError: it has no place for one, or the JSON is of another format.
        OSError: there is no such JSON.
    """
    if not BLOCK.search(text):
        raise ValueError("no <!-- benchmark: results/NAME.json --> ... <!-- end --> in the text")

    def table(match: re.Match[str]) -> str:
        return match[1] + "\n".join(tables(Report.read(FOLDER / match[2]))) + "\n" + match[3]

    return BLOCK.sub(table, text)


def tables(report: Report) -> list[str]:
    """Return what a README says of a report."""
    models = [row for row in report.rows if row.kind == "model"]
    # What is compiled as well is what the targets are about; the rest is reported beside it.
    by_title = cases_of(models).values()
    full = [rows for rows in by_title if any("compiled" in row.contestant for row in rows)]
    further = [rows for rows in by_title if rows not in full]
    ops = [row for row in report.rows if row.kind == "op" and row.is_quick]
    parts = [introduction(report), ""]
    if full:
        parts += [*models_table(full), ""]
    if further:
        parts += [*models_table(further), "", *cost_tables(full or further)]
    if ops:
        parts += ["", *ops_table(ops)]
    images = [row for row in report.rows if row.kind == "images"]
    if images:
        parts += ["", *IMAGE_NOTES, "", *image_table(images)]
    return parts


def introduction(report: Report) -> str:
    """Return what was measured on and with, in a sentence."""
    machine = report.machine
    versions = {**machine["versions"], **report.peers}
    names = {"torch": "torch", "transformers": "transformers"}
    kinds = {row.kind for row in report.rows}
    if "images" in kinds:
        names |= {"torchvision": "torchvision", "pillow": "Pillow"}
    contestants = {family_of(row) for row in report.rows}
    for package, name in (
        ("timm", "timm"),
        ("onnxruntime", "ONNX Runtime"),
        ("openvino", "OpenVINO"),
    ):
        if name in contestants:
            names[package] = name
    used = [f"{name} {versions[key]}" for key, name in names.items() if versions.get(key)]
    limits = "; ".join(
        f"with {count} thread{'s' if count > 1 else ''} "
        f"{limit.flops['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{limit.flops['bfloat16'] / 1e9:.0f} in bfloat16, copies {limit.bandwidth / 1e9:.0f} GB/s"
        for count, limit in report.limits.items()
    )
    text = (
        f"{machine['cpu']} ({machine['capability']}), {machine['date']}, commit "
        f"{machine['commit'] or 'unknown'}, {', '.join(used)}. Medians of one run"
    )
    if "model" in kinds:
        text += "; ratios are to transformers in float32, uncompiled"
    return f"{text}. The machine reaches {limits}." if limits else f"{text}."


# ---- models -------------------------------------------------------------------------------------


def family_of(row: Row) -> str:
    """Return a contestant's name without its dtype."""
    return row.contestant.replace(" bfloat16", "")


def models_table(cases: Sequence[list[Row]]) -> list[str]:
    """Return cases about models, a line per case and dtype, a column per contestant."""
    columns = list(dict.fromkeys(family_of(row) for rows in cases for row in rows))
    heads = [f"**{name}**" if name.startswith("bitfast") else name for name in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * len(columns)}"]
    for rows in cases:
        for dtype in dict.fromkeys(row.dtype for row in rows):
            by_family = {family_of(row): row for row in rows if row.dtype == dtype}
            cells = [short_cell(by_family.get(name)) for name in columns]
            lines.append(f"| {rows[0].title}, {dtype} | {' | '.join(cells)} |")
    return lines


def cost_tables(cases: Sequence[list[Row]]) -> list[str]:
    """Return the error, limit, first result and memory of each contestant at batch 8, with most threads.

    If no case has batch 8, in the first one.
    """
    of_batch_8 = [rows for rows in cases if "batch 8" in rows[0].case]
    rows = max(of_batch_8 or cases[:1], key=lambda rows: rows[0].threads)
    lines = [
        f"| {rows[0].title} | of the arithmetic limit | error against float64 | first result | peak memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.first_result is None or row.peak_memory is None:
            continue
        name = f"**{row.contestant}**" if row.is_ours else row.contestant
        lines.append(
            f"| {name} | {percent(row.fraction)} | {row.error:.1e} | {row.first_result:.1f} s "
            f"| {row.peak_memory / 2**20:.0f} MiB |"
        )
    return lines


# ---- ops ----------------------------------------------------------------------------------------


def ops_table(rows: Sequence[Row]) -> list[str]:
    """Return cases about ops, a line each."""
    lines = [
        "| op | plain PyTorch | bitfast | ratio (quartiles) | of the copy bandwidth |",
        "|---|--:|--:|--:|--:|",
    ]
    for group in cases_of(list(rows)).values():
        by_name = {row.contestant: row for row in group}
        times = [
            row.status if row.seconds is None else duration(row.seconds)
            for row in (by_name[PLAIN], by_name[OURS])
        ]
        ours = by_name[OURS]
        lines.append(
            f"| {ours.op}: {ours.case} | {' | '.join(times)} | {ratio_cell(ours)} "
            f"| {percent(ours.fraction)} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
