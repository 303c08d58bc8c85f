from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.ops.group_norm_act import group_norm_act
from tests.drawn_cases import norm_cases
from tests.feature_maps import DTYPES, LAYOUTS
from tests.norm_backward import drawn_arguments, recomputed_result
from tests.plain_ops import plain_norm
from tests.tolerances import Triples, assert_draws_within_contract

NAMES = sorted(ACTIVATIONS)


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout)
    parameter_dtype = parameter_dtype or dtype
    weight = (torch.rand(shape[1]) + 0.5).to(parameter_dtype)
    return x, weight, torch.randn(shape[1]).to(parameter_dtype)


def oracle(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, activation: str
) -> torch.Tensor:
    """GroupNorm written out from its definition, in float64."""
    grouped = x.double().reshape(x.shape[0], groups, x.shape[1:].numel() // groups)
    centered = grouped - grouped.mean(-1, keepdim=True)
    normalized = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normalized = normalized.reshape(x.shape)
    scaled = normalized * weight.double().view(1, -1, 1, 1) + bias.double().view(1, -1, 1, 1)
    return ACTIVATIONS[activation](scaled)


def check(count: int, draw: Callable[[], tuple[Tensor, Tensor, Tensor]], *settings: Any) -> None:
    """Hold the op to the contract, over several draws of x, weight and bias together."""

    def results() -> Triples:
        arguments = (*draw(), *settings)
        actual = group_norm_act(*arguments[:4], activation=arguments[4])
        return {"result": (actual, plain_norm(*arguments), oracle(*arguments))}

    assert_draws_within_contract(results, count)


@settings(max_examples=60)
@given(case=norm_cases(DTYPES, most_channels_per_group=5, largest_side=9))
def test_matches_the_oracle(case):
    torch.manual_seed(case.seed)
    check(
        8,
        lambda: make(case.shape, case.dtype, case.layout, case.mean),
        case.groups,
        case.activation,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [-2.3, 100.0])
def test_variance_does_not_cancel(layout, mean):
    check(2, lambda: make((2, 64, 14, 14), layout=layout, mean=mean), 32, "none")
    arguments = (*make((2, 64, 14, 14), layout=layout, mean=mean), 32, "none")
    actual = group_norm_act(*arguments[:4], activation="none")
    assert (actual - oracle(*arguments)).abs().max() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(layout):
    x, weight, bias = make((2, 8, 5, 3), layout=layout)
    assert group_norm_act(x, weight, bias, 4).is_contiguous(memory_format=layout)


def test_reads_views_and_nothing_beside_them():
    whole = torch.full((4, 10, 9, 9), float("nan"))
    x = whole[1:3, 1:9, 2:7, ::2]
    x.copy_(torch.randn(x.shape))
    _, weight, bias = make((2, 8, 5, 5))
    expected = group_norm_act(x.contiguous(), weight, bias, 4)
    assert torch.equal(group_norm_act(x, weight, bias, 4), expected)
    permuted = x.contiguous().permute(0, 1, 3, 2)
    expected = group_norm_act(permuted.contiguous(), weight, bias, 4)
    assert torch.equal(group_norm_act(permuted, weight, bias, 4), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype(dtype, layout):
    check(4, lambda: make((2, 8, 5, 3), dtype, layout, parameter_dtype=torch.float32), 4, "gelu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
def test_gradients_in_float64(activation, layout):
    x, weight, bias = (t.double() for t in make((2, 6, 3, 2), mean=0.3))
    x = x.contiguous(memory_format=layout)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: group_norm_act(*t, 3, activation=activation), inputs)
    contract = torch.ops.bitfast.group_norm_act.reference
    assert torch.autograd.gradcheck(lambda *t: contract(*t, 3, 1e-5, activation)[0], inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["public", "contract"])
def test_gradients_are_within_the_contract(op, dtype, layout):
    def ours(x, weight, bias):
        if op == "public":
            return group_norm_act(x, weight, bias, 4, activation="gelu")
        return torch.ops.bitfast.group_norm_act.reference(x, weight, bias, 4, 1e-5, "gelu")[0]

    def draw():
        inputs = make((2, 96, 7, 5), dtype, layout)
        grad = torch.randn(inputs[0].shape).to(dtype).contiguous(memory_format=layout)

        def gradients(function, dtype):
            leaves = [t.detach().to(dtype).clone().requires_grad_() for t in inputs]
            return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

        actual = gradients(ours, dtype)
        assert actual[0].is_contiguous(memory_format=layout)
        baseline = gradients(lambda *t: plain_norm(*t, 4, "gelu"), dtype)
        exact = gradients(lambda *t: oracle(*t, 4, "gelu"), torch.float64)
        names = (f"gradient of {name}" for name in ("x", "weight", "bias"))
        return dict(zip(names, zip(actual, baseline, exact, strict=True), strict=True))

    assert_draws_within_contract(draw, 3)


@pytest.mark.parametrize("has_total", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_that_gives_the_result_again(dtype, activation, layout, has_total):
    def draw() -> Triples:
        arguments = drawn_arguments(
            (2, 24, 5, 3), 4, dtype, activation, mean=3.0, has_total=has_total, layout=layout
        )
        x, weight, bias = arguments[2:5]
        result = recomputed_result("reference", arguments)
        assert result.is_contiguous(memory_format=layout)
        settings = (weight, bias, 4, activation)
        return {"result": (result, plain_norm(x, *settings), oracle(x, *settings))}

    assert_draws_within_contract(draw, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_a_backward_that_gives_the_result_again(layout):
    arguments = drawn_arguments((2, 6, 4, 3), 2, torch.bfloat16, has_total=True, layout=layout)
    torch.library.opcheck(torch.ops.bitfast.group_norm_act_recompute.reference, arguments)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, layout, activation):
    x, weight, bias = make((2, 8, 3, 5), dtype)
    if layout == "permuted":
        x = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    else:
        x = x.contiguous(memory_format=layout)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(
        torch.ops.bitfast.group_norm_act.reference, (*inputs, 4, 1e-5, activation)
    )


def test_autocast_result_has_the_autocast_dtype_and_float32_statistics():
    x, weight, bias = make((2, 8, 6, 6), mean=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = group_norm_act(x, weight, bias, 4)
        unaffected = group_norm_act(x.double(), weight.double(), bias.double(), 4)
    assert actual.dtype == torch.bfloat16
    assert unaffected.dtype == torch.float64
    assert torch.equal(actual, group_norm_act(x, weight, bias, 4).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_graph_breaks_and_with_dynamic_shapes(layout):
    torch._dynamo.reset()
    compiled = torch.compile(group_norm_act, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 8, 6, 5), (3, 8, 9, 4), (5, 8, 2, 7)]:
        x, weight, bias = make(shape, layout=layout)
        with torch.compiler.set_stance("fail_on_recompile" if shape[0] == 5 else "default"):
            torch.testing.assert_close(
                compiled(x, weight, bias, 4), group_norm_act(x, weight, bias, 4)
            )


def test_explicit_backend_never_degrades():
    x, weight, bias = make((1, 8, 2, 2))
    with use_backend("reference"):
        group_norm_act(x, weight, bias, 4)
    with use_backend("native"), pytest.raises(BackendUnavailableError, match="group_norm_act"):
        group_norm_act(x.double(), weight, bias, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        ({"x": torch.zeros(2, 8, 0, 3)}, ValueError, "at least 1"),
        ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int32)}, TypeError, "floating-point"),
        ({"x": [1.0]}, TypeError, "torch.Tensor"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(8,\)"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias must have shape \(8,\)"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 8 channels of x, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .*got 'tanh'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    x, weight, bias = make((2, 8, 3, 3))
    arguments = {"x": x, "weight": weight, "bias": bias, "num_groups": 4, **changes}
    with pytest.raises(error, match=message):
        group_norm_act(**arguments)


def test_statistics_of_the_contract():
    x, weight, bias = make((2, 8, 5, 3), mean=3.0)
    _, mean, rstd = reference.group_norm_act_forward(x, weight, bias, 4, 1e-5, "relu")
    grouped = x.double().reshape(2, 4, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-6, atol=1e-6)
    expected = (grouped.var(-1, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=1e-5)
