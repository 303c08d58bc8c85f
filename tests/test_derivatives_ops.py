"""Derivatives of the ops: right in every order and mode, for every backend, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from bitfast.backends import use_backend
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all
from tests.derivatives import orders
from tests.interpreter import DEVICE
from tests.tolerances import assert_draws_within_contract, relative_error

OPERATORS = torch.ops.bitfast
LAYOUTS = [torch.contiguous_format, torch.channels_last]
WEIGHT_EPS = 1e-3
"""So large that it shows in derivatives."""


class Case(NamedTuple):
    """A function of one op, and what it means in plain PyTorch."""

    run: Callable[..., Tensor]
    operator: Callable[..., Callable[..., Tensor]]
    """The same by the raw operator of a backend."""
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    backends: tuple[str, ...] = ("native", "triton")

    def draw(
        self,
        dtype: torch.dtype = torch.float64,
        layout: torch.memory_format = torch.contiguous_format,
        backend: str = "reference",
        widening: int = 1,
    ) -> list[Tensor]:
        """Draw the inputs; of tensors of four dimensions, the last two are ``widening`` times as long."""
        device = DEVICE if backend == "triton" else "cpu"
        stretch = (1, 1, widening, widening)
        shapes = [
            [n * s for n, s in zip(shape, stretch, strict=True)] if len(shape) == 4 else shape
            for shape in self.shapes
        ]
        inputs = [torch.randn(shape).to(device, dtype) for shape in shapes]
        return [x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in inputs]


def _standardized(weight: Tensor) -> Tensor:
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(variance + WEIGHT_EPS)


def _joined(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _added(total: Tensor, result: Tensor, *_: Tensor) -> Tensor:
    return total.sin() * 0.3 + result


def _normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.group_norm(x.contiguous(), 2, weight, bias, 1e-5))


def _weights_by_operator(backend: str) -> Callable[..., Tensor]:
    operator = getattr(OPERATORS.weight_standardization_all, backend)

    def run(*weights: Tensor) -> Tensor:
        packed = operator(weights, WEIGHT_EPS, None, False)[0]
        sizes = [w.numel() for w in weights]  # each begins at a multiple of 64
        starts = [sum(-(-size // 64) * 64 for size in sizes[:n]) for n in range(len(sizes))]
        return torch.cat([packed[a : a + n] for a, n in zip(starts, sizes, strict=True)])

    return run


CASES = {
    "weight_standardization": Case(
        lambda w: weight_standardization(w, WEIGHT_EPS),
        lambda backend: (
            lambda w: getattr(OPERATORS.weight_standardization, backend)(w, WEIGHT_EPS, None)[0]
        ),
        _standardized,
        ((3, 2, 2, 3),),
    ),
    "weight_standardization_all": Case(
        lambda *weights: _joined(weight_standardization_all(weights, WEIGHT_EPS)),
        _weights_by_operator,
        lambda *weights: _joined(map(_standardized, weights)),
        ((3, 2, 2, 3), (2, 5, 1, 1)),
    ),
    "group_norm_act": Case(
        lambda *t: group_norm_act(*t, 2, activation="gelu"),
        lambda backend: (
            lambda *t: getattr(OPERATORS.group_norm_act, backend)(*t, 2, 1e-5, "gelu")[0]
        ),
        _normed,
        ((2, 4, 3, 2), (4,), (4,)),
    ),
    "add_group_norm_act": Case(
        lambda *t: _added(*add_group_norm_act(*t, 2, activation="gelu")),
        lambda backend: (
            lambda *t: _added(*getattr(OPERATORS.add_group_norm_act, backend)(*t, 2, 1e-5, "gelu"))
        ),
        lambda x, residual, *t: _added(x + residual, _normed(x + residual, *t)),
        ((2, 4, 3, 2), (2, 4, 3, 2), (4,), (4,)),
    ),
    "same_pad": Case(
        lambda x: same_pad(x, 3, 2, value=0.5),
        lambda backend: lambda x: getattr(OPERATORS.same_pad, backend)(x, [0, 1, 1, 1], 0.5),
        lambda x: F.pad(x, (1, 1, 0, 1), value=0.5),
        ((2, 2, 4, 5),),
        ("native",),
    ),
    "same_max_pool": Case(
        lambda x: same_max_pool(x, 3, 2),
        lambda backend: (
            lambda x: getattr(OPERATORS.same_max_pool, backend)(
                x, [3, 3], [2, 2], [1, 1], [0, 1, 1, 1], 0.0, True
            )[0]
        ),
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 0, 1)), 3, 2),
        ((2, 2, 4, 5),),
        ("native",),
    ),
}
ON_KERNELS = [(name, backend) for name, case in CASES.items() for backend in case.backends]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["function", "operator"])
def run(request, case):
    """The op's function, or the reference operator, whose first derivatives are operators, too."""
    return case.run if request.param == "function" else case.operator("reference")


# ---- float64 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives_in_float64(case, run, layout):
    inputs = [x.requires_grad_() for x in case.draw(layout=layout)]
    squared = lambda *t: run(*t).square()  # noqa: E731  (whose second derivatives are not zero)
    assert torch.autograd.gradcheck(squared, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(squared, inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_one_input_may_require_what_others_do_not(case, run, wanted):
    inputs = case.draw()
    wanted %= len(inputs)
    results = []
    for function in (run, case.plain):
        leaves = [x.clone().requires_grad_(n == wanted) for n, x in enumerate(inputs)]
        (first,) = torch.autograd.grad(
            function(*leaves).pow(3).sum(), leaves[wanted], create_graph=True
        )
        results.append(torch.autograd.grad(first.square().sum(), leaves[wanted])[0])
    assert relative_error(*results) < 1e-10


def test_an_input_may_have_been_computed_from_another_one():
    """Then gradients of the one must not hold what reaches it through the other a second time."""
    x, weight, bias = CASES["group_norm_act"].draw()

    def second(normed: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        scale = weight * leaf.mean((0, 2, 3))
        result = normed(leaf, scale, bias + scale).pow(3).sum()
        (first,) = torch.autograd.grad(result, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    operator = CASES["group_norm_act"].operator("reference")
    assert relative_error(second(operator), second(_normed)) < 1e-10


def test_third_and_fourth_order(case, run):
    """Torch's own batch norm has them wrong: its second derivative takes the statistics for constants."""
    inputs = case.draw()
    directions = [torch.randn_like(x) for x in inputs]

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves).pow(5).sum()
        orders = []
        for _ in range(4):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))  # type: ignore
            orders.append(_joined(gradients).detach())
        return orders

    for ours, theirs in zip(derivatives(run), derivatives(case.plain), strict=True):
        assert relative_error(ours, theirs) < 1e-9


# ---- kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), ON_KERNELS)
def test_first_and_second_derivatives_of_kernels(name, backend, dtype, layout):
    case = CASES[name]

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        # Of a few values some draws have next to no variance, and the largest error is that of the unluckiest.
        inputs = case.draw(dtype, layout, backend, widening=3)
        exact = [x.double() for x in inputs]
        weights = torch.randn(case.plain(*exact).shape).to(inputs[0])
        with use_backend(backend):
            actual = orders(case.run, inputs, weights)
        plain = orders(case.plain, inputs, weights)
        oracle = orders(case.plain, exact, weights.double())
        return {key: (actual[key], plain[key], oracle[key]) for key in oracle}

    assert_draws_within_contract(draw, 4)


@pytest.mark.parametrize(("name", "backend"), ON_KERNELS)
def test_gradients_in_batches(name, backend):
    case = CASES[name]
    inputs = case.draw(torch.float32, backend=backend)
    results = []
    for function, dtype in ((case.operator(backend), torch.float32), (case.plain, torch.float64)):
        leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
        result = function(*leaves)
        ramp = torch.linspace(-1, 1, result.numel(), dtype=dtype, device=result.device).view(
            result.shape
        )
        gradients = torch.autograd.grad(
            result, leaves, torch.stack([ramp, ramp.square(), ramp + 1]), is_grads_batched=True
        )
        results.append(_joined(gradients))
    assert relative_error(*results) < 1e-5


@pytest.mark.parametrize(("name", "backend"), ON_KERNELS)
def test_a_cotangent_with_a_tangent(name, backend):
    """The graph is recorded by kernels; only its backward pass sees dual numbers. It is linear in them."""
    case = CASES[name]
    leaves = [x.requires_grad_() for x in case.draw(torch.float32, backend=backend)]
    result = case.operator(backend)(*leaves)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(result), torch.full_like(result, 2.0))
        for gradient in torch.autograd.grad(result, leaves, cotangent):
            primal, tangent = forward_ad.unpack_dual(gradient)
            assert relative_error(tangent, 2 * primal) < 1e-5


# ---- transforms of raw operators ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), ON_KERNELS)
def test_operators_can_be_transformed(name, backend):
    """An exported program calls them without the functions around them."""
    case = CASES[name]
    run, x, *others = case.operator(backend), *case.draw(torch.float32, backend=backend)
    direction = torch.randn_like(x)
    exact = [t.double() for t in (x, *others)]
    of_x = lambda t: run(t, *others)  # noqa: E731
    plain = lambda t: case.plain(t, *exact[1:])  # noqa: E731

    expected = jvp(plain, (exact[0],), (direction.double(),))[1]
    assert relative_error(jvp(of_x, (x,), (direction,))[1], expected) < 1e-5
    for requires_grad in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(requires_grad):
            leaf = x.clone().requires_grad_(requires_grad)
            dual = forward_ad.make_dual(leaf, direction)
            tangent = forward_ad.unpack_dual(of_x(dual)).tangent
        assert relative_error(tangent, expected) < 1e-5
    cubed = lambda f: grad(lambda t: f(t).pow(3).sum())  # noqa: E731
    assert relative_error(cubed(of_x)(x), cubed(plain)(exact[0])) < 1e-5
    batch = torch.stack([x, x + 1, -x])
    assert relative_error(vmap(of_x)(batch), vmap(plain)(batch.double())) < 1e-5
    assert relative_error(vmap(cubed(of_x))(batch), vmap(cubed(plain))(batch.double())) < 1e-4
