"""What the models return: ordered dictionaries that also index like tuples and read like attributes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict):
    """Base of the outputs: a dataclass whose fields that are not None are also its dictionary entries.

    ``output.logits``, ``output["logits"]`` and ``output[0]`` name the same value; a slice gives a tuple
    of values. Iteration goes over the names, as in any dictionary. Subclasses are registered as pytrees,
    so torch.compile, torch.export and ``torch.utils._pytree`` see the tensors inside. One is also built
    from a dictionary or from (name, value) pairs, as DataParallel's gather and ``copy()`` do.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __post_init__(self) -> None:
        names = _field_names(self)
        values = {name: getattr(self, name) for name in names}
        if all(values[name] is None for name in names[1:]):
            pairs = _name_value_pairs(values[names[0]])
            if pairs is not None:
                values = {names[0]: None, **pairs}
        for name, value in values.items():
            super().__setattr__(name, value)
            if value is not None:
                super().__setitem__(name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = super().__reduce__()  # type: ignore[assignment]
        return reduced[0], tuple(getattr(self, name) for name in _field_names(self)), *reduced[2:]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in order."""
        return tuple(self.values())

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{type(self).__name__} has fixed entries: {name!r} cannot be deleted")

    def pop(self, name: str, *_: Any) -> Any:
        """Refuse: the entries are fixed."""
        self.__delitem__(name)

    def setdefault(self, name: str, *_: Any) -> Any:
        """Refuse: the entries are fixed."""
        raise TypeError(f"{type(self).__name__} has fixed entries: {name!r} cannot be added")

    def update(self, *_: Any, **__: Any) -> None:
        """Refuse: the entries are fixed."""
        raise TypeError(f"{type(self).__name__} has fixed entries and cannot be updated")


def _field_names(output: ModelOutput) -> list[str]:
    return [field.name for field in fields(output)]  # type: ignore[arg-type]


def _name_value_pairs(value: Any) -> dict[str, Any] | None:
    """Return the entries if value is a dictionary or an iterable of (name, value) pairs, else None."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        return None
    items = list(value)
    is_pairs = items and all(
        isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)
        for item in items
    )
    return dict(items) if is_pairs else None


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _flatten_with_keys(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output.keys())


@dataclass(eq=False)
class BaseModelOutputWithNoAttention(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: (N, C, H, W), the last stage's output.
        hidden_states: The encoder's input and each stage's output; on request.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutputWithPoolingAndNoAttention(ModelOutput):
    """Output of :class:`~bitfast.BitModel`.

    Attributes:
        last_hidden_state: (N, C, H, W), after the final norm.
        pooler_output: (N, C, 1, 1), its mean over the spatial axes.
        hidden_states: The stem's and each stage's output, before the final norm; on request.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class ImageClassifierOutputWithNoAttention(ModelOutput):
    """Output of :class:`~bitfast.BitForImageClassification`.

    Attributes:
        loss: Scalar, when labels were given.
        logits: (N, num_labels), before softmax.
        hidden_states: The stem's and each stage's output, before the final norm; on request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BackboneOutput(ModelOutput):
    """Output of :class:`~bitfast.BitBackbone`.

    Attributes:
        feature_maps: One (N, C, H, W) per name in ``out_features``, in that order.
        hidden_states: The stem's and each stage's output; on request.
        attentions: Always None: a convolutional network has none.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


__all__ = [
    "BackboneOutput",
    "BaseModelOutputWithNoAttention",
    "BaseModelOutputWithPoolingAndNoAttention",
    "ImageClassifierOutputWithNoAttention",
    "ModelOutput",
]
