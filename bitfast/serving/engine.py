"""The model of a server: decodes and processes single images, runs batches, warms up for their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from bitfast.commands.classify import Classifier, find_device
from bitfast.graphs import capture
from bitfast.images.files import ImageTooLargeError
from bitfast.network import stage_widths
from bitfast.serving.decoding import decode
from bitfast.serving.settings import Settings


@dataclass(frozen=True)
class Features:
    """What the model makes of one image.

    Attributes:
        logits: (labels,), float32, on the CPU.
        embedding: The pooled features (D,), float32, on the CPU.
        seconds: How long each part of the work took, if somebody has measured it.
    """

    logits: Tensor
    embedding: Tensor
    seconds: Mapping[str, float] = field(default_factory=dict)


class Engine:
    """A model that answers single images and batches.

    Args:
        classifier: The model and its processor.
        most_pixels: Of an image.
    """

    def __init__(self, classifier: Classifier, most_pixels: int) -> None:
        self.classifier = classifier
        self._most_pixels = most_pixels
        # What the head reads, taken where it reads it: pooling again could round in another way.
        self._pooled: list[Tensor] = []
        classifier.model.classifier.register_forward_pre_hook(
            lambda head, arguments: self._pooled.append(arguments[0])
        )

    @classmethod
    def load(cls, settings: Settings) -> Engine:
        """Load the model that the settings name, on a GPU if a replica has one.

        Raises:
            OSError, RuntimeError, ValueError: as :meth:`Classifier.load`.
        """
        device = find_device("cuda" if settings.gpus_per_replica else "cpu")
        classifier = Classifier.load(settings.model, device, settings.dtype)
        return cls(classifier, settings.max_image_pixels)

    @property
    def channels(self) -> int:
        """Channels of the model's images."""
        return self.classifier.model.config.num_channels

    @property
    def labels(self) -> int:
        """How many labels the model has."""
        return self.classifier.model.config.num_labels

    @property
    def embedding_size(self) -> int:
        """Numbers in an embedding."""
        return stage_widths(self.classifier.model.config)[-1]

    @property
    def dtype(self) -> str:
        """The model's dtype, such as "float32"."""
        return str(self.classifier.model.dtype).removeprefix("torch.")

    def preprocess(self, content: bytes) -> Tensor:
        """Return the pixel_values (C, H, W), float32, of an image file.

        Raises:
            ImageTooLargeError: the image has too many pixels, and has not been decoded; or gets too many.
            Exception: what Pillow and the processor raise for other bad images.
        """
        pixels = self.classifier.preprocess(decode(content, self._most_pixels))
        height, width = pixels.shape[-2:]
        if height * width > self._most_pixels:  # where there is no crop
            raise ImageTooLargeError(
                f"the image is resized to {width} x {height} pixels, more than {self._most_pixels}"
            )
        return pixels

    @torch.inference_mode()
    def run(self, pixel_values: Tensor) -> Sequence[Features]:
        """Return the features of each image of a batch (N, C, H, W). One thread may call this at a time."""
        model = self.classifier.model
        pixel_values = pixel_values.to(model.device, model.dtype)
        self._pooled.clear()
        logits = model(pixel_values, return_dict=True).logits.float().cpu()
        embeddings = self._pooled.pop().flatten(1).float().cpu()
        return [Features(*pair) for pair in zip(logits, embeddings, strict=True)]

    def example(self) -> Tensor:
        """Return pixel_values (1, C, H, W), float32, of the shape that the processor gives a square image."""
        return self.classifier.preprocess(Image.new("RGB", (64, 64)))[None]

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run a batch of each size, so that its plan is made; on a GPU record its CUDA graph."""
        model = self.classifier.model
        example = self.example()
        for size in sizes:
            batch = (
                example.expand(size, *example.shape[1:]).to(model.device, model.dtype).contiguous()
            )
            if batch.is_cuda:
                capture(model, batch, return_dict=True)
            self.run(batch)
