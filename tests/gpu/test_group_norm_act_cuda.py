"""The CUDA kernels of group_norm_act, forward, on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.backends import use_backend
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.group_norm_act_cuda import check_forward
from tests.feature_maps import DTYPES
from tests.plain_ops import exact_norm, plain_norm
from tests.tolerances import assert_within_contract, relative_error

DEVICE = "cuda"
SHAPES = [
    ((128, 256, 56, 56), 32), ((32, 64, 56, 56), 32), ((16, 128, 28, 28), 32), ((8, 1024, 14, 14), 32),
    ((300, 512, 7, 7), 32), ((1, 2048, 7, 7), 32), ((2, 6144, 7, 7), 32), ((2, 768, 56, 56), 32),
    ((2, 256, 112, 112), 32), ((3, 96, 9, 5), 8), ((3, 35, 9, 11), 7), ((1, 36, 1, 1), 12),
]  # fmt: skip
"""By clusters of each size, in slices of channels, in two launches; the last ones of odd sizes."""


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with use_backend(group_norm_act="native"):
        yield


def draw(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    x = torch.randn(shape, device=DEVICE) + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def parameters(channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)


def check(total: Tensor, actual: Tensor, *others: object) -> None:
    """Hold the first image and the last to the contract."""
    for image in (slice(0, 1), slice(-1, None)):
        x = total[image]
        assert_within_contract(actual[image], plain_norm(x, *others), exact_norm(x, *others))


def test_the_check_before_the_first_use() -> None:
    assert check_forward(torch.device(DEVICE, torch.cuda.current_device())) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_numbers(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    weight, bias = parameters(shape[1])
    x, residual = draw(shape, dtype, -2.3), draw(shape, dtype)
    check(x, group_norm_act(x, weight, bias, groups), weight, bias, groups, "relu")
    total, result = add_group_norm_act(x, residual, weight, bias, groups)
    assert torch.equal(total, x + residual)
    check(total, result, weight, bias, groups, "relu")


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    weight, bias = parameters(96)
    x = draw((4, 96, 14, 14), dtype)
    actual = group_norm_act(x, weight, bias, 8, activation=activation)
    check(x, actual, weight, bias, 8, activation)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_equal_inputs_give_equal_bits(shape: tuple[int, ...], groups: int) -> None:
    weight, bias = parameters(shape[1])
    x, residual = draw(shape, torch.bfloat16), draw(shape, torch.bfloat16)
    first = add_group_norm_act(x, residual, weight, bias, groups)
    for _ in range(5):
        again = add_group_norm_act(x, residual, weight, bias, groups)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_operator_computes_the_same() -> None:
    """Also where maps are not channels_last, not dense or not aligned."""
    weight, bias = parameters(64)
    x = draw((4, 64, 14, 14), torch.bfloat16)
    expected = group_norm_act(x, weight, bias, 32)
    operator = torch.ops.bitfast.group_norm_act.native
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)
    shifted = memory[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    for given in (x, x.contiguous(), x.repeat(1, 2, 1, 1)[:, :64], shifted):
        result, mean, rstd = operator(given, weight, bias, 32, 1e-5, "relu")
        assert relative_error(result, expected) < 2**-9
        assert mean.shape == rstd.shape == (4, 32)


@pytest.mark.parametrize("batch", [1, 17])
def test_offsets_past_two_billion(batch: int) -> None:
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("maps of more than 2^31 elements need 14 GiB of free GPU memory")
    side = 6000 if batch == 1 else 1460
    weight, bias = parameters(64)
    x = torch.empty(
        (batch, 64, side, side),
        dtype=torch.bfloat16,
        device=DEVICE,
        memory_format=torch.channels_last,
    )
    x.normal_()
    actual = group_norm_act(x, weight, bias, 32)
    part = x[-1:, 62:].contiguous()
    settings = (weight[62:], bias[62:], 1, "relu")
    assert_within_contract(
        actual[-1:, 62:], plain_norm(part, *settings), exact_norm(part, *settings)
    )


def test_a_graph_replays_it() -> None:
    weight, bias = parameters(256)
    x = draw((8, 256, 112, 112), torch.bfloat16)
    expected = group_norm_act(x, weight, bias, 32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = group_norm_act(x, weight, bias, 32)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
