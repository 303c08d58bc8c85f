"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import OURS, PLAIN
from .rows import MISSING, TIMED, Report, Row, cases_of


def markdown(report: Report) -> str:
    """Return the whole report."""
    parts = ["# bitfast beside others", "", *header(report), "", *limits_lines(report)]
    models = [row for row in report.rows if row.kind == "model"]
    for title, rows in cases_of(models).items():
        parts += ["", f"## {title}", "", *model_table(rows)]
    ops = [row for row in report.rows if row.kind == "op"]
    if ops:
        parts += ["", "## Ops", "", *op_table(ops)]
    images = [row for row in report.rows if row.kind == "images"]
    if images:
        parts += ["", "## Image processors", "", *IMAGE_NOTES, "", *image_table(images)]
    return "\n".join(parts) + "\n"


def header(report: Report) -> list[str]:
    """Return what was measured on and with."""
    machine = report.machine
    versions = {**machine["versions"], **report.peers}
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"{machine['cpu']} ({machine['cores']} cores, {machine['capability']}), {machine['date']}, "
        f"commit {machine['commit'] or 'unknown'}; load average at the start: {machine['load']}.",
        f"{installed}.",
    ]
    missing = [name for name, version in report.peers.items() if version is None]
    if missing:
        lines.append(f"Not installed: {', '.join(missing)}.")
    return [*lines, "", *NOTES]


NOTES = (
    "Times are medians, with the quartiles in brackets. A ratio is plain PyTorch's time, for models that of",
    "transformers in float32 without compilation, over the contestant's; more is faster. An error is the norm",
    "of the difference from float64 over the norm, checked before any time was taken. ONNX Runtime and",
    "OpenVINO are given the model with its weights standardized. A first result counts from constructing, with",
    "what must be compiled; the peak memory is that of a process which does nothing else, after two results.",
)


def limits_lines(report: Report) -> list[str]:
    """Return the machine's limits, as measured in the same run."""
    lines = []
    for threads, limits in report.limits.items():
        count = f"{threads} thread{'s' if threads > 1 else ''}"
        lines.append(
            f"- The machine's limits with {count}, each the best that any probe reached: "
            f"{limits.flops['float32'] / 1e9:.0f} GFLOP/s in float32, "
            f"{limits.flops['bfloat16'] / 1e9:.0f} in bfloat16, "
            f"copying {limits.bandwidth / 1e9:.1f} GB/s, read and written together."
        )
        lines += [
            f"  - {name}: {rate / 1e9:.0f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}"
            for name, rate in limits.probes.items()
        ]
    return lines


# ---- models -------------------------------------------------------------------------------------


def model_table(rows: list[Row]) -> list[str]:
    """Return one case about a model, a line per contestant."""
    lines = [
        "| contestant | time | ratio | of the arithmetic limit | error | first result | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = f"**{row.contestant}**" if row.is_ours else row.contestant
        if row.status != TIMED:
            lines.append(f"| {name} | {row.status} | | | | | {cell_text(row.note)} |")
            continue
        first = "" if row.first_result is None else f"{row.first_result:.1f} s"
        peak = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {time_cell(row)} | {ratio_cell(row)} | {percent(row.fraction)} "
            f"| {error_cell(row)} | {first} | {peak} |"
        )
    return lines


# ---- ops ----------------------------------------------------------------------------------------


def op_table(rows: list[Row]) -> list[str]:
    """Return cases about ops, a line per case."""
    lines = [
        "| op | case | plain PyTorch | bitfast | ratio | of the copy bandwidth | errors | backend |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for group in cases_of(rows).values():
        by_name = {row.contestant: row for row in group}
        plain, ours = by_name[PLAIN], by_name[OURS]
        errors = f"{error_cell(plain)}, {error_cell(ours)}"
        lines.append(
            f"| {ours.op} | {ours.case} | {time_cell(plain)} | {time_cell(ours)} "
            f"| {ratio_cell(ours)} | {percent(ours.fraction)} | {errors} "
            f"| {cell_text(ours.note.removeprefix('backend: '))} |"
        )
    return lines


# ---- image processors ---------------------------------------------------------------------------

IMAGE_NOTES = (
    "From decoded PIL images to `pixel_values` of 224x224, by the processors' defaults. Ratios are to",
    "transformers' slow processor. bitfast's equals it bit for bit, its fast one transformers' fast one",
    "but for a level of 255 here and there, which was checked before. Two only resize, for comparison.",
)


def image_table(rows: Sequence[Row]) -> list[str]:
    """Return cases about image processors, a line per case, a column per contestant."""
    columns = list(dict.fromkeys(row.contestant for row in rows))
    heads = [f"**{name}**" if name.startswith("bitfast") else name for name in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'--:|' * len(columns)}"]
    for group in cases_of(list(rows)).values():
        by_name = {row.contestant: row for row in group}
        cells = [short_cell(by_name.get(name)) for name in columns]
        lines.append(f"| {group[0].title.removeprefix('preprocessing: ')} | {' | '.join(cells)} |")
    return lines


# ---- cells --------------------------------------------------------------------------------------


def time_cell(row: Row) -> str:
    """Return a time and its quartiles, or why there is none."""
    if row.seconds is None or row.quartiles is None:
        return row.status
    first, third = row.quartiles
    unit, scale = unit_of(row.seconds)
    return f"{row.seconds * scale:.4g} {unit} ({first * scale:.4g}-{third * scale:.4g})"


def ratio_cell(row: Row) -> str:
    """Return a ratio and its quartiles, nothing without a baseline."""
    if row.ratio is None or row.ratio_quartiles is None:
        return ""
    first, third = row.ratio_quartiles
    return f"{row.ratio:.2f}x ({first:.2f}-{third:.2f})"


def error_cell(row: Row) -> str:
    """Return an error."""
    return "" if row.error is None else f"{row.error:.1e}"


def percent(fraction: float | None) -> str:
    """Return a share."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    unit, scale = unit_of(seconds)
    return f"{seconds * scale:.4g} {unit}"


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit that suits a time, and how many of it are a second."""
    if seconds < 1e-3:
        return "us", 1e6
    return ("ms", 1e3) if seconds < 1 else ("s", 1.0)


def cell_text(text: str) -> str:
    """Return text that fits into a cell."""
    return text.replace("|", "/").replace("\n", " ")


def short_cell(row: Row | None) -> str:
    """Return a contestant's time and ratio in few words, for tables of many contestants."""
    if row is None:
        return ""
    if row.seconds is None:
        return "not installed" if row.status == MISSING else row.status
    ratio = "" if row.ratio is None else f", {row.ratio:.2f}x"
    return f"{duration(row.seconds)}{ratio}"
