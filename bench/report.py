"""A report as Markdown, whole or as much of it as the documentation shows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from .cases import OURS, PLAIN, place_of
from .rows import TIMED, Report, Row, cases_of
from .tables import table

NOTES = (
    "Times are medians, with the quartiles in brackets. A ratio is the time of the first contestant, which is",
    "plain PyTorch or transformers without compilation (on a CPU in float32), over the contestant's; more is",
    "faster. An error is the norm of the difference from float64 over the norm, checked before any time was",
    "taken. The limit is the machine's rate of arithmetic or of copying, whichever binds. ONNX Runtime and",
    "OpenVINO are given the model with its weights standardized. A first result counts from constructing, with",
    "what must be compiled; the peak memory is that of a process which does nothing else, or of the GPU.",
)
IMAGE_NOTES = (
    "From decoded PIL images to `pixel_values` of 224x224, by the processors' defaults. Ratios are to",
    "transformers' slow processor. bitfast's equals it bit for bit, its fast one transformers' fast one",
    "but for a level of 255 here and there, which was checked before. Two only resize, for comparison.",
)
PACKAGES = {
    "torch": "torch", "transformers": "transformers", "torchvision": "torchvision", "pillow": "Pillow",
    "timm": "timm", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip
"""Whose versions the documentation tells, if they take part."""


def markdown(report: Report) -> str:
    models, ops, images = (report.of_kind(kind) for kind in ("model", "op", "images"))
    fused = [row for row in ops if row.op == "norm_convolution" and row.device == "cuda"]
    ops = [row for row in ops if row not in fused]
    parts = ["# bitfast beside others", "", *header(report), "", *limits_lines(report)]
    for title, rows in cases_of(models).items():
        parts += ["", f"## {title}", "", *model_table(rows)]
    if fused:
        parts += ["", "## Convolutions that normalize what they read", "", *rate_table(fused)]
    if ops:
        parts += ["", "## Ops", "", *op_table(ops)]
    if images:
        parts += ["", "## Image processors", "", *IMAGE_NOTES, "", *image_table(images)]
    return "\n".join(parts) + "\n"


def header(report: Report) -> list[str]:
    machine = report.machine
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    installed = (f"{name} {version}" for name, version in report.versions.items() if version)
    missing = ", ".join(name for name, version in report.peers.items() if version is None)
    lines = [
        f"{gpu}{machine['cpu']} ({machine['cores']} cores, {machine['capability']}), {machine['date']}, "
        f"commit {machine['commit'] or 'unknown'}; load average at the start: {machine['load']}.",
        f"{', '.join(installed)}.",
    ]
    return [*lines, *([f"Not installed: {missing}."] if missing else []), "", *NOTES]


def limits_lines(report: Report) -> list[str]:
    lines = []
    for threads, limits in report.limits.items():
        rates = (f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in limits.flops.items())
        lines.append(
            f"- The machine's limits {where(threads)}, each the best that any probe reached: "
            f"{', '.join(rates)}, copying {limits.bandwidth / 1e9:.1f} GB/s, read and written together."
        )
        for name, rate in limits.probes.items():
            unit = "GB/s" if name.startswith("copy") else "GFLOP/s"
            lines.append(f"  - {name}: {rate / 1e9:.0f} {unit}")
    return lines


def where(threads: int) -> str:
    return f"with {place_of(threads)}" if threads else "on the GPU"


# ---- tables, a line per contestant or per case --------------------------------------------------------


def model_table(rows: Iterable[Row]) -> list[str]:
    """Return one case about a model, a line per contestant."""
    heads = ["contestant", "time", "ratio", "of the limit", "error", "first result", "peak memory"]
    lines = []
    for row in rows:
        cells = [row.status, "", "", "", "", cell_text(row.note)]
        if row.status == TIMED:
            cells = [
                time_cell(row, row.quartiles),
                ratio_cell(row),
                limit_cell(row),
                *cost_cells(row),
            ]
        lines.append([bold(row.contestant), *cells])
    return table(heads, lines)


def op_table(rows: Iterable[Row]) -> list[str]:
    """Return cases about ops, a line per case."""
    heads = ["op", "case", PLAIN, OURS, "ratio", "of the limit", "errors", "backend", "others"]
    lines = []
    for group in cases_of(rows).values():
        by_name = {row.contestant: row for row in group}
        if OURS not in by_name:
            lines.append(
                [group[0].op, group[0].case, *[""] * 5, cell_text(group[0].note), group[0].status]
            )
            continue
        plain, ours = pair = by_name.pop(PLAIN), by_name.pop(OURS)
        lines.append([
            ours.op, f"{ours.case}, GPU" if ours.device == "cuda" else ours.case,
            *(time_cell(row, row.quartiles) for row in pair), ratio_cell(ours), limit_cell(ours),
            f"{error(plain.error)}, {error(ours.error)}", cell_text(ours.note.removeprefix("backend: ")),
            "; ".join(f"{name} {short_cell(row)}" for name, row in by_name.items()),
        ])  # fmt: skip
    return table(heads, lines, "llrrrrrll")


def rate_table(rows: Iterable[Row]) -> list[str]:
    """Return cases about ops that are about bytes and arithmetic, a line per contestant."""
    heads = [
        "case",
        "contestant",
        "time",
        "ratio",
        "GB/s",
        "TFLOP/s",
        "of the limit",
        "error",
        "note",
    ]
    lines = []
    for row in rows:
        cells = [row.status, "", "", "", "", "", cell_text(row.note)]
        if row.seconds is not None:
            rates = (cell("{:.0f}", count / row.seconds or None, scale)
                     for count, scale in ((row.bytes, 1e-9), (row.flops, 1e-12)))  # fmt: skip
            limit = cell("{:.0f} %", row.fraction, 100) + (f" ({row.limit})" if row.limit else "")
            note = cell_text(row.note.removeprefix("backend: native"))
            cells = [time_cell(row), ratio_cell(row), *rates, limit, error(row.error), note]
        lines.append([row.case, bold(row.contestant), *cells])
    return table(heads, lines, "llrrrrrrl")


def image_table(rows: Iterable[Row]) -> list[str]:
    """Return cases about image processors, a line per case, a column per contestant."""
    groups = cases_of(rows).items()
    return wide_table([(title.removeprefix("preprocessing: "), group) for title, group in groups])


def wide_table(lines: Iterable[tuple[str, Iterable[Row]]]) -> list[str]:
    """Return a line for each title and its rows, a column for each contestant, whatever its dtype."""
    named = [(title, {family_of(row): short_cell(row) for row in rows}) for title, rows in lines]
    columns = list(dict.fromkeys(name for _, cells in named for name in cells))
    body = [[title, *(cells.get(name, "") for name in columns)] for title, cells in named]
    return table(["", *map(bold, columns)], body)


# ---- what the documentation shows -----------------------------------------------------------------------


def documentation(report: Report) -> list[str]:
    """Return the introduction and tables that a page of the documentation shows of a report."""
    cases = list(cases_of(report.of_kind("model")).values())
    # What is compiled as well is what the targets are about; the rest is reported beside it.
    full = [rows for rows in cases if any("compiled" in row.contestant for row in rows)]
    further = [rows for rows in cases if rows not in full]
    ops = [row for row in report.of_kind("op") if row.is_quick]
    images = report.of_kind("images")
    parts = [introduction(report)]
    parts += ["", *models_table(full)] if full else []
    parts += ["", *models_table(further), "", *cost_table(full or further)] if further else []
    parts += ["", *quick_op_table(ops)] if ops else []
    parts += ["", *IMAGE_NOTES, "", *image_table(images)] if images else []
    return parts


def introduction(report: Report) -> str:
    machine, kinds = report.machine, {row.kind for row in report.rows}
    shown = {"torch", "transformers", *map(family_of, report.rows)}
    shown |= {"torchvision", "Pillow"} if "images" in kinds else set()
    found = [(name, report.versions.get(package)) for package, name in PACKAGES.items()]
    used = [f"{name} {version}" for name, version in found if version and name in shown]
    limits = "; ".join(
        f"{where(threads)} {limit.flops['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{limit.flops['bfloat16'] / 1e9:.0f} in bfloat16, copies {limit.bandwidth / 1e9:.0f} GB/s"
        for threads, limit in report.limits.items()
    )
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['date']}, commit "
        f"{machine['commit'] or 'unknown'}, {', '.join(used)}. Medians of one run"
        + ("; ratios are to transformers in float32, uncompiled" if "model" in kinds else "")
        + (f". The machine reaches {limits}." if limits else ".")
    )


def models_table(cases: Iterable[list[Row]]) -> list[str]:
    return wide_table(
        (f"{rows[0].title}, {dtype}", [row for row in rows if row.dtype == dtype])
        for rows in cases
        for dtype in dict.fromkeys(row.dtype for row in rows)
    )


def cost_table(cases: list[list[Row]]) -> list[str]:
    """Return what each contestant costs at batch 8 (if no case has it, in the first), with most threads."""
    of_batch_8 = [rows for rows in cases if "batch 8" in rows[0].case]
    rows = max(of_batch_8 or cases[:1], key=lambda rows: rows[0].threads)
    costs = ["of the arithmetic limit", "error against float64", "first result", "peak memory"]
    counted = [row for row in rows if row.first_result is not None]
    lines = [[bold(row.contestant), percent(row.fraction), *cost_cells(row)] for row in counted]
    return table([rows[0].title, *costs], lines)


def quick_op_table(rows: Iterable[Row]) -> list[str]:
    lines = []
    for group in cases_of(rows).values():
        by_name = {row.contestant: row for row in group}
        plain, ours = by_name[PLAIN], by_name[OURS]
        fraction = percent(ours.fraction if ours.limit == "copy" else None)
        times = time_cell(plain), time_cell(ours)
        lines.append([f"{ours.op}: {ours.case}", *times, ratio_cell(ours), fraction])
    return table(["op", PLAIN, OURS, "ratio (quartiles)", "of the copy bandwidth"], lines)


# ---- cells; empty for what a row does not have ----------------------------------------------------------


def bold(name: str) -> str:
    return f"**{name}**" if name.startswith("bitfast") else name


def family_of(row: Row) -> str:
    return row.contestant.replace(" bfloat16", "")


def cell_text(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def cell(form: str, value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else form.format(scale * value)


percent = partial(cell, "{:.0f} %", scale=100)
error = partial(cell, "{:.1e}")


def duration(seconds: float, digits: int = 4, quartiles: Iterable[float] = ()) -> str:
    """Return a time, and its quartiles, in a unit that suits it."""
    unit, scale = "s", 1.0
    if seconds < 1:
        unit, scale = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3)
    median, *others = (f"{scale * each:.{digits}g}" for each in (seconds, *quartiles))
    return f"{median} {unit}" + (f" ({'-'.join(others)})" if others else "")


def time_cell(row: Row, quartiles: Iterable[float] | None = None) -> str:
    """Return a time, or why there is none."""
    return row.status if row.seconds is None else duration(row.seconds, quartiles=quartiles or ())


def short_cell(row: Row) -> str:
    """Return a time and its ratio, or why there is none."""
    return time_cell(row) + cell(", {:.2f}x", None if row.seconds is None else row.ratio)


def ratio_cell(row: Row) -> str:
    """Return a ratio and its quartiles."""
    spread = "" if row.ratio_quartiles is None else " ({:.2f}-{:.2f})".format(*row.ratio_quartiles)
    return cell("{:.2f}x", row.ratio) + spread


def limit_cell(row: Row) -> str:
    """Return the share of the limit that binds, and the rate that this is."""
    if row.fraction is None or row.seconds is None:
        return ""
    count, unit = (row.bytes, "GB/s") if row.limit == "copy" else (row.flops, "GFLOP/s")
    return f"{percent(row.fraction)} ({count / row.seconds / 1e9:.0f} {unit})"


def cost_cells(row: Row) -> list[str]:
    """Return the error, the first result and the peak memory."""
    memory = cell("{:.0f} MiB", row.peak_memory, 2**-20)
    return [error(row.error), cell("{:.1f} s", row.first_result), memory]
