"""The CUDA kernels of the pad and the pool, against the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import use_backend
from bitfast.modeling import BitBackbone
from bitfast.ops import first_use
from bitfast.ops.same_padding import max_pool_for, pad_for, same_max_pool, same_pad, same_padding
from tests.feature_maps import DTYPES, LAYOUTS, make
from tests.tiny_models import ours


def test_the_cuda_half_is_here() -> None:
    assert extension.CUDA.problem is None
    assert first_use.why_unusable("same_padding") is None


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pool_of_the_stem(dtype: torch.dtype) -> None:
    """Its own kernels: of the model's shape, of small odd ones, and with any padding."""
    window = ((3, 3), (2, 2), (1, 1))
    for shape, sides in (
        ((32, 64, 112, 112), [1, 1, 1, 1]),
        ((3, 24, 17, 30), [0, 1, 0, 1]),
        ((2, 8, 5, 4), [3, 0, 2, 4]),
    ):
        x = make(shape, dtype, torch.channels_last).cuda()
        x = x.contiguous(memory_format=torch.channels_last)
        for value in (0.0, -math.inf):
            compare_with_the_reference(x, window, sides, value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_past_the_dispatcher(layout: torch.memory_format) -> None:
    """Those of plans and of eager code, gradients included."""
    window, sides = ((3, 3), (2, 2), (1, 1)), [1, 1, 1, 1]
    x = make((2, 16, 21, 19), torch.bfloat16, layout).cuda().contiguous(memory_format=layout)
    expected = reference.same_max_pool(x, *window, sides, 0.0)
    with use_backend("native"):
        pool = max_pool_for(tuple(x.shape), window, sides, 0.0, "cuda", x.dtype)
        pad = pad_for(tuple(x.shape), window, 0.0, "cuda", x.dtype)
        assert pad is not None
        assert torch.equal(pool(x), expected)
        assert torch.equal(same_max_pool(x, 3, 2), expected)
        padded = reference.same_pad_forward(x, sides, 0.0)
        assert torch.equal(pad(x), padded)
        assert torch.equal(same_pad(x, 3, 2), padded)
    gradients = []
    for backend in ("native", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            pooled = same_max_pool(leaf, 3, 2)
        pooled.backward(
            torch.arange(pooled.numel(), device="cuda").remainder(7).view(pooled.shape).to(x.dtype)
        )
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


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
