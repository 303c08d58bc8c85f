"""BatchFeature, which the image processors return."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

TENSOR_TYPES = {"np": "NumPy", "pt": "PyTorch", "tf": "TensorFlow", "jax": "JAX"}
"""The values of ``return_tensors`` and the library that each stands for."""


class BatchFeature(UserDict):
    """A dictionary of lists, arrays or tensors whose entries are also attributes.

    Args:
        data: The entries.
        tensor_type: "pt", "np", "tf" or "jax": makes each entry one tensor of that library; None
            leaves the entries as they are.
    """

    def __init__(self, data: dict[str, Any] | None = None, tensor_type: Any = None) -> None:
        super().__init__(data)
        self.convert_to_tensors(tensor_type)

    def __getattr__(self, name: str) -> Any:
        # Not self.data, which an instance does not have yet while it is being unpickled.
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"{type(self).__name__} has no entry or attribute {name!r}")

    def convert_to_tensors(self, tensor_type: Any = None) -> BatchFeature:
        """Make each entry one tensor, in place; return self.

        Raises:
            ImportError: the library asked for is not installed.
            ValueError: an unknown library; an entry whose arrays differ in shape.
        """
        tensor_type = parse_tensor_type(tensor_type)
        if tensor_type is not None:
            for key, value in self.items():
                self[key] = _to_tensor(key, value, tensor_type)
        return self

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move the torch tensors to a device and cast the floating ones to a dtype, in place.

        Takes the arguments of :meth:`torch.Tensor.to` and returns self. Integer tensors keep their
        dtype; entries that are no torch tensors stay as they are.

        Raises:
            TypeError: arguments that ``torch.Tensor.to`` does not take.
        """
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                self[key] = moved if value.is_floating_point() else value.to(moved.device)
        return self


def parse_tensor_type(value: Any) -> str | None:
    """Return the tensor type that a string or an enumeration's member names; None for None."""
    value = getattr(value, "value", value)
    if value is None or value in TENSOR_TYPES:
        return value
    allowed = ", ".join(repr(t) for t in TENSOR_TYPES)
    raise ValueError(f"return_tensors must be one of {allowed} or None, got {value!r}")


def _to_tensor(key: str, value: Any, tensor_type: str) -> Any:
    """Return an entry as one tensor of a library; a tensor of that library is returned as it is."""
    if tensor_type == "pt":
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
            _check_shapes(key, value)
            return torch.stack(value)
        value = _stack(key, value)
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.tensor(value)
    if tensor_type == "np":
        return np.asarray(_stack(key, value))
    if tensor_type == "tf":
        return _import_library("tensorflow", "tf").constant(_stack(key, value))
    return _import_library("jax.numpy", "jax").asarray(_stack(key, value))


def _stack(key: str, value: Any) -> Any:
    """Stack a list of arrays into one array; return anything else as it is."""
    if not isinstance(value, (list, tuple)) or not all(hasattr(v, "__array__") for v in value):
        return value
    _check_shapes(key, value)
    return np.array(value)


def _check_shapes(key: str, values: Sequence[Any]) -> None:
    shapes = [tuple(v.shape) if hasattr(v, "shape") else np.shape(v) for v in values]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{key} cannot be one tensor: entry {i} has shape {shape}, entry 0 has {shapes[0]}. "
                "Crop or resize to one size, or leave return_tensors unset."
            )


def _import_library(module: str, tensor_type: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"return_tensors={tensor_type!r} needs {TENSOR_TYPES[tensor_type]}, "
            f"which cannot be imported here: {error}"
        ) from error
