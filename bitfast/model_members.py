"""Members of transformers' PreTrainedModel that trainers, exporters and loaders expect of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from bitfast.blocks import LAYERS


def _only_with_transformers(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name} is transformers' own, which bitfast.{type(self).__name__} does without:"
            f" use bitfast.transformers.{type(self).__name__}"
        )

    method.__name__ = name
    method.__doc__ = f"Raise NotImplementedError: :mod:`bitfast.transformers` has ``{name}``."
    return method


class ModelMembers(nn.Module):
    """Attributes and methods that trainers, exporters and loaders expect of a model."""

    framework = "pt"
    is_parallelizable = False
    main_input_name: ClassVar[str]
    model_tags: list[str] | None = None
    _no_split_modules = ("BitEmbeddings", *(layer.__name__ for layer in LAYERS.values()))
    _skip_keys_device_placement = None
    _keep_in_fp32_modules = None
    _keep_in_fp32_modules_strict = None
    _keys_to_ignore_on_load_missing = None
    _keys_to_ignore_on_load_unexpected = None
    _keys_to_ignore_on_save = None
    _tied_weights_keys = None
    _is_stateful = False
    _hf_peft_config_loaded = False
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model generates text: no."""
        return False

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Whether the attention can be replaced: there is none."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # what transformers says of models without attention

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Do nothing: there is no attention."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no two modules share a weight."""

    def get_input_embeddings(self) -> NoReturn:
        """Raise NotImplementedError, as transformers does: images are not embedded by a table."""
        raise NotImplementedError(f"{type(self).__name__} has no input embeddings")

    def get_output_embeddings(self) -> None:
        """Return None: there are no output embeddings."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for the model card that ``push_to_hub`` writes, each once."""
        added = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*(self.model_tags or ()), *added]))

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Return the number of values of ``pixel_values``, which transformers takes for tokens; 0 without."""
        pixel_values = input_dict.get(self.main_input_name)
        return 0 if pixel_values is None else pixel_values.numel()

    def floating_point_ops(
        self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True
    ) -> int:
        """Return what transformers' Trainer logs: six per parameter and token.

        Convolutions do far less; ``torch.utils.flop_counter.FlopCounterMode`` counts what they do.
        """
        parameters = self.num_parameters(exclude_embeddings=exclude_embeddings)  # type: ignore[operator]
        return 6 * self.estimate_tokens(input_dict) * parameters

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """Return the parameter or the buffer of that name.

        Raises:
            AttributeError: there is neither.
        """
        try:
            return self.get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)

    register_for_auto_class = classmethod(_only_with_transformers("register_for_auto_class"))
    add_adapter = _only_with_transformers("add_adapter")
    load_adapter = _only_with_transformers("load_adapter")
    set_adapter = _only_with_transformers("set_adapter")
    enable_adapters = _only_with_transformers("enable_adapters")
    disable_adapters = _only_with_transformers("disable_adapters")
    delete_adapter = _only_with_transformers("delete_adapter")
    active_adapters = _only_with_transformers("active_adapters")
    get_adapter_state_dict = _only_with_transformers("get_adapter_state_dict")


__all__ = ["ModelMembers"]
