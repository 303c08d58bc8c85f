"""The C++ kernels of group_norm_act on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.backends import use_backend
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from tests.drawn_cases import norm_cases
from tests.feature_maps import LAYOUTS, away_from_kinks
from tests.guarded import Guarded
from tests.norm_backward import recomputed_result
from tests.plain_ops import channel_moments, plain_norm
from tests.requirements import NEEDS_EXTENSION
from tests.threads import torch_threads
from tests.tolerances import Triples, assert_draws_within_contract

pytestmark = [NEEDS_EXTENSION, pytest.mark.usefixtures("poisoned")]

DTYPES = (torch.float32, torch.bfloat16)
NAMES = sorted(ACTIVATIONS)
operators = torch.ops.bitfast


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


def draw(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    activation: str,
    mean: float,
    with_residual: bool,
) -> Triples:
    """Return, of one forward and backward pass, the kernels' results, plain PyTorch's and float64's."""
    x = (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout)
    residual, grad, grad_total = (
        torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    weight, bias = (torch.rand(shape[1]) + 0.5).to(dtype), torch.randn(shape[1]).to(dtype)
    arguments = (weight, bias, groups, 1e-5, activation)
    if with_residual:
        total, result, mean_, rstd = operators.add_group_norm_act.native(x, residual, *arguments)
        assert torch.equal(total, x + residual)
    else:
        total = x
        result, mean_, rstd = operators.group_norm_act.native(x, *arguments)
    extra = grad_total if with_residual else None
    grad = away_from_kinks(grad, total, weight, bias, groups, activation)
    saved = (total, weight, bias, mean_, rstd, groups, activation)
    gradients = operators.group_norm_act_backward.native(grad, extra, *saved)
    again = recomputed_result("native", (grad, extra, *saved))
    for tensor in (total, result, gradients[0], again):
        assert tensor.is_contiguous(memory_format=layout) or shape[0] == 0

    def outputs(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).contiguous().requires_grad_() for t in (total, weight, bias)]
        output = plain_norm(*leaves, groups, activation)
        found = torch.autograd.grad(output, leaves, grad.to(dtype))
        added = 0 if extra is None else extra.to(dtype)
        return [output.detach(), output.detach(), found[0] + added, *found[1:]]

    names = ("result", "result again", "grad_x", "grad_weight", "grad_bias")
    columns = zip((result, again, *gradients), outputs(dtype), outputs(torch.float64), strict=True)
    return dict(zip(names, columns, strict=True))


def check(count: int, *arguments: object) -> None:
    assert_draws_within_contract(lambda: draw(*arguments), count)  # type: ignore[arg-type]


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation, layout, mean):
    check(4, (2, 48, 9, 7), 16, torch.float32, layout, activation, mean, False)


@settings(max_examples=150)
@given(
    case=norm_cases(DTYPES, most_channels_per_group=40, largest_side=12),
    with_residual=st.booleans(),
)
def test_drawn_shapes(case, with_residual):
    # Of a few values that happen to be close, the mean's rounding, saved for the backward pass in float32,
    # decides: here and in plain PyTorch alike.
    assume(case.group_size == 1 or case.group_size >= 8)
    torch.manual_seed(case.seed)
    check(
        4, case.shape, case.groups, case.dtype, case.layout, case.activation, case.mean, with_residual
    )  # fmt: skip


@pytest.mark.parametrize("with_residual", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_one_image_on_several_threads(threads, groups, layout, with_residual):
    """Groups are cut into pieces of pixels where there are fewer of them than threads."""
    check(1, (1, 64, 41, 83), groups, torch.float32, layout, "gelu", 1.0, with_residual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (3, 7, 1, 1), (2, 6, 1, 13)])
def test_one_channel_per_group(shape, layout):
    check(8, shape, shape[1], torch.float32, layout, "relu", 100.0, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_statistics_do_not_cancel(layout, threads):
    """Where the mean is 1000 standard deviations, and where one pixel stands far from the others."""
    for x in (torch.randn(1, 8, 99, 47) + 1000, 5 + 1e-3 * torch.randn(1, 8, 99, 47)):
        x[0, :, 0, 0] += 1
        x = x.contiguous(memory_format=layout)
        ones = torch.ones(8)
        _, mean, rstd = operators.group_norm_act.native(x, ones, ones, 2, 1e-5, "none")
        grouped = x.double().reshape(1, 2, -1)
        torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=2e-7, atol=0)
        exact = (grouped.var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (1, 5, 3, 3), (3, 67, 5, 4)])
def test_writes_all_of_its_memory_and_nothing_beside(shape, layout, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.rand(shape[1]), torch.randn(shape[1])
    arguments = (weight, bias, 1, 1e-5, "gelu")
    expected = operators.group_norm_act.native(x, *arguments)[0]
    guarded, itself = Guarded(x), Guarded(x)
    itself.tensor.copy_(x)
    operators.group_norm_act_into.native(x, None, *arguments, None, guarded.tensor)
    operators.group_norm_act_.native(itself.tensor, None, *arguments, None)
    for memory in (guarded, itself):
        memory.check()
        assert torch.equal(memory.tensor, expected)


@settings(max_examples=60)
@given(
    case=norm_cases(DTYPES, most_channels_per_group=20, largest_side=12),
    knows_moments=st.booleans(),
)
def test_a_shortcut_before_the_activation_and_moments_that_are_known(case, knows_moments):
    torch.manual_seed(case.seed)

    def draw() -> Triples:
        x, shortcut = (
            (torch.randn(case.shape) + offset).to(case.dtype).contiguous(memory_format=case.layout)
            for offset in (case.mean, 0)
        )
        weight, bias = torch.rand(case.channels) + 0.5, torch.randn(case.channels)

        def output(dtype: torch.dtype) -> Tensor:
            normalized = plain_norm(x.to(dtype), weight, bias, case.groups, "none")
            return ACTIVATIONS[case.activation](normalized + shortcut.to(dtype))

        moments = channel_moments(x) if knows_moments else None
        result = torch.empty_like(x)
        operators.group_norm_act_into.native(
            x, moments, weight, bias, case.groups, 1e-5, case.activation, shortcut, result
        )
        return {"result": (result, output(case.dtype), output(torch.float64))}

    assert_draws_within_contract(draw, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
def test_not_a_number_and_infinity_go_through_as_in_torch(activation, layout):
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=layout)
    residual, weight, bias = torch.randn_like(x), torch.rand(8), torch.randn(8)
    x[0, 1, 2, 3], x[1, 5, 0, 0] = float("nan"), float("inf")
    with use_backend("native"):
        actual = group_norm_act(x, weight, bias, 2, activation=activation)
        _, added = add_group_norm_act(x, residual, weight, bias, 2, activation=activation)

    expected, expected_added = (
        plain_norm(values, weight, bias, 2, activation) for values in (x, x + residual)
    )
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual.isnan().any()
    assert torch.equal(added.isnan(), expected_added.isnan())


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-40, 3.3895e38, float("inf"), 1.00390625, 1.01171875]
)
def test_bfloat16_is_rounded_as_torch_rounds_it(value):
    """Ties to even, and past the largest number to infinity; one group per value, so that it stays."""
    bias = torch.full((17,), value)
    x = torch.zeros(1, 17, 1, 1, dtype=torch.bfloat16)
    result = operators.group_norm_act.native(x, torch.zeros(17), bias, 17, 1e-5, "none")[0]
    assert torch.equal(result.flatten(), bias.bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_inputs_give_equal_bits(layout, threads):
    x, residual = (
        torch.randn(2, 24, 9, 7).bfloat16().contiguous(memory_format=layout) for _ in "ab"
    )
    weight, bias = torch.rand(24), torch.randn(24)

    def run() -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
        with use_backend("native"):
            total, result = add_group_norm_act(*inputs, 4, activation="gelu")
            (total.float().square().sum() + result.float().sum()).backward()
        return [total, result, *(t.grad for t in inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_views_and_nothing_beside_them(dtype):
    buffer = torch.full((2, 40, 10, 20), float("nan"), dtype=dtype)
    view = buffer[:, 4:36, 1:8, 2:16:2]
    view.copy_(torch.randn(view.shape))
    weight, bias = torch.rand(64)[::2], torch.randn(64)[::2]
    with use_backend("native"):
        actual = group_norm_act(view, weight, bias, 4)
        expected = group_norm_act(view.contiguous(), weight.contiguous(), bias.contiguous(), 4)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_that_it_does_not_take(dtype):
    x, ones = torch.ones(1, 4, 2, 2, dtype=dtype), torch.ones(4)
    with use_backend("native"), pytest.raises(RuntimeError, match="it supports"):
        group_norm_act(x, ones, ones, 2)
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        operators.group_norm_act.native(x, ones, ones, 2, 1e-5, "relu")


def test_the_operator_checks_what_it_is_given():
    x, ones = torch.ones(1, 4, 2, 2), torch.ones(4)
    for arguments, message in (
        ((x[0], ones, ones, 2, 1e-5, "relu"), "must have shape"),
        ((x, ones, ones, 3, 1e-5, "relu"), "num_groups"),
        ((x, ones[1:], ones, 2, 1e-5, "relu"), "weight and bias"),
        ((x, ones, ones, 2, 1e-5, "tanh"), "activation"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.group_norm_act.native(*arguments)
    with pytest.raises(RuntimeError, match="residual"):
        operators.add_group_norm_act.native(x, x[..., :1], ones, ones, 2, 1e-5, "relu")
    with pytest.raises(RuntimeError, match="result"):
        operators.group_norm_act_into.native(x, None, ones, ones, 2, 1e-5, "relu", None, x.double())
    for moments in (
        torch.zeros(2, 3, 4).double(),
        torch.zeros(2, 2, 4),
        torch.zeros(2, 2, 5).double(),
    ):
        with pytest.raises(RuntimeError, match="moments"):
            operators.group_norm_act_.native(x, moments, ones, ones, 2, 1e-5, "relu", None)
    with pytest.raises(RuntimeError, match="shortcut"):
        operators.group_norm_act_.native(x, None, ones, ones, 2, 1e-5, "relu", x[..., :1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, layout):
    torch.use_deterministic_algorithms(False)
    x, residual = (torch.randn(2, 8, 4, 3).to(dtype).contiguous(memory_format=layout) for _ in "ab")
    weight, bias = torch.rand(8, requires_grad=True), torch.randn(8, requires_grad=True)
    arguments = (weight, bias, 2, 1e-5, "gelu")
    torch.library.opcheck(operators.group_norm_act.native, (x.requires_grad_(), *arguments))
    torch.library.opcheck(
        operators.add_group_norm_act.native, (x, residual.requires_grad_(), *arguments)
    )
    x, residual = x.detach(), residual.detach()
    memory = torch.empty_like(x)
    for moments, shortcut in ((None, None), (channel_moments(x), residual)):
        inputs = (x, moments, weight.detach(), bias.detach(), 2, 1e-5, "gelu", shortcut)
        torch.library.opcheck(operators.group_norm_act_.native, inputs)
        torch.library.opcheck(operators.group_norm_act_into.native, (*inputs, memory))
    for total in (None, residual):
        saved = (x, weight.detach(), bias.detach(), torch.zeros(2, 2), torch.ones(2, 2), 2, "gelu")
        torch.library.opcheck(operators.group_norm_act_recompute.native, (residual, total, *saved))
