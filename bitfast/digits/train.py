"""Train the model that ships with bitfast: ``python -m bitfast.digits.train --help``.

A small BiT learns scikit-learn's 1,797 handwritten digits, with bitfast's own classes and nothing that
a user could not do. A fixed quarter of the images is held out: it has no part in training nor in any
choice. The settings below were chosen with ``--validate``, which holds out a part of the training images.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bitfast.checkpoints.files import replace_files
from bitfast.configuration import BitConfig
from bitfast.digits.card import CARD_NAME, model_card
from bitfast.digits.sheet import write_sheet
from bitfast.images.processing import BitImageProcessor
from bitfast.measurement import Measurement
from bitfast.modeling import BitForImageClassification

HELD_OUT_FRACTION = 0.25
VALIDATION_FRACTION = 0.25
SPLIT_SEED = 0

EPOCHS = 40
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05

MAX_ROTATION = 0.2  # radians
MAX_ZOOM = 0.15
MAX_SHIFT = 0.15  # of half the image's width: a bit more than half a pixel of the 8x8 image


@dataclass(frozen=True)
class Digits:
    """Images, each 8x8 pixels of mode "L", and the digits on them."""

    images: list[Image.Image]
    labels: list[int]

    def select(self, indices: Sequence[int]) -> Digits:
        """Return some of the images."""
        return Digits([self.images[i] for i in indices], [self.labels[i] for i in indices])


# ---- data ---------------------------------------------------------------------------------------


def load_digits() -> Digits:
    """Return all of scikit-learn's handwritten digits, in its order.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'training needs scikit-learn, which has the data: pip install "bitfast[test]"'
        ) from error
    data = datasets.load_digits()
    return Digits([to_image(values) for values in data.images], data.target.tolist())


def to_image(values: np.ndarray) -> Image.Image:
    """Make an 8-bit image of integers v from 0 to 16: (255 * v + 8) // 16, which keeps all 17 apart."""
    return Image.fromarray(((255 * values.astype(np.int64) + 8) // 16).astype(np.uint8))


def split(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Divide 0 ... len(labels) - 1 in two, the same way each time: (the rest, the given fraction).

    Each digit contributes the fraction of its own images, rounded. Both parts are in ascending order.
    """
    # RandomState, because NumPy guarantees that its numbers never change.
    random = np.random.RandomState(SPLIT_SEED)
    rest: list[int] = []
    part: list[int] = []
    for digit in sorted(set(labels)):
        indices = random.permutation([i for i, label in enumerate(labels) if label == digit])
        count = round(fraction * len(indices))
        part += indices[:count].tolist()
        rest += indices[count:].tolist()
    return sorted(rest), sorted(part)


def make_processor(training: Digits) -> BitImageProcessor:
    """Return the image processor of the model: 8x8 to 32x32, then mean 0 and variance 1 in training."""
    processor = BitImageProcessor(
        size={"height": 32, "width": 32},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
    )
    pixels = processor(training.images, do_normalize=False, return_tensors="pt")["pixel_values"]
    processor.image_mean = [round(pixels.double().mean().item(), 4)] * 3
    processor.image_std = [round(pixels.double().std().item(), 4)] * 3
    return processor


# ---- training -----------------------------------------------------------------------------------


def make_model() -> BitForImageClassification:
    """Return the network, newly initialised from torch's random state."""
    config = BitConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 256],
        depths=[1, 1, 1],
        num_groups=8,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    return BitForImageClassification(config)


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each image of a batch a little, at random; black comes in from outside."""
    draws = 2 * torch.rand(5, len(pixel_values), generator=generator) - 1
    angle = MAX_ROTATION * draws[0]
    zoom_x, zoom_y = 1 + MAX_ZOOM * draws[1], 1 + MAX_ZOOM * draws[2]
    shift_x, shift_y = MAX_SHIFT * draws[3], MAX_SHIFT * draws[4]
    rows = [
        torch.stack([zoom_x * angle.cos(), -zoom_y * angle.sin(), shift_x], dim=1),
        torch.stack([zoom_x * angle.sin(), zoom_y * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixel_values.shape), align_corners=False)
    black = pixel_values.min()
    return F.grid_sample(pixel_values - black, grid, align_corners=False) + black


def train(
    model: BitForImageClassification, pixel_values: Tensor, labels: Tensor, epochs: int, seed: int
) -> None:
    """Train a model in place: AdamW on the model's own loss, the learning rate up and down once."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
            loss = model(augment(pixel_values[batch], generator), labels=labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def fit(
    training: Digits, epochs: int, seed: int
) -> tuple[BitForImageClassification, BitImageProcessor]:
    """Return a model trained on the given images, and its image processor."""
    processor = make_processor(training)
    pixel_values = processor(training.images, return_tensors="pt")["pixel_values"]
    with reproducible(seed):
        model = make_model()
        train(model, pixel_values, torch.tensor(training.labels), epochs, seed)
    return model, processor


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Inside, equal seeds give equal bits; afterwards torch's settings are what they were."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)  # sums are added up in an order that depends on the threads
        torch.use_deterministic_algorithms(True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


def count_correct(
    model: BitForImageClassification, processor: BitImageProcessor, digits: Digits
) -> int:
    """Return how many of the images the model classifies correctly."""
    pixel_values = processor(digits.images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        predictions = model(pixel_values).logits.argmax(dim=1)
    return int((predictions == torch.tensor(digits.labels)).sum())


# ---- results ------------------------------------------------------------------------------------


def save(
    folder: Path,
    model: BitForImageClassification,
    processor: BitImageProcessor,
    card: str,
    held_out: Digits,
) -> None:
    """Write model, processor, model card and held-out images into a folder: all of them, or nothing."""
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        write_sheet(staging, held_out.images, held_out.labels)
        (staging / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")
        files = sorted(staging.iterdir())
        replace_files(folder, {file.name: partial(shutil.copyfile, file) for file in files})


def validate(digits: Digits, epochs: int, seed: int) -> Measurement:
    """Train on a part of the training images and measure on the rest of them."""
    training, _ = split(digits.labels, HELD_OUT_FRACTION)
    digits = digits.select(training)
    fitting, validation = split(digits.labels, VALIDATION_FRACTION)
    model, processor = fit(digits.select(fitting), epochs, seed)
    correct = count_correct(model, processor, digits.select(validation))
    return Measurement(correct, len(validation))


def train_and_save(digits: Digits, folder: Path, epochs: int, seed: int) -> Measurement:
    """Train on all training images, measure on the held-out ones, and write everything to a folder."""
    folder.mkdir(parents=True, exist_ok=True)  # first: what cannot work should fail at once
    training, held_out = (digits.select(part) for part in split(digits.labels, HELD_OUT_FRACTION))
    model, processor = fit(training, epochs, seed)
    measurement = Measurement(count_correct(model, processor, held_out), len(held_out.labels))
    card = model_card(
        measurement,
        training=len(training.labels),
        seed=seed,
        epochs=epochs,
        parameters=model.num_parameters(),
    )
    save(folder, model, processor, card, held_out)
    return measurement


# ---- command line -------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line; exit with a message if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m bitfast.digits.train",
        description="Train a small BiT on scikit-learn's handwritten digits.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("digits-model"),
        metavar="DIR",
        help="folder for the trained model (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="measure on a part of the training images instead, and write nothing",
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {options.epochs}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"argument --seed: must be from 0 to 2**63 - 1, got {options.seed}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"argument --output: must be a folder, {options.output} is a file")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    start = time.perf_counter()
    try:
        digits = load_digits()
        if options.validate:
            what, measurement = "validation", validate(digits, options.epochs, options.seed)
        else:
            what = "held-out"
            measurement = train_and_save(digits, options.output, options.epochs, options.seed)
    except (ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{what} accuracy {measurement} after {time.perf_counter() - start:.0f} s")
    if not options.validate:
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
