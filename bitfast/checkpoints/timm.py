"""timm's BiT checkpoints: the tensors of a ``resnetv2_*_bit`` model and the ``config.json`` beside them.

Kernels are as in PyTorch, the head is a 1x1 convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitfast.checkpoints.architecture import (
    VARIANTS,
    Architecture,
    Scheme,
    as_parameter,
    infer_architecture,
    listed,
)
from bitfast.checkpoints.files import CheckpointError

ARCHITECTURE = re.compile(r"resnetv2_(?P<variant>\d+x\d+)_bit(m?([._].*)?)")
"""Also with a pretrained tag (".goog_in21k") and as older releases named it ("resnetv2_50x1_bitm")."""

SHOWN_BY_SHAPES = frozenset(
    {"layers", "channels", "width_factor", "stem_chs", "in_chans", "num_classes"}
)
"""Arguments of a timm model that its tensors show."""

WITHOUT_EFFECT = frozenset({"drop_rate", "drop_path_rate", "zero_init_last", "img_size"})
"""Arguments of a timm model that change nothing about what a trained one computes."""

FIXED: dict[str, Any] = {
    "avg_down": False,
    "basic": False,
    "bottle_ratio": 0.25,
    "output_stride": 32,
    "preact": True,
    "stem_type": "fixed",
    "act_layer": "relu",
    "global_pool": "avg",
}
"""Arguments of a timm model that must have BiT's values."""

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of its filters, by timm's names."""

PREPROCESSING = ("input_size", "crop_pct", "interpolation", "mean", "std")


def _their_name(name: str) -> str:
    """Return the name that timm gives to a parameter of BitForImageClassification."""
    name = name.removeprefix("bit.")
    name = name.replace("classifier.1.", "head.fc.").replace("embedder.convolution.", "stem.conv.")
    return name.replace("encoder.stages.", "stages.").replace(".layers.", ".blocks.")


SCHEME = Scheme(
    name="timm's",
    layer=re.compile(r"stages\.(?P<stage>\d{1,6})\.blocks\.(?P<layer>\d{1,6})\."),
    first=0,
    their_name=_their_name,
)


def is_config(content: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's: those of transformers have a "model_type"."""
    return "architecture" in content and "model_type" not in content


def convert(tensors: Mapping[str, Tensor], source: str) -> tuple[Architecture, dict[str, Tensor]]:
    """Find the architecture, and give the tensors the names of BitForImageClassification.

    Args:
        tensors: A timm model's state dictionary.
        source: The checkpoint's name, for messages.

    Returns:
        The architecture, and the same tensors, or views of them, under their new names.

    Raises:
        CheckpointError: this is no BiT network, or not all of one.
    """
    _require_bit(tensors, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    architecture = infer_architecture(shapes, SCHEME, source)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name} is {tensor.dtype}, not floating point")
    return architecture, {
        name: as_parameter(name, tensors[_their_name(name)]) for name in architecture.shapes()
    }


def _require_bit(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for another network, naming what it has rather than what it lacks."""
    for ending, what in (
        (".running_mean", "BatchNorm, and BiT has GroupNorm"),
        ("stem.conv3.weight", "a stem of three convolutions, and BiT's has one of 7x7"),
        ("stem.norm.weight", "a norm in the stem, as only post-activation networks have"),
    ):
        for name in tensors:
            if name.endswith(ending):
                raise CheckpointError(f"{source} is no BiT checkpoint: {name} is of {what}")


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Check that a timm ``config.json`` describes a network that bitfast computes.

    Raises:
        CheckpointError: it is another architecture, or BiT changed in a way that no tensor shows.
    """
    name = config["architecture"]
    match = ARCHITECTURE.fullmatch(name) if isinstance(name, str) else None
    if match is None or match["variant"] not in VARIANTS:
        allowed = ", ".join(f"resnetv2_{variant}_bit" for variant in VARIANTS)
        raise CheckpointError(
            f"{source} is of timm's architecture {name!r}; bitfast loads {allowed}"
        )
    arguments = {"global_pool": config.get("global_pool"), **_object(config, "model_args", source)}
    for argument, value in arguments.items():
        if argument in SHOWN_BY_SHAPES | WITHOUT_EFFECT or (
            # A model without a head may leave its pooling to others.
            argument == "global_pool" and value in (None, "")
        ):
            continue
        if argument not in FIXED or value != FIXED[argument]:
            allowed = f"only {FIXED[argument]!r}" if argument in FIXED else "no such argument"
            raise CheckpointError(
                f"{source}: the timm model was made with {argument}={value!r}; bitfast has {allowed}"
            )


def require_head(config: Mapping[str, Any], architecture: Architecture, source: str) -> None:
    """Check that a timm ``config.json`` and the tensors have heads of one size.

    Raises:
        CheckpointError: "num_classes" is another number than that of the tensors.
    """
    said = config.get("num_classes")
    if said is not None and said != (architecture.num_labels or 0):
        found = "no head" if architecture.num_labels is None else f"{architecture.num_labels}"
        raise CheckpointError(f"{source} says num_classes={said!r}, and the tensors have {found}")


def labels(config: Mapping[str, Any], num_labels: int, source: str) -> dict[int, str] | None:
    """Return the names of the classes in a timm ``config.json``, or None.

    A class's description is preferred to its name, which for ImageNet is a WordNet id.

    Raises:
        CheckpointError: the names do not fit the classes.
    """
    pretrained = _object(config, "pretrained_cfg", source)
    names = config.get("label_names") or pretrained.get("label_names")
    if not names:
        return None
    descriptions = {
        **_object(pretrained, "label_descriptions", source),
        **_object(config, "label_descriptions", source),
    }
    try:
        items = names.items() if isinstance(names, dict) else enumerate(names)
        named = {int(index): str(descriptions.get(name, name)) for index, name in items}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: label_names must be a list or numbered: {error}"
        ) from error
    outside = [index for index in named if not 0 <= index < num_labels]
    if outside or (isinstance(names, list) and len(names) != num_labels):
        raise CheckpointError(
            f"{source}: label_names has {len(names)} names, which do not fit {num_labels} classes"
        )
    return {index: named.get(index, f"LABEL_{index}") for index in range(num_labels)}


def image_parameters(
    config: Mapping[str, Any], source: str, image_size: int | None = None
) -> dict[str, Any] | None:
    """Return the parameters of the image processor that does what timm does to evaluate a model.

    Args:
        config: A timm ``config.json``.
        source: Its name, for messages.
        image_size: Height and width of the model's images instead of the configuration's.

    Returns:
        Arguments of BitImageProcessor; None: the configuration says nothing about images.

    Raises:
        CheckpointError: it describes what the processor does not do, or makes no sense.
    """
    # Files of timm before 0.9 have no "pretrained_cfg" but its content.
    settings = _object(config, "pretrained_cfg", source) or config
    if all(settings.get(name) is None for name in PREPROCESSING):
        return None
    missing = [name for name in PREPROCESSING if settings.get(name) is None]
    if missing:
        raise CheckpointError(f"{source}: pretrained_cfg lacks {listed(missing)}")
    if settings.get("crop_mode", "center") != "center":
        raise CheckpointError(
            f"{source}: crop_mode must be 'center', got {settings['crop_mode']!r}"
        )
    if settings["interpolation"] not in RESAMPLING:
        raise CheckpointError(
            f"{source}: interpolation must be one of {', '.join(RESAMPLING)}, "
            f"got {settings['interpolation']!r}"
        )
    channels, size = _input_size(settings["input_size"], source)
    size = size if image_size is None else image_size
    return {
        "size": {"shortest_edge": math.floor(size / _crop_share(settings["crop_pct"], source))},
        "crop_size": {"height": size, "width": size},
        "resample": RESAMPLING[settings["interpolation"]],
        "image_mean": _statistics("mean", settings["mean"], channels, source),
        "image_std": _statistics("std", settings["std"], channels, source),
        "do_convert_rgb": channels == 3,
    }


def _input_size(value: Any, source: str) -> tuple[int, int]:
    """Return channels and size of square images."""
    is_list = isinstance(value, (list, tuple)) and len(value) == 3
    if not is_list or any(type(item) is not int or item < 1 for item in value):
        raise CheckpointError(
            f"{source}: input_size must be [channels, height, width], got {value!r}"
        )
    channels, height, width = value
    if height != width:
        raise CheckpointError(f"{source}: input_size must be square, got {value!r}")
    return channels, height


def _crop_share(value: Any, source: str) -> float:
    if type(value) not in (int, float) or not 0.01 <= value <= 1:
        raise CheckpointError(f"{source}: crop_pct must be in [0.01, 1], got {value!r}")
    return value


def _statistics(name: str, value: Any, channels: int, source: str) -> list[float]:
    is_list = isinstance(value, (list, tuple)) and len(value) == channels
    if not is_list or any(
        type(item) not in (int, float) or not math.isfinite(item) for item in value
    ):
        raise CheckpointError(
            f"{source}: {name} must be a list of {channels} numbers, one per channel, got {value!r}"
        )
    return list(value)


def _object(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return a JSON object in a configuration; an empty one if there is none."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {name} must be a JSON object, got {type(value).__name__}")
    return value
