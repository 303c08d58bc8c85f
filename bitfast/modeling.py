"""Big Transfer: BitModel, BitForImageClassification and BitBackbone.

Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", 2019
(https://arxiv.org/abs/1912.11370).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast.checkpoints.hub import PretrainedModelMixin
from bitfast.configuration import BitConfig
from bitfast.configuration_values import align_output_stages
from bitfast.forward_pass import ForwardPass
from bitfast.layers import GroupNormActivation, runs_as_written
from bitfast.network import (
    BitEmbeddings,
    BitEncoder,
    BitStage,
    round_to_multiple,
    stage_widths,
)
from bitfast.outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from bitfast.prepared_weights import PreparedWeights


class BitPreTrainedModel(PretrainedModelMixin, nn.Module):
    """What the three models share: configuration, initialisation, checkpoints, gradient checkpointing.

    Args:
        config: A :class:`BitConfig`; transformers' own class is accepted and converted.
    """

    config_class = BitConfig
    base_model_prefix = "bit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.config = as_bit_config(config)

    def post_init(self) -> None:
        """Initialise the modules that no inner model has initialised already."""
        for child in self.children():
            if not isinstance(child, BitPreTrainedModel):
                child.apply(self._init_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module the way BiT is initialised before training."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks recompute their activations in the backward pass."""
        return any(stage.gradient_checkpointing for stage in self._stages())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """In training, keep only each block's input and recompute the rest in the backward pass.

        Args:
            gradient_checkpointing_kwargs: Passed to ``torch.utils.checkpoint.checkpoint``; by default
                ``{"use_reentrant": False}``.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for stage in self._stages():
            stage.gradient_checkpointing = True
            stage.checkpoint_options = options

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass again."""
        for stage in self._stages():
            stage.gradient_checkpointing = False

    def _stages(self) -> list[BitStage]:
        return [module for module in self.modules() if isinstance(module, BitStage)]

    def _resolve_output_options(
        self, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        """Fill in from the configuration what a forward call left open."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.use_return_dict
        return output_hidden_states, return_dict


class BitModel(ForwardPass, BitPreTrainedModel):
    """The network without a head: feature map and its spatial mean."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        config = self.config
        self.embedder = BitEmbeddings(config)
        self.encoder = BitEncoder(config)
        self.norm = (
            GroupNormActivation(config.num_groups, stage_widths(config)[-1], config.hidden_act)
            if config.layer_type == "preactivation"
            else nn.Identity()
        )
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.prepared_weights = PreparedWeights()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Any, ...]:
        """Compute the features of a batch of images.

        Args:
            pixel_values: (N, num_channels, H, W), floating point, NCHW or channels_last.
            output_hidden_states: Also return the stem's and each stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` has another shape, or is too small.
        """
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        hidden_states, normalized, pooled = self.features(pixel_values, output_hidden_states)
        layout = self.layout_of_outputs(pixel_values)
        output = BaseModelOutputWithPoolingAndNoAttention(
            layout(normalized), layout(pooled), tuple(map(layout, hidden_states)) or None
        )
        return output if return_dict else output.to_tuple()

    def features(
        self, pixel_values: Tensor, output_hidden_states: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the hidden states (or none), the last of them normalized, and its spatial mean.

        Args:
            pixel_values: (N, num_channels, H, W).
            output_hidden_states: Also return the stem's and each stage's output.

        Returns:
            Feature maps in the layout that the network runs in.
        """
        last = len(self.encoder.stages)
        wanted = range(last + 1) if output_hidden_states else ()
        hidden_states, normalized = self.run(pixel_values, last, wanted, self.norm)
        return hidden_states, normalized, self.pooler(normalized)

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the modules that :meth:`run` calls."""
        return self.embedder, list(self.encoder.stages)


class BitForImageClassification(BitPreTrainedModel):
    """BitModel and a linear classifier on its pooled features."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.bit = BitModel(config)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(stage_widths(config)[-1], config.num_labels)
            if config.num_labels > 0
            else nn.Identity(),
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Classify a batch of images.

        Args:
            pixel_values: (N, num_channels, H, W), floating point, NCHW or channels_last.
            labels: To compute the loss that ``config.problem_type`` names: (N,) class indices
                ("single_label_classification"), (N, num_labels) zeros and ones
                ("multi_label_classification"), or (N,) or (N, num_labels) values ("regression").
                Where it names none, one label means regression, integer labels a single class, others
                several. (transformers also writes that choice into the configuration.)
            output_hidden_states: Also return the stem's and each stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` is missing, has another shape, or is too small.
        """
        if pixel_values is None:
            raise ValueError("pixel_values must be given: (batch, num_channels, height, width)")
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        hidden_states: tuple[Tensor, ...] | None
        if runs_as_written(self.bit) and not output_hidden_states:
            hidden_states = None
            *_, pooled = self.bit.features(pixel_values, output_hidden_states=False)
        else:
            features = self.bit(pixel_values, output_hidden_states, return_dict=True)
            hidden_states, pooled = features.hidden_states, features.pooler_output
        logits = self.classifier(pooled)
        loss = None if labels is None else self._loss(logits, labels)
        output = ImageClassifierOutputWithNoAttention(loss, logits, hidden_states)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                problem_type = "single_label_classification"
            else:
                problem_type = "multi_label_classification"
        if problem_type == "regression":
            if self.num_labels == 1:
                return F.mse_loss(logits.squeeze(), labels.squeeze())
            return F.mse_loss(logits, labels)
        if problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)


class BitBackbone(BitPreTrainedModel):
    """The feature maps of chosen stages, for detection, segmentation and hybrid models.

    Stages after the last chosen one are not computed, unless all hidden states are asked for. Setting
    ``out_features`` or ``out_indices`` changes this model's choice, not the configuration's.
    """

    has_attentions = False

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.bit = BitModel(self.config)
        # A stage needs both a depth and a hidden size.
        self.stage_names = self.config.stage_names[: 1 + len(self.bit.encoder.stages)]
        # Like transformers, also of hidden sizes that have no depth, and so no stage.
        self.num_features = [
            self.config.embedding_size,
            *(
                round_to_multiple(size * self.config.width_factor)
                for size in self.config.hidden_sizes
            ),
        ]
        self._out_features, self._out_indices = align_output_stages(
            self.config.out_features, self.config.out_indices, self.stage_names
        )
        self.post_init()

    @property
    def out_features(self) -> list[str]:
        """Names of the stages whose outputs are returned."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self._out_features, self._out_indices = align_output_stages(names, None, self.stage_names)

    @property
    def out_indices(self) -> list[int]:
        """Positions of those stages in ``stage_names``."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: Iterable[int]) -> None:
        self._out_features, self._out_indices = align_output_stages(None, indices, self.stage_names)

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every stage's output, chosen or not."""
        return dict(zip(self.stage_names, self.num_features, strict=False))

    @property
    def channels(self) -> list[int]:
        """Channels of each returned feature map."""
        return [self.out_feature_channels[name] for name in self.out_features]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without ``output_attentions``, which it has no use for."""
        kwargs.pop("output_attentions", None)
        return self(*args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Compute the chosen feature maps of a batch of images.

        Args:
            pixel_values: (N, num_channels, H, W), floating point, NCHW or channels_last.
            output_hidden_states: Also return the stem's and every stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` has another shape, or is too small.
        """
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        chosen = [self.stage_names.index(name) for name in self.out_features]
        last = len(self.bit.encoder.stages) if output_hidden_states else max(chosen, default=0)
        computed = range(last + 1) if output_hidden_states else sorted(set(chosen))
        outputs, _ = self.bit.run(pixel_values, last, computed, norm=None)
        outputs = [*map(self.bit.layout_of_outputs(pixel_values), outputs)]
        output = BackboneOutput(
            feature_maps=tuple(outputs[computed.index(index)] for index in chosen),
            hidden_states=tuple(outputs) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def as_bit_config(config: Any) -> BitConfig:
    """Return config as a BitConfig, converting transformers' own class.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(config, BitConfig):
        return config
    if getattr(config, "model_type", None) == "bit" and hasattr(config, "to_dict"):
        return BitConfig.from_dict(config.to_dict())
    raise TypeError(f"config must be a BitConfig, got {type(config).__name__}")


__all__ = ["BitBackbone", "BitForImageClassification", "BitModel", "BitPreTrainedModel"]
