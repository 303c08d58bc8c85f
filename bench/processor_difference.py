"""``python -m bench.processor_difference``: how the slow and the fast image processor differ, as a picture.

On scikit-image's photograph "rocket". Prints the figures, and draws bench/results/processor-difference.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from bitfast import BitImageProcessor, BitImageProcessorFast

from .torchvision_import import import_torchvision

PICTURE = Path(__file__).parent / "results" / "processor-difference.png"
BYTES = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}  # from 0 to 255
DETAIL = slice(60, 124), slice(70, 134)  # the rows and columns that are enlarged


def pixels(processor: type, image: Image.Image) -> np.ndarray:
    """Return what a processor makes of an image before it rescales, (H, W, C)."""
    return processor()(image, **BYTES)["pixel_values"][0].permute(1, 2, 0).numpy().astype(int)


def describe(name: str, difference: np.ndarray) -> str:
    share = 100 * (difference > 0).mean()
    return f"{name}: {share:.2f} % of the bytes differ, by at most {difference.max()}"


def main() -> None:
    import_torchvision()
    import matplotlib
    from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as Theirs

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image = Image.open(Path(skimage.__file__).parent / "data" / "rocket.jpg")
    processors = (BitImageProcessor, BitImageProcessorFast, Theirs)
    slow, fast, theirs = (pixels(processor, image) for processor in processors)
    crop, resampling = np.abs(slow - fast), np.abs(fast - theirs)
    print(describe("slow and fast (the crop)", crop))
    print(describe("fast and transformers' fast (the resampling)", resampling))
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7))
    resampled = f"torchvision's resampling: up to {resampling.max()}"
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("slow (a detail)", slow[DETAIL], {}),
        ("fast: one pixel further", fast[DETAIL], {}),
        (f"their difference: up to {crop.max()} levels", crop.max(2), {"cmap": "magma"}),
        (resampled, resampling.max(2), {"cmap": "magma", "vmin": 0, "vmax": 2}),
    ]
    for axis, (title, content, options) in zip(axes, panels, strict=True):
        axis.imshow(content, **options)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=80)
    print(f"drew {PICTURE}")


if __name__ == "__main__":
    main()
