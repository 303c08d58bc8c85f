"""A model, the processor of its images, and the layer whose features stand for an image."""

from __future__ import annotations

import re

import torch
from PIL import Image
from torch import Tensor

from bitfast.commands.classify import Classifier
from bitfast.network import stage_widths

LAYERS = ("pooled", "logits")
"""The layers besides ``stageN``."""


class Embedder:
    """Makes vectors of images.

    Args:
        classifier: The model and its processor.
        layer: ``"pooled"``: what the classifier's head reads, ``"logits"``: what it gives, or ``"stageN"``:
            the output of stage N (from 1), averaged over its positions.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, classifier: Classifier, layer: str = "pooled") -> None:
        stages = len(classifier.model.bit.encoder.stages)
        names = [*(f"stage{number}" for number in range(1, stages + 1)), *LAYERS]
        if layer not in names:
            raise ValueError(
                f"layer must be one of {', '.join(names)} for this model, got {layer!r}"
            )
        self.classifier = classifier
        self.layer = layer
        match = re.fullmatch(r"stage(\d+)", layer)
        self._stage = int(match[1]) if match else None

    @property
    def dimension(self) -> int:
        """The length of each vector."""
        config = self.classifier.model.config
        if self.layer == "logits":
            return config.num_labels
        return stage_widths(config)[-1 if self._stage is None else self._stage - 1]

    @classmethod
    def load(
        cls, name_or_path: str, device: torch.device, dtype: str, layer: str = "pooled"
    ) -> Embedder:
        """Load both as :meth:`Classifier.load` does.

        Raises:
            OSError, ValueError, RuntimeError: as there; ValueError too if the model has no such layer.
        """
        return cls(Classifier.load(name_or_path, device, dtype), layer)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixel_values of one image, of shape (C, H, W).

        Raises:
            OSError: the image cannot be converted.
            ValueError: the image cannot be resized.
        """
        return self.classifier.preprocess(image)

    @torch.inference_mode()
    def vectors(self, pixel_values: Tensor) -> Tensor:
        """Return the vectors of a batch, shape (N, D), float32, on the CPU."""
        model = self.classifier.model
        pixel_values = pixel_values.to(model.device, model.dtype)
        if self.layer == "logits":
            vectors = model(pixel_values, return_dict=True).logits
        elif self._stage is None:
            vectors = model.bit(pixel_values, return_dict=True).pooler_output.flatten(1)
        else:
            outputs = model.bit(pixel_values, output_hidden_states=True, return_dict=True)
            vectors = outputs.hidden_states[self._stage].float().mean(dim=(2, 3))
        return vectors.float().cpu()
