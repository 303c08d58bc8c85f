"""What the parts of the GPU report share: rows, checks before times, and how a time is taken.

A part is a process. It writes each row as soon as it has it, so that what was measured before a crash or a
time limit is kept; ``bench.gpu_report`` starts the parts and collects the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMOKE_SLACK = 1e-3
"""Added to the bounds of smoke runs: twice the error of a few dozen numbers is too much a matter of luck."""

CALLS_IN_A_GRAPH = 48
"""Most input sets that take turns."""


class Sample(NamedTuple):
    """A time: the median of ``repeats``, and the distance of the quartiles over the median."""

    seconds: float
    spread: float
    repeats: int
    is_captured: bool = False
    """Taken by replaying a CUDA graph: the kernels alone, without the host's share."""


class WrongResultError(AssertionError):
    """A result differs too much from the reference; it is not timed."""


@dataclass
class Session:
    """One part's run: where it computes, how long it may take, where its rows go."""

    part: str
    device: str
    is_smoke: bool
    is_check_only: bool
    rows: Path | None
    deadline: float
    failures: int = 0
    _device_name: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.device == "cpu":
            self._device_name = "cpu, smoke run"
        elif torch.cuda.is_available():
            self._device_name = torch.cuda.get_device_name()
        else:
            self._device_name = "torch sees no CUDA device"

    def out_of_time(self) -> bool:
        """Say whether the part should begin nothing more."""
        return time.monotonic() > self.deadline

    def add(self, case: str, contestant: str, status: str = "measured", **values: Any) -> None:
        """Write one row. ``status`` is measured, checked, failed, skipped or not installed."""
        row = {
            "part": self.part,
            "case": case,
            "contestant": contestant,
            "status": status,
            "seconds": None,
            "spread": None,
            "ratio": None,
            "fraction_of_floor": None,
            "check": None,
            "device": self._device_name,
            "smoke": self.is_smoke,
            "note": "",
            **values,
        }
        self.failures += status == "failed"
        if self.rows is not None:
            with self.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        note = f" ({row['note']})" if row["note"] else ""
        print(f"{self.part} | {case} | {contestant} | {status}{note} {row['seconds'] or ''}")

    def attempt(self, case: str, contestant: str, function: Callable[[], None]) -> None:
        """Run what adds a row; where it fails, the row says so and the part goes on."""
        if self.out_of_time():
            self.add(case, contestant, "skipped", note="out of time")
            return
        try:
            function()
        except Exception as error:
            self.add(case, contestant, "failed", note=last_lines(error))

    def compile(self, function: Any, **options: Any) -> Any:
        """Return the compiled function; in a smoke run without generating code, which takes long."""
        options = {"backend": "aot_eager"} if self.is_smoke else options
        return torch.compile(function, **options)

    def ours(self) -> AbstractContextManager[None]:
        """Within it bitfast runs as on a GPU: in Triton's interpreter, where the smoke run has that."""
        from bitfast.backends import use_backend

        if self.device == "cuda" or os.environ.get("TRITON_INTERPRET") != "1":
            return nullcontext()
        return use_backend(
            group_norm_act="triton", weight_standardization="triton", resize_normalize="triton"
        )

    def on_ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function on the backends of :meth:`ours`."""

        def run(*arguments: Any) -> Any:
            with self.ours():
                return function(*arguments)

        return run

    def input_sets(self, nbytes: int) -> int:
        """Return how many inputs of this size must take turns so that none is found in the L2 cache."""
        if self.is_smoke:
            return 2
        cache = l2_bytes(self.device)
        return 2 if nbytes >= cache else min(CALLS_IN_A_GRAPH, math.ceil(4 * cache / nbytes))

    def contest(self, contest: Contest) -> None:
        """Check every contestant of a case, then time it, and write the rows."""
        expected = [tensor.double() for tensor in tensors_of(contest.expected())]
        bounds: list[float] = []
        for name, function in contest.contestants.items():

            def run(name: str = name, function: Callable[[int], Any] = function) -> None:
                errors = errors_of(function, expected, self.device)
                if not bounds:
                    bounds.extend(2 * e for e in errors)
                # The first contestant is plain PyTorch; its error bounds ours. Peers must only be right.
                roundings = 1 if name.startswith("bitfast") and not self.is_smoke else 64
                for number, (error, bound) in enumerate(zip(errors, bounds, strict=True)):
                    bound += roundings * contest.rounding + SMOKE_SLACK * self.is_smoke
                    if not error <= bound or not math.isfinite(bound):
                        raise WrongResultError(f"output {number}: error {error:.1e} > {bound:.1e}")
                values: dict[str, Any] = {"check": max(errors), "bytes": contest.floor_bytes}
                if self.is_check_only:
                    self.add(contest.case, name, "checked", **values)
                    return
                calls = [lambda n=n: function(n) for n in range(contest.sets)]
                sample = measure(calls, self.device, 0.0 if self.is_smoke else 0.08)
                self.add(
                    contest.case,
                    name,
                    **values,
                    **sample._asdict(),
                    is_baseline=name == contest.baseline,
                    gigabytes_per_second=contest.floor_bytes / sample.seconds / 1e9,
                    fraction_of_floor=contest.floor_seconds / sample.seconds,
                    **contest.facts,
                )

            self.attempt(contest.case, name, run)


@dataclass
class Contest:
    """A case: contestants that compute the same.

    Attributes:
        case: For people.
        contestants: Called with the number of an input set. The first sets the bound of the errors.
        baseline: The contestant that ratios refer to.
        expected: Returns the result for input set 0 in float64.
        sets: Input sets.
        floor_bytes: That must move, each tensor read once and written once.
        floor_seconds: They take as long by the copy bandwidth that was measured.
        rounding: Added to twice the error of the first contestant.
        facts: For the rows.
    """

    case: str
    contestants: dict[str, Callable[[int], Any]]
    baseline: str
    expected: Callable[[], Any]
    sets: int
    floor_bytes: int
    floor_seconds: float
    rounding: float
    facts: dict[str, Any] = field(default_factory=dict)


# ---- checks ---------------------------------------------------------------------------------------


def tensors_of(result: Any) -> list[Tensor]:
    """Return a result's tensors."""
    return [result] if isinstance(result, Tensor) else list(result)


def errors_of(function: Callable[[int], Any], expected: list[Tensor], device: str) -> list[float]:
    """Return the relative error, norm over norm, of each output for input set 0.

    The function runs a second time into memory that holds NaN, so that what it leaves out is seen.
    """
    shapes = [(t.shape, t.dtype) for t in tensors_of(function(0))]
    poison = [torch.full(s, math.nan, dtype=d, device=device) for s, d in shapes]
    del poison
    results = tensors_of(function(0))
    if len(results) != len(expected):
        raise WrongResultError(f"{len(results)} results instead of {len(expected)}")
    return [relative_error(r, e) for r, e in zip(results, expected, strict=True)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of ``expected``, in float64."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}")
    expected = expected.detach().double()
    difference = actual.detach().double() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-300))


def last_lines(error: BaseException, lines: int = 4) -> str:
    """Return the end of an exception's traceback."""
    text = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(line[:300] for line in text[-lines:])


# ---- times ----------------------------------------------------------------------------------------


def measure(
    calls: Sequence[Callable[[], Any]], device: str, seconds: float, capture: bool = True
) -> Sample:
    """Time one call, the given ones taking turns, after warming up.

    Args:
        calls: Each on its own inputs.
        device: "cuda" or "cpu".
        seconds: About how long to repeat.
        capture: Replay a CUDA graph of the calls if they can be captured.
    """
    if device == "cpu":
        return _measure_on_cpu(calls, seconds)
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = _captured(calls) if capture else None

    def once() -> None:
        if graph is not None:
            graph.replay()
            return
        for call in calls:
            call()

    times = [_event_seconds(once, 1)[0] for _ in range(3)]
    repeats = int(min(max(seconds / max(min(times), 1e-6), 9), 300))
    times = _event_seconds(once, repeats)
    return sample_of(times, len(calls), graph is not None)


def _event_seconds(function: Callable[[], None], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph | None:
    """Return a graph of the calls, None where one of them does what a graph cannot hold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # once where it will be captured: autograd stays on one stream
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except Exception as error:
        print("not captured:", last_lines(error, 1))
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _measure_on_cpu(calls: Sequence[Callable[[], Any]], seconds: float) -> Sample:
    calls[0]()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - start)
    return sample_of(times, 1, False)


def sample_of(times: list[float], calls: int, is_captured: bool) -> Sample:
    """Return what is said of times of so many calls each."""
    low, middle, high = statistics.quantiles(times, n=4)
    return Sample(middle / calls, (high - low) / middle, len(times), is_captured)


def host_sample(function: Callable[[], Any], device: str, calls: int, repeats: int = 15) -> Sample:
    """Time what a call costs the host: many calls, none of which waits for the device."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    synchronize(device)
    return sample_of(times[2:], 1, False)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the device -----------------------------------------------------------------------------------


def l2_bytes(device: str) -> int:
    """Return the size of the L2 cache; of a CPU some size, for the smoke run."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**16


def copy_sample(device: str, is_smoke: bool) -> tuple[Sample, int]:
    """Time a device-to-device copy of a large buffer; also return its bytes, read and written."""
    size = 2**20 if is_smoke else 2**31
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sample = measure([lambda: target.copy_(source)], device, 0.0 if is_smoke else 0.1)
    if not torch.equal(source, target):
        raise WrongResultError("the copy differs from what was copied")
    return sample, 2 * size


def copy_bandwidth(device: str, is_smoke: bool) -> float:
    """Return the bytes per second, read and written, that a large copy moves."""
    sample, nbytes = copy_sample(device, is_smoke)
    return nbytes / sample.seconds


# ---- the command line of a part -------------------------------------------------------------------


def run_parts(parts: dict[str, Callable[[Session], None]], description: str) -> None:
    """Run the parts named on the command line; exit with 1 if anything in them failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--part", action="append", choices=sorted(parts), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--check-only", action="store_true", help="take no times")
    parser.add_argument("--rows", type=Path, help="append JSON lines here")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after these")
    options = parser.parse_args()
    if options.device == "cuda" and os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not run on the GPU")
    if options.device == "cpu" and not options.smoke:
        parser.error("--device cpu needs --smoke: times from a CPU say nothing about a GPU")
    failures = 0
    for part in options.part:
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        session = Session(
            part,
            options.device,
            options.smoke,
            options.check_only,
            options.rows,
            time.monotonic() + options.seconds,
        )
        parts[part](session)
        failures += session.failures
    if failures:
        raise SystemExit(1)
