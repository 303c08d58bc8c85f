"""The C++ kernels of resize_normalize equal the reference bit for bit, and stay within their memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfast.backends import use_backend
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize
from tests.drawn_cases import resize_arguments
from tests.guarded import poisoned_memory
from tests.image_layouts import LAYOUTS, random_image
from tests.requirements import NEEDS_EXTENSION
from tests.threads import torch_threads

pytestmark = NEEDS_EXTENSION

edges = st.integers(1, 30) | st.integers(1, 120)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=400)
@given(st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 9))
    image_dtype = data.draw(st.sampled_from([torch.uint8] * 3 + [torch.float32, torch.bfloat16]))
    shapes = data.draw(st.lists(st.tuples(edges, edges), min_size=1, max_size=5))
    images = [
        random_image(
            data.draw(seeds), (*shape, channels), data.draw(st.sampled_from(LAYOUTS)), image_dtype
        )
        for shape in shapes
    ]
    arguments = data.draw(resize_arguments(shapes, channels, edges, largest_offset=120))
    with use_backend("reference"):
        expected = resize_normalize(images, **arguments)
    with use_backend("native"), torch_threads(data.draw(st.integers(1, 3))), poisoned_memory():
        result = resize_normalize(images, **arguments)
    assert result.dtype == expected.dtype
    assert result.is_contiguous(memory_format=arguments["memory_format"])
    assert torch.equal(result, expected)


@contextmanager
def memory_between_walls(size: int) -> Iterator[int]:
    """Yield the address of bytes, a multiple of a page, around which reading ends the process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for wall in (start, start + page + size):
        if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) != 0:
            pytest.skip(f"mprotect fails: errno {ctypes.get_errno()}")
    yield start + page


def tensor_at(address: int, like: Tensor) -> Tensor:
    """Return a copy of an image at an address, with its strides."""
    length = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    buffer = (ctypes.c_uint8 * (length * like.element_size())).from_address(address)
    flat = torch.frombuffer(buffer, dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride()).copy_(like)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_nothing_outside_an_image_is_read(layout: str, dtype: torch.dtype, seed: int) -> None:
    for i in range(60):
        generator = torch.Generator().manual_seed(seed + i)
        height, width, new_height, new_width = torch.randint(
            1, 70, (4,), generator=generator
        ).tolist()
        channels = 1 + i % 4
        image = random_image(seed + i, (height, width, channels), layout, dtype)
        length = 1 + sum((n - 1) * s for n, s in zip(image.shape, image.stride(), strict=True))
        size = -(-length * image.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
        arguments: dict[str, Any] = {
            "sizes": [(new_height, new_width)],
            "crop": None if i % 3 else (11, 13),
            "resample": i % len(RESAMPLE_NAMES),
            "pillow_version": [(12, 1), (13, 0)][i % 2],
        }
        expected = resize_normalize([image], **arguments)
        with memory_between_walls(size) as start:
            for address in (start, start + size - length * image.element_size()):
                result = resize_normalize([tensor_at(address, image)], **arguments)
                assert torch.equal(result, expected)


def test_threads_share_one_large_image() -> None:
    image = random_image(0, (700, 900, 3), "HWC")
    arguments: dict[str, Any] = {"sizes": [(300, 400)], "crop": (280, 390)}
    with torch_threads(1):
        expected = resize_normalize([image], **arguments)
    for count in (2, 3, 8):
        with torch_threads(count):
            assert torch.equal(resize_normalize([image], **arguments), expected)


@pytest.mark.parametrize("resample", range(1, len(RESAMPLE_NAMES)))
def test_only_the_window_is_computed(resample: int) -> None:
    """A whole image of this size would be 12 million terabytes."""
    image = random_image(2, (3, 3, 3), "HWC")
    edge = 2_000_000_001
    result = resize_normalize(
        [image],
        [(edge, edge)],
        (5, 4),
        resample,
        offsets=[(edge // 2, edge // 2)],
        dtype=torch.uint8,
    )
    assert torch.equal(result[0], image[1, 1].view(3, 1, 1).expand(3, 5, 4))


def test_tables_made_in_inference_mode_serve_outside_of_it() -> None:
    image = random_image(0, (9, 9, 3), "HWC")
    factor = torch.rand(()).item()  # of which there is no table yet
    with torch.inference_mode():
        expected = resize_normalize([image], [(5, 5)], rescale_factor=factor)
    result = resize_normalize([image], [(5, 5)], rescale_factor=factor)
    assert torch.equal(result.clone().requires_grad_(), expected)


IMAGE = torch.zeros(4, 5, 3, dtype=torch.uint8)
VALUES = torch.zeros(256, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: []}, "number of images"),
        ({0: [IMAGE[0]]}, "must have shape"),
        ({0: [IMAGE.float()]}, "must be uint8 with values"),
        ({5: None}, "float32 without"),
        ({1: [3]}, "sizes, offsets and first_axes must fit"),
        ({1: [3, 0]}, "sizes must be from 1 to"),
        ({1: [3, 2**31]}, "sizes must be from 1 to"),
        ({2: [3]}, "crop must be"),
        ({2: [3, 0]}, "crop must be"),
        ({3: [0]}, "must fit the number"),
        ({4: 6}, "must be one of Pillow's filters"),
        ({5: VALUES[:, :2]}, "values must have shape"),
        ({5: VALUES.to(torch.complex128)}, "elements of 1, 2, 4 or 8 bytes"),
        ({7: []}, "must fit the number"),
    ],
)
def test_the_operator_checks_what_memory_depends_on(changes: dict[int, Any], message: str) -> None:
    arguments = [[IMAGE], [3, 3], [3, 3], [0, 0], 3, VALUES, False, [1]]
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitfast.resize_normalize_pixels.native(*arguments)
