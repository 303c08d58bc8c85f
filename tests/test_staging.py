"""A batch of images packed in pieces for another device. The copies themselves are a matter of tests/gpu."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.images import photographs
from bitfast.images.inputs import to_tensor
from bitfast.images.pillow_memory import pixels_of
from bitfast.ops import staging
from bitfast.ops.staging import ALIGNMENT, pack, send, upload
from tests.requirements import NEEDS_EXTENSION
from tests.test_resize_normalize_native import memory_between_walls, tensor_at

CPU = torch.device("cpu")


def images() -> list[Tensor]:
    four_bytes = torch.randint(256, (9, 7, 4), dtype=torch.uint8)[..., :3]
    planes = torch.randint(256, (3, 8, 5), dtype=torch.uint8).permute(1, 2, 0)
    return [
        torch.randint(256, (5, 3, 3), dtype=torch.uint8),
        four_bytes,
        four_bytes.permute(2, 0, 1)[:, 2:, 1:6],
        planes,
        torch.rand(4, 6, 3),
        torch.rand(5, 4, 7)[..., 1::2],
        torch.randint(256, (20, 30, 3), dtype=torch.uint8)[3:17:2, ::5],
        torch.randint(256, (1, 1, 3), dtype=torch.uint8).expand(6, 7, 3),
        torch.rand(3, 3, 1).double().flip(0).transpose(0, 1),
        torch.empty((0, 3), dtype=torch.int32),
        torch.tensor(7, dtype=torch.int16),
        torch.randint(256, (1, 1, 1), dtype=torch.uint8),
        torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8).transpose(0, 2),
        torch.rand(3, 5, 2).to(torch.complex128)[:, ::2],
    ]


@NEEDS_EXTENSION
@pytest.mark.parametrize("piece", [1, 3, 16, 100, 2**24])
def test_packed_images_are_what_they_were(piece: int) -> None:
    originals = images()
    batch = pack(originals)
    views = batch.views(send(batch, CPU, piece))
    for original, view, start in zip(originals, views, batch.starts, strict=True):
        assert start % ALIGNMENT == 0
        assert view.dtype == original.dtype
        assert torch.equal(view, original)
        assert view.data_ptr() % ALIGNMENT == 0 or not view.numel()
        order = [s for _, s in sorted(zip(view.stride(), original.stride(), strict=True))]
        assert order == sorted(order) or 0 in original.stride() or 1 in original.shape
    ends = [
        start + v.numel() * v.element_size() for start, v in zip(batch.starts, views, strict=True)
    ]
    for end, start in zip(ends, batch.starts[1:], strict=False):
        assert end <= start < end + ALIGNMENT
    assert batch.nbytes == ends[-1]


@NEEDS_EXTENSION
def test_pieces_follow_one_another_and_are_never_reused() -> None:
    """A copy that comes late still finds its piece as it was packed."""
    originals = images()
    batch = pack(originals)
    late = list(batch.pieces(100, pin_memory=False))
    assert [first for first, _ in late] == list(range(0, batch.nbytes, 100))
    assert {piece.numel() for _, piece in late[:-1]} == {100}
    there = torch.zeros(batch.nbytes + ALIGNMENT, dtype=torch.uint8)[: -(-batch.nbytes // 16) * 16]
    for first, piece in reversed(late):
        there[first : first + piece.numel()] = piece
    for original, view in zip(originals, batch.views(there), strict=True):
        assert torch.equal(view, original)


def test_pieces_are_neither_small_nor_large_nor_few() -> None:
    sizes = {1: 2**21, 2**24 - 1: 2**21, 2**25: 2**22, 2**25 + 1: 2**22, 2**27: 2**24, 2**40: 2**24}
    assert {nbytes: staging.piece_size(nbytes) for nbytes in sizes} == sizes


@NEEDS_EXTENSION
@settings(max_examples=100)
@given(st.data())
def test_any_memory_and_any_pieces(data: st.DataObject) -> None:
    """Cut, stepped and turned in all ways."""
    originals = []
    for seed in range(data.draw(st.integers(1, 4))):
        torch.manual_seed(seed)
        shape = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float32]))
        image = torch.randint(0, 255, shape).to(dtype)
        image = image.permute(data.draw(st.permutations(range(3))))
        for axis in range(3):
            first, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3))
            image = image.movedim(axis, 0)[first::step].movedim(0, axis)
        originals.append(image)
    batch = pack(originals)
    if batch.nbytes:
        there = send(batch, CPU, data.draw(st.integers(1, batch.nbytes + 5)))
        for original, view in zip(originals, batch.views(there), strict=True):
            assert torch.equal(view, original)


@NEEDS_EXTENSION
def test_photographs_of_pillow_lose_their_fourth_byte() -> None:
    tensors = [to_tensor(pixels_of(image)) for image in photographs(((640, 427), (1000, 872)), 2)]
    batch = pack(tensors)
    assert batch.nbytes == sum(tensor.numel() for tensor in tensors)
    for tensor, view in zip(tensors, batch.views(send(batch, CPU, 300_001)), strict=True):
        assert view.is_contiguous()
        assert torch.equal(view, tensor)


@NEEDS_EXTENSION
@pytest.mark.parametrize("channels", [3, 4])
def test_nothing_outside_an_image_is_read_or_written(channels: int) -> None:
    """Four bytes are copied for a pixel of three, but not of the last one."""
    whole = torch.randint(256, (50, 40, 4), dtype=torch.uint8)
    image = whole[..., :channels]
    length = 1 + sum((n - 1) * s for n, s in zip(image.shape, image.stride(), strict=True))
    size = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    with memory_between_walls(size) as start:
        for address in (start, start + size - length):
            there = tensor_at(address, image)
            batch = pack([there])
            assert torch.equal(batch.views(send(batch, CPU, 1000))[0], image)
    batch = pack([image])
    memory = torch.full((batch.nbytes + 64,), 77, dtype=torch.uint8)
    torch.ops.bitfast.pack_images.native([image], [0], 0, memory[32:-32])
    assert (memory[:32] == 77).all()
    assert (memory[-32:] == 77).all()
    assert torch.equal(memory[32:-32], image.flatten())


def test_on_the_cpu_nothing_happens() -> None:
    originals = images()
    for original, image in zip(originals, upload(originals, CPU), strict=True):
        assert image is original


def test_other_devices_get_each_image() -> None:
    on_meta = upload(images(), torch.device("meta"))
    assert [image.shape for image in on_meta] == [image.shape for image in images()]


def test_only_plain_memory_is_packed() -> None:
    """Of others autograd, or the device, has to make the copy."""
    plain = [torch.zeros(2, 3), torch.zeros(3, dtype=torch.uint8), torch.zeros(2).long()]
    others = [
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, dtype=torch.uint8, device="meta"),
        torch.zeros(2, dtype=torch.complex64).conj(),
        torch.zeros(2, dtype=torch.complex64).conj().imag,
        torch.eye(2).to_sparse(),
    ]
    assert all(map(staging._is_plain_memory, plain))
    assert not any(map(staging._is_plain_memory, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu() -> None:
    originals = images()
    for original, image in zip(originals, upload(originals, torch.device("cuda")), strict=True):
        assert torch.equal(image.cpu(), original)


# ---- a GPU that copies late --------------------------------------------------------------------------


class LateCopies:
    """Stands in for a GPU: its memory is the CPU's, and it makes its copies one after the other, late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: list[int] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._empty, self._copy = torch.empty, Tensor.copy_
        monkeypatch.setattr(torch, "empty", self._new)
        monkeypatch.setattr(Tensor, "copy_", lambda *args, **kwargs: self._late(*args, **kwargs))

    def _new(
        self, *size: int, device: object = None, pin_memory: bool = False, **kwargs: object
    ) -> Tensor:
        memory = self._empty(*size, **kwargs)
        if pin_memory:
            self.pinned.append(memory.data_ptr())
        return memory

    def _late(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert non_blocking
        assert source.data_ptr() in self.pinned
        self.copies.append((target, source))
        return target

    def finish(self) -> None:
        for target, source in self.copies:
            self._copy(target, source)


@NEEDS_EXTENSION
def test_copies_may_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = [image for image in images() if staging._is_plain_memory(image)]
    gpu = LateCopies(monkeypatch)
    monkeypatch.setattr(staging, "SMALLEST_PIECE", 32)
    result = upload(originals, torch.device("cuda"))
    assert len(gpu.copies) > 8
    gpu.finish()
    for original, image in zip(originals, result, strict=True):
        assert torch.equal(image, original)
