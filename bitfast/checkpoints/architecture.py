"""The architecture of a BiT network, found in the names and shapes of its tensors.

The formats of timm and of Google's files name the same tensors in their own ways. What differs is in a
:class:`Scheme`; what must hold of any BiT checkpoint is here, and is checked before a number is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bitfast.checkpoints.files import CheckpointError

Shape = tuple[int, ...]

NUM_GROUPS = 32
"""Groups of every GroupNorm of the released models, which no shape shows."""

STEM_WIDTH = 64
STAGE_WIDTHS = (256, 512, 1024, 2048)
"""Channels of the stem and of the stages of a model of width 1."""

BOTTLENECK_RATIO = 4
"""Ratio of the channels of a block's output to those inside the block."""

RELEASED_DEPTHS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
VARIANTS = ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")

LISTED = 5
"""Names that a message lists, at most."""

STEM = "bit.embedder.convolution.weight"
HEAD = "classifier.1"


class Scheme(NamedTuple):
    """How a format names the tensors of a network.

    Attributes:
        name: The format's name, for messages.
        layer: Finds, as ``(?P<stage>)`` and ``(?P<layer>)``, the numbers of a block in a tensor's name.
        first: The number of the first stage and block.
        their_name: Maps a name in BitForImageClassification to the one in the format.
    """

    name: str
    layer: re.Pattern[str]
    first: int
    their_name: Callable[[str], str]


@dataclass(frozen=True)
class Architecture:
    """Depths and widths of a preactivation network.

    Attributes:
        num_channels: Channels of the images.
        embedding_size: Channels of the stem.
        hidden_sizes: Channels of each stage's output.
        depths: Blocks of each stage.
        num_labels: Classes of the head; None: there is no head.
    """

    num_channels: int
    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    num_labels: int | None

    @property
    def variant(self) -> str | None:
        """The paper's name for these depths and widths, such as "50x1"; None if it has none."""
        width = self.embedding_size // STEM_WIDTH
        for layers, depths in RELEASED_DEPTHS.items():
            if depths == self.depths and self._has_width(width):
                return f"{layers}x{width}"
        return None

    def _has_width(self, width: int) -> bool:
        return self.embedding_size == width * STEM_WIDTH and self.hidden_sizes == tuple(
            width * size for size in STAGE_WIDTHS
        )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of BitConfig, without ``num_labels`` if there is no head."""
        labels = {} if self.num_labels is None else {"num_labels": self.num_labels}
        return {
            "num_channels": self.num_channels,
            "embedding_size": self.embedding_size,
            "hidden_sizes": list(self.hidden_sizes),
            "depths": list(self.depths),
            "layer_type": "preactivation",
            "num_groups": NUM_GROUPS,
            **labels,
        }

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every parameter by its name in BitForImageClassification.

        The head is a 1x1 convolution, (classes, channels, 1, 1), as both formats have it.
        """
        shapes: dict[str, Shape] = {STEM: (self.embedding_size, self.num_channels, 7, 7)}
        channels = self.embedding_size
        for stage, (width, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            for layer in range(depth):
                shapes.update(
                    _layer_shapes(f"bit.encoder.stages.{stage}.layers.{layer}", channels, width)
                )
                if layer == 0:
                    name = f"bit.encoder.stages.{stage}.layers.{layer}.downsample.conv.weight"
                    shapes[name] = (width, channels, 1, 1)
                channels = width
        shapes.update(_affine_shapes("bit.norm", channels))
        if self.num_labels is not None:
            shapes[f"{HEAD}.weight"] = (self.num_labels, channels, 1, 1)
            shapes[f"{HEAD}.bias"] = (self.num_labels,)
        return shapes


def _layer_shapes(prefix: str, channels: int, width: int) -> dict[str, Shape]:
    inner = width // BOTTLENECK_RATIO
    convolutions = ((channels, inner, 1), (inner, inner, 3), (inner, width, 1))
    shapes: dict[str, Shape] = {}
    for number, (inputs, outputs, kernel) in enumerate(convolutions, start=1):
        shapes.update(_affine_shapes(f"{prefix}.norm{number}", inputs))
        shapes[f"{prefix}.conv{number}.weight"] = (outputs, inputs, kernel, kernel)
    return shapes


def _affine_shapes(prefix: str, channels: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def infer_architecture(shapes: Mapping[str, Shape], scheme: Scheme, source: str) -> Architecture:
    """Find the architecture of the network whose tensors have these shapes, and no others.

    Args:
        shapes: The shape of each tensor by the name the format gives it, kernels as (outputs, inputs,
            height, width).
        scheme: The format.
        source: The checkpoint's name, for messages.

    Raises:
        CheckpointError: this is no BiT network, or not all of one, or more than one.
    """
    depths = _depths(shapes, scheme, source)
    stem = _kernel(shapes, STEM, scheme, source)
    last_kernels = [
        f"bit.encoder.stages.{stage}.layers.0.conv3.weight" for stage in range(len(depths))
    ]
    head = [scheme.their_name(f"{HEAD}.{name}") for name in ("weight", "bias")]
    has_head = any(name in shapes for name in head)
    found = Architecture(
        num_channels=stem[1],
        embedding_size=stem[0],
        hidden_sizes=tuple(_kernel(shapes, name, scheme, source)[0] for name in last_kernels),
        depths=depths,
        num_labels=_kernel(shapes, f"{HEAD}.weight", scheme, source)[0] if has_head else None,
    )
    _require_widths(found, source)
    _require_shapes(found, shapes, scheme, source)
    return found


def _depths(shapes: Mapping[str, Shape], scheme: Scheme, source: str) -> tuple[int, ...]:
    """Count the blocks of each stage, whose numbers must have no gap."""
    layers: dict[int, set[int]] = {}
    for name in shapes:
        match = scheme.layer.match(name)
        if match is not None:
            layers.setdefault(int(match["stage"]), set()).add(int(match["layer"]))
    if not layers:
        raise CheckpointError(
            f"{source} is no BiT checkpoint in {scheme.name} format: it has no {_first(scheme)}; "
            f"it has {listed(shapes)}"
        )
    _require_consecutive(sorted(layers), "stages", scheme.first, source)
    for stage, numbers in sorted(layers.items()):
        _require_consecutive(sorted(numbers), f"blocks in stage {stage}", scheme.first, source)
    return tuple(len(layers[stage]) for stage in sorted(layers))


def _first(scheme: Scheme) -> str:
    return scheme.their_name("bit.encoder.stages.0.layers.0.conv1.weight")


def _require_consecutive(numbers: list[int], what: str, first: int, source: str) -> None:
    if numbers != list(range(first, first + len(numbers))):
        raise CheckpointError(
            f"{source} is not a whole BiT checkpoint: its {what} are numbered {listed(numbers)}; "
            f"expected numbers from {first} on without a gap"
        )


def _kernel(shapes: Mapping[str, Shape], name: str, scheme: Scheme, source: str) -> Shape:
    """Return the shape of a convolution's kernel, from which widths are read."""
    theirs = scheme.their_name(name)
    if theirs not in shapes:
        raise CheckpointError(
            f"{source} is not a whole BiT checkpoint in {scheme.name} format: it lacks {theirs}; "
            f"it has {listed(shapes)}"
        )
    shape = shapes[theirs]
    if len(shape) != 4 or min(shape) < 1:
        raise CheckpointError(
            f"{source}: {theirs} must have four dimensions and none of size 0, got {shape}"
        )
    return shape


def _require_widths(found: Architecture, source: str) -> None:
    if found.embedding_size % NUM_GROUPS:
        raise CheckpointError(
            f"{source}: its stem has {found.embedding_size} channels; BiT's GroupNorm needs a multiple of"
            f" {NUM_GROUPS}"
        )
    multiple = NUM_GROUPS * BOTTLENECK_RATIO
    if any(width % multiple for width in found.hidden_sizes):
        raise CheckpointError(
            f"{source}: its stages have {list(found.hidden_sizes)} channels; BiT's bottlenecks and GroupNorm"
            f" need multiples of {multiple}"
        )


def _require_shapes(
    found: Architecture, shapes: Mapping[str, Shape], scheme: Scheme, source: str
) -> None:
    expected = {scheme.their_name(name): shape for name, shape in found.shapes().items()}
    complaints = []
    missing = [name for name in expected if name not in shapes]
    if missing:
        complaints.append(f"it lacks {listed(missing)}")
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        complaints.append(f"it has {listed(unexpected)}, for which there is no place")
    differing = [
        f"{name} is {shapes[name]} and should be {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if differing:
        complaints.append(f"as (outputs, inputs, height, width), {listed(differing)}")
    if complaints:
        raise CheckpointError(
            f"{source} is not a whole BiT checkpoint in {scheme.name} format. With stages of"
            f" {list(found.depths)} blocks and {list(found.hidden_sizes)} channels, {'; '.join(complaints)}"
        )


def listed(names: Iterable[Any]) -> str:
    """Return text with the first few names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return (", ".join(texts[:LISTED]) or "nothing") + more


def as_parameter(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the shape of BitForImageClassification's parameter, whose head is a matrix."""
    return tensor.flatten(1) if name == f"{HEAD}.weight" else tensor


__all__ = [
    "NUM_GROUPS",
    "VARIANTS",
    "Architecture",
    "Scheme",
    "Shape",
    "as_parameter",
    "infer_architecture",
    "listed",
]
