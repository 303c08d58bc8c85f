"""Big Transfer: BitModel, BitForImageClassification and BitBackbone.

Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", 2019
(https://arxiv.org/abs/1912.11370).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from bitfast import models
from bitfast.checkpoints.hub import PretrainedModelMixin
from bitfast.configuration import BitConfig
from bitfast.configuration_values import align_output_stages
from bitfast.model_members import ModelMembers


class BitPreTrainedModel(PretrainedModelMixin, ModelMembers, models.ModelBase):
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
        """Call :meth:`init_weights`, at the end of a model's ``__init__``."""
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the modules that have not been initialised yet: a second time does nothing."""
        for module in self.modules():
            if not getattr(module, "_is_initialized", False):
                self._init_weights(module)
                module._is_initialized = True  # type: ignore[assignment]


class BitModel(models.Model, BitPreTrainedModel):
    """The network without a head: feature map and its spatial mean."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.add_modules(self.config)
        self.post_init()


class BitForImageClassification(models.Classifier, BitPreTrainedModel):
    """BitModel and a linear classifier on its pooled features."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.add_modules(self.config, BitModel(self.config))
        self.post_init()

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """What computes the loss: called with the labels, the logits and the configuration."""
        return self.__dict__.get("_loss_function", self._standard_loss)

    @loss_function.setter
    def loss_function(self, function: Callable[..., Tensor]) -> None:
        self._loss_function = function

    def _standard_loss(self, labels: Tensor, logits: Tensor, config: Any, **_: Any) -> Tensor:
        return super()._loss(logits, labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(labels, logits, self.config)


class BitBackbone(models.Backbone, BitPreTrainedModel):
    """The feature maps of chosen stages, for detection, segmentation and hybrid models.

    Stages after the last chosen one are not computed, unless all hidden states are asked for. Setting
    ``out_features`` or ``out_indices`` changes this model's choice, not the configuration's.
    """

    backbone_type = "transformers"

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.add_modules(self.config, BitModel(self.config))
        # A stage needs both a depth and a hidden size.
        self.stage_names = self.config.stage_names[: 1 + len(self.bit.encoder.stages)]
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

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration's settings, with this model's choice of stages."""
        choice = {"out_features": list(self.out_features), "out_indices": list(self.out_indices)}
        return {**self.config.to_dict(), **choice}

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model without ``output_attentions``, which it has no use for."""
        kwargs.pop("output_attentions", None)
        return self(*args, **kwargs)


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
