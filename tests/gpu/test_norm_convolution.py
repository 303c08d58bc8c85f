"""The CUDA kernels of norm_convolution on a card, against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitfast.backends import use_backend
from bitfast.graphs import capture
from bitfast.ops import first_use
from bitfast.ops.norm_convolution_cuda import (
    CAPABILITY,
    OP,
    cell_channels_of,
    pack_filters,
    why_no_kernels,
)
from bitfast.ops.norm_convolution_fused import Fused, cell_moments, fused_convolution
from tests.gpu.test_group_norm_act import need_memory
from tests.test_execution_cuda import plans
from tests.test_norm_convolution_op_cuda import (
    BFLOAT16,
    FLOAT16,
    NO_ZEROS,
    ONE_ZERO,
    compare,
    draw_filters,
    draw_map,
    draw_norm,
    plain,
)
from tests.tiny_models import ours
from tests.tolerances import assert_within_contract

DEVICE, GROUPS = "cuda", 32

IS_OURS = torch.cuda.is_available() and torch.cuda.get_device_capability() == CAPABILITY
needs_hopper = pytest.mark.skipif(not IS_OURS, reason="the kernels are for compute capability 9.0")

LAYERS = [
    (64, 56, 64, 1, 1, NO_ZEROS, False, 256),
    (64, 56, 64, 3, 1, ONE_ZERO, False, 0),
    (64, 56, 256, 1, 1, NO_ZEROS, True, 0),
    (256, 56, 128, 3, 2, ONE_ZERO, False, 0),
    (256, 56, 512, 1, 2, NO_ZEROS, False, 0),
    (128, 28, 512, 1, 1, NO_ZEROS, True, 0),
    (256, 28, 256, 3, 2, (0, 1, 0, 1), False, 0),
    (512, 14, 256, 1, 1, NO_ZEROS, False, 1024),
    (256, 14, 256, 3, 1, ONE_ZERO, False, 0),
    (512, 7, 512, 3, 1, ONE_ZERO, False, 0),
    (512, 7, 2048, 1, 1, NO_ZEROS, True, 0),
    (192, 33, 320, 3, 1, (2, 0, 1, 2), True, 64),
]
"""Channels and size of x, channels of the result, size of filters, stride, zeros, whether a residual is added,
channels of a second result."""


def chain(
    layer: tuple[Any, ...], images: int, dtype: torch.dtype, activation: str = "relu"
) -> list[Fused]:
    """Run a layer, and a 1x1 convolution that takes the statistics which that left; compare all they write."""
    channels, size, out, kernel_size, stride, padding, adds, second_channels = layer
    options: dict[str, Any] = {"dtype": dtype, "device": DEVICE}
    x = draw_map(images, channels, size, size, **options) + 2
    norm = draw_norm(channels, GROUPS, activation, device=DEVICE)
    filters = draw_filters(out, channels, kernel_size, **options)
    others = draw_filters(second_channels or 8, channels, kernel_size, **options)
    geometry = stride, padding
    residual = (
        draw_map(*plain(x, None, filters, *geometry, None).shape, **options) if adds else None
    )
    found = fused_convolution(
        x, norm, pack_filters(filters), stride=stride, padding=padding, residual=residual,
        next_groups=GROUPS, second_packed=pack_filters(others) if second_channels else None,
    )  # fmt: skip
    compare(x, norm, filters, found.result, *geometry, residual)
    if found.second is not None:
        compare(x, norm, others, found.second, *geometry, None)
    assert found.partials is not None
    cells = found.result.double().reshape(images, out // cell_channels_of(out, GROUPS), -1)
    moments = torch.stack([cells.mean(2), cells.var(2, correction=0)])
    torch.testing.assert_close(cell_moments(found.partials, out), moments, rtol=1e-4, atol=1e-5)
    following = draw_norm(out, GROUPS, device=DEVICE)
    filters = draw_filters(64, out, 1, **options)
    last = fused_convolution(
        found.result, following, pack_filters(filters), partials=found.partials
    )
    compare(found.result, following, filters, last.result, 1, NO_ZEROS, None)
    return [found, last]


@needs_hopper
def test_the_first_use_finds_nothing_wrong() -> None:
    assert first_use.why_unusable(OP) is None
    assert why_no_kernels() is None


def test_other_cards_are_told() -> None:
    if not IS_OURS:
        assert "are for compute capability 9.0" in str(why_no_kernels())


@needs_hopper
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("images", "dtype"), [(1, BFLOAT16), (9, FLOAT16), (40, BFLOAT16)])
def test_equals_plain_pytorch(images, dtype, layer) -> None:
    need_memory(10)
    chain(layer, images, dtype, "relu" if images > 1 else "none")


@needs_hopper
@pytest.mark.parametrize("layer", LAYERS[:4], ids=str)
def test_the_same_numbers_each_time(layer) -> None:
    results = []
    for _ in range(3):
        torch.manual_seed(3)
        results.append(chain(layer, 32, BFLOAT16))
    for first, *others in zip(*results, strict=True):
        for a, *rest in zip(first, *others, strict=True):
            assert all(b is None if a is None else torch.equal(a, b) for b in rest)


@needs_hopper
@pytest.mark.parametrize(("kernel_size", "padding"), [(1, NO_ZEROS), (3, ONE_ZERO)])
def test_nan_and_infinity(kernel_size, padding) -> None:
    """What has one group of an image is normalized to NaN, which reaches all that reads it."""
    x, norm = draw_map(3, 64, 20, 20, device=DEVICE), draw_norm(64, GROUPS, device=DEVICE)
    x[1, 5, 7, 8], x[2, 9, 0, 0] = float("nan"), float("inf")
    filters = draw_filters(64, 64, kernel_size, device=DEVICE)
    found = fused_convolution(x, norm, pack_filters(filters), padding=padding, next_groups=GROUPS)
    assert not found.result[0].isnan().any()
    assert found.result[1:].isnan().all()
    assert found.partials is not None
    assert not found.partials[0].isnan().any()
    assert cell_moments(found.partials, 64)[:, 1:].isnan().all()
    x = draw_map(1, 64, 20, 20, device=DEVICE)
    x[0, 5, 7, 8], x[0, 9, 13, 2] = float("nan"), float("inf")
    found = fused_convolution(x, None, pack_filters(filters), padding=padding)
    expected = plain(x.double(), None, filters.double(), 1, padding, None)
    for marks in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(marks(found.result), marks(expected))


@needs_hopper
@pytest.mark.parametrize(("kernel_size", "padding"), [(1, NO_ZEROS), (3, ONE_ZERO)])
def test_offsets_past_two_billion(kernel_size, padding) -> None:
    need_memory(20)
    count = 2**31 // (64 * 28 * 28) + 2
    few, norm = draw_map(1, 64, 28, 28, device=DEVICE), draw_norm(64, GROUPS, device=DEVICE)
    x = few.expand(count, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    filters = draw_filters(64, 64, kernel_size, device=DEVICE)
    found = fused_convolution(x, norm, pack_filters(filters), padding=padding, next_groups=GROUPS)
    assert torch.equal(found.result[-1], found.result[0])
    compare(few, norm, filters, found.result[-1:].clone(), 1, padding, None)
    assert found.partials is not None
    assert torch.equal(found.partials[-1], found.partials[0])


@needs_hopper
def test_plans_and_graphs_call_it() -> None:
    options = {"embedding_size": 64, "hidden_sizes": [256, 512], "depths": [2, 2], "num_groups": 32}
    model: Any = ours("BitModel", **options).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    model = model.to(DEVICE, BFLOAT16)
    images = torch.randn(4, 3, 128, 96, device=DEVICE).bfloat16()
    with torch.inference_mode():
        with use_backend(norm_convolution="native"):
            actual = model(images, output_hidden_states=True)
            assert "norm_convolution" in plans(model)[0].parts[0].program.names  # type: ignore[attr-defined]
            capture(model, images)
            assert torch.equal(model(images).last_hidden_state, actual.last_hidden_state)
        with use_backend("reference"):
            expected = model(images, output_hidden_states=True)
            exact: Any = ours("BitModel", **options).eval().to(DEVICE).double()
            exact.load_state_dict(model.state_dict())
            oracle = exact(images.double(), output_hidden_states=True)
    for a, b, c in zip(
        actual.hidden_states, expected.hidden_states, oracle.hidden_states, strict=True
    ):
        assert_within_contract(a, b, c)
