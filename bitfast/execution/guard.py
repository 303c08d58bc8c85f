"""Whether a network is still what it was when it was read: asked once a pass, in a few dozen microseconds.

Everything that can change is looked at in bulk, by functions that loop in C over all modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from bitfast.execution.steps import Convolve, Join, Normalize, Steps
from bitfast.layers import DropPath, DynamicPad2d, GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.kept_weights import kept_weights
from bitfast.optimizer_steps import is_shared

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_ANNOUNCED = (
    attrgetter("stride", "padding", "dilation", "eps", "groups", "padding_mode", "bias", "pad", "is_lent"),
    attrgetter("num_groups", "eps"),
    methodcaller("has_scale_and_shift"),
)  # fmt: skip
"""What decides about the work of a convolution, and of a norm: these announce changes by themselves."""

_SETTINGS: tuple[tuple[type[nn.Module], Any], ...] = (
    (DynamicPad2d, itemgetter("kernel_size", "stride", "dilation", "value")),
    (nn.MaxPool2d, itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    (nn.ConstantPad2d, itemgetter("padding", "value")),
    (nn.GELU, itemgetter("approximate")),
    (DropPath, itemgetter("training", "drop_prob")),
)  # fmt: skip
"""What decides about the work of other modules, by their class."""

_weight, _bias = itemgetter("weight"), itemgetter("bias")


class Structure:
    """The modules of a network: which they are, that nobody has to do with them, how they are set.

    Args:
        modules: Those that were read, and those that were found to be unusual.
        outer: Those that hold them.
    """

    def __init__(self, modules: Iterable[nn.Module], outer: Iterable[nn.Module]) -> None:
        unique = list(dict.fromkeys([*modules, *outer]))
        dicts = [vars(module) for module in unique]
        hooks = [own[name] for own in dicts for name in HOOKS]
        self._free = tuple(hook for hook in hooks if not hook)
        self._hooked = tuple(hook for hook in hooks if hook)
        self._modules, self._dicts = tuple(unique), tuple(dicts)
        self._types, self._sizes = tuple(map(type, unique)), tuple(map(len, dicts))
        self._children = [own["_modules"] for own in dicts if own["_modules"]]
        self._children_then = [dict(children) for children in self._children]
        self._settings = [
            (getter, tuple(own))
            for cls, getter in _SETTINGS
            if (own := [vars(module) for module in unique if isinstance(module, cls)])
        ]
        self._settings_then = [tuple(map(getter, own)) for getter, own in self._settings]
        self._convolutions = [m for m in unique if isinstance(m, WeightStandardizedConv2d)]
        self._norms = [m for m in unique if isinstance(m, GroupNormActivation)]
        self._generation = kept_weights.generation
        self._announced = self._announced_now()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return (
            not any(self._free)
            and all(self._hooked)
            and tuple(map(type, self._modules)) == self._types
            and tuple(map(len, self._dicts)) == self._sizes
            and self._children == self._children_then
            and [tuple(map(getter, own)) for getter, own in self._settings] == self._settings_then
            and self._announced_holds()
        )

    def _announced_holds(self) -> bool:
        generation = kept_weights.generation
        if generation != self._generation:
            if self._announced_now() != self._announced:
                return False
            self._generation = generation
        return True

    def _announced_now(self) -> list[Any]:
        of_convolutions, of_norms, scaled = _ANNOUNCED
        modules = (
            (self._convolutions, of_convolutions),
            (self._norms, of_norms),
            (self._norms, scaled),
        )
        return [list(map(getter, own)) for own, getter in modules]


class Parameters:
    """The parameters that a plan has prepared itself for: the same objects, not changed.

    The parameters of norms may change, as they are read in each pass; only others must not take their place.

    Args:
        steps: Of the network.
        with_norms: They must stay at their addresses as well.
    """

    def __init__(self, steps: Steps, with_norms: bool = False) -> None:
        convolutions = [step.convolution for step in steps.all() if isinstance(step, Convolve)]
        norms = [
            step.norm
            for step in steps.all()
            if isinstance(step, (Convolve, Normalize, Join)) and step.norm is not None
        ]
        self._of_convolutions = [c._parameters for c in convolutions]
        self._of_norms = [n._parameters for n in dict.fromkeys(norms)]
        self._weights: list[Any] = [own.get("weight") for own in self._of_convolutions]
        self._scales: list[Any] = [own.get("weight") for own in self._of_norms]
        self._shifts: list[Any] = [own.get("bias") for own in self._of_norms]
        self._placed = [*self._weights, *((*self._scales, *self._shifts) if with_norms else ())]
        self.may_be_kept = (
            all(
                type(w) is nn.Parameter and not w.is_inference() and not is_shared(w)
                for w in self._weights
            )
            and all(isinstance(t, Tensor) for t in (*self._scales, *self._shifts))
            and _are_together([*self._weights, *self._scales, *self._shifts])
        )
        """Whether all are plain, on one device, and changes of the weights are counted."""
        if self.may_be_kept:
            self._versions = self._versions_now()
            self._addresses = self._addresses_now()
        self._generation = kept_weights.generation

    def hold(self) -> bool:
        """Whether they are what they were."""
        try:
            return self._are_there() and self._are_unchanged()
        except KeyError:  # somebody has taken one away
            return False

    def _are_there(self) -> bool:
        return (
            all(map(is_, map(_weight, self._of_convolutions), self._weights))
            and all(map(is_, map(_weight, self._of_norms), self._scales))
            and all(map(is_, map(_bias, self._of_norms), self._shifts))
        )

    def _are_unchanged(self) -> bool:
        return (
            self._versions_now() == self._versions
            and self._addresses_now() == self._addresses
            and kept_weights.generation == self._generation
        )

    def _versions_now(self) -> list[int]:
        return list(map(attrgetter("_version"), self._weights))

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._placed))


def _are_together(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.device for tensor in tensors}) == 1 and not tensors[0].is_meta


def outer_modules(network: nn.Module, parts: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the network and what is in it, without its parts and what is in those."""
    inner = set(parts)
    found: list[nn.Module] = []
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if module not in inner:
            found.append(module)
            waiting += [child for child in module._modules.values() if child is not None]
    return found


__all__ = ["Parameters", "Structure", "outer_modules"]
