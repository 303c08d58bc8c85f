"""What ``bitfast convert`` does: a checkpoint of timm or of Google becomes a folder in transformers' format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfast.checkpoints import timm, weights
from bitfast.checkpoints.files import (
    CONFIG_NAME,
    CheckpointError,
    is_weight_file,
    locate_file,
    read_json,
    replace_files,
    text_writer,
)
from bitfast.checkpoints.foreign import ForeignCheckpoint, read_foreign
from bitfast.configuration import BitConfig
from bitfast.configuration_values import dtype_name
from bitfast.images.processing import BitImageProcessor
from bitfast.images.processing_base import CONFIG_NAME as PROCESSOR_CONFIG_NAME

FINE_TUNING_SIZE = 448
"""Height and width of the images that most released models were fine-tuned for."""

FINE_TUNING_SIZES = {"152x4": 480}
"""The height and width for the models where it is another."""

BILINEAR = 2
"""Pillow's number of the resampling filter."""

BASE_PREFIX = "bit."


@dataclass(frozen=True)
class Converted:
    """What was written, and what was assumed about the checkpoint.

    Attributes:
        architecture: Such as "R50x1".
        checkpoint: The source.
        num_parameters: Of the model, its head included.
        dtype: Of the weights written.
        processor: Of the model's images.
        images_from: The file that describes the images; None: nothing does, and they are assumed.
        files: Names of the files in the folder.
    """

    architecture: str
    checkpoint: ForeignCheckpoint
    num_parameters: int
    dtype: torch.dtype
    processor: BitImageProcessor
    images_from: str | None
    files: list[str]


def convert(
    source: str,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write ``config.json``, weights and ``preprocessor_config.json``, all of them or none.

    Args:
        source: A weight file of timm or Google, a folder of timm's, or its name on the Hub.
        folder: Created if need be. It must be empty, or ``overwrite`` be given and it hold a BiT model.
        dtype: Of the weights; None: as they are in ``source``.
        image_size: Height and width of the model's images; None: as ``source`` says, or else that of the
            released models' fine-tuning.
        overwrite: Replace a BiT model in the folder.

    Raises:
        OSError: ``source`` cannot be read, or the folder not be written.
        ValueError: ``source`` is no BiT checkpoint of timm or Google.
    """
    _require_replaceable(folder, overwrite)
    checkpoint = _read(source)
    tensors = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    config = _config(checkpoint, tensors)
    processor, images_from = _processor(checkpoint, image_size)
    if checkpoint.architecture.num_labels is None:
        tensors = {name.removeprefix(BASE_PREFIX): tensor for name, tensor in tensors.items()}
    assert config.dtype is not None
    writers = weights.weight_writers(tensors)
    writers[CONFIG_NAME] = text_writer(config.to_json_string())
    writers[PROCESSOR_CONFIG_NAME] = text_writer(processor.to_json_string())
    with _new_folder(folder):
        replace_files(folder, writers, weights.stale_weights(folder, set(writers)))
    return Converted(
        architecture=_architecture_name(checkpoint),
        checkpoint=checkpoint,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=config.dtype,
        processor=processor,
        images_from=images_from,
        files=sorted(writers),
    )


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise OSError unless the folder is empty, or holds a BiT model and ``overwrite`` is given."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    config = folder / CONFIG_NAME
    if not config.is_file() or read_json(config).get("model_type") != BitConfig.model_type:
        raise FileExistsError(
            f"{folder} has files in it, and is no BiT model in transformers' format that could be replaced; "
            "give a new or an empty folder"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} has a BiT model in it already; --overwrite replaces it")


def _read(source: str) -> ForeignCheckpoint:
    config_file = None if is_weight_file(source) else locate_file(source, CONFIG_NAME)
    checkpoint = read_foreign(source, config_file)
    if checkpoint is None:
        raise CheckpointError(
            f"{config_file} is no timm checkpoint's: it names no timm architecture"
        )
    return checkpoint


def _config(checkpoint: ForeignCheckpoint, tensors: dict[str, Tensor]) -> BitConfig:
    has_head = checkpoint.architecture.num_labels is not None
    config = BitConfig(**checkpoint.settings)
    config.architectures = ["BitForImageClassification" if has_head else "BitModel"]
    config.dtype = next(iter(tensors.values())).dtype
    return config


def _processor(
    checkpoint: ForeignCheckpoint, image_size: int | None
) -> tuple[BitImageProcessor, str | None]:
    """Return the image processor, and the file that describes the images if there is one."""
    parameters = timm.image_parameters(checkpoint.config, checkpoint.source, image_size)
    if parameters is not None:
        return BitImageProcessor(**parameters), checkpoint.source
    return BitImageProcessor(**_assumed_parameters(checkpoint, image_size)), None


def _assumed_parameters(checkpoint: ForeignCheckpoint, image_size: int | None) -> dict[str, Any]:
    """Return the image parameters of the released fine-tuned models."""
    channels = checkpoint.architecture.num_channels
    variant = checkpoint.architecture.variant or ""
    size = image_size or FINE_TUNING_SIZES.get(variant, FINE_TUNING_SIZE)
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": BILINEAR,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "do_convert_rgb": channels == 3,
    }


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Create the folder; if the block fails, remove the folders that were created."""
    created = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        created.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise


def _architecture_name(checkpoint: ForeignCheckpoint) -> str:
    found = checkpoint.architecture
    if found.variant is not None:
        return f"R{found.variant}"
    return (
        f"a BiT of its own size (depths {list(found.depths)}, stem {found.embedding_size}, "
        f"hidden sizes {list(found.hidden_sizes)})"
    )


def as_text(converted: Converted, folder: Path) -> str:
    """Return what was found, what was assumed and what was written, for people."""
    num_labels = converted.checkpoint.architecture.num_labels
    head = "no head (load it with BitModel)" if num_labels is None else f"{num_labels} classes"
    groups = f"GroupNorm of {converted.checkpoint.settings['num_groups']} groups"
    millions = converted.num_parameters / 1e6
    images = _describe_images(converted.processor)
    found = (
        f"found: {converted.architecture} in {converted.checkpoint.format} format, {head}, "
        f"{millions:.1f} M parameters"
    )
    if converted.images_from is None:
        lines = [found, f"assumed: {groups}; {images}, as nothing says how the model takes images"]
    else:
        lines = [found, f"found: {images} (from {converted.images_from})", f"assumed: {groups}"]
    files = ", ".join(converted.files)
    return "\n".join(
        [*lines, f"wrote: {files} in {folder}, weights in {dtype_name(converted.dtype)}"]
    )


def _describe_images(processor: BitImageProcessor) -> str:
    crop = processor.crop_size
    return (
        f"images of {crop['height']}x{crop['width']} pixels, from a shorter edge of "
        f"{processor.size['shortest_edge']}, {processor.resample.name.lower()}, "
        f"mean {processor.image_mean}, std {processor.image_std}"
    )
