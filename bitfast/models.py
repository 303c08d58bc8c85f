"""The three models, without configuration and checkpoints.

These are added by :mod:`bitfast.modeling`, and by :mod:`bitfast.transformers` for models that are instances of
transformers' own classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfast import outputs
from bitfast.blocks import norm, round_to_multiple
from bitfast.execution.forward_pass import ForwardPass, Request
from bitfast.execution.plans import Plans
from bitfast.network import BitEmbeddings, BitEncoder, BitStage, stage_widths
from bitfast.watching import is_plain, runs_as_written


class ModelBase(nn.Module):
    """The base of the three models: initialisation, gradient checkpointing, options of a call."""

    config: Any

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

    def enable_input_require_grads(self) -> None:
        """Let the stem's output require gradients, which reentrant checkpoints of a frozen network need."""

        def require_gradients(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        embedder: Any = getattr(self, "bit", self).embedder
        self._require_grads_hook = embedder.register_forward_hook(require_gradients)

    def disable_input_require_grads(self) -> None:
        """Undo :meth:`enable_input_require_grads`."""
        self._require_grads_hook.remove()

    def _stages(self) -> list[BitStage]:
        return [module for module in self.modules() if isinstance(module, BitStage)]

    def _resolve_output_options(
        self, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        """Replace options of a call that are None by the configuration's."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.use_return_dict
        return output_hidden_states, return_dict


class Model(ForwardPass, ModelBase):
    """The network without a head: feature map and its spatial mean."""

    output_class: ClassVar[Any] = outputs.BaseModelOutputWithPoolingAndNoAttention

    def add_modules(self, config: Any) -> None:
        """Add the modules that the configuration describes."""
        self.embedder = BitEmbeddings(config)
        self.encoder = BitEncoder(config)
        self.norm = (
            norm(config, stage_widths(config)[-1])
            if config.layer_type == "preactivation"
            else nn.Identity()
        )
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.plans = Plans(self)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compute the features of a batch of images.

        Args:
            pixel_values: (N, num_channels, H, W), floating point, NCHW or channels_last.
            output_hidden_states: Also return the stem's and each stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Returns:
            BaseModelOutputWithPoolingAndNoAttention, or a tuple.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` has another shape, or is too small.
        """
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        computed = self.compute_features(pixel_values, output_hidden_states)
        if computed is None:
            encoded = self.encoder(
                self.embedder(pixel_values),
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            )
            normalized = self.norm(encoded[0])
            hidden_states = encoded[1] if output_hidden_states else None
        else:
            hidden_states, normalized = computed
            normalized = self.layout_of_outputs(pixel_values)(normalized)
        output = self.output_class(normalized, self.pooler(normalized), hidden_states)
        return output if return_dict else output.to_tuple()

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the stem and the stages."""
        return self.embedder, list(self.encoder.stages)

    def stages_in_order(self) -> Sequence[nn.Module]:
        """Return the stages."""
        return self.encoder.stages._modules.values()  # type: ignore[return-value]

    def is_known(self) -> bool:
        """Whether the encoder is a :class:`BitEncoder` that nobody has replaced."""
        return is_plain(self.encoder, BitEncoder)

    def containers(self) -> Sequence[nn.Module]:
        """Return the encoder."""
        return (self.encoder,)


class Classifier(ModelBase):
    """The network and a linear classifier on its pooled features."""

    output_class: ClassVar[Any] = outputs.ImageClassifierOutputWithNoAttention

    def add_modules(self, config: Any, base_model: nn.Module) -> None:
        """Add a base model and a classifier."""
        self.num_labels = config.num_labels
        self.bit: Any = base_model
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(stage_widths(config)[-1], config.num_labels)
            if config.num_labels > 0
            else nn.Identity(),
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
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

        Returns:
            ImageClassifierOutputWithNoAttention, or a tuple.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` is missing, has another shape, or is too small.
        """
        if pixel_values is None:
            raise ValueError("pixel_values must be given: (batch, num_channels, height, width)")
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        bit, hidden_states, computed = self.bit, None, None
        if may_bypass_base_model(bit) and not output_hidden_states:
            computed = bit.compute_features(pixel_values, output_hidden_states)
        if computed is not None:
            pooled = bit.pooler(computed[1])
        else:
            features = bit(
                pixel_values, output_hidden_states=output_hidden_states, return_dict=return_dict
            )
            pooled = features[1]
            hidden_states = features[2] if output_hidden_states else None
        logits = self.classifier(pooled)
        loss = None if labels is None else self._loss(logits, labels)
        output = self.output_class(loss, logits, hidden_states)
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


class Backbone(ModelBase):
    """The feature maps of chosen stages.

    Subclasses have ``stage_names`` and ``out_features``.
    """

    output_class: ClassVar[Any] = outputs.BackboneOutput
    stage_names: list[str]
    has_attentions = False

    def add_modules(self, config: Any, base_model: nn.Module) -> None:
        """Add a base model, whose feature maps are returned."""
        self.bit: Any = base_model
        # As in transformers, also for hidden sizes without a depth, which have no stage.
        self.num_features = [
            config.embedding_size,
            *(round_to_multiple(size * config.width_factor) for size in config.hidden_sizes),
        ]

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compute the chosen feature maps of a batch of images.

        Args:
            pixel_values: (N, num_channels, H, W), floating point, NCHW or channels_last.
            output_hidden_states: Also return the stem's and every stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Returns:
            BackboneOutput, or a tuple.

        Raises:
            TypeError: ``pixel_values`` is no tensor, or not of the parameters' dtype (autocast aside).
            ValueError: ``pixel_values`` has another shape, or is too small.
        """
        output_hidden_states, return_dict = self._resolve_output_options(
            output_hidden_states, return_dict
        )
        chosen = [self.stage_names.index(name) for name in self.out_features]  # type: ignore[union-attr]
        last = len(self.stage_names) - 1 if output_hidden_states else max(chosen, default=0)
        computed = range(last + 1) if output_hidden_states else sorted(set(chosen))
        outputs = None
        if may_bypass_base_model(self.bit) and self.bit.is_known():
            outputs = self.bit.compute(
                pixel_values, Request(last, tuple(computed), is_normed=False)
            )
        if outputs is None:
            features = self.bit(pixel_values, output_hidden_states=True, return_dict=True)
            outputs, computed = (features.hidden_states, None), range(len(self.stage_names))
        feature_maps, _ = outputs
        output = self.output_class(
            feature_maps=tuple(feature_maps[computed.index(index)] for index in chosen),
            hidden_states=tuple(feature_maps) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def may_bypass_base_model(bit: nn.Module) -> bool:
    """Whether a model with a head may compute its base model without calling it: nobody would notice."""
    return (
        is_plain(bit, Model)
        and runs_as_written(bit)
        and type(bit.pooler) is nn.AdaptiveAvgPool2d  # another might need the plain layout
        and runs_as_written(bit.pooler)
    )


__all__ = ["Backbone", "Classifier", "Model", "ModelBase"]
