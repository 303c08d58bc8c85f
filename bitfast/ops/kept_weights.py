"""A store of what is computed from convolution weights for inference, kept until a weight changes.

It holds all forms of a weight: standardized, or packed for the kernel that convolves with it. A form is valid
for the same parameter object, at the same address and of the same version, unless :meth:`KeptWeights.drop` was
called because the weight changed in a way that torch does not count.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.optimizer_steps import is_in_shared_memory, watch_optimizers

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]
"""Stride, padding and dilation, each as (height, width)."""

MOST_FORMS = 64
"""Forms of one weight that are kept at most; several forms may share a tensor."""

MOST_TENSORS = 3
"""Different tensors kept of one weight at most: for a few dtypes, or image sizes that need other layouts."""


class Source(NamedTuple):
    """The state of a weight at one moment."""

    version: int
    address: int
    storage: torch.UntypedStorage
    """Held so that no other tensor can come to lie at the same address."""

    @classmethod
    def of(cls, weight: Tensor) -> Source:
        """Return the present state of a weight, which must not be an inference tensor."""
        return cls(weight._version, weight.data_ptr(), weight.untyped_storage())

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight is still in this state."""
        return self.version == weight._version and self.address == weight.data_ptr()


class _Kept(NamedTuple):
    source: Source
    by_form: dict[Hashable, Tensor]
    alive: weakref.ref[Tensor]
    """Removes the entry when the weight dies."""

    def is_of(self, weight: Tensor) -> bool:
        """Whether this entry belongs to the weight in its present state."""
        return self.alive() is weight and self.source.is_current(weight)


class KeptWeights:
    """Keeps what is computed from weights, as long as these live and do not change.

    Attributes:
        generation: A counter that is raised when anything is dropped, and by :meth:`note_change`. While it
            stays the same, whoever compares versions and addresses of weights himself need not ask here.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.RLock()

    def find(self, weight: Tensor, form: Hashable) -> Tensor | None:
        """Return the kept form of a weight; None if there is none, or the weight has changed."""
        if weight.is_inference():  # torch does not count its changes
            return None
        kept = self._kept.get(id(weight))
        if kept is None or not kept.is_of(weight):
            return None
        return kept.by_form.get(form)

    def source_of(self, weight: Tensor) -> Source | None:
        """Return the state that a weight's kept forms were made from, or None; a new object after a drop."""
        kept = self._kept.get(id(weight))
        return None if kept is None else kept.source

    def keep(
        self,
        source: Source,
        weight: Tensor,
        form: Hashable,
        made: Tensor,
        same: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> Tensor:
        """Keep a form of a weight; return it, or an equal tensor that is kept already.

        Nothing is kept if another thread has changed the weight meanwhile, or other processes may change it.

        Args:
            source: The state of the weight before ``made`` was computed.
            weight: The weight.
            form: The key of the form.
            made: The tensor to keep.
            same: Whether two tensors are equal. If given, an equal tensor of another form is shared.
        """
        if is_in_shared_memory(weight) or not source.is_current(weight):
            return made
        watch_optimizers(self)
        with self._lock:
            kept = self._kept.get(id(weight))
            if kept is None or not kept.is_of(weight):
                key, entries = id(weight), self._kept
                alive = weakref.ref(weight, lambda _: entries.pop(key, None))
                kept = entries[key] = _Kept(source, {}, alive)
            by_form = kept.by_form
            if same is not None:
                made = next((t for t in _distinct(by_form) if same(t, made)), made)
            by_form.pop(form, None)
            by_form[form] = made
            while len(by_form) > MOST_FORMS or len(_distinct(by_form)) > MOST_TENSORS:
                by_form.pop(next(iter(by_form)))
        return made

    def get(
        self,
        weight: Tensor,
        form: Hashable,
        make: Callable[[], Tensor],
        same: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> Tensor:
        """Return the kept form of a weight, or what ``make`` returns, which is then kept (see :meth:`keep`).

        Nothing is kept of inference tensors, whose changes torch does not count.
        """
        if weight.is_inference():
            return make()
        found = self.find(weight, form)
        if found is not None:
            return found
        source = Source.of(weight)
        # Not as inference tensors, which later calls outside inference mode could not use.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        return self.keep(source, weight, form, made, same)

    def note_change(self) -> None:
        """Raise the generation, because an attribute of a module was changed."""
        self.generation += 1

    def drop(self, weights: Iterable[Tensor]) -> None:
        """Drop all forms of these weights, and free their memory."""
        self.drop_if_from({id(weight) for weight in weights})

    def drop_if_from(self, weights: set[int]) -> None:
        """Drop all forms of the weights with these ids."""
        with self._lock:
            dropped = [self._kept.pop(key, None) for key in weights]
            self.generation += any(kept is not None for kept in dropped)


def _distinct(by_form: dict[Hashable, Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in by_form.values()}.values())


kept_weights = KeptWeights()
"""The store of this process."""

__all__ = ["MOST_FORMS", "Geometry", "KeptWeights", "Pair", "Source", "kept_weights"]
