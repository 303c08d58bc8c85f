"""``python -m bench.host``: what a pass costs the host, apart from arithmetic: calls and microseconds.

Counts are those of one warm inference pass of R50x1 on a tiny image: the same on any machine, busy or not.
Microseconds are the least of many repetitions, of a network with R50x1's steps but next to no arithmetic. With
``--base`` another checkout, say of the commit before, is counted beside this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import rows
from .torchvision_import import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m bench.host"
IMAGES = (1, 3, 32, 32)
NARROW: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 32, 32, 32],
    "num_groups": 4,
}
"""What differs from the default configuration in the network that microseconds are taken of."""

WARM_UPS = 3
REPETITIONS = 50
PASSES = 1000
"""Of which the fastest counts. A pass is short enough to fall between what else the machine does."""

OURS, BEFORE, THEIRS = "bitfast", "bitfast before", "transformers"


# ---- calls ----------------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What one call of a function makes Python and torch call.

    Attributes:
        python: Python functions, by the last two parts of their file's path, and name.
        builtin: How many functions written in C, Python's and torch's.
        operators: Entries into torch's dispatcher, by operator; those that operators make as well.
        outer: How many of these come from Python.
    """

    python: Counter[str]
    builtin: int
    operators: Counter[str]
    outer: int

    def as_json(self) -> dict[str, Any]:
        """Return the sums, and the names that stand behind most of them."""
        return {
            "python_calls": self.python.total(),
            "builtin_calls": self.builtin,
            "operators": self.operators.total(),
            "operators_from_python": self.outer,
            "python_calls_most": dict(self.python.most_common(12)),
            "operators_most": dict(self.operators.most_common(12)),
        }


def calls_of(function: Callable[..., Any], *arguments: Any) -> Calls:
    """Count what a function calls; it is run some more times before."""
    for _ in range(WARM_UPS):
        function(*arguments)
    python, builtin = python_calls_of(function, *arguments)
    # A dispatch mode would be seen, and no plan would run; a profiler is not.
    with torch.autograd.profiler.profile() as profile:
        function(*arguments)
    events = [event for event in profile.function_events or () if "::" in event.name]
    outer = sum(event.cpu_parent is None for event in events)
    return Calls(python, builtin, Counter(event.name for event in events), outer)


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

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return python, builtin


# ---- microseconds ---------------------------------------------------------------------------------------


def microseconds(statement: str, **names: Any) -> float:
    """Return what a statement takes, in the fastest of the repetitions of some runs each."""
    return fastest(timeit.Timer(statement, globals=names), REPETITIONS, 20)


def fastest(timer: timeit.Timer, repetitions: int, number: int) -> float:
    """Return the microseconds of a run, in the fastest of the repetitions of ``number`` runs each."""
    timer.timeit(number)
    return 1e6 * min(timer.repeat(repetitions, number)) / number


class Decisions(NamedTuple):
    """Microseconds of what is asked before a plan runs.

    Attributes:
        setting: Which setting it is.
        structure: Whether the modules are what they were.
        parameters: Whether the parameters are.
    """

    setting: float
    structure: float
    parameters: float

    @property
    def guard(self) -> float:
        """What it takes to know that a plan still holds."""
        return self.structure + self.parameters


def decisions_of(model: Any, images: Tensor) -> Decisions:
    """Time what is asked before a model's latest plan runs."""
    from bitfast.execution.setting import planned_setting

    plans, plan = model.plans, latest_plan(model)
    assert plans.is_current()
    assert plan.holds()
    return Decisions(
        microseconds("ask(images)", ask=planned_setting, images=images),
        microseconds("ask()", ask=plans.is_current),
        microseconds("ask()", ask=plan.holds),
    )


def latest_plan(model: Any) -> Any:
    """Return the plan that a model has met last."""
    return model.plans.made()[-1]


class StepCost(NamedTuple):
    """What the calls of one kind cost, each on average.

    Attributes:
        kind: The name of the calls.
        times: How many of them a pass makes.
        python: Microseconds without the operator that does the work; None if that cannot be taken out.
        whole: Microseconds with it, where there is next to nothing to compute.
    """

    kind: str
    times: int
    python: float | None
    whole: float


def step_costs(model: Any, images: Tensor) -> list[StepCost]:
    """Time each call of a model's latest plan by itself, in the order of their kinds' first appearance."""
    found: dict[str, list[tuple[float | None, float]]] = {}
    x = images.contiguous(memory_format=torch.channels_last)
    with torch._C._AutoDispatchBelowAutograd():
        for part in latest_plan(model).parts:
            program = part.program
            places: list[Any] = [None] * program.places
            places[0] = x
            for name, call in zip(program.names, program.calls, strict=True):
                before = list(places)
                call(places)
                found.setdefault(name, []).append(cost_of(call, before))
            x = places[program.outputs[-1]]
    return [
        StepCost(kind, len(costs), mean([p for p, _ in costs]), mean([w for _, w in costs]) or 0.0)
        for kind, costs in found.items()
    ]


def mean(values: list[Any]) -> float | None:
    """Return the mean; None if a value is missing."""
    return None if None in values else statistics.fmean(values)


def cost_of(call: Any, places: list[Any]) -> tuple[float | None, float]:
    """Return the microseconds of a call on these places, without its operator (or None) and with it."""
    # A result may take the place of what is read.
    statement, names = "call(places.copy())", {"call": call, "places": places}
    whole = microseconds(statement, **names)
    with without_operators(call, places) as count:
        python = microseconds(statement, **names) if count else None
    return python, whole


@contextmanager
def without_operators(call: Any, places: list[Any]) -> Iterator[int]:
    """Within the block, let a call's operators return at once what they returned in a run before.

    Yields:
        How many operators there are.
    """
    packed = torch.ops.mkldnn
    overloads = [packed._convolution_pointwise.default, packed._convolution_pointwise_.binary]
    results: dict[int, Any] = {}

    def noting(operator: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            results[id(operator)] = result = operator(*arguments)
            return result

        return run

    def returning(operator: Any) -> Callable[..., Any]:
        result = results.get(id(operator))
        return lambda *_: result

    cells = [
        cell
        for cell in call.__closure__ or ()
        if isinstance(cell.cell_contents, BuiltinFunctionType)
    ]
    places_of_operators = [(cell, "cell_contents") for cell in cells]
    places_of_operators += [(overload, "_op") for overload in overloads]
    originals = [getattr(*where) for where in places_of_operators]

    def put(function_for: Callable[[Any], Any]) -> None:
        for where, original in zip(places_of_operators, originals, strict=True):
            setattr(*where, function_for(original))

    try:
        put(noting)
        call(places.copy())
        put(returning)
        yield len(results)
    finally:
        put(lambda original: original)


# ---- whole models ---------------------------------------------------------------------------------------


def our_model(**settings: Any) -> nn.Module:
    """Return bitfast's model, of whichever checkout bitfast was imported."""
    from bitfast import BitConfig, BitModel

    return BitModel(BitConfig(**settings)).eval()


def their_model(**settings: Any) -> nn.Module:
    """Return transformers' model."""
    import_torchvision()
    import transformers

    return transformers.BitModel(transformers.BitConfig(**settings)).eval()


@torch.no_grad()
def measure(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """Count a pass of R50x1 on a tiny image, and time one of the narrow network."""
    images = torch.randn(IMAGES)
    counted = calls_of(make(), images).as_json()
    narrow = make(**NARROW)
    for _ in range(WARM_UPS):
        narrow(images)
    return {**counted, "pass_us": fastest(timeit.Timer(lambda: narrow(images)), PASSES, 1)}


@torch.no_grad()
def steps_and_decisions() -> tuple[Decisions, list[StepCost]]:
    """Time what our model asks before a pass of R50x1, and the steps of the narrow network."""
    images = torch.randn(IMAGES)
    model, narrow = our_model(), our_model(**NARROW)
    for each in (model, narrow):
        each(images)
    return decisions_of(model, images), step_costs(narrow, images)


BASE_SCRIPT = """
import importlib.util, sys
# Where bitfast is installed from a checkout, its kernels are found there, whichever bitfast asks for them.
spec = importlib.util.spec_from_file_location(
    "bitfast.kernels", "kernels/__init__.py", submodule_search_locations=["kernels"])
sys.modules["bitfast.kernels"] = kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
import bitfast
root, output = sys.argv[1:]
sys.path.insert(0, root)
from bench import host
host.write_counts(output)
"""
"""Runs in the other checkout: that one's bitfast, and this one's way to measure it."""


def measure_base(folder: Path) -> dict[str, Any]:
    """Measure the bitfast of another checkout, in a process of its own."""
    folder = folder.resolve()
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "base.json"
        command = [sys.executable, "-c", BASE_SCRIPT, str(ROOT), str(output)]
        subprocess.run(command, check=True, cwd=folder, env=environment)
        found = json.loads(output.read_text(encoding="utf-8"))
    if Path(found.pop("path")).parent.parent != folder:
        raise RuntimeError(f"there is no bitfast to be imported in {folder}")
    return {"commit": rows.commit(folder), **found}


def write_counts(output: str) -> None:
    """Measure the bitfast that was imported, and write JSON."""
    import bitfast

    torch.set_num_threads(1)
    found = {"path": bitfast.__file__, **measure(our_model)}
    Path(output).write_text(json.dumps(found), encoding="utf-8")


# ---- the report -----------------------------------------------------------------------------------------


def report(command: str, base: Path | None) -> dict[str, Any]:
    """Measure everything; the result is ready for JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    models = {} if base is None else {BEFORE: measure_base(base)}
    models[OURS] = measure(our_model)
    models[THEIRS] = measure(their_model)
    decisions, steps = steps_and_decisions()
    return {
        "machine": rows.machine(),
        "device": "CPU",
        "command": command,
        "threads": 1,
        "images": IMAGES,
        "narrow": NARROW,
        "models": models,
        "decisions_us": {**decisions._asdict(), "guard": decisions.guard},
        "steps_us": [step._asdict() for step in steps],
    }


def markdown(found: dict[str, Any]) -> str:
    """Return a report as tables."""
    models: dict[str, Any] = found["models"]
    counted = {
        "calls of Python functions": "python_calls",
        "calls of functions in C": "builtin_calls",
        "operators called from Python": "operators_from_python",
        "entries into the dispatcher, those of operators included": "operators",
    }
    lines = [f"| one pass | {' | '.join(models)} |", f"|---|{'--:|' * len(models)}"]
    for title, key in counted.items():
        lines.append(f"| {title} | {' | '.join(f'{m[key]:,}' for m in models.values())} |")
    passes = " | ".join(f"{m['pass_us'] / 1e3:.2f} ms" for m in models.values())
    lines += [f"| with next to no arithmetic | {passes} |", ""]
    decisions = found["decisions_us"]
    lines += ["| before a plan runs | us |", "|---|--:|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in decisions.items()]
    lines += ["", "| call | in a pass | Python alone, us | whole, us |", "|---|--:|--:|--:|"]
    for step in found["steps_us"]:
        python = "" if step["python"] is None else f"{step['python']:.2f}"
        lines.append(f"| `{step['kind']}` | {step['times']} | {python} | {step['whole']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="another checkout, installed")
    options = parser.parse_args(arguments)
    found = report(COMMAND if options.base is None else f"{COMMAND} --base FOLDER", options.base)
    print(markdown(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
