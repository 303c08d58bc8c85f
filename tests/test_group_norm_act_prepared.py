"""Prepared norms, statistics that are not stored, and memory that is used again: in every way of working."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels import weight_standardization as weights
from bitfast.kernels.group_norm_act_prepared import prepare_backward, prepare_forward
from tests.guarded import Guarded
from tests.interpreter import DEVICE
from tests.launch_ways import WAYS, choose, forget_calls

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPE, GROUPS = (2, 12, 7, 5), 2
STREAM = 0 if DEVICE == "cpu" else torch.cuda.current_stream().cuda_stream


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: Any) -> Iterator[str]:
    choose(monkeypatch, request.param)
    yield request.param
    forget_calls()


def draw(layout: torch.memory_format, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(SHAPE, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def parameters() -> tuple[Tensor, Tensor]:
    return torch.rand(SHAPE[1], device=DEVICE) + 0.5, torch.randn(SHAPE[1], device=DEVICE)


def run(launches: list[Any]) -> None:
    for launch in launches:
        launch.launch()


class Ordinary:
    """What the launches give without anything of what is tested here."""

    def __init__(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, layout: Any
    ) -> None:
        self.total = torch.empty_like(x) if residual is not None else None
        self.result = torch.empty_like(x)
        self.mean, self.rstd = (torch.empty(x.shape[0], GROUPS, device=DEVICE) for _ in range(2))
        launches = kernels.forward_launches(
            x, residual, weight, bias, 1e-5, "gelu", layout == torch.channels_last,
            total=self.total, result=self.result, mean=self.mean, rstd=self.rstd,
        )  # fmt: skip
        run(launches)
        self.used = [launch.kernel.__name__ for launch in launches]


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- memory that is used again --------------------------------------------------------------------

SHARED = {
    "result in x": (None, "x"),
    "result in residual": (None, "residual"),
    "total in x": ("x", None),
    "total in residual": ("residual", None),
    "total in x, result in residual": ("x", "residual"),
    "total in residual, result in x": ("residual", "x"),
}


@pytest.mark.parametrize("shared", SHARED)
def test_outputs_in_the_memory_of_inputs(way, shared):
    layout, keeps_statistics = random.choice(LAYOUTS), random.random() < 0.5
    x, residual, (weight, bias) = draw(layout), draw(layout), parameters()
    expected = Ordinary(x, residual, weight, bias, layout)
    memory = {"x": x, "residual": residual}
    total, result = (
        memory.get(name or "", torch.full_like(x, torch.nan)) for name in SHARED[shared]
    )
    mean, rstd = (
        torch.empty(SHAPE[0], GROUPS, device=DEVICE) if keeps_statistics else None for _ in range(2)
    )
    launches = kernels.forward_launches(
        x, residual, weight, bias, 1e-5, "gelu", layout == torch.channels_last,
        total=total, result=result, mean=mean, rstd=rstd, groups=GROUPS,
    )  # fmt: skip
    assert [launch.kernel.__name__ for launch in launches] == expected.used
    run(launches)
    assert torch.equal(total, expected.total)
    assert torch.equal(result, expected.result)
    if mean is not None and rstd is not None:
        assert torch.equal(mean, expected.mean)
        assert torch.equal(rstd, expected.rstd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_in_place(way, layout):
    x, (weight, bias) = draw(layout), parameters()
    expected = Ordinary(x, None, weight, bias, layout)
    run(
        kernels.forward_launches(
            x, None, weight, bias, 1e-5, "gelu", layout == torch.channels_last,
            total=None, result=x, groups=GROUPS,
        )
    )  # fmt: skip
    assert torch.equal(x, expected.result)


def test_what_cannot_be_is_refused():
    x, (weight, bias) = draw(LAYOUTS[0]), parameters()
    arguments = (x, torch.empty_like(x), weight, bias, 1e-5, "relu", False)
    with pytest.raises(ValueError, match="must not take the place of total"):
        kernels.forward_launches(*arguments, total=x, result=x, groups=GROUPS)
    statistic = torch.empty(SHAPE[0], GROUPS)
    for given in ({}, {"mean": statistic}, {"rstd": statistic, "groups": GROUPS}):
        with pytest.raises(ValueError, match="mean and rstd, or groups"):
            kernels.forward_launches(*arguments, total=None, result=x, **given)


# ---- prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_statistics", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prepared_norm_gives_the_same_bits(way, layout, has_residual, keeps_statistics):
    weight, bias = parameters()
    prepared = prepare_forward(
        SHAPE, torch.bfloat16, torch.device(DEVICE), layout == torch.channels_last, GROUPS, 1e-5, "gelu",
        weight.dtype, bias.dtype, has_residual=has_residual, keeps_statistics=keeps_statistics,
    )  # fmt: skip
    for _ in range(2):
        x, residual = draw(layout), draw(layout) if has_residual else None
        expected = Ordinary(x, residual, weight, bias, layout)
        result, total = Guarded(x), Guarded(x) if has_residual else None
        statistics = [Guarded(expected.mean) for _ in range(2 * keeps_statistics)]
        prepared(
            STREAM, pointer(x), pointer(residual), pointer(weight), pointer(bias),
            pointer(total and total.tensor), pointer(result.tensor),
            *([pointer(s.tensor) for s in statistics] or (0, 0)),
        )  # fmt: skip
        for guarded in (result, *statistics, *([total] if total else ())):
            guarded.check()
        assert torch.equal(result.tensor, expected.result)
        assert total is None or torch.equal(total.tensor, expected.total)
        for guarded, statistic in zip(statistics, (expected.mean, expected.rstd), strict=False):
            assert torch.equal(guarded.tensor, statistic)


def test_a_prepared_sum_in_place(way):
    x, residual, (weight, bias) = draw(LAYOUTS[1]), draw(LAYOUTS[1]), parameters()
    expected = Ordinary(x, residual, weight, bias, LAYOUTS[1])
    prepared = prepare_forward(
        SHAPE, torch.bfloat16, torch.device(DEVICE), True, GROUPS, 1e-5, "gelu", weight.dtype, bias.dtype,
        has_residual=True, sum_in_place=True, keeps_statistics=False,
    )  # fmt: skip
    pointers = [pointer(t) for t in (x, residual, weight, bias, x, residual)]
    prepared(STREAM, *pointers, 0, 0)
    assert torch.equal(x, expected.total)
    assert torch.equal(residual, expected.result)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("has_grad_total", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_gradients_have_the_same_bits(way, layout, has_grad_total, recomputes):
    weight, bias = parameters()
    prepared = prepare_backward(
        SHAPE, torch.bfloat16, torch.device(DEVICE), layout == torch.channels_last, GROUPS, "gelu",
        weight.dtype, bias.dtype, has_grad_total=has_grad_total, recomputes=recomputes,
    )  # fmt: skip
    for _ in range(2):
        x, grad = draw(layout), draw(layout)
        grad_total = draw(layout) if has_grad_total else None
        statistics = Ordinary(x, None, weight, bias, layout)
        inputs = (grad, grad_total, x, weight, bias, statistics.mean, statistics.rstd)
        outputs = (x, weight, bias, *([x] if recomputes else []))
        expected = [torch.empty_like(t) for t in outputs]
        names = ("grad_x", "grad_weight", "grad_bias", "result")[: len(outputs)]
        run(
            kernels.backward_launches(
                *inputs, "gelu", layout == torch.channels_last, **dict(zip(names, expected, strict=True))
            )
        )  # fmt: skip
        actual = [Guarded(t) for t in outputs]
        addresses = [pointer(g.tensor) for g in actual]
        prepared(STREAM, *map(pointer, inputs), *addresses, *([] if recomputes else [0]))
        for guarded, tensor in zip(actual, expected, strict=True):
            guarded.check()
            assert torch.equal(guarded.tensor, tensor)


def test_a_prepared_empty_batch():
    weight, bias = parameters()
    shape, device = (0, *SHAPE[1:]), torch.device(DEVICE)
    settings = (weight.dtype, bias.dtype)
    prepared = prepare_forward(shape, torch.float32, device, False, GROUPS, 1e-5, "relu", *settings)
    prepared(STREAM, 0, 0, pointer(weight), pointer(bias), 0, 0, 0, 0)
    backward = prepare_backward(shape, torch.float32, device, False, GROUPS, "relu", *settings)
    gradients = Guarded(weight), Guarded(bias)
    backward(
        STREAM, 0, 0, 0, pointer(weight), pointer(bias), 0, 0, 0,
        *(pointer(g.tensor) for g in gradients), 0,
    )  # fmt: skip
    assert not any(g.tensor.any() for g in gradients)


def test_all_weights_prepared():
    parameters = [
        torch.randn(shape, device=DEVICE) for shape in ((5, 3, 7, 7), (32, 16, 3, 3), (4, 64, 1, 1))
    ]
    starts, end = [0, 1024, 1024 + 4608], 1024 + 4608 + 256
    table = weights.table_of(parameters, starts, True)
    assert table is not None
    filters = sum(p.shape[0] for p in parameters)

    def outputs() -> list[Tensor]:
        packed = torch.zeros(end, dtype=torch.bfloat16, device=DEVICE)
        return [packed, *torch.zeros(2, filters, device=DEVICE).split(1)]

    expected, actual = outputs(), outputs()
    names = ("result", "mean", "rstd")
    weights.forward_all_launch(
        table, parameters, 1e-8, **dict(zip(names, expected, strict=True))
    ).launch()
    prepared = weights.prepare_forward_all(table, torch.float32, torch.bfloat16, 1e-8)
    prepared(STREAM, table, *map(pointer, actual))
    assert all(map(torch.equal, actual, expected))
    grad, grads = torch.randn_like(expected[0]), [torch.zeros(end, device=DEVICE) for _ in range(2)]
    weights.backward_all_launch(
        table, grad, parameters, *expected[1:], grad_weight=grads[0]
    ).launch()
    backward = weights.prepare_backward_all(table, torch.float32, torch.bfloat16)
    backward(STREAM, table, *map(pointer, (grad, *expected[1:], grads[1])))
    assert grads[0].any()
    assert torch.equal(*grads)
