from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import center_crop, normalize, rescale

from bitfast import extension
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize

FILTERS = range(len(RESAMPLE_NAMES))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

edges = st.integers(1, 40) | st.integers(1, 300)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on both; what the extension does not take is left to the reference."""
    if request.param == "native":
        if extension.CPU.problem is not None:
            pytest.skip(f"no extension: {extension.CPU.problem}")
        yield "native"
        return
    with use_backend("reference"):
        yield "reference"


def random_image(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise, or noise of two values only, which overshoots under every filter with negative lobes."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if seed % 2 else image


def resize(image: np.ndarray, height: int, width: int, resample: int, **options: Any) -> np.ndarray:
    """Resize one (H, W, C) image by the op; return (H, W, C)."""
    dtype = torch.from_numpy(image).dtype
    result = resize_normalize(
        [torch.from_numpy(image)], [(height, width)], resample=resample, dtype=dtype, **options
    )
    return result[0].permute(1, 2, 0).numpy()


@settings(max_examples=300)
@given(edges, edges, edges, edges, st.sampled_from(FILTERS), seeds)
def test_uint8_equals_pillow(
    height: int, width: int, new_height: int, new_width: int, resample: int, seed: int
) -> None:
    image = random_image(seed, height, width)
    expected = np.array(Image.fromarray(image).resize((new_width, new_height), resample))
    assert np.array_equal(resize(image, new_height, new_width, resample), expected)


@settings(max_examples=150)
@given(edges, edges, edges, edges, st.sampled_from(FILTERS), seeds)
def test_float_equals_pillow_mode_f(
    height: int, width: int, new_height: int, new_width: int, resample: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    image = generator.standard_normal((height, width)).astype(np.float32)
    expected = np.array(Image.fromarray(image).resize((new_width, new_height), resample))
    result = resize(image[..., None], new_height, new_width, resample)[..., 0]
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3000, 2), (2, 3000)])
@pytest.mark.parametrize("new_size", [(1, 1), (5, 2000), (2000, 5), (7, 7)])
def test_extreme_sizes_equal_pillow(
    size: tuple[int, int], new_size: tuple[int, int], resample: int
) -> None:
    image = random_image(1, *size)
    expected = np.array(Image.fromarray(image).resize(new_size[::-1], resample))
    assert np.array_equal(resize(image, *new_size, resample), expected)


@pytest.mark.parametrize("resample", FILTERS)
def test_an_unchanged_axis_is_not_resampled(resample: int) -> None:
    image = random_image(3, 20, 30)
    assert np.array_equal(resize(image, 20, 30, resample), image)
    columns_alone = np.array(Image.fromarray(image).resize((30, 11), resample))
    assert np.array_equal(resize(image, 11, 30, resample), columns_alone)


def one_axis_after_the_other(image: np.ndarray, *sizes: tuple[int, int]) -> np.ndarray:
    for height, width in sizes:
        image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return image


@pytest.mark.parametrize(
    ("size", "new_size", "columns_first_since"),
    [
        ((60, 8), (5, 12), (13, 0)),  # loses 55 rows, gains columns
        ((60, 28), (9, 3), (13, 0)),  # loses 51 rows and 25 columns
        ((60, 28), (10, 3), None),  # loses 50 rows and 25 columns
        ((60, 28), (90, 3), None),
        ((809, 8), (700, 12), (12, 2)),
        ((800, 8), (700, 12), (13, 0)),
    ],
)
def test_pass_order_is_that_of_the_pillow_version(
    size: tuple[int, int], new_size: tuple[int, int], columns_first_since: tuple[int, int] | None
) -> None:
    image = random_image(5, *size)
    rows_first = one_axis_after_the_other(image, (size[0], new_size[1]), new_size)
    columns_first = one_axis_after_the_other(image, (new_size[0], size[1]), new_size)
    assert not np.array_equal(rows_first, columns_first)
    for version in ((9, 5), (12, 1), (12, 2), (12, 3), (13, 0), (14, 1)):
        columns_come_first = columns_first_since is not None and version >= columns_first_since
        expected = columns_first if columns_come_first else rows_first
        assert np.array_equal(resize(image, *new_size, 3, pillow_version=version), expected), (
            version
        )


@settings(max_examples=100)
@given(
    st.lists(st.tuples(edges, edges), min_size=1, max_size=3),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.none() | st.sampled_from([1 / 255, 1 / 127.5, 2]),
    st.booleans(),
    st.sampled_from(["HWC", "CHW"]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seeds,
)
def test_crop_rescale_normalize_equal_the_slow_processors(
    sizes: list[tuple[int, int]],
    crop: tuple[int, int],
    factor: float | None,
    normalized: bool,
    layout: str,
    memory_format: torch.memory_format,
    seed: int,
) -> None:
    images = [random_image(seed + i, *size) for i, size in enumerate(sizes)]
    expected = []
    for image in images:
        pixels = center_crop(image, crop, input_data_format="channels_last")
        if factor is not None:
            pixels = rescale(pixels, factor)
        if normalized:
            pixels = normalize(pixels, MEAN, STD, input_data_format="channels_last")
        expected.append(pixels.astype(np.float32).transpose(2, 0, 1))
    result = resize_normalize(
        [torch.from_numpy(i if layout == "HWC" else i.transpose(2, 0, 1)) for i in images],
        sizes,
        crop,
        rescale_factor=factor,
        mean=MEAN if normalized else None,
        std=STD if normalized else None,
        layout=layout,
        memory_format=memory_format,
    )
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)
    assert np.array_equal(result.numpy(), np.stack(expected))


def test_zeros_around_a_small_image_are_rescaled_and_normalized() -> None:
    image = torch.full((1, 1, 3), 255, dtype=torch.uint8)
    result = resize_normalize([image], [(1, 1)], (3, 4), 3, 1 / 255, MEAN, STD)
    zero = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(result[0, :, 0, 0], zero)
    # 1 pixel in a window of 4: two zeros before it, one after.
    assert (result[0, 0] != zero[0]).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float16, torch.float64])
def test_result_dtypes(dtype: torch.dtype, image_dtype: torch.dtype) -> None:
    """The result in float64 is the oracle; every other dtype is one rounding of float32 away from it."""
    image = torch.rand(9, 13, 3).mul(255).to(image_dtype)
    arguments = ([image], [(7, 8)], (5, 6), 3, 1 / 255, MEAN, STD)
    result = resize_normalize(*arguments, dtype=dtype)
    oracle = resize_normalize(*arguments, dtype=torch.float64)
    assert result.dtype == dtype
    tolerance = torch.finfo(dtype).eps + (16 * 2**-24 if dtype != torch.float64 else 0)
    assert ((result.double() - oracle).abs() <= tolerance * oracle.abs().clamp_min(1)).all()


def test_strided_images() -> None:
    image = torch.from_numpy(random_image(7, 40, 50))
    view = image[::2, 1::3].flip(1)
    expected = resize_normalize([view.contiguous()], [(9, 11)])
    assert torch.equal(resize_normalize([view], [(9, 11)]), expected)


def test_autocast_has_no_influence() -> None:
    image = torch.from_numpy(random_image(2, 12, 9))
    arguments = ([image], [(7, 8)], None, 3, 1 / 255, MEAN, STD)
    expected = resize_normalize(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        result = resize_normalize(*arguments)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offsets", [[1, 2, 3, 4], [-1, 0, 2, -3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, channels_last: bool, offsets: list[int], dtype: torch.dtype) -> None:
    images = [torch.from_numpy(random_image(i, 6 + i, 9)) for i in range(2)]
    arguments = (
        images, [7, 8] * 2, [5, 4], offsets, 3, [1 / 255], MEAN, STD, dtype, channels_last, [0, 1]
    )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.bitfast.resize_normalize, backend), arguments)


def test_compiles_without_graph_break_for_dynamic_sizes() -> None:
    def batch(images: list[torch.Tensor]) -> torch.Tensor:
        sizes = [(2 * image.shape[0], 20) for image in images]
        return resize_normalize(images, sizes, (10, 12), 2, 1 / 255, MEAN, STD) * 2

    compiled = torch.compile(batch, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, (height, width) in enumerate([(12, 9), (5, 31)]):
        images = [torch.from_numpy(random_image(seed + i, height, width + i)) for i in range(2)]
        assert torch.equal(compiled(images), batch(images))


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_demanded_backend_that_cannot_is_an_error(name: str) -> None:
    image = torch.zeros(4, 4, 3, dtype=torch.float64)
    with use_backend("reference"):
        resize_normalize([image], [(2, 2)])
    with (
        use_backend(resize_normalize=name),
        pytest.raises(BackendUnavailableError, match=f"{name}' cannot run resize_normalize"),
    ):
        resize_normalize([image], [(2, 2)])


GOOD = torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": []}, ValueError, "images must hold at least one"),
        ({"images": [GOOD, np.zeros((4, 5, 3))]}, TypeError, r"images\[1\] must be a torch.Tensor"),
        ({"images": [GOOD, GOOD.int()]}, TypeError, r"images\[1\] must be uint8 .* torch.int32"),
        ({"images": [GOOD, GOOD[0]]}, ValueError, r"images\[1\] must have shape .* \(5, 3\)"),
        ({"images": [GOOD, GOOD[:0]]}, ValueError, r"images\[1\] must have shape .* \(0, 5, 3\)"),
        ({"images": [GOOD, GOOD.float()]}, ValueError, r"images\[1\] must have the dtype"),
        ({"images": [GOOD, GOOD.to("meta")]}, ValueError, r"images\[1\] must have the device"),
        (
            {"images": [GOOD, GOOD[..., :2]]},
            ValueError,
            r"images\[1\] must have the number of chan",
        ),
        ({"images": [GOOD.float().requires_grad_()] * 2}, ValueError, r"images\[0\] .* gradient"),
        ({"layout": "NHWC"}, ValueError, "layout must be"),
        ({"sizes": [(3, 3)]}, ValueError, "sizes must hold one .* 2 images, got 1"),
        ({"sizes": [(3, 3), (3, 0)]}, ValueError, r"sizes\[1\] must be an integer >= 1.*\(3, 0\)"),
        ({"sizes": [(3, 3), (3, 4)]}, ValueError, r"sizes\[1\] must equal sizes\[0\].*\(3, 4\)"),
        ({"crop": (0, 3)}, ValueError, r"crop must be an integer >= 1.*\(0, 3\)"),
        ({"offsets": [(0, 0)]}, ValueError, "offsets must hold one .* 2 images, got 1"),
        ({"offsets": [(0, 0), (0, 0.5)]}, ValueError, r"offsets\[1\] must be two int.*\(0, 0.5\)"),
        ({"resample": 6}, ValueError, "resample must be one of 0 .NEAREST.*got 6"),
        ({"resample": "bicubic"}, ValueError, "resample must be one of.*got 'bicubic'"),
        ({"mean": [0.5] * 3}, ValueError, "std must hold 3 numbers.*got None"),
        ({"mean": [0.5], "std": [0.5] * 3}, ValueError, r"mean must hold 3 numbers.*got \[0.5\]"),
        (
            {"mean": [0] * 3, "std": [1, 0, 1]},
            ValueError,
            "std must hold numbers other than 0",
        ),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format must be"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point dtype"),
        (
            {"dtype": torch.uint8, "rescale_factor": 2.0},
            TypeError,
            "dtype must be floating-point unless",
        ),
    ],
)
def test_errors_name_the_argument(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"images": [GOOD, GOOD], "sizes": [(3, 3), (3, 3)], **changes}
    with pytest.raises(error, match=f"resize_normalize: {message}"):
        resize_normalize(**arguments)
