"""The CUDA kernels of group_norm_act, forward, in the emulation of a GPU."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.ops import group_norm_act_eager as eager
from bitfast.ops import native_cuda
from bitfast.ops.group_norm_act_cuda import Case, Forward, check_forward, prepare_forward
from tests.emulated import A100, H100, at_page_end, emulate, library
from tests.feature_maps import DTYPES
from tests.group_norm_act_calls import NAN, Norm, channels_last, kernels, launch_shape, run
from tests.plain_ops import exact_norm, plain_norm
from tests.tolerances import assert_draws_within_contract

hypothesis = pytest.importorskip("hypothesis", reason="the shapes are drawn by hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.drawn_cases import norm_cases  # noqa: E402

FEW = (90, 3, 227 * 1024)
"""An H100 of 3 multiprocessors: its blocks have several images to do."""

NARROW = (90, 8, 24 * 1024)
"""One whose blocks hold so little that images are cut into slices of channels."""

BFLOAT16 = torch.bfloat16


def make(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, parameter_dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, residual, weight, bias; the maps end where their memory does."""
    x, residual = (
        at_page_end(channels_last((torch.randn(shape) + m).to(dtype))) for m in (mean, 0.0)
    )
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    return (
        x,
        residual,
        at_page_end(weight.to(parameter_dtype)),
        at_page_end(bias.to(parameter_dtype)),
    )


def exact_statistics(total: Tensor, groups: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    values = total.double().reshape(total.shape[0], groups, math.prod(total.shape[1:]) // groups)
    return values.mean(-1), (values.var(-1, correction=0) + eps).rsqrt()


def check(
    count: int,
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype,
    activation: str = "relu",
    mean: float = 0.0,
    adds: bool = False,
    device: tuple[int, int, int] = H100,
    seed: int = 0,
) -> None:
    """Hold several draws together to the contract."""
    torch.manual_seed(seed)
    emulate(kernels(), device, seed)

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        x, residual, weight, bias = make(shape, dtype, mean)
        norm = run(x, residual if adds else None, weight, bias, groups, activation)
        total = x + residual if adds else x
        assert torch.equal(norm.total, total)
        assert norm.result.stride() == x.stride()
        assert norm.mean is not None
        assert norm.rstd is not None
        exact_mean, exact_rstd = exact_statistics(total, groups)
        torch.testing.assert_close(norm.mean.double(), exact_mean, rtol=4e-7, atol=1e-6)
        torch.testing.assert_close(norm.rstd.double(), exact_rstd, rtol=1e-5, atol=0)
        arguments = (total, weight, bias, groups, activation)
        return {"result": (norm.result, plain_norm(*arguments), exact_norm(*arguments))}

    assert_draws_within_contract(draw, count)


# ---- launch shapes --------------------------------------------------------------------------------

FASTEST = {
    # Measured on an H100, batch 128, bfloat16: the fastest of those that were tried, or within 3 % of it.
    (256, 56): (1, 8, 512), (64, 56): (1, 4, 512), (128, 56): (1, 8, 512), (128, 28): (1, 2, 512),
    (512, 28): (1, 8, 512), (256, 28): (1, 4, 512), (256, 14): (1, 2, 256), (1024, 14): (1, 4, 512),
    (512, 7): (1, 1, 256),
    # Not measured; those that were are slow for their bytes: 4 x 256 takes 37 us, and 8 x 256 28 us.
    (512, 14): (1, 2, 512), (2048, 7): (1, 2, 512),
}  # fmt: skip
"""By channels and side: slices, blocks of a cluster, threads."""


@pytest.mark.parametrize(("channels", "side"), FASTEST)
def test_launch_shapes_at_batch_128(channels: int, side: int) -> None:
    emulate(kernels(), H100)
    assert launch_shape(128, side, channels) == FASTEST[channels, side]


@pytest.mark.parametrize(("channels", "side"), FASTEST)
def test_few_images_take_as_many_blocks_as_a_cluster_has(channels: int, side: int) -> None:
    emulate(kernels(), H100)
    assert launch_shape(1, side, channels) == launch_shape(8, side, channels) == (1, 8, 512)


def test_launch_shapes_of_other_maps() -> None:
    emulate(kernels(), H100)
    assert launch_shape(128, 56, 256, dtype=torch.float32)[:2] == (2, 8)
    assert launch_shape(128, 56, 768)[:2] == (4, 8)
    assert launch_shape(128, 7, 6144)[:2] == (2, 4), "at most 512 vectors to a pixel"
    assert launch_shape(4, 1, 64)[:2] == (1, 1), "no more blocks than pixels"
    assert launch_shape(1, 6000, 64)[0] == 0, "too large to stay on chip"
    assert launch_shape(1, 7, 60, 4)[0] == 0, "no multiple of a vector"
    assert launch_shape(1, 7, 24, 8)[0] == 0, "an odd number of channels in a group"
    emulate(kernels(), A100)
    assert launch_shape(128, 56, 256)[0] == 0, "no clusters"


# ---- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize(("channels", "side"), FASTEST)
def test_the_maps_of_the_model(channels: int, side: int, adds: bool) -> None:
    check(1, (1 if side > 14 else 2, channels, side, side), 32, BFLOAT16, adds=adds)


@pytest.mark.parametrize("adds", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [H100, A100, FEW], ids=["h100", "a100", "few"])
def test_every_dtype(device: tuple[int, int, int], dtype: torch.dtype, adds: bool) -> None:
    for channels, groups in ((64, 32), (96, 8), (96, 12)):  # 2, 12 and 8 channels a group
        check(1, (2, channels, 17, 9), groups, dtype, mean=-2.3, adds=adds, device=device)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    for device in (FEW, A100):
        check(2, (2, 64, 9, 7), 8, dtype, activation, device=device)
    check(2, (2, 33, 9, 7), 3, dtype, activation)


@settings(max_examples=40)
@given(
    case=norm_cases(DTYPES, most_channels_per_group=9, largest_side=9),
    adds=st.booleans(),
    device=st.sampled_from([A100, FEW, NARROW]),
)
def test_drawn_shapes(case, adds, device):
    check(
        2, case.shape, case.groups, case.dtype, case.activation, case.mean, adds, device, case.seed
    )  # fmt: skip


@settings(max_examples=25)
@given(
    vectors=st.integers(1, 9),
    channels=st.sampled_from([2, 4, 6, 8, 10, 12, 16, 24]),
    sides=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    images=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    adds=st.booleans(),
    device=st.sampled_from([FEW, NARROW]),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_in_clusters(vectors, channels, sides, images, dtype, adds, device, seed):
    """Channels that are a multiple of a vector, in groups of any even size."""
    vector = 16 // dtype.itemsize
    groups = vectors * math.lcm(channels, vector) // channels
    check(1, (images, groups * channels, *sides), groups, dtype, "relu", 0.0, adds, device, seed)


def test_slices_of_channels() -> None:
    emulate(kernels(), NARROW)
    assert launch_shape(3, 16, 512, 16)[:2] == (2, 8)
    for adds in (False, True):
        check(1, (3, 512, 16, 16), 16, BFLOAT16, adds=adds, device=NARROW)


@pytest.mark.parametrize("device", [H100, A100, FEW], ids=["h100", "a100", "few"])
def test_the_statistics_do_not_cancel(device: tuple[int, int, int]) -> None:
    """Where the mean is 1000 standard deviations, and where one pixel stands far from the others."""
    for x in (torch.randn(2, 64, 20, 20) + 1000, 5 + 1e-3 * torch.randn(2, 64, 20, 20)):
        x[:, :, 0, 0] += 1
        emulate(kernels(), device)
        weight = bias = torch.ones(64)
        norm = run(channels_last(x), None, weight, bias, 8, "none")
        mean, rstd = exact_statistics(x, 8)
        assert norm.mean is not None
        assert norm.rstd is not None
        torch.testing.assert_close(norm.mean.double(), mean, rtol=2e-7, atol=0)
        torch.testing.assert_close(norm.rstd.double(), rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("channels", "groups"), [(16, 2), (9, 3)])
@pytest.mark.parametrize("device", [FEW, A100], ids=["few", "a100"])
def test_not_a_number_and_infinity_go_where_they_go_in_torch(activation, channels, groups, device):
    emulate(kernels(), device)
    for dtype in DTYPES:
        x, residual, weight, bias = make((3, channels, 3, 5), dtype)
        x[0, 1, 2, 3], x[1, 5, 0, 0] = math.nan, math.inf
        weight[2] = math.nan
        for adds in (False, True):
            norm = run(x, residual if adds else None, weight, bias, groups, activation)
            total = x + residual if adds else x
            expected = plain_norm(total, weight, bias, groups, activation)
            assert torch.equal(norm.result.isnan(), expected.isnan())
            assert 0 < expected.isnan().sum() < expected.numel()


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    for device in (H100, A100):
        for channels, groups in ((32, 4), (15, 5)):
            emulate(kernels(), device)
            x, _, weight, bias = make((2, channels, 5, 3), dtype, parameter_dtype=parameter_dtype)
            norm = run(x, None, weight, bias, groups)
            same = run(x, None, weight.float(), bias.float(), groups)
            assert torch.equal(norm.result, same.result)


# ---- memory ---------------------------------------------------------------------------------------

PLACES = [H100, A100, FEW, NARROW]


def bits(norm: Norm) -> list[Tensor]:
    tensors = (norm.total, norm.result, norm.mean, norm.rstd)
    return [t.clone() for t in tensors if t is not None]


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (15, 5)])
@pytest.mark.parametrize("device", PLACES)
def test_in_place(device: tuple[int, int, int], channels: int, groups: int) -> None:
    x, residual, weight, bias = make((2 if device is H100 else 7, channels, 6, 5), BFLOAT16)
    expected: list[Norm] = []
    for adds in (False, True):
        emulate(kernels(), device, seed=1)
        expected.append(run(x, residual if adds else None, weight, bias, groups))
    emulate(kernels(), device, seed=2)
    own = at_page_end(x)
    assert torch.equal(run(own, None, weight, bias, groups, result=own).result, expected[0].result)
    # As a plan does: the sum in the memory of the shortcut, the result in that of the branch.
    own, shortcut = at_page_end(x), at_page_end(residual)
    norm = run(own, shortcut, weight, bias, groups, total=shortcut, result=own)
    assert torch.equal(norm.total, expected[1].total)
    assert torch.equal(norm.result, expected[1].result)
    own, shortcut = at_page_end(x), at_page_end(residual)
    norm = run(own, shortcut, weight, bias, groups, total=own, result=shortcut)
    assert torch.equal(norm.total, expected[1].total)
    assert torch.equal(norm.result, expected[1].result)


@pytest.mark.parametrize("adds", [False, True], ids=["x", "x+residual"])
@pytest.mark.parametrize("device", PLACES)
def test_scheduling_does_not_change_a_bit(device: tuple[int, int, int], adds: bool) -> None:
    for channels, groups in ((96, 8), (64, 32), (15, 5)):
        x, residual, weight, bias = make((2 if device is H100 else 5, channels, 9, 8), BFLOAT16)
        results = []
        for seed in range(2):
            emulate(kernels(), device, seed)
            results.append(bits(run(x, residual if adds else None, weight, bias, groups)))
        assert all(
            torch.equal(a, b)
            for other in results[1:]
            for a, b in zip(results[0], other, strict=True)
        )


def test_statistics_are_kept_only_if_wanted() -> None:
    for device in (H100, A100):
        emulate(kernels(), device)
        x, _, weight, bias = make((2, 16, 3, 4), BFLOAT16)
        kept, other = (
            run(x, None, weight, bias, 2, keeps_statistics=keeps) for keeps in (True, False)
        )
        assert torch.equal(kept.result, other.result)


@pytest.mark.parametrize("channels", [16, 15])
def test_an_empty_batch(channels: int) -> None:
    for device in (H100, A100):
        emulate(kernels(), device)
        x, residual, weight, bias = make((0, channels, 3, 4), BFLOAT16)
        assert run(x, residual, weight, bias, 1).result.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_that_are_not_aligned(dtype: torch.dtype) -> None:
    emulate(kernels(), H100)
    x, _, weight, bias = make((2, 16, 3, 4), dtype)
    flat = torch.empty(x.numel() + 1, dtype=dtype)
    shifted = flat[1:].as_strided(x.shape, x.stride()).copy_(x)
    actual, expected = (run(t, None, weight, bias, 2).result for t in (shifted, x))
    torch.testing.assert_close(actual, expected)


def test_what_cannot_be_is_refused() -> None:
    emulate(kernels(), H100)
    x, _, weight, bias = make((2, 16, 3, 4), BFLOAT16)
    with pytest.raises(RuntimeError, match="the groups do not divide the channels"):
        run(x, None, weight, bias, 3)
    with pytest.raises(RuntimeError, match="a size is not positive"):
        run(x, None, weight, bias, 0)


# ---- prepared calls -------------------------------------------------------------------------------


@pytest.fixture
def emulated_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prepared calls on CPU tensors go to the emulation."""
    monkeypatch.setattr(native_cuda, "library", kernels)
    emulate(kernels(), (90, 16, 227 * 1024))


def prepared(shape: tuple[int, int, int, int], groups: int, **options: bool) -> Forward:
    arguments = (shape, BFLOAT16, torch.device("cpu"), True, groups, 1e-5, "relu")
    return prepare_forward(*arguments, torch.float32, torch.float32, **options)


@pytest.mark.parametrize("channels", [64, 15])
def test_prepared_calls(emulated_library: None, channels: int) -> None:
    x, residual, weight, bias = make((3, channels, 9, 8), BFLOAT16)
    expected = run(x, residual, weight, bias, channels // 5 if channels == 15 else 8)
    groups = expected.mean.shape[1]
    total, result = at_page_end(x, NAN), at_page_end(x, NAN)
    call = prepared(tuple(x.shape), groups, has_residual=True, keeps_statistics=False)
    tensors = (x, residual, weight, bias, total, result)
    call(0, *(t.data_ptr() for t in tensors), 0, 0)
    assert torch.equal(total, expected.total)
    assert torch.equal(result, expected.result)


def test_prepared_calls_need_channels_last(emulated_library: None) -> None:
    with pytest.raises(ValueError, match="need channels_last"):
        prepare_forward(
            (1, 8, 2, 2), BFLOAT16, torch.device("cpu"), False, 1, 1e-5, "relu", BFLOAT16, BFLOAT16
        )  # fmt: skip


SMALL_CASES = (
    Case((2, 64, 7, 5), torch.bfloat16, adds=True),
    Case((2, 15, 7, 5), torch.float32, groups=3, activation="gelu"),
)


def test_the_check_before_the_first_use(emulated_library: None) -> None:
    assert check_forward(torch.device("cpu"), SMALL_CASES) is None


def test_that_check_finds_a_wrong_kernel(emulated_library: None, monkeypatch) -> None:
    monkeypatch.setattr(reference, "group_norm_act_forward", group_norm_with_another_eps)
    problem = check_forward(torch.device("cpu"), SMALL_CASES)
    assert problem is not None
    assert "the error of the result" in problem


def group_norm_with_another_eps(*arguments: Any) -> Any:
    *others, _, activation = arguments
    return exact_forward(*others, 1e-1, activation)


exact_forward = reference.group_norm_act_forward


def test_eager_calls_and_their_gradients(emulated_library: None, monkeypatch) -> None:
    """As on a GPU: past the dispatcher, by the CUDA kernels, forward and backward."""
    x, residual, weight, bias = make((2, 16, 6, 5), torch.float32)
    inputs = [t.requires_grad_() for t in (x, residual, weight, bias)]
    call = eager.PreparedCall("native", x, True, weight, bias, 2, 1e-5, "gelu")
    monkeypatch.setattr(native_cuda, "library", lambda: Both())
    total, result = eager.AddGroupNormAct.apply(call, *inputs)
    plain_total = x + residual
    plain = plain_norm(plain_total, weight, bias, 2, "gelu")
    torch.testing.assert_close(total, plain_total)
    torch.testing.assert_close(result, plain)
    grads = torch.randn(2, *x.shape)
    grads = [channels_last(g) for g in grads]
    emulate(library("csrc/group_norm_act_backward.cu"))
    actual = torch.autograd.grad((total, result), inputs, grads)
    expected = torch.autograd.grad((plain_total, plain), inputs, grads)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Both:
    """The libraries of the forward and of the backward kernels, as one."""

    def __getitem__(self, name: str) -> Any:
        backward = library("csrc/group_norm_act_backward.cu")
        return (backward if "backward" in name else kernels())[name]


def test_what_a_prepared_call_costs_the_host(emulated_library: None, monkeypatch) -> None:
    """It is one call of the entry, by two frames of Python; no tensor is looked at."""
    call = prepared((0, 64, 9, 8), 8, has_residual=True)
    frames: list[str] = []
    sys.setprofile(
        lambda frame, event, _: frames.append(event) if event in ("call", "c_call") else None
    )
    try:
        call(0, 0, 0, 0, 0, 0, 0, 0, 0)
    finally:
        sys.setprofile(None)
    assert frames.count("call") <= 2
    assert len(frames) <= 4
