"""The BiT of timm (``resnetv2_*_bit`` and the ResNet of its hybrid ViTs): what becomes what, and how it runs.

timm itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from bitfast.blocks import BitBottleneckLayer
from bitfast.forward_pass import ForwardPass
from bitfast.fusion import Deferred
from bitfast.in_place import parts
from bitfast.in_place.changes import Change, UnsuitableError, require
from bitfast.in_place.networks import Recipes, network
from bitfast.in_place.parts import Outcome, Planned, qualified_name
from bitfast.layers import DynamicPad2d, GroupNormActivation
from bitfast.network import BitStage, zeros_of
from bitfast.pooling import MaxPool2d
from bitfast.torch_state import is_concrete
from bitfast.watching import is_plain, runs_as_written


class PartOfModule(DynamicPad2d):
    """A padding that is no module of the network, so that nobody could watch it: a call is its forward."""

    __call__ = DynamicPad2d.forward


class TimmGroupNormActivation(GroupNormActivation):
    """A norm whose activation is called ``act``, with a ``drop`` before it that does nothing in BiT."""

    act: nn.Module
    drop: nn.Module

    @property
    def activation(self) -> nn.Module:  # type: ignore[override]
        """What activates."""
        return self.act

    def activate(self, x: Tensor) -> Tensor:
        """Return what the modules after the norm make of it."""
        return self.act(self.drop(x))

    def fused_activation(self) -> str | None:
        """Return the name of the activation if a fused op may apply it; None if it must be called."""
        is_idle = type(self.drop) is nn.Identity and runs_as_written(self.drop)
        return super().fused_activation() if is_idle else None


class TimmBottleneckLayer(BitBottleneckLayer):
    """A block whose activation is called ``act3``."""

    act3: nn.Module

    @property
    def activation(self) -> nn.Module:  # type: ignore[override]
        """What activates the sum."""
        return self.act3


class TimmStem(nn.Sequential):
    """A stem whose pool puts the zeros around its input by itself."""

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the first feature map."""
        x, zeros = input, 0
        for module, following in pairwise([*self, None]):
            assert module is not None
            if zeros:
                assert isinstance(module, MaxPool2d)
                x, zeros = module.with_zeros(x, zeros), 0
            elif is_plain(following, MaxPool2d) and runs_as_written(following):
                zeros = zeros_of(module) or 0
                x = x if zeros else module(x)
            else:
                x = module(x)
        return x


class TimmStage(BitStage):
    """A stage whose blocks are called ``blocks``."""

    blocks: nn.Sequential
    grad_checkpointing: bool

    @property
    def layers(self) -> nn.Sequential:  # type: ignore[override]
        """The blocks."""
        return self.blocks

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the blocks recompute their activations in the backward pass."""
        return self.grad_checkpointing

    def run(
        self,
        x: Tensor,
        preactivated: Tensor | Deferred | None,
        following: GroupNormActivation | None,
    ) -> tuple[Tensor, Tensor | Deferred | None]:
        """Do what a stage does, which in timm calls the blocks as one module, if somebody watches that."""
        if self.is_recomputed or runs_as_written(self.blocks):
            return super().run(x, preactivated, following)
        return self.blocks(x), None


class TimmNetwork(ForwardPass):
    """How a ResNetV2 of timm runs with bitfast's modules inside: between its class and its objects."""

    stem: nn.Module
    stages: Any
    norm: nn.Module

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return what is called."""
        return self.stem, list(self.stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the normalized output of the last stage."""
        if not is_concrete(x) or not runs_as_written(self.stages):
            return super().forward_features(x)  # type: ignore[misc]
        _, features = self.run(x, len(self.stages), (), self.norm)
        return self.layout_of_outputs(x)(features)


def _convolution(module: Any, planned: Planned) -> Outcome:
    pads_itself = getattr(module, "same_pad", False)
    pad = PartOfModule(module.kernel_size, module.stride, module.dilation) if pads_itself else None
    return {module: parts.convolution(module, pad=pad)}


def _norm(module: Any, planned: Planned) -> Outcome:
    require(type(module.drop) is nn.Identity, "it drops activations")
    return parts.norm(module, module.act, TimmGroupNormActivation)


def _bottleneck_block(module: Any, planned: Planned) -> Outcome:
    return parts.bottleneck_block(module, planned, module.act3, TimmBottleneckLayer)


def _stage(module: Any, planned: Planned) -> Outcome:
    return {module: parts.stage(planned, TimmStage, list(module.blocks))}


def _resnet(module: Any, planned: Planned) -> Outcome:
    require(any(stage in planned for stage in module.stages), "all its stages are left as they are")
    changes = _stem_pool(dict(module.stem.named_children()), planned)
    if is_plain(module.stem, nn.Sequential) and "forward" not in module.stem.__dict__:
        changes[module.stem] = Change(TimmStem)
    return {**changes, module: network(module, TimmNetwork)}


def _features(module: Any, planned: Planned) -> Outcome:
    """Plan for the list that a ``features_only`` network is, which calls its children one by one."""
    stem = {
        name.removeprefix("stem_"): child
        for name, child in module.named_children()
        if name.startswith("stem_")
    }
    return _stem_pool(stem, planned) if stem.get("conv") in planned else {}


def _stem_pool(children: Mapping[str, nn.Module], planned: Planned) -> Outcome:
    """Plan for the stem's pool, if it is one of BiT or of hybrid ViTs."""
    pool, norm = children.get("pool"), children.get("norm")
    try:
        if type(pool) is nn.MaxPool2d:
            require("forward" not in pool.__dict__, "its forward was replaced")
            return {pool: parts.pool(pool, pad=None)}
        if qualified_name(type(pool)) == "timm.layers.pool2d_same.MaxPool2dSame":
            # Its padding is minus infinity, which beside what ReLU leaves is as good as zero.
            require(
                norm is not None and norm in planned and type(norm.act) is nn.ReLU,
                "what it pads with minus infinity has not gone through a ReLU",
            )
            return {pool: parts.pool(pool, pad=PartOfModule(3, 2))}  # type: ignore[dict-item]
    except UnsuitableError as reason:
        return {pool: str(reason)}  # type: ignore[dict-item]
    return {}


RECIPES: Recipes = {
    "timm.layers.std_conv.StdConv2d": _convolution,
    "timm.layers.std_conv.StdConv2dSame": _convolution,
    "timm.layers.norm_act.GroupNormAct": _norm,
    "timm.models.resnetv2.DownsampleConv": parts.downsample,
    "timm.models.resnetv2.PreActBottleneck": parts.preactivation_block,
    "timm.models.resnetv2.Bottleneck": _bottleneck_block,
    "timm.models.resnetv2.ResNetStage": _stage,
    "timm.models.resnetv2.ResNetV2": _resnet,
    "timm.models._features.FeatureDictNet": _features,
    "timm.models._features.FeatureListNet": _features,
}
"""What makes a change of a module, by the full name of its class."""

ENTRIES = {"timm.models.resnetv2.ResNetV2": "forward_features"}
"""The method of a network that bitfast replaces. A subclass that has its own is left."""

__all__ = ["ENTRIES", "RECIPES", "TimmNetwork", "TimmStage"]
