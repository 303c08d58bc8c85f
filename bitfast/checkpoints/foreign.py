"""Checkpoints of other libraries: their format is recognised, and their content converted to bitfast's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfast.checkpoints import google, timm, weights
from bitfast.checkpoints.architecture import Architecture
from bitfast.checkpoints.files import CheckpointError, is_weight_file, read_json

NPZ = ".npz"

OUR_NAMES = ("bit.embedder.", "embedder.")
"""Prefixes of the names of tensors in transformers' own format."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another library, read and checked.

    Attributes:
        format: "timm's" or "Google's npz".
        architecture: What its tensors say about the network.
        tensors: By their names in BitForImageClassification; without a head if it has none.
        settings: The arguments of BitConfig.
        config: timm's ``config.json``, if there is one.
        source: The file or, for a folder, its ``config.json``, for messages.
    """

    format: str
    architecture: Architecture
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)


def read_foreign(
    name_or_path: str | os.PathLike[str],
    config_file: Path | None,
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **where: Any,
) -> ForeignCheckpoint | None:
    """Read a checkpoint of timm or of Google; return None if it is in transformers' own format.

    Args:
        name_or_path: A weight file, a folder, or the id of a Hub repository.
        config_file: Its ``config.json``, if it has one.
        use_safetensors: As in :func:`bitfast.checkpoints.weights.read_weights`.
        variant: As in :func:`bitfast.checkpoints.weights.read_weights`.
        **where: As in :func:`bitfast.checkpoints.weights.read_weights`.

    Raises:
        CheckpointError: it is broken, or holds anything but a BiT network.
    """
    if is_weight_file(name_or_path):
        return _read_file(Path(name_or_path), use_safetensors)
    config = {} if config_file is None else read_json(config_file)
    if not timm.is_config(config):
        return None
    # The name is judged before the tensors, which may have to be downloaded.
    timm.check_config(config, str(config_file))
    tensors = weights.read_weights(
        os.fspath(name_or_path), use_safetensors=use_safetensors, variant=variant, **where
    )
    return _from_timm(tensors, config, repr(os.fspath(name_or_path)), str(config_file))


def _read_file(path: Path, use_safetensors: bool | None) -> ForeignCheckpoint:
    is_safetensors = path.suffix.lower() == ".safetensors"
    if use_safetensors is not None and use_safetensors != is_safetensors:
        raise CheckpointError(
            f"{path} is {'a' if is_safetensors else 'no'} safetensors file, and "
            f"use_safetensors={use_safetensors} asks for the contrary"
        )
    if path.suffix.lower() == NPZ:
        architecture, tensors = google.read(path)
        return ForeignCheckpoint(
            google.SCHEME.name, architecture, tensors, architecture.settings(), str(path)
        )
    tensors = weights.read_file(path)
    if any(name.startswith(OUR_NAMES) for name in tensors):
        raise CheckpointError(
            f"{path} is a file; expected a folder, because its tensors are in transformers' format, which "
            "needs a config.json beside them"
        )
    return _from_timm(tensors, {}, str(path), str(path))


def _from_timm(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str, config_source: str
) -> ForeignCheckpoint:
    architecture, renamed = timm.convert(tensors, source)
    timm.require_head(config, architecture, config_source)
    settings = architecture.settings()
    if architecture.num_labels is not None:
        id2label = timm.labels(config, architecture.num_labels, config_source)
        if id2label is not None:
            settings["id2label"] = id2label
            settings["label2id"] = {label: index for index, label in id2label.items()}
    return ForeignCheckpoint(
        timm.SCHEME.name, architecture, renamed, settings, config_source, config
    )
