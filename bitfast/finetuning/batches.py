"""Batches of images for training and evaluation, made by worker processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from bitfast.finetuning import draws
from bitfast.finetuning.augmentation import (
    CHANNELS,
    View,
    evaluation_view,
    lambda_of,
    show,
    training_views,
)
from bitfast.finetuning.dataset import Dataset, Problem
from bitfast.finetuning.draws import Purpose
from bitfast.finetuning.loading import Loading, LoadingError, MicroBatch
from bitfast.finetuning.recipe import Recipe
from bitfast.images.files import describe
from bitfast.ops.resize_normalize import RESAMPLE_NAMES

MOST_TRIES = 1000
"""Images in a row that may be broken, before the data are given up."""

EPOCHS_KEPT = 2
"""Orders that are remembered: a batch may have the end of one and the beginning of the next."""


@dataclass(frozen=True)
class Step:
    """One update of the weights.

    Attributes:
        number: From 0.
        count: Images of the whole batch, over all ranks: the mean of losses is their sum divided by this.
        mixing: MixUp's lambda for all pairs of this step, or None where images are not mixed.
        micro_batches: Those of this rank, in order; to be iterated once. They are made while the network
            computes on those before.
    """

    number: int
    count: int
    mixing: float | None
    micro_batches: Iterator[MicroBatch]


class TrainingBatches:
    """The steps of a training run, from ``first_step`` to ``recipe.steps``.

    Which images a step has, and how each is cropped and flipped, depends on the data, the recipe, the seed and
    the step's number alone: not on the number of workers, of ranks, of micro-batches, or on where the
    run began. One epoch follows the other, each in an order of its own, without a gap: a batch may begin in
    one and end in another. Where an image cannot be decoded, the next one of its epoch that can stands instead.

    Args:
        dataset: At least one image.
        recipe: How images are resized, cropped and flipped, and how many are a batch.
        resample: Pillow's filter number, that of the network's image processor.
        seed: From 0 to 2**63 - 1.
        rank, world_size: Each rank gets a contiguous part of a batch, an even number of images (the last one
            may have an odd one), so that pairs that are mixed are never divided.
        workers: Processes that read and resize images; 0: this one does.
        micro_batch: Images at a time, even if images are mixed; None: all that the rank has in a step.
            Each worker holds two micro-batches in shared memory, of 3 * crop ** 2 bytes an image.
        first_step: Where to begin.
        pin_memory: Whether micro-batches lie in pinned memory, from which a GPU can fetch them by itself.

    Attributes:
        problems: What could not be decoded so far, each image once.
        waited: Seconds that the caller has waited for micro-batches so far.

    Raises:
        ValueError: an argument that is not as described; too few images in a batch for so many ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        resample: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        micro_batch: int | None = None,
        first_step: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _check_ranks(rank, world_size)
        pairs = -(-recipe.batch_size // 2)
        if pairs < world_size:
            raise ValueError(
                f"batch_size must be at least {2 * world_size - 1} for {world_size} processes, "
                f"got {recipe.batch_size}"
            )
        start = 2 * (pairs * rank // world_size)
        stop = min(2 * (pairs * (rank + 1) // world_size), recipe.batch_size)
        size = stop - start if micro_batch is None else micro_batch
        if size < 1 or (size % 2 and size < stop - start and recipe.mixup_alpha > 0):
            raise ValueError(
                f"micro_batch must be at least 1, and even where images are mixed, got {micro_batch}"
            )
        self._recipe, self._seed, self._first_step = recipe, seed, first_step
        self._bounds = _cut(start, stop, size)
        images = _TrainingImages(dataset, recipe, _checked_filter(resample), seed)
        self._loading = Loading(images, workers, pin_memory)

    @property
    def problems(self) -> list[Problem]:
        """What could not be decoded so far."""
        return list(self._loading.problems.values())

    @property
    def waited(self) -> float:
        """Seconds that the caller has waited for micro-batches so far."""
        return self._loading.waited

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps.

        Raises:
            LoadingError: images cannot be loaded any more.
        """
        numbers = range(self._first_step, self._recipe.steps)
        tasks = ((number, *bounds) for number in numbers for bounds in self._bounds)
        alpha = self._recipe.mixup_alpha
        with contextlib.closing(self._loading.run(tasks)) as micro_batches:
            for number in numbers:
                mixing = lambda_of(self._seed, number, alpha) if alpha else None
                own = islice(micro_batches, len(self._bounds))
                yield Step(number, self._recipe.batch_size, mixing, own)
                for _ in own:  # what the caller has left
                    pass


class EvaluationBatches:
    """All images of a data set in order, each once, as :meth:`Recipe.processor` resizes them.

    It may be iterated several times. Images that cannot be decoded are left out.

    Args:
        dataset: May be empty.
        recipe: Says the size.
        resample: Pillow's filter number.
        rank, world_size: Each rank gets a contiguous part.
        workers: As in :class:`TrainingBatches`.
        micro_batch: Images at a time.
        pin_memory: As in :class:`TrainingBatches`.

    Attributes:
        problems: What could not be decoded so far, each image once.

    Raises:
        ValueError: an argument that is not as described.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        *,
        resample: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        micro_batch: int = 64,
        pin_memory: bool = False,
    ) -> None:
        _check_ranks(rank, world_size)
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        count = len(dataset)
        start, stop = (count * part // world_size for part in (rank, rank + 1))
        self._bounds = _cut(start, stop, micro_batch)
        images = _EvaluationImages(dataset, recipe, _checked_filter(resample))
        self._loading = Loading(images, workers, pin_memory)

    @property
    def problems(self) -> list[Problem]:
        """What could not be decoded so far."""
        return list(self._loading.problems.values())

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank, or more if all images of one are broken."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield micro-batches, none of them empty.

        Raises:
            LoadingError: images cannot be loaded any more.
        """
        with contextlib.closing(self._loading.run(self._bounds)) as micro_batches:
            yield from (batch for batch in micro_batches if len(batch.labels))


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")


def _checked_filter(resample: int) -> int:
    if resample not in range(len(RESAMPLE_NAMES)):
        raise ValueError(
            f"resample must be from 0 to {len(RESAMPLE_NAMES) - 1}, one of Pillow's filters, got {resample}"
        )
    return int(resample)


def _cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


# ---- in the workers -----------------------------------------------------------------------------


class _Images(TorchDataset):
    """Makes micro-batches; a copy of it is in each worker.

    Attributes:
        broken: The images that could not be decoded, by index.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, resample: int) -> None:
        self.dataset, self.recipe, self.resample = dataset, recipe, resample
        self.broken: dict[int, Problem] = {}

    def __getitem__(self, task: tuple[int, ...]) -> MicroBatch | LoadingError:
        """Return a micro-batch, or what the user should know where there is none."""
        known = set(self.broken)
        try:
            batch = self.load(task)
        except MemoryError:
            return LoadingError("there is not enough memory to decode images: take fewer --workers")
        except LoadingError as error:
            return error
        new = {index: self.broken[index] for index in self.broken.keys() - known}
        return replace(batch, problems=new)

    def load(self, task: tuple[int, ...]) -> MicroBatch:
        """Return the micro-batch of a task."""
        raise NotImplementedError

    def try_to_show(self, index: int, view: View) -> Tensor | None:
        """Return the view of an image, or None if it is broken.

        Raises:
            MemoryError: there is not enough; nothing is known of the image.
        """
        if index in self.broken:
            return None
        try:
            return show(self.dataset.read(index), view, self.resample)
        except MemoryError:
            raise
        except Exception as error:  # broken files make Pillow's decoders raise nearly anything
            self.broken[index] = Problem(self.dataset.name(index), describe(error))
            return None

    def gather(self, shown: Iterable[tuple[int, Tensor]], count: int) -> MicroBatch:
        """Return a micro-batch of at most ``count`` images, given with their indices.

        They come one by one: of large photographs no more than one is decoded at a time.
        """
        edge = self.recipe.crop
        images = torch.empty((count, edge, edge, CHANNELS), dtype=torch.uint8)
        images = images.permute(0, 3, 1, 2)
        indices: list[int] = []
        for index, pixels in shown:
            images[len(indices)] = pixels
            indices.append(index)
        labels = torch.from_numpy(self.dataset.labels[indices].astype(np.int64))
        return MicroBatch(
            images[: len(indices)], labels, torch.tensor(indices, dtype=torch.int64), {}
        )


class _TrainingImages(_Images):
    def __init__(self, dataset: Dataset, recipe: Recipe, resample: int, seed: int) -> None:
        super().__init__(dataset, recipe, resample)
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def load(self, task: tuple[int, ...]) -> MicroBatch:
        """Return the micro-batch of (step, start, stop)."""
        step, start, stop = task
        views = training_views(self.recipe, self.seed, step, start, stop)
        first = step * self.recipe.batch_size + start
        return self.gather(
            (self._next_readable(first + i, view) for i, view in enumerate(views)), stop - start
        )

    def _next_readable(self, position: int, view: View) -> tuple[int, Tensor]:
        """Return the image at a position of the whole run, or the next one that can be decoded."""
        epoch, place = divmod(position, len(self.dataset))
        order = self._order(epoch)
        tries = min(len(order), MOST_TRIES)
        for index in np.take(order, range(place, place + tries), mode="wrap").tolist():
            pixels = self.try_to_show(index, view)
            if pixels is not None:
                return index, pixels
        problem = self.broken[index]
        raise LoadingError(
            f"none of {tries} training images in a row can be decoded: "
            f"{problem.name}: {problem.reason}"
        )

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= EPOCHS_KEPT:
                del self._orders[min(self._orders)]
            self._orders[epoch] = draws.order(self.seed, Purpose.EPOCH, epoch, len(self.dataset))
        return self._orders[epoch]


class _EvaluationImages(_Images):
    def load(self, task: tuple[int, ...]) -> MicroBatch:
        """Return the micro-batch of (start, stop)."""
        start, stop = task
        view = evaluation_view(self.recipe)
        shown = ((index, self.try_to_show(index, view)) for index in range(start, stop))
        return self.gather(
            ((index, pixels) for index, pixels in shown if pixels is not None), stop - start
        )
