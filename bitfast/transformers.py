"""The BiT classes as subclasses of transformers' own, for Trainer, pipelines, PEFT and whatever asks for those.

``from bitfast.transformers import BitModel`` instead of ``from transformers import BitModel``. They need
transformers, 4.56 or 5; the network and its speed are those of :mod:`bitfast.modeling`, and everything
around it (configuration, checkpoints, devices, adapters) is what transformers does. Checkpoints of timm and
Google are loaded by :mod:`bitfast`'s classes alone; ``bitfast convert`` makes them transformers'.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

try:
    from transformers import BitConfig, modeling_outputs
    from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
    from transformers.models.bit import modeling_bit
    from transformers.utils import filter_out_non_signature_kwargs
except ImportError as error:
    raise ImportError(
        f"bitfast.transformers needs transformers (pip install transformers): {error}"
    ) from error
try:
    from transformers.image_processing_utils_fast import BaseImageProcessorFast
except ImportError:  # transformers 5
    from transformers.image_processing_backends import TorchvisionBackend as BaseImageProcessorFast
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitfast import configuration, models
from bitfast.blocks import LAYERS
from bitfast.images import processing, processing_fast

NETWORK_SETTINGS = tuple(
    inspect.signature(configuration.BitConfig).parameters.keys()
    - {"out_features", "out_indices", "kwargs"}
)
"""The settings of a configuration that describe the network."""


class BitPreTrainedModel(models.ModelBase, modeling_bit.BitPreTrainedModel):
    """The base of the three models, on top of ``transformers.PreTrainedModel``.

    Args:
        config: A ``transformers.BitConfig``; :class:`bitfast.BitConfig` is accepted and converted.

    Raises:
        TypeError: ``config`` is neither.
        ValueError: a value in it cannot work; the message names it and what is allowed.
    """

    # Of transformers' class, for type checkers.
    loss_function: Any
    post_init: Any
    _init_backbone: Any

    config_class = BitConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ("BitEmbeddings", *(layer.__name__ for layer in LAYERS.values()))
    _init_weights = modeling_bit.BitPreTrainedModel._init_weights

    def __init__(self, config: BitConfig) -> None:
        if isinstance(config, configuration.BitConfig):
            config = BitConfig.from_dict(config.to_dict())
        super().__init__(config)

    def network_config(self) -> configuration.BitConfig:
        """Return the settings that describe the network, checked, as bitfast's configuration."""
        settings = {name: getattr(self.config, name) for name in NETWORK_SETTINGS}
        return configuration.BitConfig(num_labels=self.config.num_labels, **settings)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """In training, keep only each block's input and recompute the rest in the backward pass.

        Args:
            gradient_checkpointing_kwargs: Passed to ``torch.utils.checkpoint.checkpoint``; by default
                ``{"use_reentrant": False}``.
            **kwargs: As in transformers.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        transformers_model: Any = super(models.ModelBase, self)
        if hasattr(transformers_model, "_activation_checkpointing_enable"):  # transformers 5
            transformers_model._activation_checkpointing_enable(options, **kwargs)
        else:
            transformers_model.gradient_checkpointing_enable(options, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **_: Any
    ) -> None:
        if (
            getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
            is not checkpoint
        ):
            raise ValueError(
                "BiT recomputes activations by torch.utils.checkpoint.checkpoint alone:"
                " they cannot be offloaded as well"
            )
        for stage in self._stages():
            stage.gradient_checkpointing = enable
            stage.checkpoint_options = getattr(gradient_checkpointing_func, "keywords", {})

    def _resolve_output_options(
        self, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:  # the configuration's use_return_dict warns in transformers 5
            return_dict = config.return_dict and not getattr(config, "torchscript", False)
        return output_hidden_states, return_dict


class BitModel(models.Model, BitPreTrainedModel):
    """The network without a head: feature map and its spatial mean."""

    output_class = modeling_outputs.BaseModelOutputWithPoolingAndNoAttention

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.add_modules(self.network_config())
        self.encoder.output_class = modeling_outputs.BaseModelOutputWithNoAttention  # type: ignore[misc]
        self.post_init()


class BitForImageClassification(models.Classifier, BitPreTrainedModel):
    """BitModel and a linear classifier on its pooled features."""

    output_class = modeling_outputs.ImageClassifierOutputWithNoAttention

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # whatever a subclass is called
        self.add_modules(self.network_config(), BitModel(self.config))
        self.post_init()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(labels, logits, self.config)


class BitBackbone(models.Backbone, modeling_bit.BackboneMixin, BitPreTrainedModel):
    """The feature maps of chosen stages, for detection, segmentation and hybrid models.

    Stages after the last chosen one are not computed, unless all hidden states are asked for.
    """

    output_class = modeling_outputs.BackboneOutput

    def __init__(self, config: BitConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 5 does it in BackboneMixin's __init__
            self._init_backbone(self.config)
        self.add_modules(self.network_config(), BitModel(self.config))
        self.post_init()


class BitImageProcessor(processing.BitImageProcessor, BaseImageProcessor):
    """:class:`bitfast.BitImageProcessor` as a ``transformers.BaseImageProcessor``."""

    @filter_out_non_signature_kwargs()
    @functools.wraps(processing.BitImageProcessor.preprocess)
    def preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess as :meth:`bitfast.BitImageProcessor.preprocess`; return transformers' own class."""
        return BatchFeature(super().preprocess(*args, **kwargs).data)


class BitImageProcessorFast(processing_fast.BitImageProcessorFast, BaseImageProcessorFast):
    """:class:`bitfast.BitImageProcessorFast` as a subclass of the base of transformers' fast processors."""

    def preprocess(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess as :meth:`bitfast.BitImageProcessorFast.preprocess`; return transformers' own class."""
        return BatchFeature(super().preprocess(*args, **kwargs).data)


__all__ = [
    "BitBackbone",
    "BitConfig",
    "BitForImageClassification",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitModel",
    "BitPreTrainedModel",
]
