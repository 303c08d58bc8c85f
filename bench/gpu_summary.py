"""What the rows of the GPU report say: ratios, targets, tables, Markdown and plots. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TARGETS = (
    ("GroupNorm+ReLU channels_last bfloat16 forward, beyond L2: fraction of the copy floor", 0.85),
    ("GroupNorm+ReLU channels_last bfloat16 forward, beyond L2: torch eager's time over ours", 3.0),
    ("weights of R50x1 in one launch: fraction of the copy floor", 0.80),
    ("R50x1 bfloat16 batch 128: transformers eager's time over ours", 3.0),
    ("R50x1 bfloat16 batch 128: best compiled transformers' time over ours", 1.5),
    ("R50x1 bfloat16 batch 1 in a CUDA graph: transformers eager's time over ours", 5.0),
    ("256 mixed images to the GPU: transformers fast's time over ours", 10.0),
)

IMAGE_CASE = "{batch} mixed images, {origin}"
"""Title of a case about image processors; ``origin`` is one of the next two."""

FROM_HOST, ON_DEVICE = "decoded PIL images", "tensors on the GPU"


def is_measured(row: Row) -> bool:
    """Say whether the row holds a time."""
    return row.get("seconds") is not None


def add_ratios(rows: list[Row]) -> None:
    """Fill in, for each row with a time, the baseline's time of the same case over its own."""
    baselines = {
        row["case"]: row["seconds"] for row in rows if row.get("is_baseline") and is_measured(row)
    }
    for row in rows:
        if is_measured(row) and row["case"] in baselines:
            row["ratio"] = baselines[row["case"]] / row["seconds"]


# ---- targets --------------------------------------------------------------------------------------


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Return each target beside what was measured: the worst where several rows count.

    The rows of a smoke run count for nothing.
    """
    rows = [row for row in rows if not row["smoke"]]
    norms = [
        row
        for row in rows
        if row["part"] == "group_norm_act"
        and row["contestant"] == "bitfast"
        and is_measured(row)
        and (row.get("form"), row.get("dtype"), row.get("exceeds_l2"))
        == ("forward", "bfloat16", True)
    ]
    prepared = [
        row
        for row in rows
        if row["part"] == "weight_standardization"
        and row["contestant"].startswith("bitfast")
        and row.get("form") == "forward"
        and is_measured(row)
    ]
    large, small = "R50x1 inference batch 128 bfloat16", "R50x1 inference batch 1 bfloat16"
    ours = ("bitfast eager", "bitfast compiled", "bitfast, CUDA graph")
    values = (
        worst(row["fraction_of_floor"] for row in norms),
        worst(row["ratio"] for row in norms),
        worst(row["fraction_of_floor"] for row in prepared),
        advantage(rows, large, ("transformers eager",), ours),
        advantage(rows, large, ("transformers compiled",), ours),
        advantage(rows, small, ("transformers eager",), ("bitfast, CUDA graph",)),
        advantage(
            rows,
            IMAGE_CASE.format(batch=256, origin=FROM_HOST),
            ("transformers fast",),
            ("bitfast fast",),
        ),
    )
    return [
        {"target": name, "wanted": wanted, "measured": value}
        for (name, wanted), value in zip(TARGETS, values, strict=True)
    ]


def worst(values: Iterable[float | None]) -> float | None:
    """Return the smallest value, None if there is none."""
    return min((value for value in values if value is not None), default=None)


def advantage(
    rows: list[Row], case: str, theirs: tuple[str, ...], ours: tuple[str, ...]
) -> float | None:
    """Return the fastest of their times over the fastest of ours; None where one side has none."""

    def fastest(prefixes: tuple[str, ...]) -> float | None:
        return worst(
            row["seconds"]
            for row in rows
            if row["case"] == case and row["contestant"].startswith(prefixes)
        )

    their_seconds, our_seconds = fastest(theirs), fastest(ours)
    if their_seconds is None or our_seconds is None:
        return None
    return their_seconds / our_seconds


# ---- tables ---------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report for people."""
    lines = ["# GPU report", ""]
    if report["smoke"]:
        lines += ["**A smoke run: it shows that the report works. Its times mean nothing.**", ""]
    lines += [*facts(report), "", *parts_table(report), "", *targets_table(report), ""]
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["part"] == part]
        lines += [f"## {part}", "", *rows_table(rows), ""]
    for part in report["parts"]:
        if part["status"] != "done" and part["problem"]:
            lines += [f"## What {part['part']} ended with", "", "```", part["problem"], "```", ""]
    lines += [*(f"![{name}]({name})" for name in report["plots"]), report["plots_problem"]]
    return "\n".join(lines).rstrip() + "\n"


def facts(report: dict[str, Any]) -> list[str]:
    """Return the machine in a few lines."""
    found = report["environment"]
    if not found:
        return ["The environment is unknown: see what its part ended with."]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    devices = ", ".join(device["name"] for device in found["cuda"]["devices"]) or "no GPU"
    lines = [
        f"- {devices}; {found.get('multiprocessors', '?')} multiprocessors, "
        f"L2 {found.get('l2_bytes', 0) / 2**20:.0f} MiB, driver {found.get('driver')}",
        f"- {versions}",
        f"- commit {found['commit']}, {report['date']}",
    ]
    missing = [name for name, version in found["peers"].items() if version is None]
    if missing:
        lines.append(f"- not installed: {', '.join(missing)}")
    return lines


def parts_table(report: dict[str, Any]) -> list[str]:
    """Return how each part ended."""
    lines = ["| part | ended | seconds | rows | failed | last words |", "|---|---|--:|--:|--:|---|"]
    for part in report["parts"]:
        rows = [row for row in report["rows"] if row["part"] == part["part"]]
        failed = sum(row["status"] == "failed" for row in rows)
        lines.append(
            f"| {part['part']} | {part['status']} | {part['seconds']:.0f} | {len(rows)} | {failed} "
            f"| {part['last_words'].replace('|', '/')} |"
        )
    return lines


def targets_table(report: dict[str, Any]) -> list[str]:
    """Return the targets, and what was measured beside them."""
    lines = ["| target | wanted | measured |", "|---|--:|--:|"]
    for target in report["targets"]:
        value = "not measured" if target["measured"] is None else f"{target['measured']:.2f}"
        lines.append(f"| {target['target']} | {target['wanted']:.2f} | {value} |")
    return lines


def rows_table(rows: list[Row]) -> list[str]:
    """Return the rows of one part."""
    lines = [
        "| case | contestant | time | spread | ratio | of floor | error | more |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [
            row["case"],
            row["contestant"],
            duration(row["seconds"]) if is_measured(row) else row["status"],
            number(row["spread"], ".0%"),
            number(row["ratio"], ".2f"),
            number(row["fraction_of_floor"], ".0%"),
            number(row["check"], ".0e"),
            more(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def more(row: Row) -> str:
    """Return what some rows have and others have not."""
    found = []
    for key, unit, scale in (
        ("gigabytes_per_second", "GB/s", 1.0),
        ("teraflops_per_second", "TFLOP/s", 1.0),
        ("images_per_second", "images/s", 1.0),
        ("peak_bytes", "GiB at most", 2.0**30),
        ("first_seconds", "s to the first result", 1.0),
    ):
        if row.get(key) is not None:
            found.append(f"{row[key] / scale:.4g} {unit}")
    if row["note"]:
        found.append(" ".join(row["note"].split()).replace("|", "/")[-300:])
    return ", ".join(found)


def number(value: float | None, form: str) -> str:
    """Return a number in this form, nothing for None."""
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def short_table(report: dict[str, Any]) -> str:
    """Return what is printed last: how the parts ended, whole models, and the targets."""
    models = [
        row for row in report["rows"] if row["part"].startswith("models") and is_measured(row)
    ]
    lines = [*parts_table(report), ""]
    if report["smoke"]:
        lines += ["A smoke run: the times mean nothing.", ""]
    if models:
        lines += ["| model | contestant | time | ratio |", "|---|---|--:|--:|"]
        lines += [
            f"| {row['case']} | {row['contestant']} | {duration(row['seconds'])} "
            f"| {number(row['ratio'], '.2f')} |"
            for row in models
        ]
        lines.append("")
    return "\n".join([*lines, *targets_table(report)])


# ---- plots ----------------------------------------------------------------------------------------


def draw_plots(rows: list[Row], folder: Path) -> tuple[list[str], str]:
    """Draw what matplotlib, if it is installed, can draw; return file names and what is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return [], f"No plots: {error}."
    names = []
    try:
        for name, title, chosen, key in plots(rows):
            if not chosen:
                continue
            figure, axes = pyplot.subplots(figsize=(11, 0.3 * len(chosen) + 1.5))
            colors = ["C1" if row["contestant"].startswith("bitfast") else "C0" for row in chosen]
            labels = [f"{row['case']}: {row['contestant']}" for row in chosen]
            axes.barh(range(len(chosen)), [row[key] for row in chosen], color=colors)
            axes.set_yticks(range(len(chosen)), labels, fontsize=7)
            axes.invert_yaxis()
            axes.set_title(title)
            figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            names.append(name)
    except Exception as error:  # a picture less must not cost the report
        return names, f"A plot failed: {type(error).__name__}: {error}"
    return names, ""


def plots(rows: list[Row]) -> list[tuple[str, str, list[Row], str]]:
    """Return file name, title, rows and key of each plot."""
    smoke = " (smoke run: the values mean nothing)" if any(row["smoke"] for row in rows) else ""

    def chosen(prefix: str, key: str, **values: Any) -> list[Row]:
        return [
            row
            for row in rows
            if row["part"].startswith(prefix)
            and row.get(key) is not None
            and all(row.get(k) == v for k, v in values.items())
        ]

    return [
        (
            "norms.png",
            "GroupNorm+ReLU bfloat16: fraction of the copy floor" + smoke,
            chosen("group_norm_act", "fraction_of_floor", dtype="bfloat16", form="forward"),
            "fraction_of_floor",
        ),
        (
            "weights.png",
            "Weight standardization of R50x1: fraction of the copy floor" + smoke,
            chosen("weight_standardization", "fraction_of_floor"),
            "fraction_of_floor",
        ),
        (
            "models.png",
            "Images per second" + smoke,
            chosen("models", "images_per_second"),
            "images_per_second",
        ),
    ]
