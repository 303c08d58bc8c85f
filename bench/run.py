"""``bitfast bench``: ops, image processors and whole models beside others, checked, then timed.

From a checkout that is not installed: ``python -m bench.run``. What a run needs is imported when it runs, so
that help and usage errors come quickly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .images import ImageCase
    from .models import ModelCase
    from .registry import Case
    from .rows import Report

SUCCESS, FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
ROUNDS, QUICK_ROUNDS = 15, 5
RESTLESS = 0.25
"""Distance of a time's quartiles, over the median, that is told."""

EPILOG = """\
The Markdown table goes to standard output, everything else to standard error. No speed is shown of
a result that is wrong. What is compared with comes by: pip install 'bitfast[bench]'; what is missing
is listed as such.

exit status: 0 bitfast's results are right; 1 one of them is not, or failed; 2 wrong arguments;
130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from bitfast.cli import positive_integer

    parser.add_argument(
        "--quick",
        action="store_true",
        help="some ops and one model, without what must be compiled: under two minutes",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose title contains it (see --list)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' titles and stop")
    parser.add_argument(
        "--threads",
        type=positive_integer,
        nargs="+",
        metavar="N",
        help="CPU threads; models and image processors run with each count, ops with the largest "
        "(default: as many as torch chooses)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_integer,
        metavar="N",
        help=f"samples of each contestant (default: {ROUNDS}; quick: {QUICK_ROUNDS})",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument(
        "--charts", type=Path, metavar="FOLDER", help="draw bar charts (PNG) into this folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark and return the exit status."""
    import torch

    thread_counts = sorted(set(arguments.threads or [torch.get_num_threads()]))
    selection = select(arguments.only, arguments.quick, thread_counts)
    if not any(selection):
        return usage_error(f"argument --only: no case's title contains {arguments.only!r}")
    if arguments.list:
        print("\n".join(case.title for cases in selection for case in cases))
        return SUCCESS
    problem = unusable(arguments)
    if problem is not None:
        return usage_error(problem)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    report = measure(selection, thread_counts, rounds, arguments.output)
    return show(report, arguments)


class Selection(NamedTuple):
    """The cases to be run."""

    ops: list[Case]
    images: list[ImageCase]
    models: list[ModelCase]


def select(text: str, is_quick: bool, thread_counts: Sequence[int]) -> Selection:
    """Return the cases whose titles contain the text."""
    from . import images, models, registry

    ops = [case for case in registry.cases() if text in case.title]
    batches = [case for case in images.cases(thread_counts) if text in case.title]
    networks = [case for case in models.cases(thread_counts) if text in case.title]
    if is_quick:
        ops = [case for case in ops if case.is_quick]
        batches = [case for case in batches if case.is_quick]
        networks = [case.quick() for case in networks if case.is_quick]
    return Selection(ops, batches, networks)


def unusable(arguments: argparse.Namespace) -> str | None:
    """Say which of the files to be written cannot be, before anything is measured; None: all can."""
    for name in ("output", "markdown"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            return f"argument --{name}: the folder {str(path.parent)!r} does not exist"
    if arguments.charts is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return "argument --charts: matplotlib is not installed: pip install matplotlib"
        if arguments.charts.exists() and not arguments.charts.is_dir():
            return f"argument --charts: {str(arguments.charts)!r} is not a folder"
    return None


def measure(
    selection: Selection,
    thread_counts: Sequence[int],
    rounds: int,
    output: Path | None,
) -> Report:
    """Run the cases; what has been found out is written after each."""
    from tqdm import tqdm

    from . import contest, images, limits, model_contest, peers, rows

    ops, batches, models = selection
    report = rows.Report(rows.machine(), peers=peers.installed())
    needed = set(thread_counts) if models else {max(thread_counts)} if ops else set()
    steps = sum(model_contest.steps(case, rounds) for case in models)
    total = len(needed) + len(ops) + len(batches) + steps
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, file=sys.stderr, mininterval=interval, dynamic_ncols=True) as bar:

        def progress(done: str) -> None:
            bar.set_postfix_str(done, refresh=False)
            bar.update()

        bar.set_description("the machine's limits")
        for threads in sorted(needed):
            report.limits[threads] = limits.measure(threads)
            progress(f"{threads} threads")
        for case in ops:
            bar.set_description(case.title)
            threads = max(thread_counts)
            report.rows += contest.run(case, threads, report.limits[threads], rounds)
            progress("")
            save(report, output)
        for batch in batches:
            bar.set_description(batch.title)
            report.rows += images.run(batch, rounds)
            progress("")
            save(report, output)
        for model in models:
            bar.set_description(model.title)
            done = bar.n
            report.rows += model_contest.run(model, report.limits[model.threads], rounds, progress)
            bar.update(done + model_contest.steps(model, rounds) - bar.n)
            save(report, output)
    return report


def save(report: Report, output: Path | None) -> None:
    """Write JSON, if asked to."""
    if output is not None:
        report.write(output)


def show(report: Report, arguments: argparse.Namespace) -> int:
    """Print and draw a report; return the exit status."""
    from . import rows
    from .report import markdown

    text = markdown(report)
    print(text, end="")
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.charts is not None:
        from .charts import draw

        for path in draw(report, arguments.charts):
            print(f"drew {path}", file=sys.stderr)
    restless = [row for row in report.rows if row.spread > RESTLESS]
    if restless:
        print(
            f"{len(restless)} of {len(report.rows)} times have quartiles more than {100 * RESTLESS:.0f} % "
            "apart: the machine was busy with something else",
            file=sys.stderr,
        )
    failures = [row for row in report.rows if row.status == rows.FAILED]
    for row in failures:
        print(f"{row.title}: {row.contestant} failed: {row.note}", file=sys.stderr)
    return FAILED if any(row.is_ours for row in failures) else SUCCESS


def usage_error(message: str) -> int:
    """Print what is wrong with the arguments; return the exit status."""
    print(f"bitfast bench: error: {message}", file=sys.stderr)
    return USAGE_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line without ``bitfast`` and return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
