"""The BiT of transformers: the changes of its modules.

Written for transformers 4.56 and 5, which is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bitfast.execution.forward_pass import ForwardPass
from bitfast.in_place import parts
from bitfast.in_place.changes import Change, require
from bitfast.in_place.networks import Recipes, network_change
from bitfast.in_place.parts import Outcome, Planned
from bitfast.layers import DropPath
from bitfast.network import BitEmbeddings, BitStage

MODULE = "transformers.models.bit.modeling_bit"


class TransformersNetwork(ForwardPass):
    """The forward pass of transformers' BitModel with bitfast's modules inside; first base of its new class."""

    embedder: nn.Module
    encoder: Any
    norm: nn.Module
    pooler: nn.Module
    config: Any

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the stem and the stages."""
        return self.embedder, list(self.encoder.stages)

    def is_known(self) -> bool:
        """Whether the encoder is transformers' own."""
        return _is_encoder(self.encoder)

    def containers(self) -> Sequence[nn.Module]:
        """Return the encoder."""
        return (self.encoder,)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what transformers' own ``forward`` returns, of the same type."""
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict and not getattr(config, "torchscript", False)
        computed = self.compute_features(pixel_values, output_hidden_states)
        if computed is None:
            return super().forward(
                pixel_values,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        hidden_states, normalized = computed
        normalized = self.layout_of_outputs(pixel_values)(normalized)
        pooled = self.pooler(normalized)
        if not return_dict:
            return (normalized, pooled, *(() if hidden_states is None else (hidden_states,)))
        return self.output_class(normalized, pooled, hidden_states)  # type: ignore[operator]


def _convolution(module: Any, planned: Planned) -> Outcome:
    return {module: parts.convolution(module)}


def _drop_path(module: Any, planned: Planned) -> Outcome:
    return {module: Change(DropPath)}


def _norm(module: Any, planned: Planned) -> Outcome:
    return parts.norm(module, module.activation)


def _pool(module: Any, planned: Planned) -> Outcome:
    return {module: parts.pool(module)}


def _embeddings(module: Any, planned: Planned) -> Outcome:
    convolution, pooler = module.convolution, module.pooler
    require(
        convolution in planned and pooler in planned,
        "its convolution or its pooler is left as it is",
    )
    if convolution.pad is not None:
        min_size = 5 if type(pooler.pad) is nn.Identity else 1
    else:
        min_size = 7 if convolution.padding == (0, 0) else 1
    return {module: Change(BitEmbeddings, {"min_size": min_size})}


def _bottleneck_block(module: Any, planned: Planned) -> Outcome:
    return parts.bottleneck_block(module, planned, module.activation)


def _stage(module: Any, planned: Planned) -> Outcome:
    blocks = list(module.layers)
    return {module: parts.stage(planned, BitStage, blocks, gradient_checkpointing=False)}


def _model(module: Any, planned: Planned) -> Outcome:
    stages = module.encoder.stages
    require(_is_encoder(module.encoder), f"its encoder is a {type(module.encoder).__name__}")
    require(any(stage in planned for stage in stages), "all its stages are left as they are")
    output_class = vars(sys.modules[MODULE])["BaseModelOutputWithPoolingAndNoAttention"]
    return {module: network_change(module, TransformersNetwork, output_class=output_class)}


def _is_encoder(module: nn.Module) -> bool:
    return parts.qualified_name(type(module)) == f"{MODULE}.BitEncoder"


RECIPES: Recipes = {
    f"{MODULE}.BitDropPath": _drop_path,
    f"{MODULE}.DynamicPad2d": parts.dynamic_pad,
    f"{MODULE}.WeightStandardizedConv2d": _convolution,
    f"{MODULE}.BitGroupNormActivation": _norm,
    f"{MODULE}.BitMaxPool2d": _pool,
    f"{MODULE}.BitEmbeddings": _embeddings,
    f"{MODULE}.BitDownsampleConv": parts.downsample,
    f"{MODULE}.BitPreActivationBottleneckLayer": parts.preactivation_block,
    f"{MODULE}.BitBottleneckLayer": _bottleneck_block,
    f"{MODULE}.BitStage": _stage,
    f"{MODULE}.BitModel": _model,
}
"""By the full name of a class, the function that plans for a module of it."""

ENTRIES = {f"{MODULE}.BitModel": "forward"}
"""The method of a network that bitfast replaces. A subclass that has its own is left."""

__all__ = ["ENTRIES", "RECIPES", "TransformersNetwork"]
