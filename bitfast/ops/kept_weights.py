"""What was made of convolution weights for inference, kept until a weight changes.

One store for all forms of a weight: standardized, or packed for the kernel that convolves with it. It has one
rule of validity: the same parameter object, at the same address, of the same version, and nobody has said
(:meth:`KeptWeights.drop`) that it changed in a way that torch does not count.
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
"""Forms of one weight that are remembered: more than one may have led to the same tensor."""

MOST_TENSORS = 3
"""Different tensors that are kept of one weight: of a few dtypes, or of image sizes that want other layouts."""


class Source(NamedTuple):
    """A weight as it is at one moment."""

    version: int
    address: int
    storage: torch.UntypedStorage
    """Held so that no other tensor can come to lie at the same address."""

    @classmethod
    def of(cls, weight: Tensor) -> Source:
        """Describe a weight that was not made in inference mode."""
        return cls(weight._version, weight.data_ptr(), weight.untyped_storage())

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight is still what it was."""
        return self.version == weight._version and self.address == weight.data_ptr()


class _Kept(NamedTuple):
    source: Source
    by_form: dict[Hashable, Tensor]
    alive: weakref.ref[Tensor]
    """Takes the entry away when the weight dies."""

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this weight, as that is now."""
        return self.alive() is weight and self.source.is_current(weight)


class KeptWeights:
    """What is kept of this process's weights, as long as they live and are not changed.

    Attributes:
        generation: Changes whenever anything was dropped, or :meth:`note_change` was called. Who holds what was
            found here, and looks at the weights' versions and addresses by itself, need not look again for
            what is kept while it stays the same.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.RLock()

    def find(self, weight: Tensor, form: Hashable) -> Tensor | None:
        """Return what is kept of the weight in this form, if anything is, and the weight has not changed."""
        if weight.is_inference():  # torch does not count its changes
            return None
        kept = self._kept.get(id(weight))
        if kept is None or not kept.is_of(weight):
            return None
        return kept.by_form.get(form)

    def source_of(self, weight: Tensor) -> Source | None:
        """Return what the kept forms of a weight were made of: another object once they were dropped."""
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
        """Keep what was made of a weight, and return it, or what is kept already and is the same.

        Nothing is kept of a weight that another thread has changed meanwhile, or that other processes may
        change.

        Args:
            source: The weight as it was before.
            weight: The weight.
            form: How it was made.
            made: What was made.
            same: Whether two tensors hold the same: then other forms of the weight are looked through.
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
        """Return what ``make`` returns, which is kept; see :meth:`keep`.

        Nothing is kept of a weight that was made in inference mode: torch does not count its changes.
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
        """Let those who hold what was found here look again: a convolution was changed."""
        self.generation += 1

    def drop(self, weights: Iterable[Tensor]) -> None:
        """Forget what was made of these weights, and free its memory."""
        self.drop_if_from({id(weight) for weight in weights})

    def drop_if_from(self, weights: set[int]) -> None:
        """Forget what was made of the weights with these ids."""
        with self._lock:
            dropped = [self._kept.pop(key, None) for key in weights]
            self.generation += any(kept is not None for kept in dropped)


def _distinct(by_form: dict[Hashable, Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in by_form.values()}.values())


kept_weights = KeptWeights()
"""The store of this process."""

__all__ = ["MOST_FORMS", "Geometry", "KeptWeights", "Pair", "Source", "kept_weights"]
