"""Registration with transformers' auto classes, which then return bitfast's classes for BiT checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bitfast.checkpoints.files import WHERE
from bitfast.configuration import BitConfig

MODELS = {
    "AutoModel": "BitModel",
    "AutoModelForImageClassification": "BitForImageClassification",
    "AutoBackbone": "BitBackbone",
}
"""The class of :mod:`bitfast.transformers` that each auto class returns."""

PROCESSORS = {
    "BitImageProcessor": {4: "BitImageProcessor", 5: "BitImageProcessorFast"},
    "BitImageProcessorFast": {4: "BitImageProcessorFast", 5: "BitImageProcessorFast"},
    "BitImageProcessorPil": {5: "BitImageProcessor"},
}
"""The processor of :mod:`bitfast.transformers` for each of transformers' classes, by that one's name and by
transformers' major version: since 5 the name without an ending is that of the class using torchvision."""

MISSING = object()


class TransformersRegistration:
    """What :func:`register_with_transformers` returns; :meth:`undo`, or the end of a ``with``, ends it."""

    def __init__(self, undoing: list[Callable[[], None]]) -> None:
        self._undoing = undoing

    def undo(self) -> None:
        """Let the auto classes return transformers' own classes again; a second call does nothing."""
        while self._undoing:
            self._undoing.pop()()

    def __enter__(self) -> TransformersRegistration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def register_with_transformers() -> TransformersRegistration:
    """Let ``AutoModel``, ``AutoModelForImageClassification``, ``AutoBackbone``, ``AutoImageProcessor`` return
    the classes of :mod:`bitfast.transformers` for the model type "bit", instead of transformers'.

    ``pipeline("image-classification", ...)`` and models that build their backbone by ``AutoBackbone`` then use
    them too. Nothing else changes: ``AutoConfig`` returns transformers' configuration, which these classes
    share, and the processors of other models stay, also where they are of the same class (as DINOv2's is).
    Registering twice does no harm; undo registrations in the opposite order.

    Returns:
        What undoes it: ``.undo()``, or as a context manager the end of the block.

    Raises:
        ImportError: transformers is not installed, or of a version whose auto classes work otherwise.
    """
    try:
        import transformers
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from bitfast import transformers as ours
    except ImportError as error:
        raise ImportError(
            f"register_with_transformers needs transformers (pip install transformers): {error}"
        ) from error
    major = int(transformers.__version__.split(".")[0])
    mappings = {name: getattr(transformers, name)._model_mapping for name in MODELS}
    for name, mapping in mappings.items():
        if not isinstance(getattr(mapping, "_extra_content", None), dict):
            raise ImportError(
                f"the auto classes of transformers {transformers.__version__} are not like those of 4.56 and 5:"
                f" {name} keeps no registered classes"
            )
    undoing: list[Callable[[], None]] = []
    for name, model_class in MODELS.items():
        for config_class in (ours.BitConfig, BitConfig):
            content = mappings[name]._extra_content
            undoing.append(_set_item(content, config_class, getattr(ours, model_class)))
    undoing.append(_wrap_processors(AutoImageProcessor, major))
    return TransformersRegistration(undoing)


def _set_item(content: dict[Any, Any], key: Any, value: Any) -> Callable[[], None]:
    """Set an item; return a function that undoes it."""
    previous = content.get(key, MISSING)
    content[key] = value

    def undo() -> None:
        if previous is MISSING:
            content.pop(key, None)
        else:
            content[key] = previous

    return undo


def _wrap_processors(auto_class: Any, major: int) -> Callable[[], None]:
    """Let ``from_pretrained`` return bitfast's processor for BiT checkpoints; return a function that undoes it.

    transformers chooses the class by a name in a file, which DINOv2, FocalNet and Hiera share with BiT. So the
    result is replaced only if the model that it is for is a BiT.
    """
    original = auto_class.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any
    ) -> Any:
        made = original.__func__(cls, pretrained_model_name_or_path, *inputs, **dict(kwargs))
        processor, *unused = made if isinstance(made, tuple) else (made,)
        ours = _our_processor(type(processor), major)
        if ours is None or _model_type(pretrained_model_name_or_path, kwargs) != "bit":
            return made
        replacement = ours.from_dict(processor.to_dict())
        return (replacement, *unused) if isinstance(made, tuple) else replacement

    auto_class.from_pretrained = classmethod(from_pretrained)

    def undo() -> None:
        auto_class.from_pretrained = original

    return undo


def _our_processor(cls: type, major: int) -> Any:
    """Return the class that replaces a processor class of transformers; None for other classes."""
    from bitfast import transformers as ours

    if not cls.__module__.startswith("transformers.models.bit."):
        return None
    name = PROCESSORS.get(cls.__name__, {}).get(major)
    return None if name is None else getattr(ours, name)


def _model_type(name_or_path: Any, kwargs: dict[str, Any]) -> str:
    """Return the type of the model that a processor is for; "bit" for a folder without a model."""
    from transformers import AutoConfig

    config = kwargs.get("config")
    if config is None:
        options = {name: kwargs[name] for name in WHERE if name in kwargs}
        try:
            config = AutoConfig.from_pretrained(name_or_path, **options)
        except (OSError, ValueError):
            return "bit"
    return getattr(config, "model_type", "bit")


__all__ = ["TransformersRegistration", "register_with_transformers"]
