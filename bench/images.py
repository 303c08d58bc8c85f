"""The cases that are about image processors: a batch of decoded images in, ``pixel_values`` out.

All contestants run in this process, on the same PIL images. bitfast's processors are checked against those of
transformers that they replace before anything is timed. Two contestants do less than a processor does, and
show what resizing alone costs elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bitfast import BitImageProcessor, BitImageProcessorFast

from . import peers
from .accuracy import WrongResultError
from .rows import FAILED, MISSING, Row
from .timing import summarize, take_turns, timer_of
from .torchvision_import import import_torchvision

SLOW, FAST = "transformers slow", "transformers fast"
OURS, OURS_FAST = "bitfast", "bitfast fast"
PILLOW, INTERPOLATE = "Pillow, resize alone", "torch interpolate, resize alone"

PHOTOGRAPHS = (
    (512, 512), (451, 300), (200, 200), (600, 400), (371, 370), (1000, 872), (741, 500), (1411, 1411),
    (640, 427), (400, 328), (500, 500), (384, 303), (550, 660), (400, 300), (384, 191), (448, 172),
    (400, 400), (102, 102),
)  # fmt: skip
"""(width, height) of 18 of scikit-image's photographs."""

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "photographs of mixed size": PHOTOGRAPHS,
    "1920x1280": ((1920, 1280),) * 8,
    "512x512": ((512, 512),) * 32,
}
"""What a batch consists of, over and over."""

BATCHES = (1, 18, 32, 256)
LARGE_BATCH, LARGE_BATCH_ROUNDS = 256, 3
"""Of which a call takes seconds."""

LEVEL = 1 / 255 / 0.26
"""What one level of a byte is in pixel_values, with the smallest standard deviation of the default."""


@dataclass(frozen=True)
class ImageCase:
    """One batch.

    Attributes:
        images: A key of :data:`SIZES`.
        batch: How many.
        threads: Of the CPU.
        is_quick: Whether it stands for its like, in ``--quick`` and in the README.
    """

    images: str
    batch: int
    threads: int
    is_quick: bool = False

    @property
    def name(self) -> str:
        """The case in a few words, without the threads."""
        return f"{self.batch} {self.images}" if self.batch > 1 else f"1 of {self.images}"

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"preprocessing: {self.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def cases(thread_counts: Sequence[int]) -> Iterator[ImageCase]:
    """Yield all cases."""
    for threads in thread_counts:
        for images in SIZES:
            for batch in BATCHES:
                if batch != len(PHOTOGRAPHS) or images != "512x512":
                    is_quick = batch == len(PHOTOGRAPHS) and threads == max(thread_counts)
                    yield ImageCase(images, batch, threads, is_quick)


def draw(case: ImageCase) -> list[Image.Image]:
    """Draw the images of a case."""
    return photographs(SIZES[case.images], case.batch)


def photographs(sizes: Sequence[tuple[int, int]], count: int) -> list[Image.Image]:
    """Draw images of these (width, height), over and over: noise, blurred as photographs are."""
    random = np.random.default_rng(0)

    def photograph(width: int, height: int) -> Image.Image:
        coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    distinct = [photograph(*size) for size in sizes[:count]]
    return list(islice(cycle(distinct), count))


# ---- contestants ----------------------------------------------------------------------------------


def processor(make: Callable[[], Any], images: list[Image.Image]) -> Callable[[], Tensor]:
    """Return what makes pixel_values of the images."""
    made = make()
    return lambda: made(images, return_tensors="pt")["pixel_values"]


def resized(image: Image.Image, edge: int = 224) -> tuple[int, int]:
    """Return (width, height) with this many pixels along the shorter edge."""
    shorter = min(image.size)
    return int(edge * image.width / shorter), int(edge * image.height / shorter)


def contestants(images: list[Image.Image]) -> dict[str, Callable[[], Any]]:
    """Return what is to be timed, by name; the processors of transformers only where they can be had."""
    found: dict[str, Callable[[], Any]] = {}
    installed = peers.installed()
    if installed["transformers"] is not None:
        import_torchvision()
        from transformers.models.bit.image_processing_bit import BitImageProcessor as Slow

        found[SLOW] = processor(Slow, images)
        if installed["torchvision"] is not None:
            from transformers.models.bit.image_processing_bit_fast import (
                BitImageProcessorFast as Fast,
            )

            found[FAST] = processor(Fast, images)
    sizes = [resized(image) for image in images]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]
    found[PILLOW] = lambda: [
        image.resize(size, Image.Resampling.BICUBIC)
        for image, size in zip(images, sizes, strict=True)
    ]
    found[INTERPOLATE] = lambda: [
        F.interpolate(tensor, size[::-1], mode="bicubic", antialias=True)
        for tensor, size in zip(tensors, sizes, strict=True)
    ]
    found[OURS] = processor(BitImageProcessor, images)
    found[OURS_FAST] = processor(BitImageProcessorFast, images)
    return found


def check(ours: Tensor, theirs: Tensor, allowed: float) -> float:
    """Return the largest difference of two batches.

    Raises:
        WrongResultError: it is larger than what is allowed.
    """
    if ours.shape != theirs.shape:
        raise WrongResultError(
            f"shape {tuple(ours.shape)} where it should be {tuple(theirs.shape)}"
        )
    difference = (ours - theirs).abs().max().item()
    if not difference <= allowed:
        raise WrongResultError(f"differs by {difference:.3g} where {allowed:.3g} is allowed")
    return difference


# ---- a case -----------------------------------------------------------------------------------------


def run(case: ImageCase, rounds: int) -> list[Row]:
    """Check and time one case; return a row per contestant."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return _rows(case, min(rounds, LARGE_BATCH_ROUNDS) if case.batch >= LARGE_BATCH else rounds)
    finally:
        torch.set_num_threads(before)


def _rows(case: ImageCase, rounds: int) -> list[Row]:
    functions = contestants(draw(case))
    rows = {
        name: Row(
            "images", "preprocessing", case.name, case.threads, name, "float32", is_quick=case.is_quick
        )
        for name in (SLOW, FAST, *functions)
    }  # fmt: skip
    for name in (SLOW, FAST):
        if name not in functions:
            note = " and ".join(peers.how_to_install(p) for p in ("transformers", "torchvision"))
            rows[name] = dataclasses.replace(rows[name], status=MISSING, note=note)
    for ours, theirs, allowed in ((OURS, SLOW, 0.0), (OURS_FAST, FAST, 2.01 * LEVEL)):
        if theirs not in functions:
            rows[ours] = dataclasses.replace(rows[ours], note=f"not checked against {theirs}")
            continue
        try:
            error = check(functions[ours](), functions[theirs](), allowed)
        except WrongResultError as wrong:
            del functions[ours]
            rows[ours] = dataclasses.replace(rows[ours], status=FAILED, note=f"{wrong}: not timed")
        else:
            rows[ours] = dataclasses.replace(rows[ours], error=error, allowed_error=allowed)
    timers = {name: timer_of(function) for name, function in functions.items()}
    samples = take_turns(timers, rounds)
    for name, seconds in samples.items():
        rows[name] = rows[name].timed(summarize(seconds, samples.get(SLOW)))
    return list(rows.values())
