"""The Triton kernels of group_norm_act as a GPU runs them.

Only the tests of streams, devices and memory need CUDA as such: the others also run in Triton's
interpreter, for whoever asks pytest to leave out this folder's conftest.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.backends import requested_backends, select_backend, use_backend
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from tests.feature_maps import DTYPES, LAYOUTS
from tests.interpreter import DEVICE
from tests.norm_backward import drawn_arguments, plain_result, recomputed_result
from tests.plain_ops import plain_norm
from tests.tolerances import assert_within_contract, relative_error

ON_GPU = DEVICE == "cuda"
NAMES = sorted(ACTIVATIONS)
SMALL = [((2, 96, 7, 5), 4), ((3, 36, 1, 1), 12), ((1, 35, 9, 11), 7)]
LARGE = [
    ((8, 256, 56, 56), 32),
    ((2, 2048, 7, 7), 32),
    ((1, 6144, 3, 3), 32),
    ((64, 64, 56, 56), 32),
]
SHAPES = [*SMALL, *(LARGE if ON_GPU else [])]
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend(group_norm_act="triton"):
        yield


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
) -> Tensor:
    x = torch.randn(shape, device=DEVICE) + mean
    return x.to(dtype).contiguous(memory_format=layout)


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.rand(channels, device=DEVICE) + 0.5
    return weight.to(dtype), torch.randn(channels, device=DEVICE).to(dtype)


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


# ---- numbers --------------------------------------------------------------------------------------


VARIANTS = [
    *(("relu", dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
    *((name, torch.float32, layout) for name in NAMES if name != "relu" for layout in LAYOUTS),
]
"""Activation, dtype and layout; not all of them with all others, which takes minutes to compile."""


def shapes_for(activation: str) -> list[tuple[tuple[int, ...], int]]:
    """Return shapes and groups; each is another kernel."""
    return SHAPES if activation == "relu" else SMALL[:1]


@pytest.mark.parametrize(("activation", "dtype", "layout"), VARIANTS)
def test_forward(activation, dtype, layout):
    for shape, groups in shapes_for(activation):
        for mean in (0.0, -2.3):
            x = draw(shape, dtype, layout, mean)
            weight, bias = parameters(shape[1], dtype)
            actual = group_norm_act(x, weight, bias, groups, activation=activation)
            assert actual.stride() == x.stride()
            baseline = plain_norm(x, weight, bias, groups, activation)
            oracle = plain_norm(*doubles(x, weight, bias), groups, activation)
            assert_within_contract(actual, baseline, oracle, f"{shape} mean {mean}")


@pytest.mark.parametrize(("activation", "dtype", "layout"), VARIANTS)
def test_with_a_residual(activation, dtype, layout):
    for shape, groups in shapes_for(activation):
        x, residual = draw(shape, dtype, layout), draw(shape, dtype, layout)
        weight, bias = parameters(shape[1], dtype)
        total, actual = add_group_norm_act(x, residual, weight, bias, groups, activation=activation)
        assert torch.equal(total, x + residual)
        baseline = plain_norm(total, weight, bias, groups, activation)
        oracle = plain_norm(*doubles(total, weight, bias), groups, activation)
        assert_within_contract(actual, baseline, oracle, str(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_of_a_hundred_deviations(layout):
    x = draw((2, 64, 14, 14), layout=layout, mean=100.0)
    weight, bias = parameters(64, torch.float32)
    actual = group_norm_act(x, weight, bias, 32, activation="none")
    oracle = plain_norm(*doubles(x, weight, bias), 32, "none")
    assert (actual - oracle).abs().max() < 1e-3


def off_the_kink(grad: Tensor, normalized: Tensor) -> Tensor:
    """Return the gradient without what enters where rounding may decide the derivative of the ReLU."""
    return grad * (normalized.abs() > 1e-4)


@pytest.mark.parametrize(("activation", "dtype", "layout"), VARIANTS)
def test_gradients(activation, dtype, layout):
    # Enough channels: the largest error of a dozen numbers is too much a matter of luck to compare.
    for shape, groups in (s for s in shapes_for(activation) if s in (SMALL[0], *LARGE[:2])):
        x, grad = draw(shape, dtype, layout), draw(shape, dtype, layout)
        weight, bias = parameters(shape[1], dtype)
        grad = off_the_kink(grad, plain_norm(*doubles(x, weight, bias), groups, "none"))

        def gradients(function, *inputs, activation=activation, grad=grad, groups=groups):
            inputs = [t.detach().clone().requires_grad_() for t in inputs]
            result = function(*inputs, groups, activation=activation)
            return torch.autograd.grad(result, inputs, grad.to(result.dtype))

        actual = gradients(group_norm_act, x, weight, bias)
        baseline = gradients(plain_norm, x, weight, bias)
        oracle = gradients(plain_norm, *doubles(x, weight, bias))
        for name, a, p, o in zip(("x", "weight", "bias"), actual, baseline, oracle, strict=True):
            assert_within_contract(a, p, o, f"{shape}: gradient of {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_a_residual(dtype, layout):
    shape, groups = ((8, 256, 28, 28), 32) if ON_GPU else ((2, 96, 7, 5), 4)
    x, residual, grad, grad_total = (draw(shape, dtype, layout) for _ in range(4))
    weight, bias = parameters(shape[1], dtype)
    total = (x + residual).double()
    grad = off_the_kink(grad, plain_norm(total, *doubles(weight, bias), groups, "none"))

    def straight_through(x, residual, *others):
        """The norm of the sum as it is rounded to the dtype at hand, also in the oracle."""
        total = x + residual
        rounded = total + (total.to(dtype).to(x.dtype) - total).detach()
        return rounded, plain_norm(rounded, *others, "relu")

    def gradients(function, *inputs):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        results = function(*inputs, groups)
        return torch.autograd.grad(
            results, inputs, [g.to(inputs[0].dtype) for g in (grad_total, grad)]
        )

    actual = gradients(add_group_norm_act, x, residual, weight, bias)
    baseline = gradients(straight_through, x, residual, weight, bias)
    oracle = gradients(straight_through, *doubles(x, residual, weight, bias))
    names = ("x", "residual", "weight", "bias")
    for name, a, p, o in zip(names, actual, baseline, oracle, strict=True):
        assert_within_contract(a, p, o, f"gradient of {name}")


@pytest.mark.parametrize(("activation", "dtype", "layout"), VARIANTS)
def test_a_backward_that_gives_the_result_again(activation, dtype, layout):
    for shape, groups in (s for s in shapes_for(activation) if s in (SMALL[0], *LARGE[:2])):
        arguments = drawn_arguments(
            shape,
            groups,
            dtype,
            activation,
            mean=-2.3,
            has_total=True,
            layout=layout,
            device=DEVICE,
        )
        result = recomputed_result("triton", arguments)
        expected = (plain_result(arguments, kind) for kind in (dtype, torch.float64))
        assert_within_contract(result, *expected, f"{shape}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s, _ in (LARGE[:2] if ON_GPU else SMALL[:1])])
def test_equal_inputs_give_equal_bits(shape, layout):
    groups = 32 if ON_GPU else 4
    x, residual, grad = (draw(shape, torch.bfloat16, layout).requires_grad_() for _ in range(3))
    weight, bias = (p.requires_grad_() for p in parameters(shape[1], torch.bfloat16))

    def run():
        total, result = add_group_norm_act(x, residual, weight, bias, groups)
        inputs = (x, residual, weight, bias)
        return total, result, *torch.autograd.grad((total, result), inputs, (grad, grad))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_where_it_goes_in_torch(value, activation, layout):
    x = draw((2, 8, 5, 3), layout=layout)
    x[1, 3, 2, 1] = value
    weight, bias = parameters(8, torch.float32)
    actual = group_norm_act(x, weight, bias, 4, activation=activation)
    expected = plain_norm(x, weight, bias, 4, activation)
    assert torch.isnan(expected[1, 2:4]).all()
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite(value):
    x = draw((2, 8, 5, 3), layout=torch.channels_last)
    weight, bias = parameters(8, torch.float32)
    # (torch makes NaN of an infinite weight, by adding two infinities where there need be but one.)
    weight[1], bias[6] = math.nan, value
    actual = group_norm_act(x, weight, bias, 4)
    torch.testing.assert_close(actual, plain_norm(x, weight, bias, 4, "relu"), equal_nan=True)


# ---- offsets --------------------------------------------------------------------------------------


def huge(batch: int, layout: torch.memory_format) -> Tensor:
    """Return a batch whose last image has elements past the 2^31st; in the interpreter a small one."""
    # 64 channels: 6000^2 pixels of one image, or 17 images of 1460^2, of which 16 come to 2^31.
    side = (6000 if batch == 1 else 1460) if ON_GPU else 5
    x = torch.empty(
        (batch, 64, side, side), dtype=torch.bfloat16, device=DEVICE, memory_format=layout
    )
    if ON_GPU:
        assert x.numel() - (batch > 1) * x[0].numel() > 2**31
    for image in x:
        for channels in image.split(8):  # no larger temporary tensors than need be
            channels.copy_(torch.randn(channels.shape, device=DEVICE, dtype=torch.bfloat16))
    return x


def need_memory(gibibytes: int) -> None:
    """Skip the test where so much is not free."""
    if ON_GPU and torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 17])
def test_offsets_past_two_billion(batch, layout):
    need_memory(14)
    weight, bias = parameters(64, torch.bfloat16)
    x = huge(batch, layout)
    actual = group_norm_act(x, weight, bias, 32)
    for channels in (slice(0, 2), slice(62, 64)):  # the first group and the last
        part = x[-1:, channels].contiguous()
        settings = (weight[channels], bias[channels])
        oracle = plain_norm(*doubles(part, *settings), 1, "relu")
        assert_within_contract(
            actual[-1:, channels], plain_norm(part, *settings, 1, "relu"), oracle
        )
    if batch > 1:
        alone = group_norm_act(x[-1:], weight, bias, 32)
        assert_same_but_for_rounding(actual[-1:], alone)


def assert_same_but_for_rounding(actual: Tensor, expected: Tensor) -> None:
    """Allow for statistics that were summed in another order: a rounding of some elements."""
    for a, e in zip(actual.split(8, 1), expected.split(8, 1), strict=True):
        assert relative_error(a, e) < torch.finfo(actual.dtype).eps / 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 17])
def test_gradients_past_two_billion(batch, layout):
    need_memory(20)
    weight, bias = (p.requires_grad_() for p in parameters(64, torch.bfloat16))
    x = huge(batch, layout).requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        result = group_norm_act(x, weight, bias, 32, activation="none")
        # The gradient of half the sum of squares is the result itself.
        return torch.autograd.grad(result, x, result.detach())[0]

    actual = gradient(x)
    part = x[-1:, 62:].detach().double().contiguous().requires_grad_()
    result = plain_norm(part, weight[62:].detach().double(), bias[62:].detach().double(), 1, "none")
    (oracle,) = torch.autograd.grad(result, part, result.detach().to(torch.bfloat16).double())
    # The incoming gradient was rounded once, some of it to the other side; the result once more.
    assert relative_error(actual[-1:, 62:], oracle) < 2 * torch.finfo(torch.bfloat16).eps


# ---- streams and devices --------------------------------------------------------------------------


@needs_cuda
def test_the_current_stream_is_used():
    x = torch.randn(8, 64, 256, 256, device="cuda")
    weight, bias = parameters(64, torch.float32)
    expected = group_norm_act(x * 2, weight, bias, 32)  # also compiles the kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 2  # not there yet when the norm is launched
        actual = group_norm_act(y, weight, bias, 32)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    x = draw((2, 64, 14, 14), torch.bfloat16, torch.channels_last)
    weight, bias = parameters(64, torch.bfloat16)
    expected = group_norm_act(x, weight, bias, 32)
    moved = [t.to("cuda:1").requires_grad_() for t in (x, weight, bias)]
    assert torch.cuda.current_device() == 0
    result = group_norm_act(*moved, 32)
    assert result.device == torch.device("cuda:1")
    assert torch.equal(result.cpu(), expected.cpu())
    for gradient in torch.autograd.grad(result.sum(), moved):
        assert gradient.isfinite().all()


@needs_cuda
def test_who_serves_by_default():
    """CUDA kernels where the GPU has clusters and the maps are channels_last, else Triton's."""
    has_clusters = torch.cuda.get_device_capability() >= (9, 0)
    formats = {
        torch.channels_last: "native" if has_clusters else "triton",
        torch.contiguous_format: "triton",
    }
    with use_defaults():
        for memory_format, backend in formats.items():
            found = select_backend("group_norm_act", "cuda", torch.bfloat16, memory_format)
            assert found == backend


@contextmanager
def use_defaults() -> Iterator[None]:
    """Forget, within the block, which backends are demanded."""
    demands = dict(requested_backends())
    requested_backends().clear()
    try:
        yield
    finally:
        requested_backends().update(demands)
