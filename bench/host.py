"""``python -m bench.host``: what a pass costs the host, apart from arithmetic: calls and microseconds.

Counts are those of one warm inference pass of R50x1 on a tiny image: the same on any machine, busy or not.
Microseconds are the least of many repetitions, of a network with R50x1's steps but next to no arithmetic. With
``--base`` another commit, say the one before, is counted beside this one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import subprocess
import sys
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .base import ROOT, environment_of, git, worktree_of
from .tables import table
from .torchvision_import import import_torchvision

IMAGES = (1, 3, 32, 32)
NARROW: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32] * 4, "num_groups": 4}
"""What differs from the default configuration in the network that microseconds are taken of."""

WARM_UPS = 3
REPETITIONS = 50
PASSES = 1000
"""Of which the fastest counts. A pass is short enough to fall between what else the machine does."""

# ---- calls ----------------------------------------------------------------------------------------------


def calls_of(
    function: Callable[..., Any], *arguments: Any, most: int | None = 12
) -> dict[str, Any]:
    """Count what a warm function makes Python and torch call: Python functions, functions written in C, and
    entries into torch's dispatcher, those that operators make included and left out; and by name the ``most``
    (None: all). What autograd's nodes call counts as called from Python."""
    for _ in range(WARM_UPS):
        function(*arguments)
    python, builtin = python_calls_of(function, *arguments)
    # A dispatch mode would be seen, and no plan would run; a profiler is not.
    with torch.autograd.profiler.profile() as profile:
        function(*arguments)
    events = [event for event in profile.function_events or () if is_operator(event)]
    operators = Counter(event.name for event in events)
    return {
        "python_calls": python.total(),
        "builtin_calls": builtin,
        "operators": operators.total(),
        "operators_from_python": sum(is_outermost(event) for event in events),
        "python_calls_most": dict(python.most_common(most)),
        "operators_most": dict(operators.most_common(most)),
    }


def is_operator(event: Any) -> bool:
    """Whether a profiler's event is a call of an operator; autograd notes its nodes and their functions too."""
    return "::" in event.name and "autograd::" not in event.name


def is_outermost(event: Any) -> bool:
    """Whether no operator has made the call: Python has, or a node of autograd."""
    parent = event.cpu_parent
    while parent is not None:
        if is_operator(parent):
            return False
        parent = parent.cpu_parent
    return True


def python_calls_of(function: Callable[..., Any], *arguments: Any) -> tuple[Counter[str], int]:
    """Return the Python functions that a function calls, itself among them, and how many are written in C."""
    python: Counter[str] = Counter()
    builtin = -1  # the call that ends the counting

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal builtin
        if event == "call":
            code = frame.f_code
            python["/".join(Path(code.co_filename).parts[-2:]) + f" {code.co_name}"] += 1
        elif event == "c_call":
            builtin += 1

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # when it comes is chance, and what it calls back is not the function's
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return python, builtin


# ---- microseconds ---------------------------------------------------------------------------------------


def microseconds(repetitions: int, number: int, statement: str, **names: Any) -> float:
    """Return what a statement takes, in the fastest of the repetitions of ``number`` runs each."""
    timer = timeit.Timer(statement, globals=names)
    timer.timeit(number)
    return 1e6 * min(timer.repeat(repetitions, number)) / number


def decisions_of(model: Any, images: Tensor) -> dict[str, float]:
    """Return the microseconds to know which "setting" a model's latest plan is for; whether the "structure"
    (the modules) and the "parameters" are what they were; and of these two, the "guard", together."""
    from bitfast.execution.setting import planned_setting

    asked = {
        "setting": partial(planned_setting, images),
        "structure": model.plans.is_current,
        "parameters": latest_plan(model).holds,
    }
    assert all(ask() for ask in asked.values())
    times = {name: microseconds(REPETITIONS, 20, "ask()", ask=ask) for name, ask in asked.items()}
    return {**times, "guard": times["structure"] + times["parameters"]}


def latest_plan(model: Any) -> Any:
    return model.plans.made()[-1]


def step_costs(model: Any, images: Tensor) -> list[dict[str, Any]]:
    """Time each call of a model's latest plan by itself.

    Returns:
        For each "kind" of call, in the order of appearance: how many "times" a pass makes it, and the mean of
        the microseconds without the operator that does the work ("python"; None if that cannot be taken out)
        and with it ("whole"), where there is next to nothing to compute.
    """
    found: dict[str, list[tuple[float | None, float]]] = {}
    x = images.contiguous(memory_format=torch.channels_last)
    with torch._C._AutoDispatchBelowAutograd():
        for part in latest_plan(model).parts:
            program = part.program
            places: list[Any] = [x, *[None] * (program.places - 1)]
            for name, call in zip(program.names, program.calls, strict=True):
                before = list(places)
                call(places)
                found.setdefault(name, []).append(cost_of(call, before))
            x = places[program.outputs[-1]]
    steps = []
    for kind, costs in found.items():
        alone, whole = zip(*costs, strict=True)
        means = {"python": None if None in alone else fmean(alone), "whole": fmean(whole)}
        steps.append({"kind": kind, "times": len(costs), **means})
    return steps


def cost_of(call: Any, places: list[Any]) -> tuple[float | None, float]:
    """Return the microseconds of a call on these places, without its operator (or None) and with it."""
    # A result may take the place of what is read.
    copied = "call(places.copy())"
    timed = partial(microseconds, REPETITIONS, 20, copied, call=call, places=places)
    whole = timed()
    with without_operators(call, places) as count:
        return timed() if count else None, whole


@contextmanager
def without_operators(call: Any, places: list[Any]) -> Iterator[int]:
    """Within the block, let a call's operators (their number is yielded) return at once what a run returned."""
    packed = torch.ops.mkldnn
    overloads = [packed._convolution_pointwise.default, packed._convolution_pointwise_.binary]
    cells = [c for c in call.__closure__ or () if isinstance(c.cell_contents, BuiltinFunctionType)]
    holders: list[tuple[Any, str]] = [(cell, "cell_contents") for cell in cells]
    holders += [(overload, "_op") for overload in overloads]
    results: dict[int, Any] = {}

    def noting(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            results[number] = original(*arguments)
            return results[number]

        return run

    def returning(result: Any) -> Callable[..., Any]:
        return lambda *_: result

    with ExitStack() as stack:
        for number, holder in enumerate(holders):
            original = getattr(*holder)
            stack.callback(setattr, *holder, original)
            setattr(*holder, noting(number, original))
        call(places.copy())
        for number, result in results.items():
            setattr(*holders[number], returning(result))
        yield len(results)


# ---- whole models ---------------------------------------------------------------------------------------


def model_of(library: str, architecture: str = "BitModel", **settings: Any) -> nn.Module:
    """Return a model of transformers, or of whichever checkout bitfast is imported from."""
    if library == "transformers":
        import_torchvision()
    classes = importlib.import_module(library)
    return getattr(classes, architecture)(classes.BitConfig(**settings)).eval()


@torch.no_grad()
def measure(library: str) -> dict[str, Any]:
    """Count a pass of R50x1 on a tiny image, and time one of the narrow network, on one thread."""
    torch.set_num_threads(1)
    images = torch.randn(IMAGES)
    calls, narrow = calls_of(model_of(library), images), model_of(library, **NARROW)
    for _ in range(WARM_UPS):
        narrow(images)
    pass_us = microseconds(PASSES, 1, "narrow(images)", narrow=narrow, images=images)
    return {**calls, "pass_us": pass_us}


# That checkout's bitfast, and this one's way to measure it.
MEASURE_BASE = """
import json, sys, bitfast
sys.path.insert(0, sys.argv[1])
from bench import host
print(json.dumps(host.measure("bitfast")))
"""


def measure_base(revision: str) -> dict[str, Any]:
    """Measure the bitfast of another commit, in a process of its own."""
    with worktree_of(revision) as folder:
        command = [sys.executable, "-c", MEASURE_BASE, str(ROOT)]
        printed = subprocess.check_output(command, cwd=folder, env=environment_of(folder))
        commit = git(folder, "rev-parse", "--short", "HEAD")
    return {"commit": commit, **json.loads(printed.splitlines()[-1])}


# ---- the report -----------------------------------------------------------------------------------------


@torch.no_grad()
def report(command: str, base: dict[str, Any] | None) -> dict[str, Any]:
    """Measure everything, and put it beside what was measured of the base; the result is ready for JSON."""
    # Not above: :data:`MEASURE_BASE` imports this module beside a bitfast that may not have what it needs.
    from .rows import machine

    torch.manual_seed(0)
    models = {} if base is None else {"bitfast before": base}
    models |= {library: measure(library) for library in ("bitfast", "transformers")}
    images, model, narrow = torch.randn(IMAGES), model_of("bitfast"), model_of("bitfast", **NARROW)
    model(images)
    narrow(images)
    about = {"machine": machine(), "device": "CPU", "command": command, "threads": 1}
    return {
        **about,
        "images": IMAGES,
        "narrow": NARROW,
        "models": models,
        "decisions_us": decisions_of(model, images),
        "steps_us": step_costs(narrow, images),
    }


COUNTED = {
    "calls of Python functions": "python_calls",
    "calls of functions in C": "builtin_calls",
    "operators called from Python": "operators_from_python",
    "entries into the dispatcher, those of operators included": "operators",
}


def markdown(found: dict[str, Any]) -> str:
    models: dict[str, Any] = found["models"]
    passes = [(title, *(f"{m[key]:,}" for m in models.values())) for title, key in COUNTED.items()]
    times = (f"{m['pass_us'] / 1e3:.2f} ms" for m in models.values())
    passes.append(("with next to no arithmetic", *times))
    decisions = [(name, f"{value:.1f}") for name, value in found["decisions_us"].items()]
    steps = []
    for step in found["steps_us"]:
        python = "" if step["python"] is None else f"{step['python']:.2f}"
        steps.append((f"`{step['kind']}`", step["times"], python, f"{step['whole']:.2f}"))
    lines = [*table(["one pass", *models], passes), ""]
    lines += [*table(["before a plan runs", "us"], decisions), ""]
    lines += table(["call", "in a pass", "Python alone, us", "whole, us"], steps)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here")
    parser.add_argument("--base", metavar="REV", help="another commit, to be measured too")
    options = parser.parse_args(arguments)
    command, base = "python -m bench.host", None
    if options.base is not None:
        command += f" --base {options.base}"
        try:
            base = measure_base(options.base)
        except ValueError as error:
            parser.error(str(error))
    found = report(command, base)
    print(markdown(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
