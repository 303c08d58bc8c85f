"""How good a network is on the validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.finetuning.augmentation import normalized
from bitfast.finetuning.batches import EvaluationBatches
from bitfast.finetuning.processes import Processes
from bitfast.measurement import Measurement


@dataclass(frozen=True)
class Evaluation:
    """What a network says of images.

    Attributes:
        labels: Index of each image's class, int64, (N,); images that could not be decoded are left out.
        predictions: Index of the class that the network gives each, int64, (N,).
        loss: Mean cross entropy; not a number without images.
    """

    labels: np.ndarray
    predictions: np.ndarray
    loss: float

    @property
    def measurement(self) -> Measurement:
        """How many images are right."""
        return Measurement(int((self.labels == self.predictions).sum()), len(self.labels))


@torch.inference_mode()
def evaluate(
    model: Any,
    batches: EvaluationBatches,
    labels: np.ndarray,
    processor: Any,
    processes: Processes,
    signals: Callable[[], Tensor],
    is_interrupted: Callable[[], bool],
) -> tuple[Evaluation, Tensor]:
    """Evaluate a network in float32, as it is used later; it is in training mode afterwards.

    Args:
        model: The same in all processes.
        batches: This process's part of the images.
        labels: Of all images, int64, (N,).
        processor: Rescales and normalizes them.
        processes: Who shares the work.
        signals: What is added up over the processes at the end.
        is_interrupted: Whether to stop early; the evaluation is then of no use.

    Returns:
        The evaluation, and the sum of the signals.
    """
    device = processes.device
    # One more than the prediction; 0: another process's image, or one that could not be decoded.
    marks = torch.zeros(len(labels), dtype=torch.int64, device=device)
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    model.eval()
    for batch in batches:
        if is_interrupted():
            break
        images = normalized(batch.images, processor, device, torch.float32)
        logits = model(images).logits
        marks[batch.indices.to(device)] = logits.argmax(dim=1) + 1
        loss += F.cross_entropy(logits, batch.labels.to(device), reduction="sum")
    model.train()
    found = processes.sum(marks).cpu().numpy()
    total, *signal_counts = processes.sum(torch.cat([loss, signals()])).cpu()
    decoded = found > 0
    mean = float(total) / decoded.sum() if decoded.any() else float("nan")
    return Evaluation(labels[decoded], found[decoded] - 1, float(mean)), torch.stack(signal_counts)
