"""The Python side of the CUDA kernels of norm_convolution: what they suit, and how they are called."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast import extension, reference
from bitfast.execution.weights import kept_packed_filters
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops import first_use, native_cuda, norm_convolution_cuda
from bitfast.ops.kept_weights import kept_weights
from bitfast.ops.norm_convolution import OP, Norm
from bitfast.ops.norm_convolution_cuda import (
    Call,
    Convolution,
    FactorsCall,
    PartialsCall,
    Prepared,
    Tiling,
    cell_channels_of,
    factors_shape,
    pack_filters,
    partials_shape,
    prepare_convolution,
    why_no_factors,
    why_no_kernels,
    why_unsuited,
)
from bitfast.ops.norm_convolution_fused import (
    CHOSEN,
    CUT,
    cell_moments,
    check_first_use,
    fused_convolution,
)
from bitfast.ops.weight_standardization import weight_standardization
from tests.emulated import ROOT
from tests.interpreter import DEVICE
from tests.norm_convolution_kernels import Kernels, at, serve
from tests.operator_calls import calls_of
from tests.tolerances import assert_within_contract

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has the same for a card")

NO_ZEROS, ONE_ZERO = (0, 0, 0, 0), (1, 1, 1, 1)
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@pytest.fixture
def kernels(monkeypatch) -> Kernels:
    """The kernels serve for CPU tensors, without being demanded."""
    return serve(monkeypatch)


# ---- structures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Tiling, Call, Prepared, PartialsCall, FactorsCall])
def test_structures_are_those_of_the_header(structure) -> None:
    header = (ROOT / "csrc" / "norm_convolution_cuda.h").read_text()
    (body,) = re.findall(rf"struct {structure.__name__} {{(.*?)}};", header, flags=re.DOTALL)
    types = {
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "float": ctypes.c_float,
        "double": ctypes.c_double,
        "Tiling": Tiling,
    }
    fields = [
        (name.strip(), types[kind])
        for kind, names in re.findall(
            r"^ *(int32_t|int64_t|float|double|Tiling) ([\w, ]+);", body, re.MULTILINE
        )
        for name in names.split(",")
    ]
    found = [(name, kind) for name, kind in structure._fields_ if name != "arguments"]
    assert found == fields
    for size in re.findall(r"alignas\(8\) unsigned char arguments\[(\d+)\]", body):
        assert structure.arguments.size == int(size)


def test_what_a_call_tells() -> None:
    convolution = Convolution(
        (5, 64, 15, 14), FLOAT16, 3, 2, (0, 1, 1, 2), 128, 32, "relu", True, 4
    )
    call = Call.of(convolution)
    told = {name: getattr(call, name) for name, _ in Call._fields_ if name != "tiling"}
    assert call.tiling.columns == 0, "the kernels choose"
    assert told == {
        "dtype": 2, "has_norm": 1, "activation": 1, "images": 5, "height": 15, "width": 14, "channels": 64,
        "kernel_size": 3, "stride": 2, "top": 0, "left": 1, "result_height": 7, "result_width": 8,
        "result_channels": 128, "second_channels": 32, "has_residual": 1, "cell_channels": 4,
    }  # fmt: skip
    for activation, expected in ((None, (0, 0)), ("none", (1, 0)), ("relu", (1, 1))):
        call = Call.of(convolution._replace(activation=activation))
        assert (call.has_norm, call.activation) == expected


@pytest.mark.parametrize(
    ("out", "channels", "size"), [(8, 8, 1), (16, 64, 3), (24, 72, 3), (8, 200, 1)]
)
def test_packed_filters(out, channels, size) -> None:
    filters = torch.randn(out, channels, size, size).bfloat16()
    filters = filters.contiguous(memory_format=torch.channels_last)
    packed = pack_filters(filters)
    assert packed.shape == (-(-channels // 64), size**2, 8, out, 8)
    assert packed.is_contiguous()
    assert packed.dtype == filters.dtype
    for channel in range(packed.shape[0] * 64):
        found = packed[channel // 64, :, channel % 64 // 8, :, channel % 8]
        expected = filters[:, channel].flatten(1).T if channel < channels else 0 * found
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"must have shape \(out, in, k, k\)"):
        pack_filters(filters[:, :, :, :0])


# ---- what they suit -----------------------------------------------------------------------------------------

SUITED = Convolution((2, 64, 14, 15), BFLOAT16, 3, 1, ONE_ZERO, 128, 0, "relu", False, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kernel_size": 1, "padding": NO_ZEROS}, None),
        ({"stride": 2, "padding": (0, 1, 0, 1)}, None),
        ({"padding": (2, 2, 2, 0)}, None),
        ({"shape": (1, 8, 1, 1), "activation": None, "cell_channels": 0}, None),
        ({"activation": "none", "second_channels": 8, "adds": True, "dtype": FLOAT16}, None),
        ({"shape": (4000, 2048, 300, 300)}, None),
        ({"dtype": torch.float32}, "for bfloat16 and float16, not torch.float32"),
        ({"kernel_size": 7}, "for filters of 1x1 and 3x3, not 7x7"),
        ({"stride": 3}, "for strides of 1 and 2, not 3"),
        ({"activation": "gelu"}, "without activation, not gelu"),
        ({"shape": (2, 12, 14, 14)}, "channels must be multiples of 8, and 12 is not"),
        ({"out_channels": 60}, "multiples of 8, and 60"),
        ({"second_channels": 4}, "multiples of 8, and 4"),
        ({"shape": (0, 64, 14, 14)}, "nothing to convolve"),
        ({"shape": (2, 64, 0, 14)}, "nothing to convolve"),
        ({"out_channels": 0}, "nothing to convolve"),
        ({"padding": (1, 1, 3, 1)}, r"0 to 2 zeros, .*; there are \(1, 1, 3, 1\)"),
        ({"padding": (-1, 1, 1, 1)}, "0 to 2 zeros"),
        ({"kernel_size": 1}, "0 to 0 zeros"),
        ({"shape": (2, 64, 2, 9), "padding": NO_ZEROS}, "images of 2x9 are smaller than a window"),
        ({"cell_channels": 16}, "2, 4 or 8 channels, not 16"),
        ({"cell_channels": 1}, "2, 4 or 8 channels, not 1"),
        ({"shape": (1, 8, 2**16, 2**15)}, "exceed 32 bits"),
        ({"out_channels": 2**31}, "exceed 32 bits"),
    ],
)
def test_why_a_convolution_is_unsuited(changes, reason) -> None:
    found = why_unsuited(SUITED._replace(**changes))
    if reason is None:
        assert found is None
        return
    assert re.search(reason, str(found))
    with pytest.raises(ValueError, match=reason):
        prepare_convolution(SUITED._replace(**changes))


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [(256, 32, 8), (64, 32, 2), (128, 32, 4), (192, 32, 2), (96, 32, 0), (64, 1, 8), (65, 2, 0), (8, 0, 0)],
)  # fmt: skip
def test_channels_of_a_cell(channels, groups, expected) -> None:
    assert cell_channels_of(channels, groups) == expected
    assert (why_no_factors(channels, groups) is None) == (expected > 0)
    if expected == 0:
        assert f"there are {channels} in {groups} groups" in str(why_no_factors(channels, groups))


def test_channels_that_are_no_multiple_have_no_factors() -> None:
    assert cell_channels_of(12, 3) == 4
    assert "multiples of 8" in str(why_no_factors(12, 3))


# ---- the function -------------------------------------------------------------------------------------------


def draw_map(*shape: int, dtype: torch.dtype = BFLOAT16, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)


def draw_norm(channels: int, groups: int, activation: str = "relu", device: str = "cpu") -> Norm:
    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    return Norm(weight.bfloat16(), bias, groups, 1e-5, activation)


def draw_filters(
    out: int, channels: int, size: int, dtype: torch.dtype = BFLOAT16, device: str = "cpu"
) -> Tensor:
    return (
        draw_map(out, channels, size, size, dtype=dtype, device=device)
        / (channels * size**2) ** 0.5
    )


def plain(
    x: Tensor, norm: Norm | None, filters: Tensor, stride: int, padding: Any, residual: Tensor | None
) -> Tensor:  # fmt: skip
    """The same by plain PyTorch, in the dtype of x."""
    if norm is not None:
        weight, bias, *others = norm
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        x = reference.group_norm_act_forward(x, weight.to(dtype), bias.to(dtype), *others)[0]
    top, bottom, left, right = padding
    result = F.conv2d(F.pad(x, (left, right, top, bottom)), filters, None, stride)
    return result if residual is None else result + residual


def compare(x: Tensor, norm: Norm | None, filters: Tensor, found: Tensor, *others: Any) -> None:
    *geometry, residual = others
    doubled = None if residual is None else residual.double()
    oracle = plain(x.double(), norm, filters.double(), *geometry, doubled)
    assert_within_contract(found, plain(x, norm, filters, *geometry, residual), oracle)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "groups", "size", "stride", "padding", "dtype"),
    [
        ((2, 64, 12, 11), 32, 1, 1, NO_ZEROS, BFLOAT16),
        ((2, 72, 9, 10), 4, 3, 1, ONE_ZERO, FLOAT16),
        ((3, 32, 9, 8), 4, 3, 2, (0, 1, 0, 1), BFLOAT16),
        ((1, 16, 7, 20), 2, 1, 2, NO_ZEROS, FLOAT16),
        ((1, 8, 1, 2), 1, 3, 1, (2, 2, 1, 0), BFLOAT16),
    ],
)
def test_the_function(kernels, shape, groups, size, stride, padding, dtype) -> None:
    """A chain of two: the first measures x, the second takes what the first has measured."""
    x, norm = draw_map(*shape, dtype=dtype) + 2, draw_norm(shape[1], groups)
    filters, others = (draw_filters(out, shape[1], size, dtype) for out in (32, 48))
    geometry = stride, padding
    residual = draw_map(*plain(x, None, filters, *geometry, None).shape, dtype=dtype)
    before = x.clone(), residual.clone()
    found = fused_convolution(
        x, norm, pack_filters(filters), stride=stride, padding=padding, residual=residual,
        next_groups=8, second_packed=pack_filters(others),
    )  # fmt: skip
    compare(x, norm, filters, found.result, *geometry, residual)
    compare(x, norm, others, found.second, *geometry, None)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    cells = found.result.double().reshape(shape[0], 8, -1)
    moments = torch.stack([cells.mean(2), cells.var(2, correction=0)])
    torch.testing.assert_close(cell_moments(found.partials, 32), moments, rtol=1e-4, atol=1e-5)
    following, filters = draw_norm(32, 4, "none"), draw_filters(16, 32, 1, dtype)
    last = fused_convolution(
        found.result, following, pack_filters(filters), partials=found.partials
    )
    compare(found.result, following, filters, last.result, 1, NO_ZEROS, None)
    assert last[1:] == (None, None)


def test_without_a_norm(kernels) -> None:
    x, filters = draw_map(2, 24, 9, 9), draw_filters(16, 24, 3)
    found = fused_convolution(x, None, pack_filters(filters), padding=ONE_ZERO, next_groups=2)
    compare(x, None, filters, found.result, 1, ONE_ZERO, None)
    assert found.partials.shape[2] == 1 + 2


def test_what_is_launched(kernels) -> None:
    x, packed = draw_map(1, 16, 5, 5), pack_filters(draw_filters(16, 16, 1))
    result = fused_convolution(x, None, packed, next_groups=2)
    assert kernels.calls == ["norm_convolution"]
    fused_convolution(x, draw_norm(16, 2), packed, partials=result.partials)
    assert kernels.calls[1:] == ["norm_convolution_factors", "norm_convolution"]
    fused_convolution(x, draw_norm(16, 2), packed)
    launched = ["norm_convolution_partials", "norm_convolution_factors", "norm_convolution"]
    assert kernels.calls[3:] == launched


X, PACKED = torch.zeros(2, 16, 5, 5, dtype=BFLOAT16), torch.zeros(1, 1, 8, 24, 8, dtype=BFLOAT16)
X = X.contiguous(memory_format=torch.channels_last)
NORM = Norm(torch.ones(16), torch.zeros(16), 2, 1e-5, "relu")
MISALIGNED = torch.zeros(2 * 16 * 25 + 1, dtype=BFLOAT16)[1:].view(2, 5, 5, 16).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": "images"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": X.float()}, TypeError, "x must be of torch.bfloat16 or torch.float16, not torch.flo"),
        ({"x": X.contiguous()}, ValueError, "dense in channels_last; got"),
        ({"x": X[0]}, ValueError, "x must have shape"),
        ({"x": MISALIGNED}, ValueError, "x must begin at a multiple of 16 bytes"),
        ({"packed": PACKED.half()}, TypeError, "packed must be of torch.bfloat16, not torch.float16"),
        ({"packed": PACKED[0]}, ValueError, "packed must come from pack_filters, for 16 input chan"),
        ({"packed": PACKED.repeat(2, 1, 1, 1, 1)}, ValueError, r"\(1, 1 or 9, 8, out, 8\); got"),
        ({"packed": PACKED.repeat(1, 4, 1, 1, 1)}, ValueError, "must come from pack_filters"),
        ({"second_packed": PACKED.repeat(1, 9, 1, 1, 1)}, ValueError, "second_packed must hold filt"),
        ({"second_packed": PACKED[..., :4]}, ValueError, "second_packed must come from pack_filters"),
        ({"stride": 3}, ValueError, "no kernel for this convolution of 16 channels: .* not 3"),
        ({"padding": ONE_ZERO}, ValueError, "0 to 0 zeros"),
        ({"padding": (1, 1)}, ValueError, "padding must be .top, bottom, left, right."),
        ({"norm": NORM._replace(activation="gelu")}, ValueError, "not gelu"),
        ({"norm": NORM._replace(weight=torch.ones(8))}, ValueError, "norm.weight must have the 16"),
        ({"norm": NORM._replace(bias=torch.ones(16).double())}, TypeError, "norm.bias must be of"),
        ({"norm": NORM._replace(num_groups=16)}, ValueError, "norm.num_groups, 16, does not suit x"),
        ({"partials": torch.zeros(2, 3, 3, 1)}, ValueError, "partials must have the shape .2, strips"),
        ({"partials": torch.zeros(2, 3, 17, 2)}, ValueError, "2 or 4 or 8 cells for 16 channels in 2"),
        ({"partials": torch.zeros(2, 3, 3, 2).double()}, TypeError, "partials must be of torch.float32"),
        ({"norm": None, "partials": torch.zeros(2, 3, 3, 2)}, ValueError, "where norm is None"),
        ({"next_groups": 5}, ValueError, "next_groups, 5, does not suit the result: .* 24 in 5"),
        ({"residual": X}, ValueError, r"residual must have the result's shape \(2, 24, 5, 5\)"),
        ({"residual": X.new_zeros(2, 24, 5, 5)}, ValueError, "dense in channels_last"),
        ({"residual": X.float()}, TypeError, "residual must be of torch.bfloat16"),
        ({"packed": PACKED.to("meta")}, ValueError, "packed must be on cpu, where x is"),
        ({"x": X.clone().requires_grad_()}, RuntimeError, "x requires a gradient, .*no_grad"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(kernels, changes, error, message) -> None:
    arguments = {"x": X, "norm": NORM, "packed": PACKED, **changes}
    with pytest.raises(error, match=message):
        fused_convolution(**arguments)
    assert kernels.calls == []


def test_no_gradient_is_no_obstacle_where_none_is_recorded(kernels) -> None:
    x, norm = X.clone().requires_grad_(), NORM._replace(weight=nn.Parameter(torch.ones(16)))
    with torch.no_grad():
        assert not fused_convolution(x, norm, PACKED).result.requires_grad


def test_an_entry_s_words_are_raised(kernels) -> None:
    too_many = SUITED._replace(shape=(2**30, 8, 14, 15))
    assert why_unsuited(too_many) is None
    with pytest.raises(
        RuntimeError, match=f"bitfast_{OP}_prepare: .*more pixels than one launch takes"
    ):
        prepare_convolution(too_many)
    too_large = SUITED._replace(shape=(1, 8, 2**15, 2**15))
    assert prepare_convolution(too_large._replace(cell_channels=0)).strips == 0
    with pytest.raises(RuntimeError, match="images of so many pixels cannot be measured"):
        prepare_convolution(too_large)
    run = prepare_convolution(SUITED).run
    with pytest.raises(RuntimeError, match=f"bitfast_{OP}: .*an address is missing"):
        run(0, 16, 16, 16, 0, 0, 16, 0, 0)


def test_what_is_prepared(kernels) -> None:
    prepared = prepare_convolution(SUITED._replace(second_channels=16))
    assert prepared.result_shape == (2, 128, 14, 15)
    assert prepared.second_shape == (2, 16, 14, 15)
    assert prepared.strips == prepared.launch.strips > 0
    prepared = prepare_convolution(SUITED._replace(cell_channels=0))
    assert (prepared.second_shape, prepared.strips) == (None, 0)
    assert partials_shape(3, 5, 64, 8) == (3, 5, 9, 2)
    assert factors_shape(3, 64) == (3, 2, 64)


# ---- before the first use -----------------------------------------------------------------------------------


def test_the_check_before_the_first_use(kernels) -> None:
    assert first_use._checks[OP] is check_first_use
    assert check_first_use(torch.device("cpu"), (*CHOSEN, *CUT)) is None


@pytest.mark.parametrize(
    ("launch", "address", "first", "found"),
    [
        ("norm_convolution", 5, 0, "the error of the result"),
        ("norm_convolution", 6, 2, "the error of the statistics' mean"),
        ("norm_convolution_factors", 4, 0, "the error of the result"),
    ],
)
def test_the_check_notices_what_is_wrong(kernels, launch, address, first, found) -> None:
    """Some numbers are wrong that a launch has written at one of its addresses."""

    def spoil(*arguments: int) -> None:
        if arguments[address]:
            at(arguments[address], torch.float32, (40,))[first:] *= 1.5

    kernels.after[launch] = spoil
    assert found in str(check_first_use(torch.device("cpu"), CHOSEN))


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 0), "wgmma of sm_90a, are for compute capability 9.0; the GPU's is 8.0"),
        ((10, 0), "the GPU's is 10.0"),
        ((9, 0), None),
    ],
)
def test_the_kernels_are_for_one_generation(monkeypatch, capability, reason) -> None:
    monkeypatch.setattr(extension, "CUDA", extension.SharedLibrary("a file", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(first_use, "_problems", {OP: None})
    found = why_no_kernels()
    assert found is None if reason is None else reason in str(found)


def test_without_the_extension_the_reason_is_that_of_the_extension() -> None:
    if extension.CUDA.problem is not None:
        assert why_no_kernels() == extension.CUDA.problem


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def convolutions() -> list[WeightStandardizedConv2d]:
    sizes = [(16, 24, 1, 1e-8), (72, 16, 3, 1e-8), (8, 16, 1, 1e-6)]
    return [WeightStandardizedConv2d(i, o, k, bias=False, eps=eps) for i, o, k, eps in sizes]


def test_packed_weights_are_kept(convolutions) -> None:
    with calls_of("weight_standardization_all", lambda given: len(given[0])) as calls:
        packed = kept_packed_filters(convolutions, BFLOAT16)
    assert calls.noted == [2, 1], "those of the same eps together"
    for convolution in convolutions:
        standardized = weight_standardization(convolution.weight, convolution.eps, BFLOAT16)
        assert torch.equal(packed[convolution], pack_filters(standardized))
        assert not packed[convolution].requires_grad
    again = kept_packed_filters(convolutions, BFLOAT16)
    assert all(again[convolution] is packed[convolution] for convolution in convolutions)
    half = kept_packed_filters(convolutions, FLOAT16)
    assert all(half[convolution].dtype == FLOAT16 for convolution in convolutions)
    assert len(kept_weights._kept[id(convolutions[0].weight)].by_form) == 2


def test_packed_weights_are_made_anew_after_a_change(convolutions) -> None:
    first, *others = convolutions
    before = kept_packed_filters(convolutions, BFLOAT16)
    with torch.no_grad():
        first.weight.normal_()
    after = kept_packed_filters(convolutions, BFLOAT16)
    assert not torch.equal(after[first], before[first])
    assert all(after[other] is before[other] for other in others)


def test_tied_weights_are_packed_once(convolutions) -> None:
    first, second = convolutions[0], convolutions[0].__class__(16, 24, 1, bias=False, eps=1e-8)
    second.weight = first.weight
    packed = kept_packed_filters([first, second], BFLOAT16)
    assert packed[first] is packed[second]


def test_packed_weights_of_inference_mode_serve_outside(convolutions) -> None:
    with torch.inference_mode():
        packed = kept_packed_filters(convolutions, BFLOAT16)
    assert not any(filters.is_inference() for filters in packed.values())


def test_the_library_is_asked_for_once_prepared(monkeypatch) -> None:
    """What is said to be suited needs no library."""
    monkeypatch.setattr(native_cuda, "library", lambda: pytest.fail("asked"))
    assert norm_convolution_cuda.why_unsuited(SUITED) is None
