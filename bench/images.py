"""The cases that are about image processors: a batch of decoded images in, ``pixel_values`` out.

All contestants run in this process, on the same images. Before anything is timed, bitfast's processors are
checked against those of transformers that they replace, on a GPU against Pillow's resizing, bit for bit. Some
contestants do less than a processor does, and show what resizing costs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bitfast import BitImageProcessor, BitImageProcessorFast

from . import peers
from .accuracy import Verdict, WrongResultError
from .cases import Begin, Case, Contestant, NotInstalledError, Problem, Results, as_list, calling
from .torchvision_import import import_torchvision

SLOW, FAST = "transformers slow", "transformers fast"
OURS, OURS_FAST = "bitfast", "bitfast fast"
PILLOW, INTERPOLATE = "Pillow, resize alone", "torch interpolate, resize alone"
TORCHVISION = "torchvision v2, image by image"

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
BATCHES, GPU_BATCHES = (1, 18, 32, 256), (256, 64)
LARGE_BATCH, LARGE_BATCH_ROUNDS = 256, 3
"""Of which a call takes seconds."""
EDGE = 224

LEVEL = 1 / 255 / 0.26
"""What one level of a byte is in pixel_values, with the smallest standard deviation of the default."""
CLOSE = 0.2
"""What peers on a GPU may differ by: a few levels, where they round otherwise."""

Function = Callable[[], Results]


def cases(device: str, thread_counts: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of a device."""
    mixed = len(PHOTOGRAPHS)
    if device == "cpu":
        for threads, (images, sizes), batch in product(thread_counts, SIZES.items(), BATCHES):
            if batch != mixed or images != "512x512":
                name = f"{batch} {images}" if batch > 1 else f"1 of {images}"
                is_quick = batch == mixed and threads == max(thread_counts)
                yield case_of(name, partial(cpu_problem, sizes, batch), batch, threads, is_quick)
        return
    for batch, origin in product(GPU_BATCHES, ("decoded PIL images", "tensors on the GPU")):
        are_there = origin.startswith("tensors")
        make = partial(gpu_problem, PHOTOGRAPHS, batch, EDGE, "cuda", are_there)
        name = f"{batch} photographs of mixed size, {origin}"
        yield case_of(name, make, batch, 0, batch == max(GPU_BATCHES))


def case_of(
    name: str, make: Callable[[], Problem], batch: int, threads: int, is_quick: bool
) -> Case:
    return Case(
        "images", "preprocessing", name, "float32", lambda: nullcontext(make()),
        "cpu" if threads else "cuda", threads, is_quick=is_quick,
        most_rounds=LARGE_BATCH_ROUNDS if batch >= LARGE_BATCH and threads else None,
    )  # fmt: skip


def photographs(sizes: Sequence[tuple[int, int]], count: int) -> list[Image.Image]:
    """Draw images of these (width, height), over and over: noise, blurred as photographs are."""
    random = np.random.default_rng(0)
    distinct = []
    for width, height in sizes[:count]:
        coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        photograph = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        distinct.append(photograph)
    return list(islice(cycle(distinct), count))


@dataclass
class NearnessJudge:
    """Compares results with others, element by element: the largest difference, and what is allowed.

    Attributes:
        expected: By contestant, what makes the expected results, and by how much others may differ. Who has
            no entry is not checked.
    """

    expected: Mapping[str, tuple[Function, float]]

    def __call__(self, name: str, dtype: str, results: Sequence[Tensor]) -> Verdict:
        if name not in self.expected:
            return Verdict(None, None)
        make, allowed = self.expected[name]
        (result,), (theirs,) = results, as_list(make())
        if result.shape != theirs.shape:
            raise WrongResultError(f"shape {tuple(result.shape)} is not {tuple(theirs.shape)}")
        return Verdict((result.cpu() - theirs).abs().max().item(), allowed)


def processing(make: Callable[[], Any], images: list[Any], **options: Any) -> Function:
    """Return what makes pixel_values of images."""
    processor = make()
    return lambda: processor(images, return_tensors="pt", **options)["pixel_values"]


def their_processor(name: str) -> Any:
    """Return a processor class of transformers, or raise NotInstalledError."""
    needed = ("transformers", "torchvision")[: 2 if name == FAST else 1]
    missing = [peer for peer in needed if peers.installed()[peer] is None]
    if missing:
        raise NotInstalledError(" and ".join(map(peers.how_to_install, missing)))
    import_torchvision()
    if name == SLOW:
        from transformers.models.bit import image_processing_bit as slow

        return slow.BitImageProcessor
    from transformers.models.bit import image_processing_bit_fast as fast

    return fast.BitImageProcessorFast


def made_late(make: Callable[[], Function]) -> Begin:
    """Return what makes a function and begins it: where its library is missing, the others still run."""
    return lambda stack: calling(make())(stack)


def contestant(name: str, begin: Begin, note: str = "") -> Contestant:
    return Contestant(name, "float32", begin, note)


def resized(image: Image.Image, edge: int = EDGE) -> tuple[int, int]:
    """Return (width, height) with this many pixels along the shorter edge."""
    shorter = min(image.size)
    return int(edge * image.width / shorter), int(edge * image.height / shorter)


# ---- on a CPU -------------------------------------------------------------------------------------


def cpu_problem(kinds: Sequence[tuple[int, int]], batch: int) -> Problem:
    """Processors of either library, and what resizing alone costs Pillow and torch."""
    images = photographs(kinds, batch)
    sizes = [resized(image) for image in images]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in images]

    def theirs(name: str) -> Function:
        return processing(their_processor(name), images)

    def in_pillow() -> Results:
        for image, size in zip(images, sizes, strict=True):
            image.resize(size, Image.Resampling.BICUBIC)
        return []

    def by_torch() -> Results:
        pairs = zip(tensors, sizes, strict=True)
        return [F.interpolate(t, size[::-1], mode="bicubic", antialias=True) for t, size in pairs]

    contestants = [
        *(contestant(name, made_late(partial(theirs, name))) for name in (SLOW, FAST)),
        contestant(PILLOW, calling(in_pillow)),
        contestant(INTERPOLATE, calling(by_torch)),
    ]
    expected = {}
    for name, peer, processor, allowed in (
        (OURS, SLOW, BitImageProcessor, 0.0),
        (OURS_FAST, FAST, BitImageProcessorFast, 2.01 * LEVEL),
    ):
        note = ""
        try:
            expected[name] = theirs(peer), allowed
        except NotInstalledError:
            note = f"not checked against {peer}"
        contestants.append(contestant(name, calling(processing(processor, images)), note))
    return Problem(contestants, NearnessJudge(expected))


# ---- on a GPU -------------------------------------------------------------------------------------


def gpu_problem(
    kinds: Sequence[tuple[int, int]], batch: int, edge: int, device: str, are_there: bool
) -> Problem:
    """Fast processors, and torchvision image by image, to ``device``; ``are_there``: the images are on it."""
    pictures = photographs(kinds, batch)
    images: list[Any] = list(pictures)
    if are_there:
        images = [torch.from_numpy(np.array(p)).permute(2, 0, 1).to(device) for p in pictures]
    options = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}

    def theirs() -> Function:
        return processing(partial(their_processor(FAST), **options), images, device=device)

    def by_torchvision() -> Function:
        their_processor(FAST)  # or it is not installed
        return torchvision_function(images, edge, device)

    ours = processing(partial(BitImageProcessorFast, **options, device=device), images)
    contestants = [
        contestant(FAST, made_late(theirs)),
        contestant(TORCHVISION, made_late(by_torchvision)),
        contestant(OURS_FAST, calling(ours)),
    ]
    # Others are compared with images that are cropped as they crop.
    as_ours = partial(with_pillow, pictures, edge, lambda: BitImageProcessorFast)
    as_theirs = partial(with_pillow, pictures, edge, lambda: their_processor(FAST))
    expected: dict[str, tuple[Function, float]] = {
        FAST: (as_theirs, CLOSE), TORCHVISION: (as_ours, CLOSE), OURS_FAST: (as_ours, 0.0)
    }  # fmt: skip
    return Problem(contestants, NearnessJudge(expected))


def with_pillow(images: list[Image.Image], edge: int, processor: Callable[[], Any]) -> Tensor:
    """Return what a fast processor makes of images that Pillow has resized."""
    pictures = [image.resize(resized(image, edge), Image.Resampling.BICUBIC) for image in images]
    crop = processor()(do_resize=False, crop_size={"height": edge, "width": edge})
    return crop(pictures, return_tensors="pt")["pixel_values"]


def torchvision_function(images: list[Any], edge: int, device: str) -> Function:
    """Return resizing, cropping and normalizing image after image, with torchvision."""
    from torchvision.transforms.v2 import functional as V

    processor = BitImageProcessorFast()
    mean, std = list(processor.image_mean), list(processor.image_std)

    def run() -> Tensor:
        results = []
        for image in images:
            pixels = image if isinstance(image, Tensor) else V.pil_to_tensor(image).to(device)
            pixels = V.resize(pixels, [edge], V.InterpolationMode.BICUBIC, antialias=True)
            results.append(V.center_crop(pixels, [edge, edge]))
        return V.normalize(torch.stack(results).float() / 255, mean, std)

    return run
