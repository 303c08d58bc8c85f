"""The Triton kernels of group_norm_act: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.backends import use_backend
from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels import group_norm_act_tiling as tiling
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from tests.feature_maps import DTYPES, LAYOUTS, away_from_kinks
from tests.guarded import Guarded
from tests.interpreter import DEVICE
from tests.launch_ways import WAYS, choose, forget_calls
from tests.plain_ops import exact_norm, plain_norm
from tests.tolerances import assert_draws_within_contract

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.drawn_cases import norm_cases  # noqa: E402

NAMES = sorted(ACTIVATIONS)


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: Any) -> Iterator[str]:
    choose(monkeypatch, request.param)
    yield request.param
    forget_calls()


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, residual, weight, bias."""
    x, residual = (
        (torch.randn(shape) + m).to(DEVICE, dtype).contiguous(memory_format=layout)
        for m in (mean, 0.0)
    )
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    parameter_dtype = parameter_dtype or dtype
    return x, residual, weight.to(DEVICE, parameter_dtype), bias.to(DEVICE, parameter_dtype)


# ---- forward and backward, in every way of working ------------------------------------------------


class Draw:
    """One forward and backward pass on fresh numbers, into guarded tensors.

    Attributes:
        used: The names of the kernels.
        results: By name: what the kernels computed, what plain PyTorch did, and float64.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        groups: int,
        dtype: torch.dtype,
        layout: torch.memory_format,
        activation: str,
        mean: float,
        with_residual: bool,
    ) -> None:
        self.groups, self.activation = groups, activation
        self.is_channels_last = layout == torch.channels_last
        self.used: list[str] = []
        self.results: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        x, residual, self.weight, self.bias = make(shape, dtype, layout, mean)
        grad, grad_total = (torch.randn(shape).to(x) for _ in range(2))
        grad, grad_total = (g.contiguous(memory_format=layout) for g in (grad, grad_total))
        if with_residual:
            total, statistics = self.forward(x, residual)
            self.backward(grad, grad_total, total, statistics)
        else:
            total, statistics = self.forward(x, None)
            self.backward(grad, None, total, statistics)

    def run(self, launches: list[Any], written: dict[str, Guarded]) -> None:
        for launch in launches:
            launch.launch()
            self.used.append(launch.kernel.__name__)
        for guarded in written.values():
            guarded.check()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        statistics = torch.empty(x.shape[0], self.groups, device=DEVICE)
        written = {"result": Guarded(x), "mean": Guarded(statistics), "rstd": Guarded(statistics)}
        if residual is not None:
            written["total"] = Guarded(x)
        outputs: dict[str, Any] = {name: g.tensor for name, g in written.items()}
        launches = kernels.forward_launches(
            x, residual, self.weight, self.bias, 1e-5, self.activation, self.is_channels_last,
            **{"total": None, **outputs},
        )  # fmt: skip
        self.run(launches, written)
        total = x if residual is None else x + residual
        assert residual is None or torch.equal(outputs["total"], total)
        arguments = (total, self.weight, self.bias, self.groups, self.activation)
        self.results["result"] = outputs["result"], plain_norm(*arguments), exact_norm(*arguments)
        return total, [outputs["mean"], outputs["rstd"]]

    def backward(
        self, grad: Tensor, grad_total: Tensor | None, total: Tensor, statistics: list[Tensor]
    ) -> None:
        inputs = (total, self.weight, self.bias)
        grad = away_from_kinks(grad, *inputs, self.groups, self.activation)
        names = ("grad_x", "grad_weight", "grad_bias")
        written = {name: Guarded(t) for name, t in zip(names, inputs, strict=True)}

        def launches(**outputs: Tensor) -> list[Any]:
            return kernels.backward_launches(
                grad, grad_total, *inputs, *statistics, self.activation, self.is_channels_last, **outputs
            )  # fmt: skip

        self.run(launches(**{name: g.tensor for name, g in written.items()}), written)
        again = {
            name: Guarded(t) for name, t in zip((*names, "result"), (*inputs, total), strict=True)
        }
        for launch in launches(**{name: g.tensor for name, g in again.items()}):
            launch.launch()
        for name, guarded in again.items():
            guarded.check()
            assert name == "result" or torch.equal(guarded.tensor, written[name].tensor)
        arguments = (*inputs, self.groups, self.activation)
        exact_result = exact_norm(*arguments)
        self.results["result again"] = again["result"].tensor, plain_norm(*arguments), exact_result

        def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.detach().to(dtype).clone().requires_grad_() for t in inputs]
            results = torch.autograd.grad(
                function(*leaves, self.groups, self.activation), leaves, grad.to(dtype)
            )
            extra = 0 if grad_total is None else grad_total.to(dtype)
            return [results[0] + extra, *results[1:]]

        for name, baseline, exact in zip(
            names,
            gradients(plain_norm, total.dtype),
            gradients(exact_norm, torch.float64),
            strict=True,
        ):
            self.results[name] = written[name].tensor, baseline, exact


def check(count: int, *arguments: Any) -> list[str]:
    """Hold several draws together to the contract; return the names of the kernels that ran."""
    used: list[list[str]] = []

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        drawn = Draw(*arguments)
        used.append(drawn.used)
        return drawn.results

    assert_draws_within_contract(draw, count)
    return used[0]


EXPECTED = {
    "whole": ["forward_kernel", "backward_kernel", "parameter_gradients_kernel"],
    "split": [
        "moments_kernel",
        "apply_kernel",
        "backward_sums_kernel",
        "backward_apply_kernel",
        "parameter_gradients_kernel",
    ],
}
EXPECTED["parts"] = EXPECTED["split"]


@pytest.mark.parametrize("with_residual", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_working(way, layout, with_residual):
    # 2 groups of 12 channels, 63 pixels: neither is a power of two.
    used = check(2, (2, 24, 9, 7), 2, torch.float32, layout, "gelu", -2.3, with_residual)
    assert used == EXPECTED[way]


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation, layout, mean, monkeypatch):
    choose(monkeypatch, "whole")
    check(3, (2, 12, 9, 7), 4, torch.float32, layout, activation, mean, False)
    forget_calls()


@settings(max_examples=40)
@given(
    case=norm_cases(DTYPES, most_channels_per_group=9, largest_side=9),
    with_residual=st.booleans(),
    way=st.sampled_from(sorted(WAYS)),
)
def test_drawn_shapes(case, with_residual, way):
    torch.manual_seed(case.seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch, way)
        check(
            4, case.shape, case.groups, case.dtype, case.layout, case.activation, case.mean, with_residual
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 7, 1, 1), (2, 6, 1, 13)])
def test_one_channel_per_group(way, layout, shape):
    check(4, shape, shape[1], torch.float32, layout, "relu", 100.0, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_statistics_do_not_cancel(way, layout):
    """Where the mean is 1000 standard deviations, and where one pixel stands far from the others."""
    for x in (torch.randn(1, 8, 9, 7) + 1000, 5 + 1e-3 * torch.randn(1, 8, 9, 7)):
        x[0, :, 0, 0] += 1
        x = x.to(DEVICE).contiguous(memory_format=layout)
        mean, rstd = torch.empty(1, 2, device=DEVICE), torch.empty(1, 2, device=DEVICE)
        ones = torch.ones(8, device=DEVICE)
        for launch in kernels.forward_launches(
            x, None, ones, ones, 1e-5, "none", layout == torch.channels_last,
            total=None, result=torch.empty_like(x), mean=mean, rstd=rstd,
        ):  # fmt: skip
            launch.launch()
        grouped = x.double().reshape(1, 2, -1)
        torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=2e-7, atol=0)
        exact = (grouped.var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(rstd.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", NAMES)
def test_not_a_number_and_infinity_go_through_as_in_torch(activation, way):
    x, residual, weight, bias = make((2, 8, 3, 5), layout=torch.channels_last)
    x[0, 1, 2, 3], x[1, 5, 0, 0] = float("nan"), float("inf")
    with use_backend("triton"):
        actual = group_norm_act(x, weight, bias, 2, activation=activation)
        _, added = add_group_norm_act(x, residual, weight, bias, 2, activation=activation)
    expected = plain_norm(x, weight, bias, 2, activation)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().any()
    expected = plain_norm(x + residual, weight, bias, 2, activation)
    assert torch.equal(added.isnan(), expected.isnan())


def test_equal_inputs_give_equal_bits(way):
    x, residual, weight, bias = make((2, 24, 9, 7), torch.bfloat16, torch.channels_last)

    def run() -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
        with use_backend("triton"):
            total, result = add_group_norm_act(*inputs, 4, activation="gelu")
            (total.float().square().sum() + result.float().sum()).backward()
        return [total, result, *(t.grad for t in inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ---- through the op -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_another_dtype(dtype, layout):
    def draw():
        x, _, weight, bias = make((2, 96, 5, 3), dtype, layout, parameter_dtype=torch.float32)
        arguments = (x, weight, bias, 4, "gelu")
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with use_backend("triton"):
            actual = group_norm_act(*inputs, 4, activation="gelu")
        actual.float().sum().backward()
        assert [t.grad.dtype for t in inputs] == [dtype, torch.float32, torch.float32]
        return {"result": (actual.detach(), plain_norm(*arguments), exact_norm(*arguments))}

    assert_draws_within_contract(draw, 1)


@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted", "sliced"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(layout, with_residual):
    x, residual, weight, bias = make((2, 8, 4, 5))
    if layout == "permuted":
        x = x.permute(0, 1, 3, 2)
        residual = residual.permute(0, 1, 3, 2)
    elif layout == "sliced":
        x, residual = x[:, :, ::2, 1:], residual[:, :, ::2, 1:]
    else:
        x = x.contiguous(memory_format=layout)  # the residual stays as it is
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    operators = torch.ops.bitfast
    if with_residual:
        inputs.insert(1, residual.detach().requires_grad_())
        torch.library.opcheck(operators.add_group_norm_act.triton, (*inputs, 2, 1e-5, "relu"))
    else:
        torch.library.opcheck(operators.group_norm_act.triton, (*inputs, 2, 1e-5, "relu"))
    statistics = (torch.zeros(2, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE))
    grads = (residual, residual if with_residual else None)
    saved = (x, weight, bias, *statistics, 2, "relu")
    torch.library.opcheck(operators.group_norm_act_recompute.triton, (*grads, *saved))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept_also_by_gradients(layout):
    x, residual, weight, bias = make((2, 8, 5, 3), layout=layout)
    x.requires_grad_()
    residual.requires_grad_()
    with use_backend("triton"):
        total, result = add_group_norm_act(x, residual, weight, bias, 4)
        (total * result).sum().backward()
    for tensor in (total, result, x.grad, residual.grad):
        assert tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("used", ["total", "result", "both"])
def test_gradients_of_either_output(used):
    x, residual, weight, bias = make((2, 8, 5, 3), layout=torch.channels_last)

    def gradients(backend: str) -> list[Tensor | None]:
        inputs = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
        with use_backend(backend):
            total, result = add_group_norm_act(*inputs, 4)
            loss = {"total": total.sin(), "result": result.sin(), "both": total * result}[used]
            loss.sum().backward()
        return [t.grad for t in inputs]

    for actual, expected in zip(gradients("triton"), gradients("reference"), strict=True):
        if used == "total" and actual is None:
            assert expected is None
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_autocast_gives_the_autocast_dtype():
    x, residual, weight, bias = make((2, 8, 6, 6), mean=100.0)
    with use_backend("triton"), torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = group_norm_act(x, weight, bias, 4)
        total, added = add_group_norm_act(x, residual, weight, bias, 4)
    assert (result.dtype, total.dtype, added.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    with use_backend("triton"):
        assert torch.equal(result, group_norm_act(x, weight, bias, 4).bfloat16())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch._dynamo.reset()

    def step(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, result = add_group_norm_act(x, residual, weight, bias, 4)
        return group_norm_act(total * result, weight, bias, 4, activation="gelu")

    with use_backend("triton"):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for shape in [(2, 8, 6, 5), (3, 8, 9, 4)]:
            inputs = make(shape, layout=torch.channels_last)
            torch.testing.assert_close(compiled(*inputs), step(*inputs))


# ---- 64-bit offsets, and the reference -------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_offsets_compute_the_same(way, layout, monkeypatch):
    monkeypatch.setattr(tiling, "is_wide", lambda *_: True)
    check(3, (2, 24, 9, 7), 4, torch.float32, layout, "relu", 0.0, True)


def test_the_reference_of_the_residual_form_is_exact():
    x, residual, weight, bias = (t.double().requires_grad_() for t in make((2, 6, 3, 2), mean=0.3))
    inputs = [t.cpu().detach().requires_grad_() for t in (x, residual, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: add_group_norm_act(*t, 3, activation="gelu"), inputs)
    contract = torch.ops.bitfast.add_group_norm_act.reference
    assert torch.autograd.gradcheck(lambda *t: contract(*t, 3, 1e-5, "gelu")[:2], inputs)
    total, result, mean, rstd = reference.add_group_norm_act_forward(*inputs, 3, 1e-5, "relu")
    assert torch.equal(total, inputs[0] + inputs[1])
    assert torch.equal(result, group_norm_act(total, *inputs[2:], 3))
    assert mean.shape == rstd.shape == (2, 3)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(2, 8, 3, 4), r"residual must have the shape of x, .*got .*4\]"),
        (torch.zeros(2, 8, 3, 3, dtype=torch.float64), "residual must have the dtype of x"),
        (torch.zeros(2, 8, 3), r"residual must have shape \(N, C, H, W\)"),
    ],
)
def test_bad_residuals_are_named(residual, message):
    with pytest.raises(ValueError, match=message):
        add_group_norm_act(torch.zeros(2, 8, 3, 3), residual, torch.ones(8), torch.ones(8), 4)
