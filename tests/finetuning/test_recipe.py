"""The recipe: what it chooses at its boundaries, and that what is given is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.finetuning.recipe import Choice, Recipe, choose_recipe


def choose(images: int = 100, size: tuple[int, int] = (96, 96), **overrides: Any) -> Recipe:
    return choose_recipe(images, [size] * min(images, 3), overrides)[0]


def choices(images: int = 100, **overrides: Any) -> dict[str, Choice]:
    return {choice.name: choice for choice in choose_recipe(images, [(96, 96)], overrides)[1]}


@pytest.mark.parametrize(
    ("images", "steps", "warmup", "decays", "alpha"),
    [
        (1, 500, 100, (150, 300, 450), 0),
        (19_999, 500, 100, (150, 300, 450), 0),
        (20_000, 10_000, 500, (3000, 6000, 9000), 0.1),
        (499_999, 10_000, 500, (3000, 6000, 9000), 0.1),
        (500_000, 20_000, 500, (6000, 12_000, 18_000), 0.1),
    ],
)
def test_number_of_images_decides_the_schedule_and_mixup(
    images: int, steps: int, warmup: int, decays: tuple[int, ...], alpha: float
) -> None:
    recipe = choose(images)
    assert (recipe.steps, recipe.warmup_steps, recipe.decay_steps) == (steps, warmup, decays)
    assert recipe.mixup_alpha == alpha
    assert (recipe.base_learning_rate, recipe.batch_size) == (0.003, 512)
    assert (recipe.momentum, recipe.weight_decay, recipe.flip) == (0.9, 0.0, True)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((95, 97), (160, 128)),
        ((32, 32), (160, 128)),
        ((96, 96), (448, 384)),
        ((9, 1024), (448, 384)),
    ],
)
def test_area_decides_the_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    recipe = choose(size=size)
    assert (recipe.resize, recipe.crop) == expected


def test_median_image_decides_among_mixed_ones() -> None:
    recipe, _ = choose_recipe(3, [(30, 30), (2000, 3000), (40, 40)], {})
    assert recipe.crop == 128


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"crop": 32}, (40, 32)),
        ({"resize": 40}, (40, 32)),
        ({"crop": 32, "resize": 32}, (32, 32)),
    ],
)
def test_one_size_given_keeps_the_proportion(
    overrides: dict[str, int], expected: tuple[int, int]
) -> None:
    recipe = choose(size=(8, 8), **overrides)
    assert (recipe.resize, recipe.crop) == expected


def test_learning_rate_of_each_part() -> None:
    recipe = choose()
    rates = [recipe.learning_rate(step) for step in range(recipe.steps)]
    assert rates[:100] == pytest.approx(np.linspace(0, 0.003, 101)[1:])
    for begin, end, rate in (
        (100, 150, 3e-3),
        (150, 300, 3e-4),
        (300, 450, 3e-5),
        (450, 500, 3e-6),
    ):
        assert rates[begin:end] == pytest.approx([rate] * (end - begin))


@given(st.integers(1, 10**6), st.integers(1, 30_000), st.integers(1, 4096))
def test_schedules_are_sane(images: int, steps: int, batch_size: int) -> None:
    recipe = choose(images, steps=steps, batch_size=batch_size)
    assert 0 <= recipe.warmup_steps <= steps
    assert list(recipe.decay_steps) == sorted(recipe.decay_steps)
    assert recipe.learning_rate(0) > 0
    assert max(map(recipe.learning_rate, range(min(steps, 1000)))) <= recipe.base_learning_rate
    assert recipe.base_learning_rate == pytest.approx(0.003 * batch_size / 512)


def test_what_is_given_is_taken_and_said() -> None:
    overrides = {
        "steps": 7, "batch_size": 8, "base_learning_rate": 0.5, "warmup_steps": 0, "decay_steps": (5,),
        "momentum": 0.5, "weight_decay": 0.1, "resize": 20, "crop": 10, "flip": False, "mixup_alpha": 0.3,
    }  # fmt: skip
    recipe, table = choose_recipe(10**6, [(96, 96)], overrides)
    assert recipe == Recipe(**overrides)
    assert {choice.reason for choice in table} == {"given"}
    assert [choice.name for choice in table] == list(overrides)
    assert choices(flip=False)["flip"].value == "no"
    assert choices(decay_steps=())["decay_steps"].value == "none"


def test_every_choice_has_a_reason() -> None:
    for images in (100, 20_000, 600_000):
        assert all(choice.reason for choice in choices(images).values())
    assert choices(steps=None)["steps"].value == "500"
    assert "20,000" in choices(20_000)["mixup_alpha"].reason
    assert "batch" in choices(batch_size=64)["base_learning_rate"].reason


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        (
            {"crop": 50, "resize": 40},
            "crop must be at most resize, 40, from which it is cut, got 50",
        ),
        ({"momentum": 1.0}, "momentum must be"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"mixup_alpha": float("inf")}, "mixup_alpha must be"),
        ({"resize": 10**6}, "resize must give at most"),
    ],
)
def test_values_out_of_range_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**overrides)


def test_no_images_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="got none"):
        choose_recipe(0, [], {})
    with pytest.raises(TypeError, match="no learning"):
        choose(learning=1)


@pytest.mark.parametrize("kind", [BitImageProcessor, BitImageProcessorFast])
def test_processor_resizes_to_the_crop_and_keeps_the_rest(kind: Any) -> None:
    base = kind(image_mean=[0.1, 0.2, 0.3], image_std=0.5, resample=2, do_rescale=True)
    processor = choose(crop=20).processor(base)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    resized = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR), np.float64) / 255
    expected = (resized - [0.1, 0.2, 0.3]) / 0.5
    assert np.abs(pixels - expected.transpose(2, 0, 1)).max() < 1e-6
