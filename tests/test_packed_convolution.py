"""Convolutions whose standardized weights are kept packed, and the plain ones where that cannot be."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast import reference
from bitfast.backends import use_backend
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops import packed_convolution as module
from bitfast.ops.kept_weights import MOST_FORMS, MOST_TENSORS, kept_weights
from bitfast.ops.packed_convolution import (
    OP,
    add_convolve_packed_,
    can_use_packed_weight,
    packed_convolution,
    packed_weight,
    uses_packed_weights,
    why_not_packed,
)
from tests.threads import in_threads
from tests.tolerances import Triples, assert_draws_within_contract

EPS = 1e-8
DTYPES = (torch.float32, torch.bfloat16)
PLAIN = ((1, 1), (0, 0), (1, 1))

pytestmark = pytest.mark.usefixtures("no_gradient")


def needs_packing(dtype: torch.dtype) -> None:
    if not uses_packed_weights("cpu", dtype):
        pytest.skip(f"convolutions of {dtype} are not packed: {why_not_packed(dtype)}")


@pytest.fixture
def packings(monkeypatch: Any) -> list[torch.Size]:
    """The input shapes for which weights were packed."""
    needs_packing(torch.float32)
    shapes: list[torch.Size] = []
    original = module._pack

    def count(weight: Tensor, shape: torch.Size, geometry: Any) -> Tensor:
        shapes.append(shape)
        return original(weight, shape, geometry)

    monkeypatch.setattr(module, "_pack", count)
    return shapes


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def plain(x: Tensor, weight: Tensor, geometry: Any) -> Tensor:
    standardized = reference.weight_standardization_forward(weight, EPS, x.dtype)[0]
    return F.conv2d(x, standardized, None, *geometry)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "shape"),
    [
        (1, 1, 0, 1, (2, 16, 9, 7)),
        (1, 2, 0, 1, (2, 16, 9, 7)),
        (3, 1, 1, 1, (1, 16, 14, 14)),
        (3, 2, 1, 1, (3, 16, 15, 10)),
        (3, 1, 2, 2, (2, 16, 9, 9)),
        (7, 2, 3, 1, (2, 3, 33, 47)),
        (1, 1, 0, 1, (4, 40, 1, 1)),
        (3, 1, 1, 1, (1, 5, 4, 4)),
    ],
)
def test_results_are_within_the_contract(kernel, stride, padding, dilation, shape, dtype):
    needs_packing(dtype)
    geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)

    def draw() -> Triples:
        x = images(*shape, dtype=dtype)
        weight = nn.Parameter(torch.randn(24, shape[1], kernel, kernel).to(dtype))
        exact = plain(x.double(), weight.double(), geometry)
        result = packed_convolution(x, weight, EPS, geometry)
        assert result.is_contiguous(memory_format=torch.channels_last)
        total = images(*result.shape, dtype=dtype)
        expected = total + plain(x, weight, geometry)
        exact_total = total.double() + exact
        packed = packed_weight(weight, EPS, geometry, dtype, x.shape)
        add_convolve_packed_(x, packed, total, geometry)
        return {
            "result": (result, plain(x, weight, geometry), exact),
            "total": (total, expected, exact_total),
        }

    assert_draws_within_contract(draw, 3)


# ---- what is kept ---------------------------------------------------------------------------------


def test_a_weight_is_packed_once_for_one_shape(packings):
    weight = nn.Parameter(torch.randn(8, 16, 3, 3))
    geometry = ((1, 1), (1, 1), (1, 1))
    for _ in range(3):
        packed_convolution(images(2, 16, 9, 9), weight, EPS, geometry)
    assert packings == [(2, 16, 9, 9)]


def tensors_of(weight: Tensor) -> list[Tensor]:
    """The different tensors that are kept of a weight."""
    return list({id(t): t for t in kept_weights._kept[id(weight)].by_form.values()}.values())


def test_changed_sizes_are_followed(packings):
    """Also those for which oneDNN packs otherwise; and each shape is tried out once."""
    weight = nn.Parameter(torch.randn(512, 2048, 1, 1))
    shapes = [(1, 2048, n, n) for n in (7, 14, 7, 14, 8, 3)] + [(8, 2048, 7, 7)]
    for shape in shapes:
        x = images(*shape)
        torch.testing.assert_close(
            packed_convolution(x, weight, EPS, PLAIN), plain(x, weight, PLAIN), rtol=1e-4, atol=1e-3
        )
        assert kept_weights.find(weight, (OP, EPS, PLAIN, x.dtype, x.shape)) is not None
        assert len(tensors_of(weight)) <= MOST_TENSORS
    alike = nn.Parameter(torch.randn(8, 8, 3, 3))
    packings.clear()
    for size in (9, 11, 9, 11, 9):
        packed_convolution(images(2, 8, size, size), alike, EPS, PLAIN)
    assert len(packings) == 2


def test_what_is_packed_alike_is_kept_once(packings):
    if not hasattr(torch.ops.mkldnn, "data_ptr"):
        pytest.skip("this torch does not show what it packed")
    weight = nn.Parameter(torch.randn(8, 16, 1, 1))
    for size in range(5, 5 + 2 * MOST_TENSORS):
        packed_convolution(images(1, 16, size, size), weight, EPS, PLAIN)
    assert len(packings) == 2 * MOST_TENSORS
    packed_convolution(images(1, 16, 5, 5), weight, EPS, PLAIN)
    assert len(packings) == 2 * MOST_TENSORS
    assert len(tensors_of(weight)) == 1


def test_the_number_of_remembered_shapes_is_bounded(packings):
    weight = nn.Parameter(torch.randn(4, 4, 1, 1))
    for size in range(1, MOST_FORMS + 20):
        packed_convolution(images(1, 4, size, 3), weight, EPS, PLAIN)
    assert len(kept_weights._kept[id(weight)].by_form) <= MOST_FORMS


def test_a_weight_that_dies_takes_its_packed_copy_along(packings):
    weight = nn.Parameter(torch.randn(8, 16, 1, 1))
    packed_convolution(images(2, 16, 9, 9), weight, EPS, PLAIN)
    key = id(weight)
    assert key in kept_weights._kept
    del weight
    gc.collect()
    assert key not in kept_weights._kept


def test_eps_dtype_and_geometry_are_told_apart(packings):
    weight = nn.Parameter(torch.randn(8, 16, 3, 3) * 1e-3)
    x = images(1, 16, 9, 9)
    cases: list[tuple[Tensor, float, Any]] = [
        (x, 1e-8, ((1, 1), (1, 1), (1, 1))),
        (x, 1e-2, ((1, 1), (1, 1), (1, 1))),
        (x, 1e-2, ((2, 2), (1, 1), (1, 1))),
    ]
    if uses_packed_weights("cpu", torch.bfloat16):
        cases.append((x.bfloat16(), 1e-2, ((2, 2), (1, 1), (1, 1))))
    for x, eps, geometry in cases:
        standardized = reference.weight_standardization_forward(weight, eps, x.dtype)[0]
        torch.testing.assert_close(
            packed_convolution(x, weight, eps, geometry), F.conv2d(x, standardized, None, *geometry),
            rtol=1e-2, atol=1e-2,
        )  # fmt: skip
    assert len(packings) == len(cases)


def test_weights_made_in_inference_mode_are_right_but_not_kept(packings):
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(8, 16, 1, 1), requires_grad=False)
        x = images(2, 16, 5, 5)
        assert not can_use_packed_weight(x, weight)
        for _ in range(2):
            result = torch.ops.bitfast.packed_convolution.native(x, weight, EPS, *PLAIN)
            torch.testing.assert_close(result, plain(x, weight, PLAIN), rtol=1e-4, atol=1e-4)
            weight.mul_(torch.rand_like(weight))
    assert id(weight) not in kept_weights._kept


def test_packing_in_inference_mode_serves_outside_of_it(packings):
    weight = nn.Parameter(torch.randn(8, 16, 1, 1))
    x = images(2, 16, 5, 5)
    with torch.inference_mode():
        first = packed_convolution(x, weight, EPS, PLAIN)
    assert torch.equal(packed_convolution(x, weight, EPS, PLAIN), first)
    assert len(packings) == 1


def test_threads_may_pack_at_the_same_time(packings):
    weight = nn.Parameter(torch.randn(64, 2048, 1, 1))
    inputs = [images(1 + n % 2, 2048, 7 + 7 * (n % 3), 7) for n in range(6)]
    expected = [plain(x, weight, PLAIN) for x in inputs]

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                result = packed_convolution(inputs[number], weight, EPS, PLAIN)
                torch.testing.assert_close(result, expected[number], rtol=1e-4, atol=1e-3)

    in_threads(work, len(inputs))


# ---- where it cannot be ---------------------------------------------------------------------------


@pytest.fixture
def layer() -> WeightStandardizedConv2d:
    return WeightStandardizedConv2d(16, 8, 3, eps=EPS).eval()


def test_the_layer_packs_only_where_it_may(layer, packings):
    x = images(2, 16, 9, 9)
    expected = plain(x, layer.weight, layer.geometry)

    def check(packed: int) -> None:
        packings.clear()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert len(packings) == packed

    check(1)
    kept_weights.drop([layer.weight])
    with torch.enable_grad():
        check(0)
    for demand in ("packed_convolution", "weight_standardization"):
        with use_backend(**{demand: "reference"}):
            check(0)
    with use_backend("reference"):
        check(0)
    with torch.backends.mkldnn.flags(enabled=False):
        check(0)
    x = x.contiguous()
    check(0)
    x = x.double()
    layer.double()
    expected = expected.double()
    check(0)


def test_a_torch_without_the_operators_is_served_plainly(layer, monkeypatch):
    x = images(2, 16, 9, 9)

    def missing(*_: Any) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(module, "convolve_packed", missing)
    module._why_not_packed.cache_clear()
    try:
        assert "no such operator" in str(why_not_packed(torch.float32))
        assert not uses_packed_weights("cpu", torch.float32)
        torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.geometry))
    finally:
        module._why_not_packed.cache_clear()


def test_operators_that_compute_something_else_are_not_used(monkeypatch):
    needs_packing(torch.float32)
    original = module.convolve_packed
    monkeypatch.setattr(module, "convolve_packed", lambda *arguments: original(*arguments) * 2)
    module._why_not_packed.cache_clear()
    try:
        assert "other results" in str(why_not_packed(torch.float32))
    finally:
        module._why_not_packed.cache_clear()


def test_the_trial_does_not_depend_on_who_asks():
    needs_packing(torch.float32)
    for context in (
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        torch.enable_grad(),
    ):
        module._why_not_packed.cache_clear()
        with context:
            assert why_not_packed(torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_have_a_reason(dtype):
    assert str(dtype) in str(why_not_packed(dtype))


def test_torches_that_do_not_show_what_they_packed(monkeypatch, packings):
    monkeypatch.setattr(module, "_hold_the_same", lambda *_: False)
    weight = nn.Parameter(torch.randn(8, 16, 1, 1))
    sizes = range(5, 6 + MOST_TENSORS)  # one more than are kept
    for size in (*sizes, 5):
        x = images(1, 16, size, size)
        torch.testing.assert_close(
            packed_convolution(x, weight, EPS, PLAIN), plain(x, weight, PLAIN), rtol=1e-4, atol=1e-4
        )
    assert len(packings) == len(sizes) + 1
    assert len(tensors_of(weight)) == MOST_TENSORS


# ---- compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    needs_packing(dtype)
    x, weight = images(2, 16, 9, 7, dtype=dtype), nn.Parameter(torch.randn(8, 16, 3, 3).to(dtype))
    geometry = ([2, 2], [1, 1], [1, 1])
    arguments = (x, weight.detach(), EPS, *geometry)
    torch.library.opcheck(torch.ops.bitfast.packed_convolution.native, arguments)
