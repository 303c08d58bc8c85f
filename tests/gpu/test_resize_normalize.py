"""resize_normalize as a GPU runs it: Pillow's bits, and nothing that the host waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.backends import use_backend
from bitfast.images.processing_base import ImageProcessor
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize
from bitfast.ops.staging import upload
from tests.image_layouts import LAYOUTS, random_image

SIZES = [
    (512, 512),
    (300, 451),
    (427, 640),
    (872, 1000),
    (172, 448),
    (102, 102),
    (1, 900),
    (700, 3),
]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend(resize_normalize="triton"):
        yield


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cpu(processor: type[ImageProcessor], images: list[Any], **options: Any) -> Tensor:
    """Return the processor's results, computed on the CPU."""
    with use_backend(resize_normalize="native"):
        return processor(**options)(images, return_tensors="pt").pixel_values


def photographs(count: int) -> list[Image.Image]:
    random = np.random.default_rng(count)
    pixels = [
        random.integers(0, 256, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8) for i in range(count)
    ]
    return [Image.fromarray(p) for p in pixels]


@pytest.mark.parametrize("resample", range(len(RESAMPLE_NAMES)), ids=RESAMPLE_NAMES)
def test_ragged_batches_equal_pillow(resample: int) -> None:
    images = photographs(64)
    tensors = upload([torch.from_numpy(np.array(image)) for image in images], torch.device("cuda"))
    for size in ((224, 224), (37, 500)):
        result = resize_normalize(tensors, [size] * 64, resample=resample, dtype=torch.uint8)
        result = result.permute(0, 2, 3, 1).cpu().numpy()
        for image, pixels in zip(images, result, strict=True):
            assert np.array_equal(pixels, np.array(image.resize(size[::-1], resample)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_cpu(dtype: torch.dtype, layout: str) -> None:
    images = [random_image(i, (40 + 50 * i, 90, 3), layout) for i in range(4)]
    options = {"rescale_factor": 1 / 255, "mean": [0.5] * 3, "std": [0.2, 0.3, 0.4], "dtype": dtype}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = {"sizes": [(70, 60)] * 4, "crop": (64, 75), "memory_format": memory_format}
        result = resize_normalize([image.cuda() for image in images], **arguments, **options)
        with use_backend("reference"):
            expected = resize_normalize(images, **arguments, **options)
        assert result.is_contiguous(memory_format=memory_format)
        assert torch.equal(result.cpu(), expected)


def test_images_come_together_and_nothing_waits() -> None:
    images = [torch.from_numpy(np.array(image)) for image in photographs(16)]
    device = torch.device("cuda")
    upload(images, device)  # what is allocated first may wait
    with without_waiting():
        moved = upload(images, device)
    for image, there in zip(images, moved, strict=True):
        assert torch.equal(there.cpu(), image)
    assert len({there.untyped_storage().data_ptr() for there in moved}) == 1


def test_pieces_of_many_batches_do_not_meet() -> None:
    """Pinned memory is used again while copies of earlier batches may still be under way."""
    device = torch.device("cuda")
    batches = [
        [torch.randint(256, (900, 1300, 3), dtype=torch.uint8)[:, i:] for i in range(20)]
        for _ in range(4)
    ]
    upload(batches[0], device)
    with without_waiting():
        moved = [upload(images, device) for images in batches]
    for images, there in zip(batches, moved, strict=True):
        for image, copy in zip(images, there, strict=True):
            assert torch.equal(copy.cpu(), image)


def test_filters_are_kept_for_the_next_batches() -> None:
    """Lines are added behind those that kernels under way may be reading."""
    images = photographs(8)
    tensors = upload([torch.from_numpy(np.array(image)) for image in images], torch.device("cuda"))
    results = []
    for edge in range(20, 220, 4):
        sizes = [(edge, 2 * edge)] * 8
        results.append((sizes[0], resize_normalize(tensors, sizes, dtype=torch.uint8)))
    for (height, width), result in results:
        expected = [np.array(image.resize((width, height), Image.BICUBIC)) for image in images]
        assert np.array_equal(result.permute(0, 2, 3, 1).cpu().numpy(), np.stack(expected))


def test_a_processor_makes_nothing_wait() -> None:
    images = photographs(16)
    expected = on_cpu(BitImageProcessorFast, images)
    on_gpu = BitImageProcessorFast(device="cuda")
    on_gpu(images, return_tensors="pt")
    with without_waiting():
        result = on_gpu(images, return_tensors="pt").pixel_values
    assert result.device.type == "cuda"
    assert torch.equal(result.cpu(), expected)


def test_streams_of_the_caller() -> None:
    images = photographs(8)
    processor = BitImageProcessorFast(device="cuda")
    expected = on_cpu(BitImageProcessorFast, images)
    for _ in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            result = processor(images, return_tensors="pt").pixel_values
        stream.synchronize()
        assert torch.equal(result.cpu(), expected)


def test_tensors_that_are_there_stay_there() -> None:
    images = photographs(5)
    tensors = [torch.from_numpy(np.array(i)).permute(2, 0, 1).cuda() for i in images]
    result = BitImageProcessorFast()(tensors, return_tensors="pt").pixel_values
    assert result.device.type == "cuda"
    expected = on_cpu(BitImageProcessorFast, images)
    assert torch.equal(result.cpu(), expected)
    slow = on_cpu(BitImageProcessor, tensors)
    assert torch.equal(slow, on_cpu(BitImageProcessor, images))


def test_floating_images_are_left_to_plain_pytorch() -> None:
    image = torch.rand(3, 90, 131)
    with use_backend("reference"):
        result = BitImageProcessorFast(do_rescale=False)(
            image.cuda(), return_tensors="pt"
        ).pixel_values
        expected = BitImageProcessorFast(do_rescale=False)(image, return_tensors="pt").pixel_values
    assert torch.allclose(result.cpu(), expected, rtol=1e-5, atol=1e-5)
