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
from torch.utils._python_dispatch import TorchDispatchMode

from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.kernels import resize_normalize as kernels
from bitfast.ops.resize_filters import filter_store
from bitfast.ops.resize_normalize import RESAMPLE_NAMES, resize_normalize, values_of_bytes
from tests.drawn_cases import resize_arguments
from tests.guarded import poisoned_memory
from tests.image_layouts import LAYOUTS, random_image
from tests.interpreter import DEVICE
from tests.requirements import NEEDS_EXTENSION
from tests.resize_plans import plan_with
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
    plan, filters = filter_store(3, images[0].device, 0).plan(
        lambda known: plan_with(known, images, [*window] * 2, window, first_axes=[1, 0])
    )
    between = torch.full((plan.between.numel() + 128,), 77, dtype=torch.uint8, device=DEVICE)
    inside = between[64:-64]
    first, second = kernels.tables_of(plan.tables.to(DEVICE), plan.places)
    is_buffered = first.segments[:, 0] != 0
    second.segments[:, 0] += is_buffered * (inside.data_ptr() - plan.between.data_ptr())
    kernels.first_pass_launch(
        first.programs, first.segments, filters, filters, intermediate=inside, channels=3
    ).launch()
    assert (between[:64] == 77).all()
    assert (between[-64:] == 77).all()
    shape = (2, 3, *window)
    like = torch.empty(shape, memory_format=layout, device="meta")
    memory = torch.full((like.numel() + 128,), torch.nan, device=DEVICE)
    result = memory[64:-64].as_strided(shape, like.stride())
    values = values_of_bytes((), (), (), 3, torch.float32).to(DEVICE)
    kernels.second_pass_launch(
        second.programs, second.segments, filters, filters, values,
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


def test_opcheck() -> None:
    images = [random_image(i, (6 + i, 9, 3), "HWC").to(DEVICE) for i in range(2)]
    arguments = (
        images, [7, 8] * 2, [5, 4], [1, 2, -1, 0], 3, [1 / 255], [0.5] * 3, [0.5] * 3, torch.bfloat16,
        True, [0, 1],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bitfast.resize_normalize.triton, arguments)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_the_dispatcher_makes_no_difference(layout: str) -> None:
    """An eager call plans and launches by itself; a mode that watches operators gets to see one."""
    images = [random_image(i, (11 + i, 9, 3), "HWC").to(DEVICE) for i in range(2)]
    if layout == "CHW":
        images = [image.permute(2, 0, 1) for image in images]
    arguments: dict[str, Any] = {"sizes": [(8, 7)] * 2, "crop": (6, 9), "layout": layout}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with use_backend("triton"):
        result = resize_normalize(images, **arguments)
        with Watch():
            watched = resize_normalize(images, **arguments)
    assert torch.ops.bitfast.resize_normalize.triton in seen
    assert torch.equal(result, watched)
    assert torch.equal(result.cpu(), resize_normalize([i.cpu() for i in images], **arguments))


def test_a_default_device_makes_no_difference() -> None:
    filter_store.cache_clear()
    values_of_bytes.cache_clear()
    images = [random_image(1, (11, 9, 3), "HWC").to(DEVICE)]
    with use_backend("triton"), torch.device("meta"):
        result = resize_normalize(images, [(8, 7)], rescale_factor=1 / 255)
    expected = resize_normalize([images[0].cpu()], [(8, 7)], rescale_factor=1 / 255)
    assert torch.equal(result.cpu(), expected)


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
