"""Standardized weights, kept in the form in which a convolution wants them; for inference on the CPU."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.optimizer_steps import is_shared, watch_optimizers

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]
"""Stride, padding and dilation, each as (height, width)."""


class Form(NamedTuple):
    """How a weight is standardized and packed."""

    pack: Callable[[Tensor, Form, torch.Size | None], Tensor]
    """Does it, given the weight, the form, and the shape of the input or None."""
    dtype: torch.dtype
    eps: float
    geometry: Geometry


class _Packed(NamedTuple):
    """A packed weight, and what it was made from and for."""

    weight: weakref.ref[Tensor]
    version: int
    storage: torch.UntypedStorage
    """Held so that no other tensor can come to lie at the same address."""
    address: int
    form: Form
    shapes: tuple[torch.Size | None, ...]
    """Of inputs for which it would be packed in the same way; None where the shape does not matter."""
    packed: Tensor

    def is_of(self, weight: Tensor, form: Form) -> bool:
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.form == form
        )


MOST_SHAPES = 64
"""Input shapes that are remembered for one weight."""


class PackedWeights:
    """The packed weights of this process: one per parameter, as long as it lives and is not changed.

    How oneDNN packs a weight depends on the input's shape, and with weights packed otherwise it is many
    times slower. So at a new shape a weight is packed again, and the outcome is kept if it differs.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Packed] = {}

    def packed(self, weight: Tensor, form: Form, shape: torch.Size | None) -> Tensor:
        """Return the packed weight.

        Args:
            shape: Of the input; None if the outcome does not depend on it.
        """
        if weight.is_inference():  # torch does not count its changes
            return form.pack(weight, form, shape)
        entry = self._entries.get(id(weight))
        if entry is not None and entry.is_of(weight, form):
            if shape in entry.shapes:
                return entry.packed
        else:
            entry = None
        return self._pack(weight, form, shape, entry)

    def _pack(
        self, weight: Tensor, form: Form, shape: torch.Size | None, entry: _Packed | None
    ) -> Tensor:
        version, address = weight._version, weight.data_ptr()
        # Not as inference tensors, which later calls outside inference mode could not use.
        with torch.inference_mode(False), torch.no_grad():
            packed = form.pack(weight, form, shape)
        shapes: tuple[torch.Size | None, ...] = (shape,)
        if entry is not None and _holds_the_same(packed, entry.packed):
            packed, shapes = entry.packed, (*entry.shapes[-MOST_SHAPES + 1 :], shape)
        key = id(weight)
        forget = lambda _: self._entries.pop(key, None)  # noqa: E731
        storage = weight.untyped_storage()
        new = _Packed(weakref.ref(weight, forget), version, storage, address, form, shapes, packed)
        # One that another thread changed meanwhile, or other processes may change, is not kept.
        if new.is_of(weight, form) and not is_shared(weight):
            watch_optimizers(self)
            self._entries[key] = new
        return packed

    def drop(self, weights: list[Tensor]) -> None:
        """Forget what was made from these weights, and free its memory."""
        self.drop_if_from({id(weight) for weight in weights})

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was made from the weights with these ids."""
        for key in weights:
            self._entries.pop(key, None)


packed_weights = PackedWeights()


def _holds_the_same(a: Tensor, b: Tensor) -> bool:
    """Say whether two packed weights are the same, byte for byte; no if this torch does not let us see."""
    operators = torch.ops.mkldnn
    if not hasattr(operators, "data_ptr") or not hasattr(operators, "_nbytes"):
        return False
    sizes = [operators._nbytes(t) for t in (a, b)]
    if sizes[0] != sizes[1]:
        return False
    views = [
        torch.frombuffer(
            (ctypes.c_char * size).from_address(operators.data_ptr(t)), dtype=torch.uint8
        )
        for t, size in zip((a, b), sizes, strict=True)
    ]
    return torch.equal(*views)


__all__ = ["Form", "Geometry", "PackedWeights", "Pair", "packed_weights"]
