"""The CUDA kernels of the pad and the pool, against the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import extension
from bitfast.backends import use_backend
from bitfast.modeling import BitBackbone
from bitfast.ops.same_padding import same_max_pool, same_pad, same_padding
from tests.feature_maps import DTYPES, LAYOUTS, make
from tests.tiny_models import ours


def test_the_cuda_half_is_here() -> None:
    assert extension.CUDA.problem is None


def draw_case() -> tuple[Tensor, Any, list[int], float]:
    """Return an input, a window, its "same" padding and the padding's value; all sizes small."""
    window = tuple((random.randint(1, n), random.randint(1, n)) for n in (4, 4, 3))
    shape = tuple(random.randint(low, high) for low, high in ((0, 3), (1, 9), (1, 20), (1, 20)))
    layout = random.choice(LAYOUTS)
    x = make(shape, random.choice(DTYPES), layout).cuda().contiguous(memory_format=layout)
    return x, window, same_padding(shape[2:], *window), random.choice((0.0, -1.5, -math.inf))


def test_equals_the_reference() -> None:
    for _ in range(200):
        compare_with_the_reference(*draw_case())


def compare_with_the_reference(x: Tensor, window: Any, sides: list[int], value: float) -> None:
    results = []
    for backend in ("native", "reference"):
        pad, pool, backward = (
            getattr(getattr(torch.ops.bitfast, name), backend)
            for name in ("same_pad", "same_max_pool", "same_max_pool_backward")
        )
        pooled, taps = pool(x, *window, sides, value, True)
        grad = torch.arange(pooled.numel(), device="cuda").remainder(7).view(pooled.shape)
        grad_x = backward(grad.to(x.dtype), taps, x.shape[2:], *window, sides)
        results.append((pad(x, sides, value), pooled, taps, grad_x))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected), (x.shape, x.dtype, x.stride(), window, value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_past_two_billion(layout: torch.memory_format) -> None:
    """The last image lies beyond 2^31 (and 2^32) elements; it must come out like the same image alone."""
    x = torch.zeros(17, 64, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=layout)
    x[-1] = torch.randn(64, 2048, 2048, device="cuda")
    for function in (lambda x: same_max_pool(x, 3, 2), lambda x: same_pad(x, 3, 2)):
        with use_backend("native"):
            assert torch.equal(function(x)[-1:], function(x[-1:]))


def test_the_current_stream_is_used() -> None:
    x = torch.randn(8, 64, 256, 256, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), use_backend("native"):
        torch.cuda._sleep(50_000_000)
        y = x * 2  # not there yet when the pool is launched
        pooled = same_max_pool(y, 3, 2)
    stream.synchronize()
    with use_backend("reference"):
        assert torch.equal(pooled, same_max_pool(x * 2, 3, 2))


@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_a_model_with_same_padding(layer_type: str) -> None:
    settings: dict[str, Any] = {
        "layer_type": layer_type, "global_padding": "same", "embedding_dynamic_padding": True,
    }  # fmt: skip
    model: BitBackbone = ours("BitBackbone", **settings).eval()
    x = torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        expected = model.double()(x.double()).feature_maps[0]
        with use_backend(same_padding="native"):
            actual = model.float().cuda()(x.cuda()).feature_maps[0]
    error = (actual.cpu().double() - expected).norm() / expected.norm()
    assert error < 1e-3  # tf32 convolutions, if they are allowed
