"""The BiT of timm (``resnetv2_*_bit``, and the ResNet of its hybrid ViTs): the changes of its modules.

timm itself is not imported.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitfast.blocks import BitBottleneckLayer
from bitfast.execution.forward_pass import ForwardPass, Request
from bitfast.in_place import parts
from bitfast.in_place.changes import Change, UnsuitableError, require
from bitfast.in_place.networks import Recipes, network_change
from bitfast.in_place.parts import Outcome, Planned, qualified_name
from bitfast.layers import DynamicPad2d, GroupNormActivation
from bitfast.network import BitStage
from bitfast.watching import is_plain, runs_as_written


class PartOfModule(DynamicPad2d):
    """A padding that is not a module of the network, so that it has no hooks to be called."""

    __call__ = DynamicPad2d.forward


class TimmGroupNormActivation(GroupNormActivation):
    """A norm whose activation is called ``act``, with a ``drop`` before it that does nothing in BiT."""

    act: nn.Module
    drop: nn.Module

    @property
    def activation(self) -> nn.Module:  # type: ignore[override]
        """The activation."""
        return self.act

    def activate(self, x: Tensor) -> Tensor:
        """Apply the modules that follow the norm."""
        return self.act(self.drop(x))

    def fused_activation(self) -> str | None:
        """Return the activation's name if the op may apply it; None if the module must be called."""
        is_idle = type(self.drop) is nn.Identity and runs_as_written(self.drop)
        return super().fused_activation() if is_idle else None


class TimmBottleneckLayer(BitBottleneckLayer):
    """A block whose activation is called ``act3``."""

    act3: nn.Module

    @property
    def activation(self) -> nn.Module:  # type: ignore[override]
        """The activation of the sum."""
        return self.act3


class TimmStem(nn.Sequential):
    """A stem with the method ``parts``, which bitfast reads."""

    def forward(self, input: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the first feature map."""
        x = input
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> list[nn.Module]:
        """Return the modules that the images go through, in order."""
        return list(self)


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

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride). As in timm, ``blocks`` is one module."""
        return super().forward(x) if self.is_recomputed else self.blocks(x)

    def parts(self) -> list[nn.Module]:
        """Return the blocks, in order."""
        return list(self.blocks)

    def calls_each_block(self) -> bool:
        """Whether the blocks may be called one by one: nobody hooks or wraps the module ``blocks``."""
        return self.is_recomputed or runs_as_written(self.blocks)


class TimmNetwork(ForwardPass):
    """The forward pass of a ResNetV2 of timm with bitfast's modules inside; the first base of its new class."""

    stem: nn.Module
    stages: Any
    norm: nn.Module

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the stem and the stages."""
        return self.stem, list(self.stages)

    def containers(self) -> Sequence[nn.Module]:
        """Return the stages, which timm calls as one module."""
        return (self.stages,)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the normalized output of the last stage."""
        computed = self.compute_features(x, output_hidden_states=False)
        if computed is None:
            return super().forward_features(x)  # type: ignore[misc]
        return self.layout_of_outputs(x)(computed[1])


class TimmFeatures(ForwardPass):
    """The forward pass of timm's ``features_only`` networks: lists of the stem's modules and the stages.

    Such a network calls ``_collect`` to compute the features.
    """

    before: tuple[str, ...]
    """The names of the stem's modules up to the last one whose output is a feature."""
    rest_of_stem: TimmStem
    """The other modules of the stem, which the network also holds itself."""
    nothing: nn.Module
    return_layers: dict[str, str]
    grad_checkpointing: bool

    def final_norm(self) -> nn.Module:
        """Return a module that does nothing: features are not normalized."""
        return self.nothing

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the stem and the stages."""
        after: list[Any] = list(self._modules.values())
        return self.rest_of_stem, after[len(self.before) + len(self.rest_of_stem) :]

    def is_known(self) -> bool:
        """Whether nobody has replaced a module of the stem."""
        modules = list(self._modules.values())[len(self.before) :]
        return all(a is b for a, b in zip(self.rest_of_stem, modules, strict=False))

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        if self.grad_checkpointing:
            return super()._collect(x)  # type: ignore[misc]
        features: dict[str, Tensor] = OrderedDict()

        def keep(name: str, x: Tensor) -> None:
            if name in self.return_layers:
                features[self.return_layers[name]] = x

        modules: Any = self._modules
        for name in self.before:
            x = modules[name](x)
            keep(name, x)
        names = list(self._modules)[len(self.before) :]
        stages = names[len(self.rest_of_stem) :]
        wanted = [n for n, name in enumerate(stages, start=1) if name in self.return_layers]
        computed = self.compute(x, Request(len(stages), tuple(wanted), is_normed=False))
        if computed is not None:
            for number, output in zip(wanted, computed[0], strict=True):
                keep(stages[number - 1], output)
            return features
        for name in names:
            x = modules[name](x)
            keep(name, x)
        return features


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
    return {**changes, module: network_change(module, TimmNetwork)}


def _features(module: Any, planned: Planned) -> Outcome:
    """Plan for a ``features_only`` network, a list of modules that it calls one by one."""
    stem = {
        name.removeprefix("stem_"): child
        for name, child in module.named_children()
        if name.startswith("stem_")
    }
    if stem.get("conv") not in planned:
        return {}
    changes = _stem_pool(stem, planned)
    names = list(module._modules)
    stages = [name for name in names if planned.get(module[name], _NONE).becomes is TimmStage]
    in_stem = names[: len(names) - len(stages)]
    # TimmFeatures does not compute norms or whatever else timm may put behind the stages.
    if not stages or names[len(in_stem) :] != stages:
        return changes
    before = [k + 1 for k, name in enumerate(in_stem) if name in module.return_layers]
    count = max(before, default=0)
    attributes = {
        "before": tuple(in_stem[:count]),
        "rest_of_stem": TimmStem(*(module[name] for name in in_stem[count:])),
        "nothing": nn.Identity(),
    }
    return {**changes, module: network_change(module, TimmFeatures, **attributes)}


_NONE = Change(nn.Module)


def _stem_pool(children: Mapping[str, nn.Module], planned: Planned) -> Outcome:
    """Plan for the stem's pool, if it is one of BiT or of hybrid ViTs."""
    pool, norm = children.get("pool"), children.get("norm")
    try:
        if type(pool) is nn.MaxPool2d:
            require("forward" not in pool.__dict__, "its forward was replaced")
            return {pool: parts.pool(pool, pad=None)}
        if qualified_name(type(pool)) == "timm.layers.pool2d_same.MaxPool2dSame":
            # It pads with minus infinity, which makes no difference to zeros where nothing is negative.
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
"""By the full name of a class, the function that plans for a module of it."""

ENTRIES = {
    "timm.models.resnetv2.ResNetV2": "forward_features",
    "timm.models._features.FeatureDictNet": "_collect",
    "timm.models._features.FeatureListNet": "_collect",
}
"""The method of a network that bitfast replaces. A subclass that has its own is left."""

__all__ = ["ENTRIES", "RECIPES", "TimmNetwork", "TimmStage"]
