"""The BiT of timm (``resnetv2_*_bit`` and the ResNet of its hybrid ViTs): what becomes what, and how it runs.

timm itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitfast.forward_pass import ForwardPass
from bitfast.in_place import parts
from bitfast.in_place.changes import Change, UnsuitableError, require
from bitfast.in_place.networks import Recipes, network
from bitfast.in_place.parts import Outcome, Planned, qualified_name
from bitfast.layers import Deferred, GroupNormActivation, runs_as_written
from bitfast.network import BitStage


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
        if not runs_as_written(self.stages):
            return super().forward_features(x)  # type: ignore[misc]
        _, features = self.run(x, len(self.stages), (), self.norm)
        return self.layout_of_outputs(x)(features)


def _convolution(module: Any, planned: Planned) -> Outcome:
    is_dynamic = getattr(module, "same_pad", False)
    return {module: parts.convolution(module, is_dynamic=is_dynamic)}


def _norm(module: Any, planned: Planned) -> Outcome:
    require(type(module.drop) is nn.Identity, "it drops activations")
    return {module: parts.norm(module, "act", without=("drop", "act"))}


def _bottleneck_block(module: Any, planned: Planned) -> Outcome:
    return {module: parts.bottleneck_block(module, planned, activation="act3")}


def _stage(module: Any, planned: Planned) -> Outcome:
    return {module: parts.stage(planned, TimmStage, list(module.blocks))}


def _resnet(module: Any, planned: Planned) -> Outcome:
    require(any(stage in planned for stage in module.stages), "all its stages are left as they are")
    pool = _stem_pool(dict(module.stem.named_children()), planned)
    return {**pool, module: network(module, TimmNetwork)}


def _features(module: Any, planned: Planned) -> Outcome:
    """Plan for the list that a ``features_only`` network is, which calls its children one by one."""
    stem = {
        name.removeprefix("stem_"): child
        for name, child in module.named_children()
        if name.startswith("stem_")
    }
    if stem.get("conv") not in planned or "stem_pad" in module.return_layers:
        return {}
    return _stem_pool(stem, planned)


def _stem_pool(children: Mapping[str, nn.Module], planned: Planned) -> Outcome:
    """Let the stem's pool do its padding itself, if it is padded as in BiT or in hybrid ViTs."""
    pad, pool, norm = (children.get(name) for name in ("pad", "pool", "norm"))
    if pool is None:
        return {}
    try:
        if pad is not None and parts.is_pad_of_one(pad):
            unwatched = runs_as_written(pad) and runs_as_written(pool)
            require(unwatched, "it or what pads it has hooks or another forward")
            change = parts.pool(pool, zero_pad=1, dynamic_padding=False)
            return {pad: Change(nn.Identity), pool: change}
        if qualified_name(type(pool)) == "timm.layers.pool2d_same.MaxPool2dSame":
            # Its padding is minus infinity, which beside what ReLU leaves is as good as zero.
            activates = norm is not None and norm in planned
            require(
                activates and planned[norm].attributes["activation"] == "relu",  # type: ignore[index]
                "what it pads with minus infinity has not gone through a ReLU",
            )
            return {pool: parts.pool(pool, zero_pad=0, dynamic_padding=True)}
    except UnsuitableError as reason:
        return {pool: str(reason)}
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
