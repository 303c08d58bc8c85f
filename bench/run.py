"""``bitfast bench``: ops, image processors and whole models beside others, checked, then timed.

From a checkout that is not installed: ``python -m bench.run``. What a run needs is imported when it runs, so
that help and usage errors come quickly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case
    from .rows import Report
    from .workers import Base

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
    from bitfast.cli import positive_integer

    add = parser.add_argument
    count: dict[str, Any] = {"type": positive_integer, "metavar": "N"}
    add("--device", choices=("cpu", "cuda"),
        help="where to compute (default: a GPU, if there is one)")  # fmt: skip
    add("--quick", action="store_true",
        help="some ops and one model, without what must be compiled: under two minutes")  # fmt: skip
    add("--only", default="", metavar="TEXT", help="cases whose title contains it (see --list)")
    add("--skip", metavar="TEXT", help="leave out cases whose title contains it")
    add("--list", action="store_true", help="print the cases' titles and stop")
    add("--threads", nargs="+", **count,
        help="CPU threads; models and image processors run with each count, ops with the largest "
        "(default: as many as torch chooses)")  # fmt: skip
    add("--rounds", **count,
        help=f"samples of each contestant (default: {ROUNDS}; quick: {QUICK_ROUNDS})")  # fmt: skip
    add("--base", metavar="REV",
        help="let the bitfast of another commit take part, in turns with this one's")  # fmt: skip
    add("--seconds", **count, help="begin no case after these; the others are listed")
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the table here too")
    add("--charts", type=Path, metavar="FOLDER", help="draw bar charts (PNG) into this folder")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark and return the exit status."""
    import torch

    from . import registry

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available() and not arguments.list:
        return usage_error("--device: torch sees no CUDA device")
    found = registry.cases(device, sorted(set(arguments.threads or [torch.get_num_threads()])))
    cases = [case for case in found if arguments.only in case.title]
    cases = [case for case in cases if case.is_quick or not arguments.quick]
    if not cases:
        return usage_error(f"--only: no case's title contains {arguments.only!r}")
    if arguments.skip:
        cases = [case for case in cases if arguments.skip not in case.title]
    if not cases:
        return usage_error(f"--skip: every case's title contains {arguments.skip!r}")
    if arguments.list:
        print("\n".join(case.title for case in cases))
        return SUCCESS
    if problem := unusable(arguments):
        return usage_error(problem)
    from .workers import base_at

    with ExitStack() as stack:
        try:
            base = stack.enter_context(base_at(arguments.base)) if arguments.base else None
        except ValueError as error:
            return usage_error(f"--base: {error}")
        return show(measure(cases, arguments, base), arguments)


def unusable(arguments: argparse.Namespace) -> str | None:
    """Return why a file cannot be written, before anything is measured; None: all can be."""
    for name in ("output", "markdown"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            return f"--{name}: the folder {str(path.parent)!r} does not exist"
    if arguments.charts is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return "--charts: matplotlib is not installed: pip install matplotlib"
        if arguments.charts.exists() and not arguments.charts.is_dir():
            return f"--charts: {str(arguments.charts)!r} is not a folder"
    return None


def measure(cases: Sequence[Case], arguments: argparse.Namespace, base: Base | None) -> Report:
    """Run the cases; what has been found out is written after each."""
    from tqdm import tqdm

    from . import contest, limits, peers, rows
    from .isolated import IsolatedCases

    report = rows.Report(rows.machine(cases[0].device), peers=peers.installed())
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    needed = sorted({case.threads for case in cases if case.kind != "images"})
    end = time.monotonic() + (arguments.seconds or float("inf"))
    interval = 0.1 if sys.stderr.isatty() else 30.0
    total = len(needed) + len(cases)
    progress = tqdm(total=total, file=sys.stderr, mininterval=interval, dynamic_ncols=True)
    with progress as bar, IsolatedCases() as isolated:
        bar.set_description("the machine's limits")
        for threads in needed:
            report.limits[threads] = limits.measure(cases[0].device, threads)
            bar.update()
        for case in cases:
            bar.set_description(case.title)
            if time.monotonic() > end:
                report.rows.append(contest.not_run(case, rows.SKIPPED, "out of time"))
            elif case.time_limit is not None and base is None:
                known = report.limits.get(case.threads)
                report.rows += isolated.run(case, known, rounds, is_quick=arguments.quick)
            else:
                isolated.close()
                known, tell = report.limits.get(case.threads), bar.set_postfix_str
                report.rows += contest.run(
                    case, known, rounds, base, tell, is_quick=arguments.quick
                )
            bar.update()
            if arguments.output is not None:
                report.write(arguments.output)
    return report


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
    if restless := sum(row.spread > RESTLESS for row in report.rows):
        share = f"{restless} of {len(report.rows)} times have quartiles more than {100 * RESTLESS:.0f} %"
        print(f"{share} apart: the machine was busy with something else", file=sys.stderr)
    failures = [row for row in report.rows if row.status == rows.FAILED]
    for row in failures:
        print(f"{row.title}: {row.contestant} failed: {row.note}", file=sys.stderr)
    are_ours = [row.is_ours or row.contestant == rows.EVERYBODY for row in failures]
    return FAILED if any(are_ours) else SUCCESS


def usage_error(message: str) -> int:
    """Print which argument is wrong, and why; return the exit status."""
    print(f"bitfast bench: error: argument {message}", file=sys.stderr)
    return USAGE_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line without ``bitfast`` and return the exit status."""
    description, as_written = (__doc__ or "").splitlines()[0], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG, formatter_class=as_written
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
