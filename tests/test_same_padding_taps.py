"""The reference of the pool on devices whose torch names other maxima, emulated here: nothing out of bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast import reference
from bitfast.ops.same_padding import same_padding
from tests.feature_maps import LAYOUTS

torch_max_pool = F.max_pool2d
PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def as_on_cuda(*arguments: Any, return_indices: bool = False) -> Any:
    """Pool as CUDA does channels_last: nothing beats -inf, so that its index stays what it was, 0."""
    if not return_indices:
        return torch_max_pool(*arguments)
    result, index = torch_max_pool(*arguments, return_indices=True)
    return result, index.where(result != -math.inf, 0)


@settings(max_examples=60)
@given(
    kernel_size=PAIRS,
    stride=PAIRS,
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31 - 1),
)
def test_windows_of_nothing_but_minus_infinity(
    kernel_size, stride, dilation, size, layout, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (2, 3, *size), generator=generator).float()
    x = x.where(torch.rand(x.shape, generator=generator) < 0.4, -math.inf).contiguous(
        memory_format=layout
    )
    window = (kernel_size, stride, dilation)
    sides = same_padding(size, *window)
    expected = reference.same_max_pool_forward(x, *window, sides, -math.inf, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "max_pool2d", as_on_cuda)
        pooled, taps = reference.same_max_pool_forward(x, *window, sides, -math.inf, True)
    assert torch.equal(pooled, expected[0])
    assert torch.equal(taps, expected[1])
    assert taps.min() >= 0
    assert taps.max() < kernel_size[0] * kernel_size[1]
    grad = torch.ones_like(pooled)
    gradient = reference.same_max_pool_backward(grad, taps, size, *window, sides)
    assert torch.equal(gradient, by_hand(grad, taps, size, window, sides))


def by_hand(grad: Tensor, taps: Tensor, size: Any, window: Any, sides: list[int]) -> Tensor:
    """Hand each gradient on, one after the other; what no pixel of x has is dropped."""
    (kernel_height, kernel_width), stride, dilation = window
    result = torch.zeros(*taps.shape[:2], *size)
    for n, c, i, j in torch.cartesian_prod(*(torch.arange(k) for k in taps.shape)).tolist():
        tap = int(taps[n, c, i, j])
        row = i * stride[0] + tap // kernel_width * dilation[0] - sides[0]
        column = j * stride[1] + tap % kernel_width * dilation[1] - sides[2]
        if 0 <= tap < kernel_height * kernel_width and 0 <= row < size[0] and 0 <= column < size[1]:
            result[n, c, row, column] += grad[n, c, i, j]
    return result


def test_taps_that_no_window_has_are_dropped() -> None:
    """As the native kernels do it. A scatter on a GPU would end the process, or write elsewhere."""
    window, size = ((2, 2), (2, 2), (1, 1)), (4, 4)
    taps = torch.tensor([[[[4, -1], [-30000, 30000]], [[0, 3], [1, 2]]]], dtype=torch.int16)
    grad = torch.full(taps.shape, 2.0)
    gradient = reference.same_max_pool_backward(grad, taps, size, *window, [0, 0, 0, 0])
    assert torch.equal(gradient, by_hand(grad, taps, size, window, [0, 0, 0, 0]))
    assert gradient[0, 0].eq(0).all()
    assert gradient[0, 1].sum() == 8


def test_taps_of_another_size_are_refused() -> None:
    taps = torch.zeros(1, 1, 5, 5, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"taps must have height and width \(2, 2\).*got \(5, 5\)"):
        reference.same_max_pool_backward(
            torch.ones(taps.shape), taps, (4, 4), (2, 2), (2, 2), (1, 1), [0, 0, 0, 0]
        )


def test_the_emulation_differs_from_the_cpu() -> None:
    x = torch.full((1, 1, 4, 4), -math.inf)
    arguments = (x, (2, 2), (2, 2), 0, (1, 1))
    _, index = torch_max_pool(*arguments, return_indices=True)
    assert not torch.equal(index, as_on_cuda(*arguments, return_indices=True)[1])
