"""The CUDA kernels of group_norm_act's backward, run on the CPU (tests/host/gpu_emulation.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.ops import native_cuda
from bitfast.ops.group_norm_act_backward_cuda import (
    CHECKED,
    Call,
    Case,
    check_backward,
    prepare_backward,
)
from tests.drawn_cases import NormCase, norm_cases
from tests.emulated import A100, DTYPES, H100, at_page_end, call, emulate, library
from tests.norm_backward import Arguments, drawn_arguments, plain_gradients, plain_result
from tests.tolerances import Triples, assert_draws_within_contract

SOURCE = "csrc/group_norm_act_backward.cu"
FEW = (90, 4, 227 * 1024)
"""An H100 with so few multiprocessors that clusters have several units to do, as in a batch of 128."""
NAN = float("nan")


def settings_of(arguments: Arguments) -> Call:
    x, weight, bias = arguments[2:5]
    images, channels, height, width = x.shape
    dtypes = (DTYPES[t.dtype] for t in (x, weight, bias))
    activation = list(ACTIVATIONS).index(arguments[-1])
    return Call(images, height * width, channels, arguments[-2], *dtypes, activation)


def workspace_bytes(call_settings: Call) -> int:
    """Return what a call on the emulated device wants."""
    wanted = ctypes.c_int64(-1)
    entry = library(SOURCE).bitfast_group_norm_act_backward_workspace
    call(entry, ctypes.byref(call_settings), ctypes.byref(wanted))
    return wanted.value


def on_chip_cluster(arguments: Arguments, device: tuple[int, int, int]) -> float:
    """Return how many blocks share a slice of an image; not a whole number where that does not fit on chip."""
    emulate(library(SOURCE), device)
    images, channels = arguments[2].shape[:2]
    return workspace_bytes(settings_of(arguments)) / (images * 2 * channels * 4)


def run(
    arguments: Arguments,
    device: tuple[int, int, int] = H100,
    seed: int = 0,
    *,
    recomputes: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, and the result if it is wanted.

    Reads or writes past an end are faults.
    """
    grad, grad_total, x, weight, bias, mean, rstd, *_ = arguments
    emulate(library(SOURCE), device, seed)
    call_settings = settings_of(arguments)
    workspace = at_page_end(torch.empty(max(1, workspace_bytes(call_settings) // 4)), NAN)
    results = [at_page_end(t, NAN) for t in (x, weight, bias)]
    result = at_page_end(x, NAN) if recomputes else None
    maps = [None if t is None else at_page_end(t) for t in (grad, grad_total, x)]
    others = [at_page_end(t) for t in (weight, bias, mean, rstd)]
    entry = library(SOURCE).bitfast_group_norm_act_backward
    call(entry, ctypes.byref(call_settings), None, *maps, *others, *results, result, workspace)
    return (*results, *(() if result is None else (result,)))


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Hold tensors to the same bits."""
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def check(
    draw: Callable[[], Arguments],
    device: tuple[int, int, int] = H100,
    seed: int = 0,
    count: int = 1,
) -> None:
    """Hold the gradients, and the result that comes beside them, to the accuracy contract."""

    def triples() -> Triples:
        arguments = draw()
        gradients = run(arguments, device, seed)
        found = run(arguments, device, seed, recomputes=True)
        assert_equal(found[:3], gradients)
        plain, exact = (
            [*plain_gradients(arguments, dtype), plain_result(arguments, dtype)]
            for dtype in (arguments[2].dtype, torch.float64)
        )
        names = ("grad_x", "grad_weight", "grad_bias", "result")
        # Plain PyTorch's gradients of parameters have the dtype of x, ours that of the parameter.
        return {
            name: (ours, theirs.to(ours.dtype), oracle)
            for name, ours, theirs, oracle in zip(names, found, plain, exact, strict=True)
        }

    assert_draws_within_contract(triples, count)


# ---- the shapes of R50x1 --------------------------------------------------------------------------

RESNET = {
    (64, 56): 8, (128, 56): 8, (256, 56): 8, (128, 28): 2, (256, 28): 2, (512, 28): 2,
    (256, 14): 1, (512, 14): 1, (1024, 14): 1, (512, 7): 1, (2048, 7): 1,
}  # fmt: skip
"""Channels and side of the feature maps, and how many blocks share a slice of an image at batch 128."""


@pytest.mark.parametrize(("channels", "side"), RESNET)
def test_bfloat16_at_the_shapes_of_resnet(channels: int, side: int) -> None:
    draw = partial(
        drawn_arguments, (1, channels, side, side), 32, torch.bfloat16,
        has_total=side in (28, 7), weight_dtype=torch.bfloat16, mean=1.5,
    )  # fmt: skip
    check(draw, FEW, seed=side)


@pytest.mark.parametrize(
    ("channels", "side", "dtype"),
    [
        (128, 28, torch.float32),
        (512, 14, torch.float32),
        (64, 56, torch.float16),
        (512, 7, torch.float16),
    ],
)
def test_other_dtypes_at_the_shapes_of_resnet(channels: int, side: int, dtype: torch.dtype) -> None:
    check(partial(drawn_arguments, (1, channels, side, side), 32, dtype, has_total=True), FEW)


@pytest.mark.parametrize(
    ("channels", "side", "cluster"), [(*shape, cluster) for shape, cluster in RESNET.items()]
)
def test_a_batch_of_128_is_cut_as_planned(channels: int, side: int, cluster: int) -> None:
    emulate(library(SOURCE), H100)
    for dtype in (torch.float32, torch.bfloat16):
        sizes = Call(128, side * side, channels, 32, DTYPES[dtype], 0, 0, 1)
        assert workspace_bytes(sizes) == 128 * cluster * 2 * channels * 4


@pytest.mark.parametrize("device", [H100, A100])
def test_a_small_batch_keeps_the_whole_device_busy(device: tuple[int, int, int]) -> None:
    check(
        partial(drawn_arguments, (2, 64, 28, 28), 32, torch.bfloat16, mean=-2.3),
        device,
    )


# ---- other shapes ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    norm_cases(
        (torch.float32, torch.bfloat16, torch.float16), most_channels_per_group=24, largest_side=9
    ),
    st.sampled_from((FEW, A100)),
    st.booleans(),
    st.sampled_from(tuple(DTYPES)),
    st.sampled_from(tuple(DTYPES)),
)
def test_any_shape(
    case: NormCase,
    device: tuple[int, int, int],
    has_total: bool,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> None:
    torch.manual_seed(case.seed)
    draw = partial(
        drawn_arguments, case.shape, case.groups, case.dtype, case.activation,
        mean=case.mean, has_total=has_total, weight_dtype=weight_dtype, bias_dtype=bias_dtype,
    )  # fmt: skip
    # A few numbers in bfloat16, 100 standard deviations from 0, are all rounding.
    assume(case.mean < 100 or case.dtype == torch.float32 or case.group_size > 64)
    check(draw, device, case.seed % 1000, count=3)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, 40, 11, 13), 8),  # groups of 5 channels: slices of 40
        ((1, 96, 31, 29), 32),  # of 3
        ((2, 384, 5, 5), 1),  # one group: all channels in a slice
        ((1, 8, 230, 230), 2),  # too many pixels to stay on the chip
        ((2, 1040, 3, 3), 1),  # a group of too many channels
        ((1, 2056, 2, 2), 257),  # more columns than threads
        ((2, 600, 4, 5), 3),  # the same, one number at a time (float16)
        ((5, 64, 1, 1), 32),
        ((3, 24, 1, 1), 24),  # groups of one number
    ],
)
def test_odd_shapes(shape: tuple[int, int, int, int], groups: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float16 if shape[1] == 600 else torch.float32
    check(partial(drawn_arguments, shape, groups, dtype, has_total=True), FEW, count=2)


def test_a_large_image_takes_large_blocks() -> None:
    torch.manual_seed(0)
    device = (90, 8, 227 * 1024)
    draw = partial(drawn_arguments, (2, 8, 170, 170), 4, torch.bfloat16, has_total=True)
    assert on_chip_cluster(draw(), device) == 8
    check(draw, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    draw = partial(drawn_arguments, (2, 32, 9, 7), 8, dtype, activation, has_total=True)
    check(draw, FEW, count=2)


@pytest.mark.parametrize("mean", [-2.3, 100.0, 1000.0])
@pytest.mark.parametrize("device", [FEW, A100])
def test_far_from_zero(mean: float, device: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    check(partial(drawn_arguments, (2, 64, 20, 20), 32, torch.float32, mean=mean), device)


# ---- what does not depend on numbers --------------------------------------------------------------


@pytest.mark.parametrize("device", [H100, A100])
def test_an_empty_batch_has_no_gradients_of_parameters(device: tuple[int, int, int]) -> None:
    grad_x, *others = run(drawn_arguments((0, 64, 5, 5), 32, torch.bfloat16), device)
    assert grad_x.numel() == 0
    assert all((grad == 0).all() for grad in others)


@pytest.mark.parametrize("shape", [(3, 64, 28, 28), (5, 256, 7, 7), (2, 6, 40, 40)])
def test_the_same_bits_each_time(shape: tuple[int, int, int, int]) -> None:
    arguments = drawn_arguments(shape, shape[1] // 2, torch.bfloat16, has_total=True)
    first, *others = (run(arguments, FEW, seed, recomputes=True) for seed in range(3))
    for other in others:
        assert_equal(first, other)


@pytest.mark.parametrize("activation", ["relu", "none", "gelu", "selu"])
@pytest.mark.parametrize("device", [FEW, A100])
def test_what_is_not_finite(activation: str, device: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    grad, total, x, weight, bias, *_ = drawn_arguments(
        (4, 64, 6, 6), 32, torch.bfloat16, activation, has_total=True
    )
    x[0, 5, 2, 3] = NAN
    x[1, 9, 0, 0] = float("inf")
    grad[2, 13, 1, 1] = NAN
    grad[2, 33, 1, 2] = -float("inf")
    total[3, 60, 5, 5] = NAN
    weight[20] = NAN
    bias[24] = -float("inf")
    _, *statistics = reference.group_norm_act_forward(x, weight, bias, 32, 1e-5, activation)
    arguments = (grad, total, x, weight, bias, *statistics, 32, activation)
    for ours, theirs in zip(
        run(arguments, device, recomputes=True),
        reference.group_norm_act_recompute(*arguments),
        strict=True,
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("device", [FEW, A100])
def test_no_gradient_passes_a_relu_at_zero(device: tuple[int, int, int]) -> None:
    grad, total, x, weight, bias, *others = drawn_arguments(
        (2, 64, 6, 6), 32, torch.bfloat16, has_total=True
    )
    grad_x, *of_parameters = run((grad, total, x, 0 * weight, 0 * bias, *others), device)
    assert torch.equal(grad_x, total)
    assert all((t == 0).all() for t in of_parameters)


def test_what_is_refused() -> None:
    arguments = drawn_arguments((1, 8, 4, 4), 2, torch.bfloat16)
    emulate(library(SOURCE), H100)
    results = [torch.empty_like(t) for t in arguments[2:5]]
    entry = library(SOURCE).bitfast_group_norm_act_backward
    grad, total, x, *others = arguments[:7]
    shifted = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:]
    for maps, result in (((shifted, total, x), None), ((grad, total, x), shifted)):
        given = (*maps, *others, *results, result, None)
        with pytest.raises(RuntimeError, match="not aligned to 16 bytes"):
            call(entry, ctypes.byref(settings_of(arguments)), None, *given)
    with pytest.raises(RuntimeError, match="the sizes of the backward pass are wrong"):
        workspace_bytes(Call(1, 16, 8, 3, 0, 0, 0, 1))


# ---- prepared calls, and the check before the first use -------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the emulated kernels in the place of the extension's."""
    emulated = library(SOURCE)
    emulate(emulated, FEW)
    monkeypatch.setattr(native_cuda, "library", lambda: emulated)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("has_total", [False, True])
def test_a_prepared_call_gives_the_same_bits(has_total: bool, recomputes: bool) -> None:
    arguments = drawn_arguments(
        (2, 64, 9, 9), 32, torch.bfloat16, has_total=has_total, weight_dtype=torch.float16
    )
    *tensors, groups, activation = arguments
    x, weight, bias = tensors[2:5]
    prepared = prepare_backward(
        x.shape, x.dtype, x.device, True, groups, activation, weight.dtype, bias.dtype,
        has_grad_total=has_total, recomputes=recomputes,
    )  # fmt: skip
    results = [torch.full_like(t, NAN) for t in (x, weight, bias, x)[: 3 + recomputes]]
    for _ in range(2):
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
        prepared(0, *addresses, *([] if recomputes else [0]))
        assert_equal(results, run(arguments, FEW, recomputes=recomputes))


@pytest.mark.usefixtures("kernels")
def test_what_cannot_be_prepared() -> None:
    arguments = ((1, 8, 4, 4), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="need channels_last"):
        prepare_backward(*arguments, False, 2, "relu", torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"do not take torch\.float64"):
        prepare_backward(*arguments, True, 2, "relu", torch.float64, torch.float32)
    with pytest.raises(RuntimeError, match="the sizes of the backward pass are wrong"):
        prepare_backward(*arguments, True, 3, "relu", torch.float32, torch.float32)


@pytest.mark.usefixtures("kernels")
def test_the_check_before_the_first_use_passes() -> None:
    small = [case._replace(shape=(min(case.shape[0], 20), *case.shape[1:])) for case in CHECKED[1:]]
    assert check_backward(torch.device("cpu"), small) is None


@pytest.mark.usefixtures("kernels")
def test_the_check_before_the_first_use_finds_what_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = reference.group_norm_act_recompute

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(
            tensor * 1.1 if number == which else tensor
            for number, tensor in enumerate(right(*arguments))
        )

    monkeypatch.setattr(reference, "group_norm_act_recompute", wrong)
    case = Case((2, 64, 5, 5), torch.bfloat16, recomputes=True)
    for which, name in ((2, "grad_bias"), (3, "result")):  # noqa: B007 (``wrong`` reads it)
        problem = check_backward(torch.device("cpu"), [case])
        assert problem is not None
        assert f"the error of {name}" in problem
