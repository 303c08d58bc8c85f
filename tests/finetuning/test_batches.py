"""Batches: functions of data, recipe, seed and step, whoever makes them; and what becomes of broken images."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from bitfast import BitImageProcessor
from bitfast.finetuning import draws
from bitfast.finetuning.augmentation import normalized, training_views
from bitfast.finetuning.batches import EvaluationBatches, TrainingBatches
from bitfast.finetuning.dataset import Dataset, Problem, open_splits
from bitfast.finetuning.draws import Purpose
from bitfast.finetuning.loading import LoadingError
from bitfast.finetuning.recipe import Recipe, choose_recipe

RESAMPLE = 3
DEADLINE = 60  # seconds, of what takes a few on a machine that has nothing else to do


def recipe_of(**changes: Any) -> Recipe:
    overrides = {"steps": 6, "batch_size": 14, "resize": 12, "crop": 9, **changes}
    return choose_recipe(100, [(40, 40)], overrides)[0]


def write_images(folder: Path, count: int = 11) -> Path:
    random = np.random.default_rng(0)
    for i in range(count):
        height, width = random.integers(5, 40, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"class {i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def open_images(folder: Path) -> Dataset:
    return open_splits(folder, valid_fraction=0).training


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_images(write_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def broken(tmp_path: Path) -> Dataset:
    """Images of which two have a header and nothing after it."""
    write_images(tmp_path)
    for name in ("class 0/04.png", "class 1/07.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    return open_images(tmp_path)


def steps_of(
    dataset: Dataset, recipe: Recipe, **options: Any
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return images, labels and indices of each step, those of its micro-batches one after the other."""
    batches = TrainingBatches(dataset, recipe, **{"resample": RESAMPLE, "seed": 5, **options})
    steps = []
    for number, step in enumerate(batches, options.get("first_step", 0)):
        assert (step.number, step.count) == (number, recipe.batch_size)
        parts = [(part.images, part.labels, part.indices) for part in step.micro_batches]
        sizes = [len(labels) for _, labels, _ in parts]
        assert max(sizes) <= options.get("micro_batch", recipe.batch_size)
        steps.append(tuple(torch.cat(column) for column in zip(*parts, strict=True)))
    return steps


def assert_equal(steps: list[Any], others: list[Any]) -> None:
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        for tensor, expected in zip(step, other, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


# ---- order and augmentation ---------------------------------------------------------------------


def test_every_epoch_has_each_image_once_in_another_order(dataset: Dataset) -> None:
    indices = torch.cat([step[2] for step in steps_of(dataset, recipe_of())]).tolist()
    count = len(dataset)
    epochs = [indices[i : i + count] for i in range(0, len(indices) - count, count)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_images_are_pillows(dataset: Dataset) -> None:
    recipe = recipe_of()
    corners = set()
    for step, (images, labels, indices) in enumerate(steps_of(dataset, recipe)):
        views = training_views(recipe, 5, step, 0, recipe.batch_size)
        assert labels.tolist() == dataset.labels[indices].tolist()
        for view, image, index in zip(views, images, indices.tolist(), strict=True):
            box = (view.left, view.top, view.left + 9, view.top + 9)
            resized = dataset.read(index).resize((12, 12), Image.Resampling.BICUBIC).crop(box)
            expected = ImageOps.mirror(resized) if view.is_mirrored else resized
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))
            corners.add((view.top, view.left, view.is_mirrored))
    assert len(corners) > 25  # of 32


@given(
    resize=st.integers(1, 50), smaller=st.integers(0, 49), seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**6), start=st.integers(0, 63), count=st.integers(1, 64), flip=st.booleans(),
)  # fmt: skip
def test_views_depend_on_seed_step_and_position_alone(
    resize: int, smaller: int, seed: int, step: int, start: int, count: int, flip: bool
) -> None:
    crop = max(1, resize - smaller)
    recipe = recipe_of(batch_size=64, resize=resize, crop=crop, flip=flip)
    views = training_views(recipe, seed, step, 0, 64)
    assert training_views(recipe, seed, step, start, start + count) == views[start : start + count]
    assert all(0 <= view.top <= resize - crop for view in views)
    assert all(0 <= view.left <= resize - crop for view in views)
    assert flip or not any(view.is_mirrored for view in views)
    if resize - crop > 9:
        assert training_views(recipe, seed, step + 1, 0, 64) != views
        assert training_views(recipe, seed ^ 1, step, 0, 64) != views


def test_views_are_uniform() -> None:
    recipe = recipe_of(batch_size=9000, resize=11, crop=9)
    views = training_views(recipe, 0, 0, 0, 9000)
    for name, values in (("top", 3), ("left", 3), ("is_mirrored", 2)):
        counts = np.bincount([getattr(view, name) for view in views])
        assert len(counts) == values
        assert np.abs(counts - 9000 / values).max() < 5 * (9000 / values) ** 0.5


def test_draws_never_change() -> None:
    """A run that is resumed by a later version goes on with the same numbers."""
    assert draws.bits(2**63 - 1, Purpose.MIXUP, 7, 2).tolist() == [
        14698569983119223286,
        15015111206984041961,
    ]
    assert draws.order(3, Purpose.EPOCH, 1, 8).tolist() == [3, 1, 6, 7, 4, 2, 0, 5]


def test_workers_and_micro_batches_make_no_difference(dataset: Dataset) -> None:
    recipe = recipe_of(mixup_alpha=0.1)
    expected = steps_of(dataset, recipe)
    assert_equal(steps_of(dataset, recipe, workers=2, micro_batch=4), expected)
    assert_equal(steps_of(dataset, recipe, micro_batch=2), expected)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(5, 30), world_size=st.integers(1, 3), micro_batch=st.sampled_from([2, 4, 100]),
    first_step=st.integers(0, 2),
)  # fmt: skip
def test_ranks_and_first_step_make_no_difference(
    dataset: Dataset, batch_size: int, world_size: int, micro_batch: int, first_step: int
) -> None:
    recipe = recipe_of(batch_size=batch_size, steps=3, mixup_alpha=0.1)
    parts = [
        steps_of(
            dataset, recipe, rank=rank, world_size=world_size, micro_batch=micro_batch,
            first_step=first_step,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert all(len(step[1]) % 2 == 0 for part in parts[:-1] for step in part)
    lengths = [len(part[0][1]) for part in parts]
    assert max(lengths) - min(lengths) <= 2
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_equal(together, steps_of(dataset, recipe)[first_step:])


def test_seed_makes_a_difference(dataset: Dataset) -> None:
    first, second = (steps_of(dataset, recipe_of(), seed=seed)[0] for seed in (0, 1))
    assert first[2].tolist() != second[2].tolist()


def test_steps_that_are_left_early_are_skipped(dataset: Dataset) -> None:
    recipe = recipe_of()
    batches = TrainingBatches(dataset, recipe, resample=RESAMPLE, seed=5, micro_batch=4)
    firsts = [next(step.micro_batches).indices for step in batches]
    for first, (_, _, indices) in zip(firsts, steps_of(dataset, recipe), strict=True):
        assert first.tolist() == indices[:4].tolist()


def test_only_large_recipes_mix(dataset: Dataset) -> None:
    def mixing(alpha: float) -> list[float | None]:
        batches = TrainingBatches(dataset, recipe_of(mixup_alpha=alpha), resample=3, seed=5)
        return [step.mixing for step in batches]

    assert mixing(0) == [None] * 6
    assert len(set(mixing(0.1))) == 6


def test_torchs_random_numbers_stay(dataset: Dataset) -> None:
    state = torch.get_rng_state()
    steps_of(dataset, recipe_of(steps=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
        ({"world_size": 8}, "batch_size must be at least 15 for 8 processes, got 14"),
        ({"micro_batch": 3}, "micro_batch must be .* even where images are mixed, got 3"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"resample": 6}, "resample must be from 0 to 5"),
    ],
)
def test_wrong_arguments(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(dataset, recipe_of(mixup_alpha=0.1), **options)


# ---- broken images ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_next_readable_image_stands_for_a_broken_one(broken: Dataset, workers: int) -> None:
    recipe = recipe_of()
    names = ["class 0/04.png", "class 1/07.png"]
    bad = {broken.names.index(name) for name in names}
    batches = TrainingBatches(
        broken, recipe, resample=RESAMPLE, seed=5, workers=workers, micro_batch=4
    )
    reported: list[Problem] = []
    indices: list[int] = []
    for step in batches:
        for part in step.micro_batches:
            reported += part.problems.values()
            indices += part.indices.tolist()
    count = len(broken)
    expected = []
    for position in range(len(indices)):
        order = draws.order(5, Purpose.EPOCH, position // count, count).tolist()
        later = order[position % count :] + order[: position % count]
        expected.append(next(index for index in later if index not in bad))
    assert indices == expected
    assert [problem.name for problem in sorted(reported)] == names  # each once
    assert batches.problems == reported
    assert all(problem.reason for problem in reported)


def test_evaluation_leaves_broken_images_out(broken: Dataset) -> None:
    batches = EvaluationBatches(broken, recipe_of(), resample=RESAMPLE, micro_batch=2)
    for _ in range(2):
        indices = [index for batch in batches for index in batch.indices.tolist()]
        names = [broken.name(index) for index in indices]
        assert names == [name for name in broken.names if name[-6:-4] not in ("04", "07")]
    assert len(batches.problems) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_only_broken_images_are_an_error_of_one_line(tmp_path: Path, workers: int) -> None:
    dataset = open_images(write_images(tmp_path, 4))
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(LoadingError, match=r"^none of 4 training images in a row .*\.png: [^\n]*$"):
        steps_of(dataset, recipe_of(), workers=workers)


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_all_images_in_order(dataset: Dataset, world_size: int) -> None:
    indices = []
    for rank in range(world_size):
        batches = EvaluationBatches(
            dataset, recipe_of(), resample=RESAMPLE, rank=rank, world_size=world_size, micro_batch=3
        )
        found = [batch.indices for batch in batches]
        assert len(found) == len(batches)
        indices += torch.cat(found).tolist()
    assert indices == list(range(len(dataset)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_sees_what_the_processor_makes(
    dataset: Dataset, workers: int, dtype: torch.dtype
) -> None:
    recipe = recipe_of()
    processor = recipe.processor(BitImageProcessor(resample=2, image_std=0.3))
    batches = EvaluationBatches(dataset, recipe, resample=2, workers=workers, micro_batch=4)
    pixels = [normalized(batch.images, processor, "cpu", dtype) for batch in batches]
    images = [dataset.read(index) for index in range(len(dataset))]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat(pixels), expected.to(dtype))
    assert pixels[0].is_contiguous(memory_format=torch.channels_last)


def test_steps_without_normalization_or_rescaling() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    plain = BitImageProcessor(do_rescale=False, do_normalize=False)
    assert torch.equal(normalized(images, plain, "cpu", torch.float32), images.float())


def test_no_images_to_evaluate(dataset: Dataset) -> None:
    empty = dataset.select(np.arange(0))
    assert list(EvaluationBatches(empty, recipe_of(), resample=RESAMPLE)) == []


# ---- processes ----------------------------------------------------------------------------------

ENDLESS = """
import sys, torch
from pathlib import Path
from bitfast.finetuning.batches import TrainingBatches
from bitfast.finetuning.dataset import open_splits
from bitfast.finetuning.recipe import choose_recipe

def main():
    dataset = open_splits(Path(sys.argv[1]), valid_fraction=0).training
    recipe, _ = choose_recipe(100, [(9, 9)], {"steps": 10**9, "batch_size": 4, "crop": 8})
    for step in TrainingBatches(dataset, recipe, resample=3, seed=0, workers=2):
        print(step.number, flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def endless(dataset: Dataset, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in its own group that loads images with two workers and never ends."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    write_images(tmp_path / "data")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "data")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(5)] == [f"{i}\n" for i in range(5)]
        yield process
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def members(session: int) -> list[int]:
    """Return the processes of a session that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name.isdigit() and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def wait_until_none_is_left(session: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while left := members(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_stays_behind(endless: subprocess.Popen[str], number: int) -> None:
    assert len(members(endless.pid)) >= 3
    if number == signal.SIGINT:
        os.killpg(endless.pid, number)  # as Control-C does
    else:
        endless.kill()
    wait_until_none_is_left(endless.pid)


def test_workers_survive_an_interrupt_that_the_main_process_handles(dataset: Dataset) -> None:
    """A run that is interrupted ends its step, for which it needs its workers."""
    recipe = recipe_of(steps=12)
    batches = TrainingBatches(dataset, recipe, resample=RESAMPLE, seed=5, workers=2)
    indices = []
    for step in batches:
        indices.append(next(step.micro_batches).indices)
        if step.number == 1:
            for pid in workers_of(os.getpid()):
                os.kill(pid, signal.SIGINT)
    assert len(indices) == 12
    assert torch.equal(indices[-1], steps_of(dataset, recipe)[-1][2])


def test_worker_that_is_killed_is_an_error_of_one_line(dataset: Dataset) -> None:
    batches = TrainingBatches(dataset, recipe_of(steps=10**6), resample=3, seed=5, workers=1)

    def run() -> None:
        for step in batches:
            if step.number == 1:
                for pid in workers_of(os.getpid()):
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(LoadingError, match=r"^loading images: .*worker [^\n]*$"):
        run()


def workers_of(parent: int) -> list[int]:
    """Return the workers of a process: children of the server that it has as a child."""

    def children(of: int) -> list[int]:
        tasks = Path(f"/proc/{of}/task")
        return [int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()]

    servers = [pid for pid in children(parent) if b"forkserver" in command_line(pid)]
    found = [pid for server in servers for pid in children(server)]
    assert found
    return found


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_waiting_is_counted(dataset: Dataset) -> None:
    batches = TrainingBatches(dataset, recipe_of(), resample=RESAMPLE, seed=5)
    began = time.perf_counter()
    for step in batches:
        list(step.micro_batches)
    assert 0 < batches.waited <= time.perf_counter() - began


def test_recipes_are_plain_values() -> None:
    recipe = recipe_of()
    assert Recipe(**dataclasses.asdict(recipe)) == recipe
