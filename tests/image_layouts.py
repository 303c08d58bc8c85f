"""Images for the tests of resize_normalize, however they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("HWC", "CHW", "sliced", "four bytes per pixel", "one pixel")


def random_image(
    seed: int, shape: tuple[int, int, int], layout: str, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Return an image (H, W, C) that lies in memory as the layout says."""
    generator = torch.Generator().manual_seed(seed)
    # Either noise, or noise of two values only, which overshoots under filters with negative lobes.
    image = torch.randint(256, shape, generator=generator)
    image = (torch.where(image > 127, 255, 0) if seed % 2 else image).to(dtype)
    return laid_out(image, layout)


def laid_out(image: Tensor, layout: str) -> Tensor:
    """Return an image (H, W, C) that lies in memory as the layout says."""
    height, width, channels = image.shape
    if layout == "CHW":
        return image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "sliced":
        wide = torch.full((2 * height, 3 * width, channels + 2), 77, dtype=image.dtype)
        return wide[::2, 1::3, 1:-1].copy_(image)
    if layout == "four bytes per pixel" and channels <= 4:
        return torch.full((height, width, 4), 77, dtype=image.dtype)[..., :channels].copy_(image)
    if layout == "one pixel":  # of which the image consists: all strides are 0 but the channels'
        return image[:1, :1].expand(image.shape)
    return image
