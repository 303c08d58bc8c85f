"""The CUDA kernels of group_norm_act's backward on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.activations import ACTIVATIONS
from bitfast.ops.group_norm_act_backward_cuda import check_backward
from tests.norm_backward import (
    Arguments,
    drawn_arguments,
    plain_gradients,
    plain_result,
    recomputed_result,
)
from tests.tolerances import assert_within_contract

pytestmark = pytest.mark.skipif(
    extension.CUDA.problem is not None, reason=f"no CUDA kernels: {extension.CUDA.problem}"
)

draw = partial(drawn_arguments, device="cuda")

RESNET = [
    (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28),
    (256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7),
]  # fmt: skip
OTHERS = [((2, 96, 7, 5), 4), ((3, 36, 1, 1), 12), ((1, 35, 9, 11), 7), ((2, 8, 230, 230), 2)]


def run(arguments: Arguments) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.bitfast.group_norm_act_backward.native(*arguments)
    return found


def check(arguments: Arguments) -> None:
    x = arguments[2]
    plain, exact = (
        [*plain_gradients(arguments, dtype), plain_result(arguments, dtype)]
        for dtype in (x.dtype, torch.float64)
    )
    found = (*run(arguments), recomputed_result("native", arguments))
    assert found[0].stride() == x.stride()
    names = ("gradient of x", "gradient of weight", "gradient of bias", "result")
    for name, ours, theirs, oracle in zip(names, found, plain, exact, strict=True):
        assert_within_contract(ours, theirs.to(ours.dtype), oracle, name)


def test_the_check_before_the_first_use() -> None:
    assert check_backward(torch.device("cuda", torch.cuda.current_device())) is None


@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize(("channels", "side"), RESNET)
def test_the_shapes_of_resnet(channels: int, side: int, images: int) -> None:
    shape = (images, channels, side, side)
    check(draw(shape, 32, torch.bfloat16, mean=1.5, has_total=side in (28, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_shapes(activation: str, dtype: torch.dtype) -> None:
    for shape, groups in OTHERS:
        check(draw(shape, groups, dtype, activation, has_total=True))


def test_another_layout() -> None:
    check(draw((2, 64, 9, 9), 32, torch.float32, layout=torch.contiguous_format))
    grad, _, x, *others = draw((2, 64, 9, 9), 32, torch.bfloat16)
    shifted = torch.empty(grad.numel() + 1, dtype=grad.dtype, device="cuda")[1:]
    shifted = shifted.as_strided(grad.shape, grad.stride()).copy_(grad)
    for ours, theirs in zip(
        run((shifted, None, x, *others)), run((grad, None, x, *others)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_parameters_in_float64() -> None:
    check(draw((2, 64, 9, 9), 32, torch.float32, weight_dtype=torch.float64, has_total=True))


def test_the_same_bits_each_time() -> None:
    arguments = draw((64, 256, 28, 28), 32, torch.bfloat16, has_total=True)
    first = run(arguments)
    for _ in range(5):
        for ours, theirs in zip(run(arguments), first, strict=True):
            assert torch.equal(ours, theirs)


def test_offsets_of_more_than_32_bits() -> None:
    images, channels, side = 700, 1024, 56
    needed = 4 * images * channels * side * side * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    x = torch.empty((images, side, side, channels), dtype=torch.bfloat16, device="cuda")
    x, grad = (like.normal_().permute(0, 3, 1, 2) for like in (x, torch.empty_like(x)))
    weight, bias = torch.rand(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, rstd = torch.zeros(images, 32, device="cuda"), torch.ones(images, 32, device="cuda")
    settings = (32, "none")
    grad_x, *_ = run((grad, None, x, weight, bias, mean, rstd, *settings))
    last = slice(images - 1, images)
    maps = (grad[last].double(), None, x[last].double())
    others = (weight.double(), bias.double(), mean[last], rstd[last])
    expected = reference.group_norm_act_backward(*maps, *others, *settings)
    error = (grad_x[last].double() - expected[0]).norm() / expected[0].norm()
    assert error < 2**-8
