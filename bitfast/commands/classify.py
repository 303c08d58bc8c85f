"""What ``bitfast classify`` does: read image files, classify them in batches, print the outcomes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bitfast.images.files import Candidate, describe_unusable, one_line, printable, read_image
from bitfast.images.processing import BitImageProcessor
from bitfast.images.processing_base import processor_type
from bitfast.images.processing_fast import BitImageProcessorFast
from bitfast.modeling import BitForImageClassification


@dataclass(frozen=True)
class Prediction:
    """One label that a model gives an image; ``score`` is its probability."""

    label: str
    index: int
    score: float


@dataclass
class Outcome:
    """The result for one candidate: ``predictions``, most probable first, or ``error``."""

    path: str
    predictions: list[Prediction] = field(default_factory=list)
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


# ---- the model ----------------------------------------------------------------------------------


def default_model() -> Path:
    """Return the folder of the model that comes with bitfast: handwritten digits."""
    from bitfast.digits import MODEL_PATH

    return MODEL_PATH


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; for None "cuda" where there is one, else "cpu".

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Reading the number back also rules out devices that hold no data, such as "meta".
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}") from error
    return device


def load_processor(name_or_path: str) -> BitImageProcessor | BitImageProcessorFast:
    """Load a checkpoint's image processor: the fast one if the checkpoint names that.

    Raises:
        OSError, ValueError: it is missing or broken.
    """
    is_fast = processor_type(name_or_path) == BitImageProcessorFast.__name__
    return (BitImageProcessorFast if is_fast else BitImageProcessor).from_pretrained(name_or_path)


class Classifier:
    """A model and the processor of its images.

    Args:
        model: In evaluation mode, with at least one label.
        processor: Makes its ``pixel_values``.
    """

    def __init__(
        self,
        model: BitForImageClassification,
        processor: BitImageProcessor | BitImageProcessorFast,
    ) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, name_or_path: str, device: torch.device, dtype: str) -> Classifier:
        """Load both from a checkpoint (a folder, a name on the Hub); the fast processor if that names it.

        Raises:
            OSError: it is missing or broken.
            ValueError: it holds no classifier.
            RuntimeError: its tensors do not fit its configuration, or the device's memory.
        """
        model = BitForImageClassification.from_pretrained(name_or_path, dtype=dtype)
        processor = load_processor(name_or_path)
        if model.config.num_labels < 1:
            raise ValueError("it has no labels")
        return cls(model.to(device), processor)

    def classify_files(
        self, candidates: Iterable[Candidate], batch_size: int, top_k: int
    ) -> Iterator[list[Outcome]]:
        """Classify files, ``batch_size`` at a time; at no time more than one image is decoded.

        Yields:
            The outcomes of each batch, in the candidates' order.
        """
        batch: list[Candidate] = []
        for candidate in candidates:
            batch.append(candidate)
            if len(batch) == batch_size:
                yield self._classify_batch(batch, top_k)
                batch = []
        if batch:
            yield self._classify_batch(batch, top_k)

    def _classify_batch(self, batch: list[Candidate], top_k: int) -> list[Outcome]:
        outcomes = [Outcome(candidate.path, error=candidate.problem) for candidate in batch]
        # Without a center crop the sizes may differ, and only equal ones go together.
        by_shape: dict[torch.Size, list[tuple[Outcome, Tensor]]] = {}
        for outcome in outcomes:
            pixels = self._read(outcome) if outcome.error is None else None
            if pixels is not None:
                by_shape.setdefault(pixels.shape, []).append((outcome, pixels))
        for pairs in by_shape.values():
            self._predict([outcome for outcome, _ in pairs], [pixels for _, pixels in pairs], top_k)
        return outcomes

    def _read(self, outcome: Outcome) -> Tensor | None:
        """Return the pixel_values (C, H, W) of a file; None, and set the outcome's error, if that fails."""
        with warnings.catch_warnings(record=True) as caught:
            # Not Python's DeprecationWarning and the like, which do not concern the user.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", RuntimeWarning)
            try:
                image = read_image(outcome.path)
                pixels = self.preprocess(image)
            except Exception as error:
                # Broken files make Pillow's decoders raise nearly anything; the others must go on.
                outcome.error, pixels = describe_unusable(error), None
        outcome.warnings += [one_line(warning.message) for warning in caught]
        return pixels

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixel_values of one image, of shape (C, H, W).

        Raises:
            OSError: the image cannot be converted.
            ValueError: the image cannot be resized.
        """
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def _predict(self, outcomes: list[Outcome], images: list[Tensor], top_k: int) -> None:
        """Set the predictions of each outcome, or in all of them the error that the model raises."""
        try:
            probabilities = self.probabilities(torch.stack(images))
        except (RuntimeError, ValueError) as error:
            for outcome in outcomes:
                outcome.error = f"the model fails: {one_line(error)}"
            return
        for outcome, scores in zip(outcomes, probabilities, strict=True):
            if scores.isfinite().all():
                outcome.predictions = self.best(scores, top_k)
            else:
                outcome.error = f"the model's output in {self.model.dtype} is not finite"

    @torch.inference_mode()
    def probabilities(self, pixel_values: Tensor) -> Tensor:
        """Return the probability of each label, shape (N, labels), float32, on the CPU."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.scores(self.model(pixel_values, return_dict=True).logits).cpu()

    def scores(self, logits: Tensor) -> Tensor:
        """Return the probability of each label, float32, of logits (N, labels)."""
        config = self.model.config
        # Probabilities of labels that do not exclude each other do not sum to 1.
        independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
        logits = logits.float()
        return logits.sigmoid() if independent else logits.softmax(dim=-1)

    def label(self, index: int) -> str:
        """Return the name of a label."""
        return str(self.model.config.id2label.get(index, f"LABEL_{index}"))

    def best(self, scores: Tensor, top_k: int) -> list[Prediction]:
        """Return the most probable labels of one image's scores, most probable first."""
        # Stable, so that equal scores always come in the order of their indices.
        values, indices = scores.sort(descending=True, stable=True)
        best = zip(indices[:top_k].tolist(), values[:top_k].tolist(), strict=True)
        return [Prediction(self.label(index), index, score) for index, score in best]


# ---- printing -------------------------------------------------------------------------------------


class Printer:
    """Prints outcomes, and a progress bar below them where standard error is a terminal.

    Args:
        total: How many outcomes there will be.
        as_json: Print one JSON object per outcome, failed ones included.
    """

    def __init__(self, total: int, as_json: bool) -> None:
        self._format = _as_json if as_json else _as_text
        self._bar = _progress_bar(total)

    def __enter__(self) -> Printer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, outcome: Outcome) -> None:
        """Print one outcome: predictions to standard output, what went wrong to standard error."""
        messages = [f"warning: {warning}" for warning in outcome.warnings]
        if outcome.error is not None:
            messages.append(outcome.error)
        for message in messages:
            self._print(f"bitfast: {printable(outcome.path)}: {printable(message)}", sys.stderr)
        text = self._format(outcome)
        if text:
            self._print(text, sys.stdout)
        if self._bar is not None:
            self._bar.update()

    def _print(self, text: str, stream: Any) -> None:
        if self._bar is None:
            print(text, file=stream)
        else:
            self._bar.write(text, file=stream)  # hides the bar meanwhile


def _as_text(outcome: Outcome) -> str:
    labels = [printable(prediction.label) for prediction in outcome.predictions]
    if not labels:
        return ""
    width = max(len(label) for label in labels)
    lines = [
        f"  {label:{width}}  {100 * prediction.score:6.2f} %"
        for label, prediction in zip(labels, outcome.predictions, strict=True)
    ]
    return "\n".join([printable(outcome.path), *lines])


def _as_json(outcome: Outcome) -> str:
    if outcome.error is not None:
        return json.dumps({"path": outcome.path, "error": outcome.error})
    predictions = [
        {"label": prediction.label, "index": prediction.index, "score": prediction.score}
        for prediction in outcome.predictions
    ]
    return json.dumps({"path": outcome.path, "predictions": predictions})


def _progress_bar(total: int) -> Any:
    """Return a tqdm bar if standard error is a terminal and tqdm is installed, else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="image", file=sys.stderr, leave=False)
