"""Batches of images for training and evaluation, made by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfast.finetuning.dataset import Dataset, Problem
from bitfast.finetuning.recipe import Recipe


class LoadingError(RuntimeError):
    """Images cannot be loaded any more; the message is one line for the user."""


@dataclass(frozen=True)
class MicroBatch:
    """Images that go through the network together.

    Attributes:
        images: uint8, (n, 3, crop, crop), channels_last; in pinned memory if that was asked for.
        labels: int64, (n,).
        indices: int64, (n,): of the images in the data set (in training, of those that stand for them).
        problems: Of images that could not be decoded, each once in the life of the loader.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    problems: tuple[Problem, ...] = ()


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
    """The steps of a training run, from ``first_step`` to ``recipe.steps``; to be iterated once.

    Which images a step has, and how each is cropped and flipped, depends on the data, the recipe, the seed and
    the step's number alone: not on the number of workers, of ranks, of micro-batches, or on where the
    run began.

    Args:
        dataset: At least one image.
        recipe: How images are resized, cropped and flipped, and how many are a batch.
        resample: Pillow's filter number, that of the network's image processor.
        seed: From 0 to 2**63 - 1.
        rank, world_size: Each rank gets a contiguous part of a batch, an even number of images (the last one may
            be odd), so that pairs that are mixed are never divided.
        workers: Processes that read and resize images; 0: this one does.
        micro_batch: Images at a time, even if images are mixed; None: all that the rank has in a step.
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
        self.problems: list[Problem] = []
        self.waited = 0.0
        raise NotImplementedError

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps. Raises LoadingError if images cannot be loaded any more."""
        raise NotImplementedError


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
        self.problems: list[Problem] = []
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield micro-batches. Raises LoadingError if images cannot be loaded any more."""
        raise NotImplementedError


def lambda_of(seed: int, step: int, alpha: float) -> float:
    """Return MixUp's lambda of a step, drawn from Beta(alpha, alpha)."""
    raise NotImplementedError


def mix(images: Tensor, labels: Tensor, classes: int, lam: float) -> tuple[Tensor, Tensor]:
    """Mix neighbours: image i becomes ``lam * image[i] + (1 - lam) * image[i ^ 1]``, and so do labels.

    A batch's order is random, so that neighbours are pairs drawn at random. Of an odd number the last image
    stays as it is.

    Args:
        images: Floating, (n, C, H, W).
        labels: int64, (n,).
        classes: How many there are.
        lam: From 0 to 1.

    Returns:
        The mixed images, and probabilities of classes, float32, (n, classes), for ``cross_entropy``.
    """
    raise NotImplementedError


def normalized(
    images: Tensor, processor: Any, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Return ``pixel_values`` of resized images: rescaled and normalized on the device, in one op.

    Args:
        images: uint8, (n, 3, H, W).
        processor: As :meth:`Recipe.processor` returns it. The values are exactly its.
        device: Where the result is to be.
        dtype: Of the result.

    Returns:
        (n, 3, H, W), in the memory format of ``images``.
    """
    raise NotImplementedError
