"""The CUDA kernels of the pad and the pool, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitfast import extension
from bitfast.backends import use_backend
from bitfast.modeling import BitBackbone
from bitfast.ops.same_padding import same_max_pool, same_pad, same_padding
from tests.test_same_padding import DTYPES, LAYOUTS, make, windows
from tests.tiny_models import ours


def test_the_cuda_half_is_here() -> None:
    assert extension.CUDA.problem is None


@settings(max_examples=200)
@given(
    window=windows(),
    shape=st.tuples(
        *(st.integers(0, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
    ),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    value=st.sampled_from([0.0, -1.5, float("-inf")]),
    seed=st.integers(0, 2**31 - 1),
)
def test_equals_the_reference(window, shape, dtype, layout, value, seed) -> None:
    x = make(shape, dtype, layout, seed).cuda().contiguous(memory_format=layout)
    sides = same_padding(shape[2:], *window)
    assume(all(n + a + b > (k - 1) * d for n, a, b, k, d in zip(
        shape[2:], sides[::2], sides[1::2], window[0], window[2], strict=True)))  # fmt: skip
    results = []
    for backend in ("native", "reference"):
        pad, pool, backward = (
            getattr(getattr(torch.ops.bitfast, name), backend)
            for name in ("same_pad", "same_max_pool", "same_max_pool_backward")
        )
        pooled, taps = pool(x, *window, sides, value, True)
        grad = torch.arange(pooled.numel(), device="cuda").remainder(7).view(pooled.shape).to(dtype)
        grad_x = backward(grad, taps, shape[2:], *window, sides)
        results.append((pad(x, sides, value), pooled, taps, grad_x))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


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
