"""The Triton kernels of resize_normalize, interpreted where there is no GPU: the same bits everywhere."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.kernels import resize_normalize as kernels
from bitfast.ops import resize_normalize_triton
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize, values_of_bytes
from tests.drawn_cases import resize_arguments
from tests.guarded import poisoned_memory
from tests.image_layouts import LAYOUTS, random_image
from tests.interpreter import DEVICE
from tests.requirements import NEEDS_EXTENSION
from tests.test_resize_normalize_native import memory_between_walls, tensor_at

pytestmark = NEEDS_EXTENSION

# The interpreter takes about a millisecond per tap.
edges = st.integers(1, 12) | st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def on_device(image: Tensor) -> Tensor:
    """Return the image in DEVICE's memory, with its strides."""
    moved = torch.empty_strided(image.shape, image.stride(), dtype=image.dtype, device=DEVICE)
    return moved.copy_(image) if 0 not in image.stride() else image.to(DEVICE)


@pytest.mark.parametrize("resample", range(len(RESAMPLE_NAMES)), ids=RESAMPLE_NAMES)
def test_equals_pillow(resample: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(12):
        height, width, new_height, new_width = random.integers(1, 40, 4).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels = (
            np.where(pixels > 127, 255, 0).astype(np.uint8) if random.random() < 0.5 else pixels
        )
        with use_backend("triton"):
            result = resize_normalize(
                [torch.from_numpy(pixels).to(DEVICE)],
                [(new_height, new_width)],
                resample=resample,
                dtype=torch.uint8,
            )
        expected = np.array(Image.fromarray(pixels).resize((new_width, new_height), resample))
        assert np.array_equal(result[0].permute(1, 2, 0).cpu().numpy(), expected)


@settings(max_examples=60)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3, 4, 5]))
    shapes = data.draw(st.lists(st.tuples(edges, edges), min_size=1, max_size=4))
    images = [
        random_image(
            data.draw(seeds), (*shape, channels), data.draw(st.sampled_from(LAYOUTS))
        )
        for shape in shapes
    ]  # fmt: skip
    arguments = data.draw(resize_arguments(shapes, channels, edges, largest_offset=45))
    with use_backend("reference"):
        expected = resize_normalize(images, **arguments)
    with use_backend("triton"), poisoned_memory():
        result = resize_normalize([on_device(image) for image in images], **arguments)
    assert result.dtype == expected.dtype
    assert result.is_contiguous(memory_format=arguments["memory_format"])
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("window", [(9, 5), (8, 86), (17, 100)])
def test_nothing_is_written_past_the_ends(channels_last: bool, window: tuple[int, int]) -> None:
    """Windows that fill their last tiles, and that do not; the buffer between the passes as well."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = [random_image(i, (7 + i, 9, 3), "HWC").to(DEVICE) for i in range(2)]
    axes: dict[Any, kernels.Axis]
    lines = [(i.shape[axis], window[axis], 0, window[axis]) for i in images for axis in (0, 1)]
    starts, weights, axes = resize_normalize_triton._tables(
        tuple(dict.fromkeys(lines)), 3, images[0].device, 0
    )
    pictures = [
        kernels.Picture(image, axes[lines[2 * i]], axes[lines[2 * i + 1]], 0, 0, bool(i))
        for i, image in enumerate(images)
    ]
    tables = kernels.tables_for(pictures, window)
    between = torch.full((tables.buffer_size + 128,), 77, dtype=torch.uint8, device=DEVICE)
    inside = between[64:-64]
    tables.second_segments[:, 0] += tables.is_buffered * inside.data_ptr()
    segments_a, programs_a, segments_b, programs_b = (t.to(DEVICE) for t in tables[:4])
    kernels.first_pass_launch(
        programs_a, segments_a, starts, weights, intermediate=inside, channels=3
    ).launch()
    assert (between[:64] == 77).all()
    assert (between[-64:] == 77).all()
    shape = (2, 3, *window)
    like = torch.empty(shape, memory_format=layout, device="meta")
    memory = torch.full((like.numel() + 128,), torch.nan, device=DEVICE)
    result = memory[64:-64].as_strided(shape, like.stride())
    values = values_of_bytes((), (), (), 3, torch.float32).to(DEVICE)
    kernels.second_pass_launch(
        programs_b, segments_b, starts, weights, values,
        intermediate=inside, result=result, channels_last=channels_last,
    ).launch()  # fmt: skip
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()
    for i, image in enumerate(images):
        version = (12, 1)
        if i:  # height first, as no version of Pillow does here: on the image that is turned
            turned = image.transpose(0, 1)
            expected = resize_normalize([turned], [window[::-1]], pillow_version=version)
            expected = expected.transpose(2, 3)
        else:
            expected = resize_normalize([image], [window], pillow_version=version)
        assert torch.equal(result[i], expected[0])


def test_an_axis_that_stays_needs_no_pass() -> None:
    image = random_image(1, (20, 9, 3), "HWC").to(DEVICE)
    line = (9, 9, 2, 5)
    _, _, axes = resize_normalize_triton._tables((line, (20, 7, 0, 7)), 3, image.device, 0)
    width, height = axes[line], axes[20, 7, 0, 7]
    assert width.is_unchanged
    assert width.first_input == 2
    tables = kernels.tables_for([kernels.Picture(image, height, width, 0, 0, False)], (7, 5))
    assert tables.buffer_size == 0
    assert tables.first_programs.numel() == 0


def test_the_tables_are_those_of_the_reference(seed: int) -> None:
    from bitfast.reference import PRECISION_BITS, resampling_weights

    random = np.random.default_rng(seed)
    for _ in range(300):
        before, after = random.integers(1, 400, 2).tolist()
        resample = int(random.integers(1, 6))
        first = int(random.integers(0, after))
        count = int(random.integers(1, after - first + 1))
        line = [before, after, first, count]
        starts, weights, taps = torch.ops.bitfast.resampling_tables.native(line, resample)
        table = torch.zeros(count, before, dtype=torch.int64)
        places = starts.long()[:, None] + torch.arange(int(taps))
        table.scatter_add_(1, places, weights.view(-1, count).T.long())
        if before == after:
            expected = torch.eye(before, dtype=torch.int64)[first : first + count] << PRECISION_BITS
        else:
            index, weight = resampling_weights(before, after, resample)
            scaled = weight * (1 << PRECISION_BITS)
            rounded = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().long()
            expected = torch.zeros(after, before, dtype=torch.int64)
            expected.scatter_add_(1, index.T, rounded.T)
            expected = expected[first : first + count]
        assert torch.equal(table, expected), line


@pytest.mark.parametrize(
    ("lines", "message"),
    [([3, 4, 0], "four numbers"), ([3, 4, 2, 3], "outputs that exist"), ([0, 4, 0, 1], "outputs that")],
)  # fmt: skip
def test_tables_of_lines_that_do_not_exist(lines: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitfast.resampling_tables.native(lines, 3)


def test_opcheck() -> None:
    images = [random_image(i, (6 + i, 9, 3), "HWC").to(DEVICE) for i in range(2)]
    arguments = (
        images, [7, 8] * 2, [5, 4], [1, 2, -1, 0], 3, [1 / 255], [0.5] * 3, [0.5] * 3, torch.bfloat16,
        True, [0, 1],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bitfast.resize_normalize.triton, arguments)


def test_floating_images_are_not_for_it() -> None:
    image = torch.rand(4, 5, 3, device=DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailableError, match=r"supports torch.uint8"),
    ):
        resize_normalize([image], [(3, 3)])


@pytest.mark.skipif(DEVICE != "cpu", reason="the walls are in the CPU's memory")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_nothing_outside_an_image_is_read(layout: str, channels_last: bool) -> None:
    """The last tile of a small window reaches far beyond the channels and columns that there are."""
    image = random_image(1, (64, 64, 3), layout)
    length = 1 + sum((n - 1) * s for n, s in zip(image.shape, image.stride(), strict=True))
    size = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    arguments: dict[str, Any] = {
        "sizes": [(9, 64)],  # the width stays, so that the second pass reads the image itself
        "crop": (9, 7),
        "pillow_version": (12, 1),
        "memory_format": torch.channels_last if channels_last else torch.contiguous_format,
    }
    with use_backend("reference"):
        expected = resize_normalize([image], **arguments)
    with memory_between_walls(size) as start, use_backend("triton"):
        for address in (start, start + size - length):
            assert torch.equal(resize_normalize([tensor_at(address, image)], **arguments), expected)
