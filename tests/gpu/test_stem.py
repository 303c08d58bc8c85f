"""The CUDA kernels of the stem on a card, against plain PyTorch in float64; see tests/test_stem_cuda.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast import extension, reference
from bitfast.backends import use_backend
from bitfast.graphs import capture
from bitfast.ops import first_use
from bitfast.ops.stem import OP, prepare_filters, stem
from tests.gpu.test_group_norm_act import need_memory
from tests.test_stem_cuda import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    POOL,
    ZEROS,
    Sides,
    model_of,
    names_of,
)
from tests.tolerances import assert_within_contract

SIZES = [(1, 1), (17, 30), (224, 224), (225, 223), (97, 640), (20, 384)]


def test_the_first_use_finds_nothing_wrong() -> None:
    assert extension.CUDA.problem is None
    assert first_use.why_unusable(OP) is None


def compare(
    images: Tensor, weight: Tensor, padding: Sides = ZEROS, pool_padding: Sides | None = POOL
) -> Tensor:
    filters = prepare_filters(weight, padding)
    with use_backend(stem="native"):
        actual = stem(images, filters, padding, pool_padding)
    arguments: Any = padding, pool_padding
    rounded = images.to(weight.dtype)
    plain = reference.stem_forward(rounded, filters, *arguments)
    oracle = reference.stem_forward(rounded.double(), filters.double(), *arguments)
    assert_within_contract(actual, plain, oracle, f"{images.shape} {arguments}")
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)
    return actual


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_plain_pytorch(dtype, size) -> None:
    for image_dtype, layout, (padding, pool_padding) in itertools.product(
        (dtype, torch.float32),
        (CHANNELS_LAST, CONTIGUOUS),
        ((ZEROS, POOL), (ZEROS, None), ((2, 3, 2, 3), (0, 1, 0, 1))),
    ):
        images = torch.randn(3, 3, *size, device="cuda").to(image_dtype)
        weight = torch.randn(64, 3, 7, 7, device="cuda").to(dtype)
        compare(images.contiguous(memory_format=layout), weight, padding, pool_padding)


def test_wide_models_and_large_batches() -> None:
    for channels, batch in ((192, 5), (64, 128), (256, 1)):
        images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(channels, 3, 7, 7, device="cuda", dtype=torch.bfloat16)
        first, second = (compare(images, weight) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("pool_padding", [POOL, None])
def test_nan_and_infinity(pool_padding) -> None:
    images = torch.randn(1, 3, 45, 48, device="cuda", dtype=torch.bfloat16)
    images[0, 1, 20, 4], images[0, 0, 30, 21] = float("nan"), float("inf")
    filters = prepare_filters(torch.randn(64, 3, 7, 7, device="cuda").bfloat16(), ZEROS)
    actual = stem(images, filters, ZEROS, pool_padding)
    plain = reference.stem_forward(images.double(), filters.double(), ZEROS, pool_padding)
    for marks in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(marks(actual), marks(plain))


def test_offsets_past_two_billion() -> None:
    need_memory(12)
    images = torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    filters = prepare_filters(torch.randn(64, 3, 7, 7, device="cuda").bfloat16(), ZEROS)
    with use_backend(stem="native"):
        many = stem(images.expand(2800, 3, 224, 224), filters, ZEROS, None)
        assert torch.equal(many[-1:], stem(images, filters, ZEROS, None))


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS])
def test_plans_and_graphs_call_it(layout) -> None:
    model = model_of("preactivation").cuda()
    images = torch.randn(2, 3, 64, 50, device="cuda").bfloat16().contiguous(memory_format=layout)
    with torch.inference_mode():
        actual = model(images, output_hidden_states=True)
        assert names_of(model)[:2] == ["begin", "stem"]
        with use_backend("reference"):
            plain = model(images, output_hidden_states=True)
            oracle = model_of("preactivation").cuda().double()
            oracle.load_state_dict(model.state_dict())
            exact = oracle(images.double(), output_hidden_states=True)
        for a, b, c in zip(
            actual.hidden_states, plain.hidden_states, exact.hidden_states, strict=True
        ):
            assert_within_contract(a, b, c)
        capture(model, images)
        assert torch.equal(model(images).last_hidden_state, actual.last_hidden_state)
