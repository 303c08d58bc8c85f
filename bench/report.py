"""A report as Markdown, whole or as much of it as the documentation shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cases import OURS, PLAIN
from .rows import MISSING, TIMED, Report, Row, cases_of
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


def markdown(report: Report) -> str:
    """Return the whole report."""
    parts = ["# bitfast beside others", "", *header(report), "", *limits_lines(report)]
    by_kind = {kind: rows_of(report, kind) for kind in ("model", "op", "images")}
    for title, rows in cases_of(by_kind["model"]).items():
        parts += ["", f"## {title}", "", *model_table(rows)]
    if by_kind["op"]:
        parts += ["", "## Ops", "", *op_table(by_kind["op"])]
    if by_kind["images"]:
        parts += ["", "## Image processors", "", *IMAGE_NOTES, "", *image_table(by_kind["images"])]
    return "\n".join(parts) + "\n"


def rows_of(report: Report, kind: str) -> list[Row]:
    """Return the rows of cases of a kind."""
    return [row for row in report.rows if row.kind == kind]


def header(report: Report) -> list[str]:
    """Return what was measured on and with."""
    machine = report.machine
    versions = {**machine["versions"], **report.peers}
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    lines = [
        f"{gpu}{machine['cpu']} ({machine['cores']} cores, {machine['capability']}), {machine['date']}, "
        f"commit {machine['commit'] or 'unknown'}; load average at the start: {machine['load']}.",
        f"{installed}.",
    ]
    missing = [name for name, version in report.peers.items() if version is None]
    if missing:
        lines.append(f"Not installed: {', '.join(missing)}.")
    return [*lines, "", *NOTES]


def limits_lines(report: Report) -> list[str]:
    """Return the machine's limits, as measured in the same run."""
    lines = []
    for threads, limits in report.limits.items():
        place = f"with {threads} thread{'s' if threads > 1 else ''}" if threads else "on the GPU"
        rates = ", ".join(
            f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in limits.flops.items()
        )
        lines.append(
            f"- The machine's limits {place}, each the best that any probe reached: {rates}, "
            f"copying {limits.bandwidth / 1e9:.1f} GB/s, read and written together."
        )
        lines += [
            f"  - {name}: {rate / 1e9:.0f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}"
            for name, rate in limits.probes.items()
        ]
    return lines


# ---- tables, a line per contestant or per case --------------------------------------------------------


def model_table(rows: list[Row]) -> list[str]:
    """Return one case about a model, a line per contestant."""
    heads = ["contestant", "time", "ratio", "of the limit", "error", "first result", "peak memory"]
    lines = []
    for row in rows:
        cells = [
            time_cell(row),
            ratio_cell(row),
            limit_cell(row),
            error_cell(row),
            *cost_cells(row),
        ]
        told = cells if row.status == TIMED else [row.status, "", "", "", "", cell_text(row.note)]
        lines.append([bold(row.contestant), *told])
    return table(heads, lines)


def op_table(rows: list[Row]) -> list[str]:
    """Return cases about ops, a line per case."""
    heads = ["op", "case", PLAIN, OURS, "ratio", "of the limit", "errors", "backend", "others"]
    lines = []
    for group in cases_of(rows).values():
        by_name = {row.contestant: row for row in group}
        if OURS not in by_name:
            lines.append([group[0].op, group[0].case, *[""] * 5, group[0].note, group[0].status])
            continue
        plain, ours = by_name.pop(PLAIN), by_name.pop(OURS)
        others = "; ".join(f"{name} {short_cell(row)}" for name, row in by_name.items())
        lines.append([
            ours.op, f"{ours.case}, GPU" if ours.device == "cuda" else ours.case, time_cell(plain),
            time_cell(ours), ratio_cell(ours), limit_cell(ours), f"{error_cell(plain)}, {error_cell(ours)}",
            cell_text(ours.note.removeprefix("backend: ")), others,
        ])  # fmt: skip
    return table(heads, lines, "llrrrrrll")


def image_table(rows: Sequence[Row]) -> list[str]:
    """Return cases about image processors, a line per case, a column per contestant."""
    groups = cases_of(list(rows)).items()
    return wide_table([(title.removeprefix("preprocessing: "), group) for title, group in groups])


def wide_table(
    lines: Sequence[tuple[str, Sequence[Row]]],
    name_of: Callable[[Row], str] = lambda row: row.contestant,
) -> list[str]:
    """Return a line for each of the given titles and rows, and a column for each name that rows have."""
    columns = list(dict.fromkeys(name_of(row) for _, rows in lines for row in rows))
    found = [(title, {name_of(row): row for row in rows}) for title, rows in lines]
    cells = [
        [title, *(short_cell(by_name.get(name)) for name in columns)] for title, by_name in found
    ]
    return table(["", *map(bold, columns)], cells)


# ---- what the documentation shows -----------------------------------------------------------------------


def documentation(report: Report) -> list[str]:
    """Return the introduction and tables that a page of the documentation shows of a report."""
    cases = list(cases_of(rows_of(report, "model")).values())
    # What is compiled as well is what the targets are about; the rest is reported beside it.
    full = [rows for rows in cases if any("compiled" in row.contestant for row in rows)]
    further = [rows for rows in cases if rows not in full]
    ops = [row for row in rows_of(report, "op") if row.is_quick]
    images = rows_of(report, "images")
    parts = [introduction(report)]
    parts += ["", *models_table(full)] if full else []
    parts += ["", *models_table(further), "", *cost_table(full or further)] if further else []
    parts += ["", *quick_op_table(ops)] if ops else []
    parts += ["", *IMAGE_NOTES, "", *image_table(images)] if images else []
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
    peers = {"timm": "timm", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    names |= {package: name for package, name in peers.items() if name in contestants}
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


def family_of(row: Row) -> str:
    """Return a contestant's name without its dtype."""
    return row.contestant.replace(" bfloat16", "")


def models_table(cases: Sequence[list[Row]]) -> list[str]:
    """Return cases about models, a line per case and dtype, a column per contestant."""
    lines = [
        (f"{rows[0].title}, {dtype}", [row for row in rows if row.dtype == dtype])
        for rows in cases
        for dtype in dict.fromkeys(row.dtype for row in rows)
    ]
    return wide_table(lines, family_of)


def cost_table(cases: Sequence[list[Row]]) -> list[str]:
    """Return the error, limit, first result and memory of each contestant at batch 8, with most threads.

    If no case has batch 8, in the first one.
    """
    of_batch_8 = [rows for rows in cases if "batch 8" in rows[0].case]
    rows = max(of_batch_8 or cases[:1], key=lambda rows: rows[0].threads)
    heads = [
        rows[0].title,
        "of the arithmetic limit",
        "error against float64",
        "first result",
        "peak memory",
    ]
    return table(heads, [
        [bold(row.contestant), percent(row.fraction), error_cell(row), *cost_cells(row)]
        for row in rows
        if row.first_result is not None
    ])  # fmt: skip


def quick_op_table(rows: Sequence[Row]) -> list[str]:
    """Return cases about ops, a line each."""
    heads = ["op", PLAIN, OURS, "ratio (quartiles)", "of the copy bandwidth"]
    lines = []
    for group in cases_of(list(rows)).values():
        by_name = {row.contestant: row for row in group}
        ours = by_name[OURS]
        times = [
            row.status if row.seconds is None else duration(row.seconds)
            for row in (by_name[PLAIN], ours)
        ]
        fraction = percent(ours.fraction) if ours.limit == "copy" else ""
        lines.append([f"{ours.op}: {ours.case}", *times, ratio_cell(ours), fraction])
    return table(heads, lines)


# ---- cells --------------------------------------------------------------------------------------


def bold(name: str) -> str:
    """Return a contestant's name, ours in bold."""
    return f"**{name}**" if name.startswith("bitfast") else name


def time_cell(row: Row) -> str:
    """Return a time and its quartiles, or why there is none."""
    if row.seconds is None or row.quartiles is None:
        return row.status if row.seconds is None else duration(row.seconds)
    first, third = row.quartiles
    unit, scale = unit_of(row.seconds)
    return f"{row.seconds * scale:.4g} {unit} ({first * scale:.4g}-{third * scale:.4g})"


def ratio_cell(row: Row) -> str:
    """Return a ratio and its quartiles, nothing without a baseline."""
    if row.ratio is None or row.ratio_quartiles is None:
        return "" if row.ratio is None else f"{row.ratio:.2f}x"
    first, third = row.ratio_quartiles
    return f"{row.ratio:.2f}x ({first:.2f}-{third:.2f})"


def limit_cell(row: Row) -> str:
    """Return the share of the limit that binds, and the rate that this is."""
    if row.fraction is None or row.seconds is None:
        return ""
    count, unit = (row.bytes, "GB/s") if row.limit == "copy" else (row.flops, "GFLOP/s")
    return f"{percent(row.fraction)} ({count / row.seconds / 1e9:.0f} {unit})"


def cost_cells(row: Row) -> list[str]:
    """Return the first result and the peak memory."""
    first = "" if row.first_result is None else f"{row.first_result:.1f} s"
    return [first, "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f} MiB"]


def error_cell(row: Row) -> str:
    """Return an error."""
    return "" if row.error is None else f"{row.error:.1e}"


def percent(fraction: float | None) -> str:
    """Return a share."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def duration(seconds: float, digits: int = 4) -> str:
    """Return a time with a unit that suits it."""
    unit, scale = unit_of(seconds)
    return f"{seconds * scale:.{digits}g} {unit}"


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
