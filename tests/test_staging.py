"""A batch of images packed for one copy. The copy itself is a matter of tests/gpu."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitfast.ops.staging import ALIGNMENT, dense_enough, pack, packed_size, places_of, upload


def images() -> list[Tensor]:
    four_bytes = torch.randint(256, (9, 7, 4), dtype=torch.uint8)[..., :3]
    planes = torch.randint(256, (3, 8, 5), dtype=torch.uint8).permute(1, 2, 0)
    return [
        torch.randint(256, (5, 3, 3), dtype=torch.uint8),
        four_bytes,
        planes,
        torch.rand(4, 6, 3),
        torch.randint(256, (20, 30, 3), dtype=torch.uint8)[3:17:2, ::5],
        torch.randint(256, (1, 1, 3), dtype=torch.uint8).expand(6, 7, 3),
        torch.rand(3, 3, 1).double(),
        torch.empty((0, 3), dtype=torch.int32),
        torch.randint(256, (1, 1, 1), dtype=torch.uint8),
    ]


def test_packed_images_are_what_they_were() -> None:
    originals = images()
    dense = [dense_enough(image) for image in originals]
    places = places_of(dense)
    packed = torch.full((packed_size(places) + 64,), 77, dtype=torch.uint8)
    pack(dense, places, packed)
    assert (packed[packed_size(places) :] == 77).all()
    for original, place in zip(originals, places, strict=True):
        assert place.start % ALIGNMENT == 0
        assert torch.equal(place.view(packed), original)
    for before, after in itertools.pairwise(places):
        assert before.start + before.nbytes <= after.start


def test_memory_that_is_nearly_dense_is_copied_as_it_is() -> None:
    small, four_bytes, planes, floats, sliced, expanded, *_ = images()
    for image in (small, four_bytes, planes, floats):
        assert dense_enough(image) is image
    for image in (sliced, expanded):
        assert dense_enough(image).is_contiguous()


def test_on_the_cpu_nothing_happens() -> None:
    originals = images()
    for original, image in zip(originals, upload(originals, torch.device("cpu")), strict=True):
        assert image is original


def test_other_devices_get_each_image() -> None:
    on_meta = upload(images(), torch.device("meta"))
    assert [image.shape for image in on_meta] == [image.shape for image in images()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu() -> None:
    originals = images()
    for original, image in zip(originals, upload(originals, torch.device("cuda")), strict=True):
        assert torch.equal(image.cpu(), original)
