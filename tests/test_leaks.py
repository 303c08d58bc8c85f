"""What a call takes from the C library's heap it gives back, to the last string.

A lost string is small, but it lies between feature maps, and keeps the heap from joining what they free. With
48 bytes a call, each training step of R50x1 on a CPU took 100 MB more than the one before.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bitfast
from tests.model_pairs import LAYER_TYPES, our_model

CALLS = 50
MOST_TRIES = 10
SMALLEST_LOSS = 24
"""Bytes that a call may seem to lose, on average; the smallest block of the heap takes 32."""


class Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "top",
        )
    ]  # fmt: skip


def heap() -> Heap:
    library = ctypes.CDLL(None)
    if platform.libc_ver()[0] != "glibc" or not hasattr(library, "mallinfo2"):
        pytest.skip("only glibc from 2.33 on tells how much of its heap is in use")
    library.mallinfo2.restype = Heap
    gc.collect()
    found = library.mallinfo2()
    assert isinstance(found, Heap)
    return found


def bytes_lost(call: Callable[[], object]) -> float:
    """Return how many bytes more are in use after each of the calls, on average."""
    before = heap()
    for _ in range(CALLS):
        call()
    after = heap()
    return (after.used + after.mapped - before.used - before.mapped) / CALLS


def assert_loses_nothing(call: Callable[[], object]) -> None:
    for _ in range(MOST_TRIES):  # caches fill up, of Python's and of torch's
        lost = bytes_lost(call)
        if lost < SMALLEST_LOSS:
            return
    pytest.fail(f"a call loses {lost:.0f} bytes")


SHALLOW: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [16, 32]}
SAME: dict[str, Any] = {"global_padding": "same", "embedding_dynamic_padding": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, SAME], ids=["default", "same"])
@pytest.mark.parametrize("layer_type", LAYER_TYPES)
def test_models(layer_type, settings, dtype):
    settings = {"layer_type": layer_type, **SHALLOW, **settings}
    model = our_model("BitForImageClassification", **settings).to(dtype)
    images = torch.randn(1, 3, 40, 40, dtype=dtype)

    def step() -> None:
        model.zero_grad()
        model(images).logits.sum().backward()

    assert_loses_nothing(step)
    model.eval()
    assert_loses_nothing(lambda: torch.no_grad()(model)(images))


@pytest.mark.parametrize("name", ["BitImageProcessor", "BitImageProcessorFast"])
def test_processors(name):
    processor = getattr(bitfast, name)(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}
    )
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert_loses_nothing(lambda: processor([image, image], return_tensors="pt"))


def test_a_lost_string_is_found():
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    assert bytes_lost(lambda: library.malloc(32)) >= SMALLEST_LOSS
