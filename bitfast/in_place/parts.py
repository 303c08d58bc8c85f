"""How modules of a BiT become bitfast's: what transformers and timm have in common.

Each function takes a module and returns its change, or the outcome for it and other modules, or raises
UnsuitableError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitfast.blocks import (
    BitBottleneckLayer,
    BitDownsampleConv,
    BitPreActivationBottleneckLayer,
    ResidualBlock,
)
from bitfast.in_place.changes import Change, require
from bitfast.layers import (
    DynamicPad2d,
    GroupNormActivation,
    WeightStandardizedConv2d,
    pair_of,
)
from bitfast.pooling import MaxPool2d

Planned = Mapping[nn.Module, Change]
"""The changes planned so far, those of the modules inside the one at hand among them."""

Outcome = dict[nn.Module, Change | str]
"""The change of each module, or why it is left as it is."""

GELUS = {
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.NewGELUActivation": "tanh",
    "timm.layers.activations.GELU": "none",
    "timm.layers.activations.GELUTanh": "tanh",
}
"""By the full name of a class, the ``approximate`` of the ``torch.nn.GELU`` that equals it."""

IDENTITIES_IN_INFERENCE = frozenset(
    {
        "torch.nn.modules.linear.Identity",
        "transformers.models.bit.modeling_bit.BitDropPath",
        "timm.layers.drop.DropPath",
    }
)


def qualified_name(cls: type) -> str:
    """Return a class's full name, by which it is recognised without importing its library."""
    return f"{cls.__module__}.{cls.__qualname__}"


def dynamic_pad(module: Any, planned: Planned) -> Outcome:
    """Plan for TensorFlow's "same" padding."""
    return {module: Change(DynamicPad2d)}


def convolution(module: Any, **attributes: Any) -> Change:
    """Return the change of a convolution with an ``eps``.

    Args:
        attributes: More attributes that bitfast's class needs.
    """
    require("weight" in module._parameters, "its weight is not a plain parameter")
    require(module.bias is None, "it has a bias")
    require(module.groups == 1, f"it has {module.groups} groups")
    require(
        module.padding_mode == "zeros" and not isinstance(module.padding, str),
        f"its padding is {module.padding_mode!r} {module.padding!r}",
    )
    return Change(WeightStandardizedConv2d, attributes)


def norm(
    module: Any, activation: nn.Module, becomes: type[nn.Module] = GroupNormActivation
) -> Outcome:
    """Plan for a GroupNorm with an activation.

    Args:
        activation: Its child that activates.
        becomes: bitfast's class, or one that finds the activation elsewhere.
    """
    require(module.weight is not None and module.bias is not None, "it has no scale and shift")
    require({"weight", "bias"} <= module._parameters.keys(), "its scale is not a plain parameter")
    return {module: Change(becomes), **_activation(activation)}


def _activation(module: nn.Module) -> Outcome:
    """Plan for an activation: a GELU becomes torch's; others are torch's already, or stay."""
    approximate = GELUS.get(qualified_name(type(module)))
    if approximate is None:
        return {}
    return {module: Change(nn.GELU, {"approximate": approximate})}


def pool(module: Any, **attributes: Any) -> Change:
    """Return the change of the stem's max-pool.

    Args:
        attributes: More attributes that bitfast's class needs.
    """
    sizes = [pair_of(value) for value in (module.kernel_size, module.stride)]
    require(sizes == [(3, 3), (2, 2)], f"its windows and stride are {sizes}, not 3x3 and 2")
    require(
        (pair_of(module.padding), pair_of(module.dilation)) == ((0, 0), (1, 1))
        and not module.ceil_mode
        and not module.return_indices,
        "it is padded, dilated, rounded up or returns indices",
    )
    pairs = {name: pair_of(getattr(module, name)) for name in ("kernel_size", "stride", "dilation")}
    return Change(MaxPool2d, {**pairs, **attributes})


def downsample(module: Any, planned: Planned) -> Outcome:
    """Plan for a block's shortcut: a 1x1 convolution, maybe with a norm."""
    _require_changed(module, ["conv"], WeightStandardizedConv2d, planned)
    if type(module.norm) is not nn.Identity:
        _require_changed(module, ["norm"], GroupNormActivation, planned)
    return {module: Change(BitDownsampleConv)}


def preactivation_block(module: Any, planned: Planned) -> Outcome:
    """Plan for a block whose norms stand before its convolutions."""
    _require_block(module, planned)
    return {module: Change(BitPreActivationBottleneckLayer, _block_attributes(module, planned))}


def bottleneck_block(
    module: Any,
    planned: Planned,
    activation: nn.Module,
    becomes: type[nn.Module] = BitBottleneckLayer,
) -> Outcome:
    """Plan for a block whose norms stand after its convolutions.

    Args:
        activation: Its child that activates the sum.
        becomes: bitfast's class, or one that finds the activation elsewhere.
    """
    _require_block(module, planned)
    change = Change(becomes, _block_attributes(module, planned))
    return {module: change, **_activation(activation)}


def stage(
    planned: Planned, cls: type[nn.Module], blocks: Sequence[Any], **attributes: Any
) -> Change:
    """Return the change of a sequence of blocks.

    Args:
        cls: The class that it becomes.
        blocks: The blocks, of which at least the first must be planned to become bitfast's.
        attributes: More attributes that the class needs.
    """
    require(blocks and blocks[0] in planned, "its first block is left as it is")
    attributes["out_channels"] = blocks[0].conv3.out_channels
    attributes["checkpoint_options"] = {"use_reentrant": False}
    return Change(cls, attributes)


def _require_block(module: Any, planned: Planned) -> None:
    _require_changed(module, ["conv1", "conv2", "conv3"], WeightStandardizedConv2d, planned)
    _require_changed(module, ["norm1", "norm2", "norm3"], GroupNormActivation, planned)
    if module.downsample is not None:
        _require_changed(module, ["downsample"], BitDownsampleConv, planned)
    drop_path = type(module.drop_path)
    require(
        qualified_name(drop_path) in IDENTITIES_IN_INFERENCE,
        f"its drop_path is a {drop_path.__name__}, which may do something in inference",
    )


def _require_changed(
    module: nn.Module, names: Sequence[str], cls: type[nn.Module], planned: Planned
) -> None:
    for name in names:
        change = planned.get(getattr(module, name))
        require(
            change is not None and issubclass(change.becomes, cls), f"its {name} is left as it is"
        )


def _block_attributes(module: Any, planned: Planned) -> dict[str, Any]:
    """Return the attributes that bitfast's blocks need."""
    return {"idle_in_inference": (*ResidualBlock.idle_in_inference, type(module.drop_path))}


__all__ = [
    "Outcome",
    "Planned",
    "bottleneck_block",
    "convolution",
    "downsample",
    "dynamic_pad",
    "norm",
    "pool",
    "preactivation_block",
    "qualified_name",
    "stage",
]
