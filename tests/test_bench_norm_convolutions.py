"""The benchmark of convolutions that normalize what they read; the kernels run on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.backends import enabled_kernels, requested_backend
from bitfast.bench import contest, models, registry
from bitfast.bench import norm_convolution_problems as problems
from bitfast.bench import norm_convolutions as bench
from bitfast.bench.accuracy import Float64Judge, WrongResultError
from bitfast.bench.cases import OURS, PLAIN, Case, Contestant, NotHereError, Problem, called
from bitfast.bench.contestant import fusing
from bitfast.bench.isolated import IsolatedCases
from bitfast.bench.norm_convolution_problems import CUDNN, UNFUSED, WITH_FACTORS, Layer
from bitfast.bench.rows import EVERYBODY, FAILED, SKIPPED, TIMED, Row
from bitfast.ops import native_cuda
from bitfast.ops import norm_convolution_cuda as kernels
from tests.norm_convolution_kernels import Kernels, at

BFLOAT = torch.bfloat16
LAYERS = [
    Layer(64, 6, 128, adds=True), Layer(72, 5, 64), Layer(64, 7, 64, 3), Layer(64, 7, 128, 3, 2),
    Layer(64, 7, 128, 1, 2, measures=False), Layer(64, 4, 64, second_channels=96),
    Layer(64, 4, 128, has_norm=False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels_of_the_cpu = Kernels()
    monkeypatch.setattr(native_cuda, "library", lambda: kernels_of_the_cpu)
    monkeypatch.setattr(problems, "GROUPS", 8)
    monkeypatch.setattr("bitfast.bench.op_problems.GROUPS", 8)
    monkeypatch.setattr(problems, "our_norm", lambda x, *norm: problems.plain_norm(x, *norm))
    with torch.no_grad():
        yield


def rows_of(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Check the contestants of a problem; nothing is timed."""
    monkeypatch.setattr(contest, "take_turns", lambda *_: {})
    case = Case("op", "norm_convolution", "case", "bfloat16", lambda: nullcontext(problem))
    return {row.contestant: row for row in contest.run(case, None, 1)}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.words(2))
def test_the_contestants_are_right(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.convolution_problem(layer, 2, BFLOAT, "cpu")
    rows = rows_of(problem, monkeypatch)
    is_whole = layer.has_norm and layer.measures
    names = [UNFUSED, WITH_FACTORS] * is_whole + [CUDNN] * (layer.has_norm and not layer.adds)
    assert set(rows) == {PLAIN, OURS, *names}
    assert {name: row.note for name, row in rows.items() if row.status == FAILED} == {}


@pytest.mark.parametrize(
    ("layer", "mega_bytes", "giga_flops"),
    [
        # x 51.38, residual and result 205.52 each, filters 0.03
        (Layer(64, 56, 256, adds=True), 462.455, 13.153),
        # x 12.85, filters 1.18, result 12.85
        (Layer(256, 14, 256, 3), 26.870, 29.595),
        # of x, 205.52, a quarter; filters 0.26, result 102.76
        (Layer(256, 56, 512, 1, 2, measures=False), 154.403, 26.306),
        # x 51.38, results 51.38 and 205.52, filters 0.04
        (Layer(64, 56, 64, second_channels=256), 308.322, 16.442),
    ],
)
def test_bytes_and_operations(layer: Layer, mega_bytes: float, giga_flops: float) -> None:
    assert layer.bytes(128, BFLOAT) / 1e6 == pytest.approx(mega_bytes, abs=1e-3)
    assert layer.flops(128) / 1e9 == pytest.approx(giga_flops, abs=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: problems.statistics_problem((2, 64, 5, 7), BFLOAT, "cpu"),
        lambda: problems.factors_problem(Layer(64, 6, 128), 2, BFLOAT, "cpu"),
    ],
)
def test_the_contestants_of_statistics_are_right(
    make: Callable[[], Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(make(), monkeypatch)
    assert list(rows) == [PLAIN, OURS]
    assert {name: row.note for name, row in rows.items() if row.status == FAILED} == {}


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Any], argument: int) -> None:
    """Let the convolution change what it has written at one of its addresses."""
    prepare = kernels.prepare_convolution

    def spoiling(convolution: kernels.Convolution) -> Any:
        prepared: Any = prepare(convolution)

        def run(*arguments: int) -> None:
            prepared.run(*arguments)
            address = arguments[argument]
            change(at(address, torch.float32, (12,)))

        return prepared._replace(run=run)

    monkeypatch.setattr(kernels, "prepare_convolution", spoiling)


@pytest.mark.parametrize(
    ("layer", "change", "argument", "note"),
    [
        (LAYERS[1], lambda found: found[2:].mul_(1 + 1e-4), 6, "statistics: means are off by"),
        (LAYERS[1], lambda found: found[10].fill_(torch.nan), 6, "statistics: means are off by"),
        (LAYERS[4], lambda found: found.zero_(), 5, "error"),
    ],
)
def test_what_is_wrong_is_not_timed(
    layer: Layer, change: Callable[[Tensor], Any], argument: int, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    spoil(monkeypatch, change, argument)
    rows = rows_of(problems.convolution_problem(layer, 2, BFLOAT, "cpu"), monkeypatch)
    ours = [rows.pop(name) for name in (OURS, WITH_FACTORS) if name in rows]
    assert all(row.status == FAILED and note in row.note for row in ours)
    assert all(row.status == TIMED for row in rows.values())


def exact_partials(x: Tensor, cell_channels: int) -> Tensor:
    """The partials of a map, each image one strip."""
    cells = x.double().unflatten(1, (-1, cell_channels)).flatten(2)
    pixels = torch.tensor([x[0, 0].numel(), 0.0]).expand(x.shape[0], 1, 2)
    moments = [cells.mean(2), cells.var(2, correction=0) * cells.shape[2]]
    return torch.cat([pixels, torch.stack(moments, 2).float()], 1)[:, None]


def test_statistics_far_from_zero_are_held_to_the_deviation() -> None:
    x = (torch.randn(1, 64, 9, 9) + 100).contiguous(memory_format=torch.channels_last)
    problems.check_statistics(exact_partials(x, 8), x, 8)
    with pytest.raises(WrongResultError):
        problems.check_statistics(exact_partials(x + 1e-3, 8), x, 8)


def test_what_the_layers_are() -> None:
    """Those of the network, each once; conv1 and the shortcut of the first stage are one launch."""
    import bitfast

    with torch.device("meta"):
        model = bitfast.BitModel(bitfast.BitConfig())
    found = {
        (layer.weight.shape[1], layer.weight.shape[0], layer.kernel_size[0], layer.stride[0])
        for layer in model.encoder.modules()
        if isinstance(layer, torch.nn.Conv2d)
    }
    wider = {(256, 128, 1, 1), (512, 256, 1, 1), (1024, 512, 1, 1)}
    """Each stage's first conv1, whose like is there."""
    ours = {(b.channels, b.out_channels, b.kernel_size, b.stride) for b in bench.LAYERS}
    assert found - wider - {(64, 256, 1, 1)} == ours - {(64, 256, 1, 1)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_cases_say_why() -> None:
    cases = [*bench.cases(), *bench.further_cases(), *models.fused_cases()]
    assert all(case.device == "cuda" and case.time_limit for case in cases)
    for case in (cases[0], cases[-1]):
        (row,) = contest.run(case, None, 1)
        assert (row.status, row.note) == (SKIPPED, "torch sees no CUDA device")
    titles = [case.title for case in registry.cases("cuda", [1])]
    assert titles[: len(list(bench.cases()))] == [case.title for case in bench.cases()]


@pytest.mark.parametrize(
    ("capability", "words"), [((8, 0), "capability 9.0, this one has 8.0"), ((10, 0), "has 10.0")]
)
def test_other_gpus_say_why(
    capability: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(NotHereError, match=words):
        bench.require_kernels()


def test_whole_models_are_run_in_three_ways() -> None:
    kernel = "norm_convolution", "native", "cuda"

    def state() -> tuple[str | None, bool]:
        return requested_backend("norm_convolution"), kernel in enabled_kernels()

    assert [entry.fused for entry in models.FUSED[1:]] == [
        "",
        "",
        "table",
        "table",
        *["everywhere"] * 2,
    ]
    within = {how: fusing(how)(state)() for how in ("", "table", "everywhere")}
    assert within == {"": (None, False), "table": (None, True), "everywhere": ("native", False)}
    assert state() == (None, False)


# ---- in a process of their own --------------------------------------------------------------------------


def strange_cases(device: str, thread_counts: Sequence[int]) -> Iterator[Case]:
    """Cases that do what kernels may do which nobody has tried."""

    def die() -> Tensor:
        os._exit(7)

    def hang() -> Tensor:
        time.sleep(60)
        raise AssertionError

    def fail() -> Tensor:
        raise RuntimeError("out of order")

    def answer() -> Tensor:
        return torch.ones(3)

    for name, ours in (("answers", answer), ("fails", fail), ("dies", die), ("hangs", hang)):

        def problem(ours: Callable[[], Tensor] = ours) -> Any:
            functions = {PLAIN: answer, OURS: ours}
            contestants = [
                Contestant(who, "float32", called(lambda _, f=f: f()))
                for who, f in functions.items()
            ]
            return nullcontext(Problem(contestants, Float64Judge([torch.ones(3).double()])))

        limit = 0.5 if name == "hangs" else 30.0
        yield Case("op", "op", name, "float32", problem, device, time_limit=limit)


def test_what_dies_or_hangs_loses_its_case_alone() -> None:
    answers, fails, dies, hangs = strange_cases("cpu", [1])
    with IsolatedCases(strange_cases) as isolated:

        def statuses(case: Case) -> dict[str, tuple[str, str]]:
            rows = isolated.run(case, None, 2)
            return {row.contestant: (row.status, row.note) for row in rows}

        assert statuses(answers) == {PLAIN: (TIMED, ""), OURS: (TIMED, "")}
        other = isolated._process
        first = other._process.pid
        failed = (FAILED, "RuntimeError: out of order")
        assert statuses(fails) == {PLAIN: (TIMED, ""), OURS: failed}
        assert other._process.pid == first
        assert statuses(dies) == {EVERYBODY: (FAILED, "the process died, exit status 7")}
        other._begin()
        process = other._process
        assert statuses(hangs) == {EVERYBODY: (FAILED, "no answer after 0.5 s")}
        assert not process.is_alive()
        other.hangs += 1
        assert statuses(answers) == {EVERYBODY: (SKIPPED, "2 cases before did not end")}
