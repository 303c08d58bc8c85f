"""A model, the processor of its images, and the layer whose features stand for an image."""

from __future__ import annotations

import re

import torch
from PIL import Image
from torch import Tensor

from bitfast.commands.classify import load_processor
from bitfast.images.processing import BitImageProcessor
from bitfast.images.processing_fast import BitImageProcessorFast
from bitfast.modeling import BitForImageClassification
from bitfast.network import stage_widths

LAYERS = ("pooled", "logits")
"""The layers besides ``stageN``."""


class Embedder:
    """Makes vectors of images.

    Args:
        model: In evaluation mode.
        processor: Makes its ``pixel_values``.
        layer: ``"pooled"``: what the classifier's head reads, ``"logits"``: what it gives, or ``"stageN"``:
            the output of stage N (from 1), averaged over its positions.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(
        self,
        model: BitForImageClassification,
        processor: BitImageProcessor | BitImageProcessorFast,
        layer: str = "pooled",
    ) -> None:
        stages = len(model.bit.encoder.stages)
        names = [*(f"stage{number}" for number in range(1, stages + 1)), *LAYERS]
        if layer not in names:
            raise ValueError(
                f"layer must be one of {', '.join(names)} for this model, got {layer!r}"
            )
        self.model = model
        self.processor = processor
        self.layer = layer
        match = re.fullmatch(r"stage(\d+)", layer)
        self._stage = int(match[1]) if match else None

    @property
    def dimension(self) -> int:
        """The length of each vector."""
        config = self.model.config
        if self.layer == "logits":
            return config.num_labels
        return stage_widths(config)[-1 if self._stage is None else self._stage - 1]

    @classmethod
    def load(
        cls, name_or_path: str, device: torch.device, dtype: str, layer: str = "pooled"
    ) -> Embedder:
        """Load model and processor from a checkpoint: a folder, or a name on the Hub.

        Raises:
            OSError: it is missing or broken.
            ValueError: the model has no such layer, or the checkpoint not all of its weights.
            RuntimeError: its tensors do not fit its configuration, or the device's memory.
        """
        model, report = BitForImageClassification.from_pretrained(
            name_or_path, dtype=dtype, output_loading_info=True
        )
        if layer == "logits" and model.config.num_labels < 1:
            raise ValueError("it has no labels, and so no logits")
        # What a checkpoint lacks is random, and different in each process.
        missing = report["missing_keys"]
        if layer != "logits":
            missing = [name for name in missing if name.startswith("bit.")]
        if missing:
            raise ValueError(f"{layer} depends on weights that it lacks: {', '.join(missing[:3])}")
        return cls(model.to(device), load_processor(name_or_path), layer)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the pixel_values of one image, of shape (C, H, W).

        Raises:
            OSError: the image cannot be converted.
            ValueError: the image cannot be resized.
        """
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def vectors(self, pixel_values: Tensor) -> Tensor:
        """Return the vectors of a batch, shape (N, D), float32, on the CPU."""
        model = self.model
        pixel_values = pixel_values.to(model.device, model.dtype)
        if self.layer == "logits":
            vectors = model(pixel_values, return_dict=True).logits
        elif self._stage is None:
            vectors = model.bit(pixel_values, return_dict=True).pooler_output.flatten(1)
        else:
            outputs = model.bit(pixel_values, output_hidden_states=True, return_dict=True)
            vectors = outputs.hidden_states[self._stage].float().mean(dim=(2, 3))
        return vectors.float().cpu()
