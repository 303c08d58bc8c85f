"""The CUDA kernels of the stem, run on the CPU, against plain PyTorch in float64; and plans that call them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bitfast import backends, reference
from bitfast.backends import Kernel, use_backend
from bitfast.ops import first_use, native_cuda
from bitfast.ops.flops import register_flop_formulas
from bitfast.ops.same_padding import same_padding
from bitfast.ops.stem import DTYPES as STEM_DTYPES
from bitfast.ops.stem import OP, StemCall, prepare_filters, stem
from tests.emulated import A100, H100, at_page_end, call, emulate, library
from tests.interpreter import DEVICE
from tests.test_execution_cuda import plans
from tests.tiny_models import ours
from tests.tolerances import assert_within_contract

Sides = tuple[int, int, int, int]

DTYPES = sorted(STEM_DTYPES, key=str)
ZEROS, POOL = (3, 3, 3, 3), (1, 1, 1, 1)
ONE_MULTIPROCESSOR = (90, 1, 227 * 1024)
"""Its blocks take long strips."""
DEVICES = [A100, H100, ONE_MULTIPROCESSOR, (80, 3, 99 * 1024)]

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def images_of(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Images that end where their memory does."""
    return at_page_end(torch.randn(shape).to(dtype).contiguous(memory_format=layout))


def run(
    images: Tensor,
    weight: Tensor,
    padding: Sides,
    pool_padding: Sides | None,
    device: tuple[int, int, int] = H100,
    seed: int = 0,
) -> Tensor:
    """Call the entry; its result was full of NaN, and ends where its memory does."""
    kernels = library("csrc/stem.cu")
    emulate(kernels, device, seed)
    size = reference.stem_size(images.shape[2:], padding, pool_padding)
    empty = torch.empty(images.shape[0], weight.shape[0], *size, dtype=weight.dtype)
    result = at_page_end(empty.contiguous(memory_format=CHANNELS_LAST), float("nan"))
    prepared = StemCall.of(
        images.shape, images.stride(), images.dtype, weight.dtype, weight.shape[0], padding, pool_padding
    )  # fmt: skip
    filters = at_page_end(prepare_filters(weight, padding))
    call(kernels.bitfast_stem, ctypes.byref(prepared), None, images, filters, result)
    return result


def expected(images: Tensor, weight: Tensor, padding: Sides, pool_padding: Sides | None) -> Tensor:
    """The same by plain PyTorch, in the dtype of the weight."""
    filters = prepare_filters(weight, padding)
    return reference.stem_forward(images, filters, padding, pool_padding)


def compare(
    images: Tensor, weight: Tensor, padding: Sides, pool_padding: Sides | None, **options: Any
) -> None:
    actual = run(images, weight, padding, pool_padding, **options)
    rounded = images.to(weight.dtype)
    arguments = padding, pool_padding
    plain = expected(rounded, weight, *arguments)
    oracle = expected(rounded.double(), weight.double(), *arguments)
    assert_within_contract(actual, plain, oracle, f"{images.shape} {arguments} {options}")


@pytest.mark.parametrize(
    ("dtype", "image_dtype", "layout", "device"),
    [
        (torch.bfloat16, torch.bfloat16, CONTIGUOUS, H100),
        (torch.float16, torch.float32, CHANNELS_LAST, A100),
        (torch.bfloat16, torch.float32, CONTIGUOUS, ONE_MULTIPROCESSOR),
    ],
)
def test_full_size(dtype, image_dtype, layout, device) -> None:
    """The stem of R50x1."""
    images = images_of((1, 3, 224, 224), image_dtype, layout)
    compare(images, torch.randn(64, 3, 7, 7).to(dtype), ZEROS, POOL, device=device)


@pytest.mark.parametrize(
    ("size", "channels", "pool_padding"),
    [
        ((20, 224), 64, None),
        ((23, 640), 64, POOL),  # tiles beside each other
        ((22, 384), 64, (0, 1, 0, 1)),
        ((17, 30), 192, POOL),  # wide models
        ((5, 460), 128, None),
        ((1, 1), 64, POOL),
        ((1, 1), 64, None),
        ((2, 3), 64, (2, 2, 2, 2)),
        ((200, 3), 64, POOL),
    ],
)
@pytest.mark.parametrize("device", [A100, H100])
def test_sizes(size, channels, pool_padding, device) -> None:
    images = images_of((2, 3, *size), torch.bfloat16, CHANNELS_LAST)
    compare(images, torch.randn(channels, 3, 7, 7).bfloat16(), ZEROS, pool_padding, device=device)


SIDES = st.tuples(*[st.integers(0, 6)] * 4)
POOL_SIDES = st.none() | st.tuples(*[st.integers(0, 2)] * 4)


@settings(max_examples=40)
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    padding=st.just(ZEROS) | st.just("same") | SIDES,
    pool_padding=st.just(POOL) | st.just("same") | POOL_SIDES,
    dtype=st.sampled_from(DTYPES),
    rounds=st.booleans(),
    layout=st.sampled_from([CHANNELS_LAST, CONTIGUOUS]),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 1000),
)
def test_odd_cases(
    images, size, padding, pool_padding, dtype, rounds, layout, device, seed
) -> None:
    torch.manual_seed(seed)
    if padding == "same":
        padding = tuple(same_padding(size, (7, 7), (2, 2), (1, 1)))
    conv_size = reference.stem_size(size, padding, None)
    if pool_padding == "same":
        pool_padding = tuple(same_padding(conv_size, (3, 3), (2, 2), (1, 1)))
    if min(conv_size) < 1 or min(reference.stem_size(size, padding, pool_padding)) < 1:
        return
    x = images_of((images, 3, *size), torch.float32 if rounds else dtype, layout)
    weight = torch.randn(64, 3, 7, 7).to(dtype)
    compare(x, weight, padding, pool_padding, device=device, seed=seed)


@pytest.mark.parametrize("image_dtype", [torch.float16, torch.float32])
def test_any_strides(image_dtype) -> None:
    weight = torch.randn(64, 3, 7, 7).half()
    wide = torch.randn(2, 4, 21, 50).to(image_dtype)
    views = [
        wide[:, 1:, :, 1:49],  # not aligned to words
        wide[:, :3, :, :31],
        wide[:, :3, :, ::2],
        wide.mT[:, :3],
        wide.permute(0, 2, 3, 1)
        .contiguous()
        .permute(0, 3, 1, 2)[:, :3],  # a fourth channel between
        wide[:1, :1].expand(2, 3, 21, 50),
    ]
    for images in views:
        compare(images, weight, ZEROS, POOL)


@pytest.mark.parametrize("device", [A100, H100, ONE_MULTIPROCESSOR])
@pytest.mark.parametrize("padding", [ZEROS, (2, 3, 2, 3)])
@pytest.mark.parametrize(
    ("image_dtype", "pool_padding"),
    [(torch.bfloat16, POOL), (torch.bfloat16, None), (torch.float32, POOL)],
)
def test_nan_and_infinity(device, padding, image_dtype, pool_padding) -> None:
    """They come out where plain PyTorch lets them come out, and nowhere else.

    They stand in the first, second, ... of the four rows that a step brings, and in even and odd columns.
    """
    images = images_of((1, 3, 45, 48), image_dtype, CHANNELS_LAST)
    for row, column, value in (
        (4, 4, "nan"), (13, 14, "inf"), (22, 25, "-inf"), (31, 35, "nan"), (41, 43, "inf")
    ):  # fmt: skip
        images[0, row % 3, row, column] = float(value)
    weight = torch.randn(64, 3, 7, 7).bfloat16()
    weight[5] = float("nan")
    actual = run(images, weight, padding, pool_padding, device)
    plain = expected(images.bfloat16().double(), weight.double(), padding, pool_padding)
    for marks in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(marks(actual), marks(plain))
    finite = plain.isfinite()
    torch.testing.assert_close(actual[finite].double(), plain[finite], rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize("device", [A100, H100])
def test_the_order_of_threads_makes_no_difference(device) -> None:
    """Nor does it how images are cut into strips."""
    images = images_of((2, 3, 41, 70), torch.bfloat16, CONTIGUOUS)
    weight = torch.randn(64, 3, 7, 7).bfloat16()
    for pool_padding in (POOL, None):
        results = [run(images, weight, ZEROS, pool_padding, device, seed) for seed in range(4)]
        results.append(run(images, weight, ZEROS, pool_padding, (*device[:1], 1, device[2])))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_offsets_past_two_billion() -> None:
    """The second image lies beyond 2^32 numbers; memory that nobody touches is not taken."""
    distance = 2**32 + 2
    memory = torch.empty(distance + 3 * 19 * 22, dtype=torch.bfloat16)
    images = memory.as_strided((2, 3, 19, 22), (distance, 19 * 22, 22, 1))
    images.copy_(torch.randn(images.shape))
    compare(images, torch.randn(64, 3, 7, 7).bfloat16(), ZEROS, POOL)


def test_no_images() -> None:
    images, filters = torch.empty(0, 3, 16, 16).bfloat16(), torch.zeros(64, 7, 8, 4).bfloat16()
    prepared = StemCall.of(
        images.shape, images.stride(), images.dtype, filters.dtype, 64, ZEROS, POOL
    )
    call(
        library("csrc/stem.cu").bitfast_stem, ctypes.byref(prepared), None, images, filters, images
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 0}, "must be bfloat16 or float16"),
        ({"image_dtype": 2}, "must have the dtype of the result, or float32"),
        ({"channels": 96}, "a multiple of 64"),
        ({"top": 7}, "smaller than the filters"),
        ({"pool_left": 3}, "smaller than its window"),
        ({"width": 0}, "must not be empty"),
    ],
)
def test_calls_that_are_refused(fields, message) -> None:
    images, filters = torch.zeros(1, 3, 16, 16).bfloat16(), torch.zeros(64, 7, 8, 4).bfloat16()
    prepared = StemCall.of(
        images.shape, images.stride(), images.dtype, filters.dtype, 64, ZEROS, POOL
    )
    for name, value in fields.items():
        setattr(prepared, name, value)
    kernels = library("csrc/stem.cu")
    result = torch.full((1, 64, 4, 4), 7.0)
    with pytest.raises(RuntimeError, match=message):
        call(kernels.bitfast_stem, ctypes.byref(prepared), None, images, filters, result)
    assert (result == 7).all()


# ---- the op, and plans --------------------------------------------------------------------------------------


@pytest.fixture
def kernels_on_the_cpu(monkeypatch) -> Iterator[None]:
    """Let the op, and the lowering for GPUs, use the kernels for CPU tensors."""
    kernels = library("csrc/stem.cu")
    emulate(kernels)
    served = {
        **backends._kernels,
        (OP, "native", "cpu"): Kernel(STEM_DTYPES, lambda: None, False, None, None),
    }
    monkeypatch.setattr(backends, "_kernels", served)
    monkeypatch.setattr(native_cuda, "library", lambda: kernels)
    with torch.no_grad(), use_backend(group_norm_act="triton"):
        yield


pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="tests/gpu has the same for a card")


def test_the_op_uses_the_kernel(kernels_on_the_cpu) -> None:
    images = torch.randn(2, 3, 18, 21)
    filters = prepare_filters(torch.randn(64, 3, 7, 7).bfloat16(), ZEROS)
    result = stem(images, filters, ZEROS, POOL)
    oracle = reference.stem_forward(images.bfloat16().double(), filters.double(), ZEROS, POOL)
    assert_within_contract(result, reference.stem_forward(images, filters, ZEROS, POOL), oracle)
    assert result.is_contiguous(memory_format=CHANNELS_LAST)
    misaligned = torch.empty(filters.numel() + 1, dtype=filters.dtype)[1:].view(filters.shape)
    assert torch.equal(stem(images, misaligned.copy_(filters), ZEROS, POOL), result)


SAME = {"global_padding": "same", "embedding_dynamic_padding": True}


def test_what_it_multiplies_is_counted(kernels_on_the_cpu) -> None:
    register_flop_formulas()
    images, weight = torch.randn(2, 3, 18, 21).bfloat16(), torch.randn(64, 3, 7, 7).bfloat16()
    filters = prepare_filters(weight, ZEROS)
    with FlopCounterMode(display=False) as expected_count:
        torch.nn.functional.conv2d(images, weight, stride=2, padding=3)
    with FlopCounterMode(display=False) as count:
        torch.ops.bitfast.stem.native(images, filters, ZEROS, POOL)
    assert count.get_total_flops() == expected_count.get_total_flops()


def test_gradients_are_those_of_plain_pytorch(kernels_on_the_cpu) -> None:
    """The kernel has none: the function leaves it alone where one is recorded, the operator refuses."""
    images = torch.randn(1, 3, 12, 13).bfloat16().requires_grad_()
    filters = prepare_filters(torch.randn(64, 3, 7, 7).bfloat16(), ZEROS)
    with torch.enable_grad():
        result = stem(images, filters, ZEROS, POOL)
        assert result.grad_fn is not None
        with pytest.raises(NotImplementedError, match="has no derivative"):
            torch.ops.bitfast.stem.native(images, filters, ZEROS, POOL)


@pytest.mark.parametrize("pool_padding", [POOL, None])
def test_the_fake_agrees(kernels_on_the_cpu, pool_padding) -> None:
    arguments = ZEROS, pool_padding
    images, filters = torch.randn(2, 3, 18, 21), torch.zeros(64, 7, 8, 4, dtype=torch.bfloat16)
    result = torch.ops.bitfast.stem.native(images, filters, *arguments)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(images), mode.from_tensor(filters)
        fake = torch.ops.bitfast.stem.native(*fakes, *arguments)
    assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)


IMAGES, FILTERS = torch.zeros(1, 3, 8, 8), torch.zeros(64, 7, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES.int(), FILTERS, ZEROS, POOL), TypeError, "images must be a floating"),
        (
            (torch.zeros(1, 4, 8, 8), FILTERS, ZEROS, POOL),
            ValueError,
            "images must have 3 channels",
        ),
        (
            (IMAGES, torch.zeros(64, 3, 7, 7), ZEROS, POOL),
            ValueError,
            "must come from prepare_filters",
        ),
        (
            (IMAGES, FILTERS, (3, 3, 3, 7), POOL),
            ValueError,
            "padding must be four integers from 0 to 6",
        ),
        ((IMAGES, FILTERS, ZEROS, (1, 1)), ValueError, "pool_padding must be four integers"),
        (
            (IMAGES[:, :, :5], FILTERS, (0, 0, 0, 0), None),
            ValueError,
            "at least as large as the windows",
        ),
        (
            (IMAGES[:, :, :0], FILTERS, (6, 6, 6, 6), None),
            ValueError,
            "at least as large as the windows",
        ),
    ],
)
def test_arguments_that_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        stem(*arguments)


def test_filters_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="filters must have shape"):
        prepare_filters(torch.zeros(64, 3, 3, 3), ZEROS)


def test_the_check_before_the_first_use(kernels_on_the_cpu, monkeypatch) -> None:
    (check,) = (check for op, check in first_use._checks.items() if op == OP)
    assert check(torch.device("cpu")) is None
    right = reference.stem_forward
    monkeypatch.setattr(reference, "stem_forward", lambda *arguments: right(*arguments) * 1.1)
    assert "the error of the result" in str(check(torch.device("cpu")))


MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "preactivation": ({}, ["begin", "stem", "group_norm_act"]),
    "same": (SAME, ["begin", "stem", "group_norm_act"]),
    "same, pool not": ({"global_padding": "same"}, ["begin", "stem", "group_norm_act"]),
    "bottleneck": ({"layer_type": "bottleneck"}, ["begin", "stem", "zeros", "group_norm_act", "same_max_pool"]),
    "two paddings": ({"embedding_dynamic_padding": True}, ["begin", "stem", "group_norm_act"]),
}  # fmt: skip


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16, channels: int = 64) -> Any:
    options = {"embedding_size": channels, "hidden_sizes": [16], "depths": [1], **MODELS[kind][0]}
    model = ours("BitModel", **options).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return model


def names_of(model: Any) -> list[str]:
    (plan,) = plans(model)
    return list(plan.parts[0].program.names)


@pytest.mark.parametrize("kind", MODELS)
def test_a_plan_calls_the_kernel(kernels_on_the_cpu, kind) -> None:
    model, images = model_of(kind), torch.randn(1, 3, 10, 13).bfloat16()
    before = images.clone()
    output = model(images, output_hidden_states=True)
    expected_names = MODELS[kind][1]
    assert names_of(model)[: len(expected_names)] == expected_names
    assert plans(model)[0].parts[0].program.takes_any_layout
    assert torch.equal(images, before)
    with use_backend("reference"):
        plain = model(images, output_hidden_states=True)
        oracle = model.double()(images.double(), output_hidden_states=True)
    assert_within_contract(output.hidden_states[0], plain.hidden_states[0], oracle.hidden_states[0])
    assert output.hidden_states[0].stride() == plain.hidden_states[0].stride()
    assert_within_contract(
        output.last_hidden_state, plain.last_hidden_state, oracle.last_hidden_state
    )


def test_autocast_rounds_the_images(kernels_on_the_cpu) -> None:
    model, images = model_of("preactivation", torch.float32), torch.randn(1, 3, 10, 12)
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images.contiguous(memory_format=layout), output_hidden_states=True)
            with use_backend("reference"):
                plain = model(images, output_hidden_states=True)
        assert all("stem" in plan.parts[0].program.names for plan in plans(model))
        a, b = output.hidden_states[0], plain.hidden_states[0]
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(
    ("dtype", "channels", "demands"),
    [
        (torch.float32, 64, {}),
        (torch.bfloat16, 32, {}),
        (torch.bfloat16, 64, {"stem": "reference"}),
        (torch.bfloat16, 64, {"same_padding": "reference"}),
    ],
)
def test_where_the_op_does_not_serve(kernels_on_the_cpu, dtype, channels, demands) -> None:
    model = model_of("preactivation", dtype, channels)
    with use_backend(**demands, group_norm_act="triton"):
        model(torch.empty(0, 3, 9, 9, dtype=dtype))
    assert names_of(model)[:3] == ["begin", "convolution", "same_max_pool"]


def test_a_change_of_the_weight_is_seen(kernels_on_the_cpu) -> None:
    model, images = model_of("preactivation"), torch.randn(1, 3, 9, 10).bfloat16()
    before = model(images).last_hidden_state
    weight = model.embedder.convolution.weight
    (filters,) = {id(t): t for t in _kept_of(weight)}.values()
    assert filters.shape == (64, 7, 8, 4), "one form of the weight is kept"
    weight.normal_()
    after = model(images).last_hidden_state
    assert not torch.equal(after, before)
    with use_backend("reference"):
        torch.testing.assert_close(after, model(images).last_hidden_state, rtol=0.1, atol=0.1)


def _kept_of(weight: Tensor) -> list[Tensor]:
    from bitfast.ops.kept_weights import kept_weights

    return list(kept_weights._kept[id(weight)].by_form.values())
