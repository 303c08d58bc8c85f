"""The loop: steps, evaluations and checkpoints, in an order that does not depend on where a run began."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.finetuning.augmentation import mix, normalized
from bitfast.finetuning.batches import EvaluationBatches, Step, TrainingBatches
from bitfast.finetuning.checkpoint import Progress, save_checkpoint
from bitfast.finetuning.errors import FinetuningError, Interrupted
from bitfast.finetuning.evaluation import Evaluation, evaluate
from bitfast.finetuning.interruption import SIGNALS, Interruption
from bitfast.finetuning.metrics import MetricsLog
from bitfast.finetuning.processes import Processes, losing_peers, synchronized
from bitfast.finetuning.progress import Display
from bitfast.finetuning.recipe import Recipe

Item = TypeVar("Item")

CHECKPOINT_SECONDS = 300.0
"""Between two checkpoints, unless a number of steps is given."""


class Trainer:
    """A network, its optimizer, and how a step changes both.

    Args:
        model: A classifier in float32, on the device of ``processes``, the same in each.
        recipe: Of the training.
        processor: Rescales and normalizes images.
        dtype: That autocast computes in; float32: no autocast.
        processes: Who shares a batch.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        processor: Any,
        dtype: torch.dtype,
        processes: Processes,
    ) -> None:
        self.model, self.recipe, self.processor = model, recipe, processor
        self.dtype, self.processes = dtype, processes
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.base_learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self._wrapped: nn.Module | None = None

    def gradients(self, step: Step) -> Tensor:
        """Add the gradients of a step's mean loss to those of the parameters.

        Returns:
            Of this process's images: the sum of their losses, and how many it gets right (of a mixed image, by
            the part of the class that it names); float64, (2,), on the device.
        """
        device = self.processes.device
        wrapped = self._wrapped = self._wrapped or self.processes.wrap(self.model)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch, is_last in with_last(step.micro_batches):
            images = normalized(batch.images, self.processor, device, torch.float32)
            targets = labels = batch.labels.to(device, non_blocking=True)
            if step.mixing is not None:
                images, targets = mix(images, labels, self.model.num_labels, step.mixing)
            with synchronized(wrapped, is_last):
                with torch.autocast(device.type, torch.bfloat16, self.dtype == torch.bfloat16):
                    logits = wrapped(images).logits
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                # The processes' gradients are averaged, and shall be added up.
                (loss * (self.processes.world_size / step.count)).backward()
            sums += torch.stack([loss.detach().double(), _right(logits, targets)])
        return sums

    def update(self, number: int) -> None:
        """Change the parameters by their gradients, in the step of that number (from 0)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_finite(self) -> bool:
        """Whether no parameter is infinite or not a number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    best = logits.detach().argmax(dim=1)
    if targets.ndim == 1:
        return (best == targets).sum().double()
    return targets.gather(1, best[:, None]).sum().double()


def with_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each item and whether it is the last one."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True


@dataclass
class Schedule:
    """What happens between steps.

    Attributes:
        evaluate_every: Steps between evaluations; there is always one at the end.
        checkpoint_every: Steps between checkpoints; None: minutes decide.
    """

    evaluate_every: int
    checkpoint_every: int | None

    def evaluates_after(self, done: int, steps: int) -> bool:
        """Whether there is an evaluation when that many of the steps are done."""
        return done == steps or (done > 0 and done % self.evaluate_every == 0)


class Run:
    """A run from some step to its end.

    A checkpoint of N steps is written before their evaluation, which a run that goes on from there makes again.
    So nothing depends on when the checkpoints were written.

    Args:
        trainer: In the state after ``start`` steps.
        validation: This process's images to measure with.
        labels: Of all images to measure with, int64, (N,).
        folder: Where the first process writes.
        log: Of the first process; holds the rows of the steps that are done.
        settings: For checkpoints.
        schedule: What happens between steps.
        start: Steps that are done.
        display: Where progress is shown.
        interruption: Signals that have come.
    """

    def __init__(
        self,
        trainer: Trainer,
        validation: EvaluationBatches,
        labels: np.ndarray,
        *,
        folder: Path,
        log: MetricsLog | None,
        settings: dict[str, Any],
        schedule: Schedule,
        start: int,
        display: Display,
        interruption: Interruption,
    ) -> None:
        self.trainer, self.validation, self.labels = trainer, validation, labels
        self.folder, self.log, self.settings = folder, log, settings
        self.schedule, self.done = schedule, start
        self.display, self.interruption = display, interruption
        self._saved_at = time.monotonic()

    def finish(self, batches: TrainingBatches) -> Evaluation:
        """Train to the end and return the last evaluation.

        Args:
            batches: From this run's first step on.

        Raises:
            Interrupted: a signal has come; the state is saved.
            FinetuningError: the loss is no longer finite.
            OSError: the first process cannot write.
            PeerLost: another process has ended.
        """
        steps = self.trainer.recipe.steps
        evaluation = self._evaluate_if_due()
        for step in batches:
            signal_number = self._step(step)
            self.display.tell_problems(batches)
            if signal_number:
                self._stop(signal_number)
            every = self.schedule.checkpoint_every
            is_due = (
                self.done % every == 0
                if every is not None
                else time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS
            )
            if is_due or self.done == steps:
                self.save()
            evaluation = self._evaluate_if_due()
        assert evaluation is not None
        return evaluation

    def save(self) -> None:
        """Write a checkpoint, in the first process.

        Raises:
            FinetuningError: a weight is not finite.
            OSError: the file cannot be written.
        """
        self._saved_at = time.monotonic()
        if self.log is None:
            return
        if not self.trainer.is_finite():
            raise self._not_finite("a weight")
        progress = Progress(self.done, self.log.sync(), self.settings)
        save_checkpoint(self.folder, progress, self.trainer.model, self.trainer.optimizer)

    def _step(self, step: Step) -> int:
        """Do one step and write its row; return the number of a signal that any process has got, or 0."""
        started = time.perf_counter()
        trainer = self.trainer
        with losing_peers() if trainer.processes.are_several else contextlib.nullcontext():
            sums = trainer.gradients(step)
        loss, right, *signals = trainer.processes.sum(torch.cat([sums, self._signals()])).tolist()
        if not math.isfinite(loss):
            raise self._not_finite("the loss")
        trainer.update(step.number)
        self.done = step.number + 1
        row = {
            "step": self.done,
            "loss": loss / step.count,
            "accuracy": right / step.count,
            "learning_rate": trainer.recipe.learning_rate(step.number),
            "images_per_second": round(step.count / (time.perf_counter() - started), 2),
        }
        self._add(row)
        self.display.step(row)
        if not trainer.processes.are_several:
            return self.interruption.signal or 0  # which may have come since
        return _signal_of(signals)

    def _evaluate_if_due(self) -> Evaluation | None:
        trainer = self.trainer
        if not self.schedule.evaluates_after(self.done, trainer.recipe.steps):
            return None
        evaluation, signals = evaluate(
            trainer.model, self.validation, self.labels, trainer.processor, trainer.processes,
            self._signals, lambda: self.interruption.signal is not None,
        )  # fmt: skip
        self.display.tell_problems(self.validation)
        if signal_number := _signal_of(signals.tolist()):
            self._stop(signal_number)
        if len(evaluation.labels):
            self._add(
                {
                    "step": self.done,
                    "validation_loss": evaluation.loss,
                    "validation_accuracy": evaluation.measurement.accuracy,
                }
            )
            self.display.say(
                f"after step {self.done}: validation loss {evaluation.loss:.4f}, "
                f"accuracy {evaluation.measurement}"
            )
        return evaluation

    def _add(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.add(row)

    def _signals(self) -> Tensor:
        """Return which signals this process has got, float64, (2,), on the device."""
        got = [float(self.interruption.signal == number) for number in SIGNALS]
        return torch.tensor(got, dtype=torch.float64, device=self.trainer.processes.device)

    def _stop(self, signal_number: int) -> None:
        self.save()
        self.trainer.processes.wait()
        message = (
            f"interrupted after step {self.done} of {self.trainer.recipe.steps}; "
            "the same command goes on from there"
        )
        raise Interrupted(message if self.trainer.processes.is_first else "", signal_number)

    def _not_finite(self, what: str) -> FinetuningError:
        return FinetuningError(
            f"{what} is not finite in step {self.done + (what == 'the loss')}; the last checkpoint stays. "
            "Try a smaller --learning-rate or --dtype float32, with --overwrite"
        )


def _signal_of(counts: list[float]) -> int:
    return next((int(number) for number, count in zip(SIGNALS, counts, strict=True) if count), 0)
