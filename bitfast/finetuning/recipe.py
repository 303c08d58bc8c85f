"""BiT-HyperRule: hyper-parameters of fine-tuning, chosen from the data alone.

Kolesnikov et al., Big Transfer (https://arxiv.org/abs/1912.11370), section 3.3. Where the paper is silent or
its authors' code (https://github.com/google-research/big_transfer, ``bit_hyperrule.py``) differs from it, the
reason of the choice says what was taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bitfast.images.processing import BitImageProcessor

BATCH_SIZE = 512
LEARNING_RATE = 0.003
"""For a batch of ``BATCH_SIZE`` images."""
MEDIUM_IMAGES, LARGE_IMAGES = 20_000, 500_000
"""Training images from which on a data set is of medium or large size."""
STEPS = {"small": 500, "medium": 10_000, "large": 20_000}
DECAYS = (30, 60, 90)
"""Percent of all steps: where the learning rate falls to a tenth."""
MOST_WARMUP_STEPS = 500
SMALL_AREA = 96 * 96
"""Pixels below which an image is small."""
SMALL_SIZES, LARGE_SIZES = (160, 128), (448, 384)
"""(resize, crop) in pixels."""
MIXUP_ALPHA = 0.1


class Choice(NamedTuple):
    """One choice of a recipe: its name (a field of :class:`Recipe`), its value as text, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Recipe:
    """How a network is fine-tuned.

    Attributes:
        steps: Updates of the weights.
        batch_size: Training images in each, over all processes and micro-batches together.
        base_learning_rate: After warm-up, for this batch size.
        warmup_steps: In which the learning rate rises in equal parts from 0; it is reached in the last of them.
        decay_steps: From each of which on the learning rate is a tenth of what it was.
        momentum: Of SGD.
        weight_decay: Of SGD.
        resize: Edge of the square that training images are resized to, whatever their shape.
        crop: Edge of the square cut out of it at random, and of the square that images are resized to,
            uncropped, in evaluation.
        flip: Whether half of the training images are mirrored, left for right.
        mixup_alpha: Of MixUp's distribution Beta(alpha, alpha); 0: images are not mixed.
    """

    steps: int
    batch_size: int
    base_learning_rate: float
    warmup_steps: int
    decay_steps: tuple[int, ...]
    momentum: float
    weight_decay: float
    resize: int
    crop: int
    flip: bool
    mixup_alpha: float

    def __post_init__(self) -> None:
        _check(self)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.base_learning_rate * ((step + 1) / self.warmup_steps)
        return self.base_learning_rate * 0.1 ** sum(step >= decay for decay in self.decay_steps)

    def processor(self, base_processor: Any) -> BitImageProcessor:
        """Return the image processor of the fine-tuned network: the preprocessing of evaluation.

        Args:
            base_processor: Of the network that is fine-tuned. Its filter, rescaling and normalization are kept.
        """
        return BitImageProcessor(
            do_resize=True,
            size={"height": self.crop, "width": self.crop},
            resample=base_processor.resample,
            do_center_crop=False,
            crop_size={"height": self.crop, "width": self.crop},
            do_rescale=base_processor.do_rescale,
            rescale_factor=base_processor.rescale_factor,
            do_normalize=base_processor.do_normalize,
            image_mean=base_processor.image_mean,
            image_std=base_processor.image_std,
            do_convert_rgb=True,
        )


OVERRIDES = tuple(field.name for field in fields(Recipe))
"""The names that may be overridden."""


def choose_recipe(
    images: int, sizes: Any, overrides: Mapping[str, Any]
) -> tuple[Recipe, list[Choice]]:
    """Return the recipe for a data set, and each choice with its reason.

    Args:
        images: Training images.
        sizes: Their (height, width) in pixels, shape (images, 2).
        overrides: Values of fields of :class:`Recipe` that are given rather than chosen; None: chosen.

    Raises:
        TypeError: an override that is no field of a recipe.
        ValueError: no images, or a value that is out of its range; the message names it.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(given.keys() - set(OVERRIDES))
    if unknown:
        raise TypeError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(OVERRIDES)}")
    if images < 1:
        raise ValueError("a recipe needs at least one training image, got none")
    chosen: dict[str, tuple[Any, str]] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        chosen[name] = (given[name], "given") if name in given else (value, reason)
        return chosen[name][0]

    kind, what = _size_of_data(images)
    steps = choose("steps", STEPS[kind], what)
    batch_size = choose("batch_size", BATCH_SIZE, "the paper's")
    choose("base_learning_rate", *_learning_rate(batch_size))
    choose(
        "warmup_steps",
        min(MOST_WARMUP_STEPS, steps // 5),
        f"a fifth of the steps, at most {MOST_WARMUP_STEPS}: 100, 500 and 500 in the authors' code",
    )
    choose(
        "decay_steps",
        tuple(-(-percent * steps // 100) for percent in DECAYS),
        "to a tenth at 30, 60 and 90 % of the steps, as in the paper (the authors' code: at 40, 60 and 80 % "
        "of 500 steps)",
    )
    choose("momentum", 0.9, "the paper's")
    choose("weight_decay", 0.0, "the paper and the authors' code use none")
    for name, value, reason in _choose_sizes(sizes, given.get("resize"), given.get("crop")):
        choose(name, value, reason)
    choose(
        "flip",
        True,
        "the paper mirrors images, except where that changes what they mean: --no-flip",
    )
    is_small = kind == "small"
    choose(
        "mixup_alpha",
        0.0 if is_small else MIXUP_ALPHA,
        f"{images:,} training images; {'no ' if is_small else ''}MixUp "
        f"{'below' if is_small else 'from'} {MEDIUM_IMAGES:,}{'' if is_small else ' on'}",
    )
    recipe = Recipe(**{name: chosen[name][0] for name in OVERRIDES})
    return recipe, [Choice(name, _shown(chosen[name][0]), chosen[name][1]) for name in OVERRIDES]


def _size_of_data(images: int) -> tuple[str, str]:
    if images < MEDIUM_IMAGES:
        return "small", f"{images:,} training images, fewer than {MEDIUM_IMAGES:,}"
    if images < LARGE_IMAGES:
        return "medium", f"{images:,} training images, from {MEDIUM_IMAGES:,} to {LARGE_IMAGES:,}"
    return "large", f"{images:,} training images, at least {LARGE_IMAGES:,}"


def _learning_rate(batch_size: int) -> tuple[float, str]:
    if batch_size == BATCH_SIZE:
        return LEARNING_RATE, "the paper's"
    rate = LEARNING_RATE * batch_size / BATCH_SIZE
    return rate, f"the paper's {LEARNING_RATE} for {BATCH_SIZE} images, in proportion to the batch"


def _choose_sizes(sizes: Any, resize: int | None, crop: int | None) -> list[tuple[str, int, str]]:
    """Return resize and crop; where one is given, the other keeps the paper's proportion to it."""
    height, width = _median_size(sizes)
    is_small = height * width < SMALL_AREA
    rule = SMALL_SIZES if is_small else LARGE_SIZES
    reason = f"the median image has {width}x{height} pixels, {'less' if is_small else 'not less'} than 96x96"
    if not is_small:
        reason += (
            " (448 and 384 are the paper's; 512 and 480, its sizes for R152x4, the authors' code's)"
        )
    proportion = f"{rule[0]} to {rule[1]}, as in the paper for such images"
    if crop is not None and resize is None:
        return [("resize", round(crop * rule[0] / rule[1]), proportion), ("crop", crop, "")]
    if resize is not None and crop is None:
        return [("resize", resize, ""), ("crop", round(resize * rule[1] / rule[0]), proportion)]
    return [("resize", rule[0], reason), ("crop", rule[1], reason)]


def _median_size(sizes: Any) -> tuple[int, int]:
    """Return the (height, width) of the image whose area is the median."""
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    order = np.argsort(sizes[:, 0] * sizes[:, 1], kind="stable")
    height, width = sizes[order[len(order) // 2]].tolist()
    return height, width


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _check(recipe: Recipe) -> None:
    for name in ("steps", "batch_size", "resize", "crop"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(recipe, name)}")
    for name in ("warmup_steps", "weight_decay", "mixup_alpha"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name} must be a number from 0 on, got {getattr(recipe, name)}")
    if not 0 < recipe.base_learning_rate < float("inf"):
        raise ValueError(f"base_learning_rate must be above 0, got {recipe.base_learning_rate}")
    if not 0 <= recipe.momentum < 1:
        raise ValueError(f"momentum must be from 0 to below 1, got {recipe.momentum}")
    if recipe.crop > recipe.resize:
        raise ValueError(
            f"crop must be at most resize, {recipe.resize}, from which it is cut, got {recipe.crop}"
        )
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and recipe.resize**2 > 2 * limit:
        raise ValueError(f"resize must give at most {2 * limit} pixels, got {recipe.resize}")
