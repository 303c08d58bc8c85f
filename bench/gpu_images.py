"""Part of the GPU report about image processors: whole batches of images of mixed sizes.

bitfast's results are compared with Pillow's, bit for bit, before anything is timed; those of the others
need only be near, and are compared with images that are cropped as they crop. A time counts from the call
until the results are on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitfast import BitImageProcessorFast

from .gpu_models import is_installed
from .gpu_summary import FROM_HOST, IMAGE_CASE, ON_DEVICE
from .gpu_timing import Session, WrongResultError, run_parts, sample_of, synchronize
from .images import PHOTOGRAPHS, photographs, resized

SMALL = ((12, 9), (8, 11), (20, 20))
"""What takes the place of photographs in a smoke run; (8, 11) is cropped by one and a half on each side."""

REPEATS = 7
CLOSE = 0.2
"""For peers: a few levels of a byte, where they round otherwise."""

Function = Callable[[], Any]


class Contestant(NamedTuple):
    """What makes ``pixel_values``, and of which class the processor is that crops as it does."""

    run: Function
    processor: type[Any]


def with_pillow(images: list[Image.Image], edge: int, processor: type[Any]) -> Tensor:
    """Return what a fast processor makes of images that Pillow has resized."""
    pictures = [image.resize(resized(image, edge), Image.Resampling.BICUBIC) for image in images]
    crop = processor(do_resize=False, crop_size={"height": edge, "width": edge})
    return crop(pictures, return_tensors="pt")["pixel_values"]


def torchvision_function(images: list[Any], edge: int, device: str) -> Function:
    """Return resizing, cropping and normalizing image after image, with torchvision."""
    from torchvision.transforms.v2 import functional as F

    processor = BitImageProcessorFast()
    mean, std = list(processor.image_mean), list(processor.image_std)

    def run() -> Tensor:
        results = []
        for image in images:
            pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image).to(device)
            pixels = F.resize(pixels, [edge], F.InterpolationMode.BICUBIC, antialias=True)
            results.append(F.center_crop(pixels, [edge, edge]))
        return F.normalize(torch.stack(results).float() / 255, mean, std)

    return run


def contestants(session: Session, images: list[Any], edge: int) -> dict[str, Contestant]:
    """Return what is to be timed, by name."""
    options = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    found: dict[str, Contestant] = {}
    if is_installed(session, "torchvision"):
        if is_installed(session, "transformers"):
            from transformers import BitImageProcessorFast as Theirs

            theirs = Theirs(**options)
            found["transformers fast"] = Contestant(
                lambda: theirs(images, return_tensors="pt", device=session.device)["pixel_values"],
                Theirs,
            )
        found["torchvision v2, image by image"] = Contestant(
            torchvision_function(images, edge, session.device), BitImageProcessorFast
        )
    fast = BitImageProcessorFast(**options, device=session.device)
    found["bitfast fast"] = Contestant(
        session.on_ours(lambda: fast(images, return_tensors="pt")["pixel_values"]),
        BitImageProcessorFast,
    )
    return found


def check(name: str, result: Tensor, expected: Tensor) -> float:
    """Return the largest difference.

    Raises:
        WrongResultError: it is too large; for bitfast, there is one.
    """
    difference = (result.cpu().float() - expected).abs().max().item()
    if not difference <= (0.0 if name.startswith("bitfast") else CLOSE):
        raise WrongResultError(f"differs from Pillow by {difference:.2e}")
    return difference


def race(session: Session, case: str, name: str, function: Function, expected: Tensor) -> None:
    """Check and time one contestant."""
    difference = check(name, function(), expected)
    if session.is_check_only:
        session.add(case, name, "checked", check=difference)
        return
    times = []
    for _ in range(2 if session.is_smoke else REPEATS):
        synchronize(session.device)
        start = time.perf_counter()
        function()
        synchronize(session.device)
        times.append(time.perf_counter() - start)
    sample = sample_of(times, 1, False)
    session.add(
        case,
        name,
        check=difference,
        **sample._asdict(),
        is_baseline=name == "transformers fast",
        images_per_second=len(expected) / sample.seconds,
    )


def images(session: Session) -> None:
    """Batches of 64 and of 256, from the host and on the device."""
    edge = 8 if session.is_smoke else 224
    for count in (3,) if session.is_smoke else (256, 64):
        batch = photographs(SMALL if session.is_smoke else PHOTOGRAPHS, count)
        on_device = [
            torch.from_numpy(np.array(image)).permute(2, 0, 1).to(session.device) for image in batch
        ]
        for origin, given in ((FROM_HOST, batch), (ON_DEVICE, on_device)):
            case = IMAGE_CASE.format(batch=count, origin=origin)
            for name, (run, processor) in contestants(session, given, edge).items():
                expected = with_pillow(batch, edge, processor)
                session.attempt(case, name, partial(race, session, case, name, run, expected))


if __name__ == "__main__":
    run_parts({"images": images}, __doc__ or "")
