"""How the parts of a BiT, whoever wrote them, become bitfast's: what transformers and timm have in common.

Each function looks at a module, and returns its change or what is planned for it, or raises UnsuitableError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitfast.blocks import BitBottleneckLayer, BitDownsampleConv, BitPreActivationBottleneckLayer
from bitfast.in_place.changes import Change, require
from bitfast.layers import GroupNormActivation, MaxPool2d, WeightStandardizedConv2d, runs_as_written

Planned = Mapping[nn.Module, Change]
"""The changes of the modules inside the one at hand."""

Outcome = dict[nn.Module, Change | str]
"""The change of each module, or why it is left as it is."""

ACTIVATION_NAMES = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SELU": "selu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_new",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_new",
}
GELU_NAMES = {"none": "gelu", "tanh": "gelu_new"}
"""By the ``approximate`` of ``torch.nn.GELU``."""

IDENTITIES_IN_INFERENCE = frozenset(
    {
        "torch.nn.modules.linear.Identity",
        "transformers.models.bit.modeling_bit.BitDropPath",
        "timm.layers.drop.DropPath",
    }
)


def qualified_name(cls: type) -> str:
    """Return a class's full name, by which it is known without importing where it comes from."""
    return f"{cls.__module__}.{cls.__qualname__}"


def convolution(module: Any, *, is_dynamic: bool, without: tuple[str, ...] = ()) -> Change:
    """Return the change of a convolution with an ``eps``.

    Args:
        is_dynamic: TensorFlow's "same" zeros go around its input.
        without: Children that write these.
    """
    require("weight" in module._parameters, "its weight is not a plain parameter")
    require(module.bias is None, "it has a bias")
    require(module.groups == 1, f"it has {module.groups} groups")
    require(
        module.padding_mode == "zeros" and not isinstance(module.padding, str),
        f"its padding is {module.padding_mode!r} {module.padding!r}",
    )
    _require_unwatched(module, *without)
    attributes = {
        "has_dynamic_padding": is_dynamic,
        "geometry": tuple(map(tuple, (module.stride, module.padding, module.dilation))),
    }
    return Change(WeightStandardizedConv2d, attributes, without)


def norm(module: Any, activation: str, *, without: tuple[str, ...]) -> Change:
    """Return the change of a GroupNorm with an activation.

    Args:
        activation: The name of the child that activates.
        without: All children.
    """
    require(module.weight is not None and module.bias is not None, "it has no scale and shift")
    require({"weight", "bias"} <= module._parameters.keys(), "its scale is not a plain parameter")
    _require_unwatched(module, *without)
    name = activation_name(module._modules[activation])
    return Change(GroupNormActivation, {"activation": name}, without)


def activation_name(module: Any) -> str:
    """Return what bitfast calls an activation."""
    full_name = qualified_name(type(module))
    if full_name == "torch.nn.modules.activation.GELU":
        return GELU_NAMES[module.approximate]
    require(
        full_name in ACTIVATION_NAMES,
        f"its activation, {type(module).__name__}, is none of relu, gelu, gelu_new, selu",
    )
    return ACTIVATION_NAMES[full_name]


def pool(
    module: Any, *, zero_pad: int, dynamic_padding: bool, without: tuple[str, ...] = ()
) -> Change:
    """Return the change of the stem's max-pool.

    Args:
        zero_pad, dynamic_padding: As in bitfast's own.
        without: Children that pad its input.
    """
    sizes = [_pair(value) for value in (module.kernel_size, module.stride)]
    require(sizes == [(3, 3), (2, 2)], f"its windows and stride are {sizes}, not 3x3 and 2")
    require(
        (_pair(module.padding), _pair(module.dilation)) == ((0, 0), (1, 1))
        and not module.ceil_mode
        and not module.return_indices,
        "it is padded, dilated, rounded up or returns indices",
    )
    _require_unwatched(module, *without)
    attributes = {"zero_pad": zero_pad, "dynamic_padding": dynamic_padding}
    return Change(MaxPool2d, attributes, without)


def is_pad_of_one(module: nn.Module) -> bool:
    """Say whether the module puts one zero on each side."""
    return (
        isinstance(module, nn.ConstantPad2d)
        and tuple(module.padding) == (1, 1, 1, 1)
        and module.value == 0
    )


def downsample(module: Any, planned: Planned) -> Outcome:
    """Plan for a block's shortcut: a 1x1 convolution and a norm or none."""
    _require_changed(module, ["conv"], WeightStandardizedConv2d, planned)
    if type(module.norm) is not nn.Identity:
        _require_changed(module, ["norm"], GroupNormActivation, planned)
    return {module: Change(BitDownsampleConv)}


def preactivation_block(module: Any, planned: Planned) -> Outcome:
    """Plan for a block whose norms stand before its convolutions."""
    _require_block(module, planned)
    attributes = {"may_shrink": _may_shrink(module, planned)}
    return {module: Change(BitPreActivationBottleneckLayer, attributes)}


def bottleneck_block(module: Any, planned: Planned, *, activation: str) -> Change:
    """Return the change of a block whose norms stand after its convolutions.

    Args:
        activation: The name of the child that activates the sum.
    """
    _require_block(module, planned)
    _require_unwatched(module, activation)
    attributes = {
        "activation": activation_name(module._modules[activation]),
        "may_shrink": _may_shrink(module, planned),
    }
    return Change(BitBottleneckLayer, attributes, (activation,))


def stage(
    planned: Planned, cls: type[nn.Module], blocks: Sequence[Any], **attributes: Any
) -> Change:
    """Return the change of a sequence of blocks.

    Args:
        cls: What it becomes.
        blocks: The blocks, of which at least the first must be bitfast's by then.
        attributes: More that the class needs to find in the stage.
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
        require(change is not None and change.becomes is cls, f"its {name} is left as it is")


def _require_unwatched(module: nn.Module, *names: str) -> None:
    """Require that nobody would notice if these children were not called any more."""
    for name in names:
        child = module._modules[name]
        require(
            child is None or all(map(runs_as_written, child.modules())),
            f"its {name}, which would not be called any more, has hooks or another forward",
        )


def _may_shrink(module: Any, planned: Planned) -> bool:
    """Say whether the 3x3 convolution loses the border."""
    pads_itself = planned[module.conv2].attributes["has_dynamic_padding"]
    return module.conv2.padding == (0, 0) and not pads_itself


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


__all__ = [
    "Outcome",
    "Planned",
    "activation_name",
    "bottleneck_block",
    "convolution",
    "downsample",
    "is_pad_of_one",
    "norm",
    "pool",
    "preactivation_block",
    "qualified_name",
    "stage",
]
