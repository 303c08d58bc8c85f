"""Guards: whether a network has changed since it was read, asked once a pass, in a few dozen microseconds.

Everything that can change is compared in bulk, by functions that loop in C over all modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, contains, is_, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from bitfast.change_notifier import ChangeNotifier
from bitfast.execution.steps import Convolve, Join, Normalize, Steps
from bitfast.layers import DropPath, DynamicPad2d, GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.kept_weights import kept_weights
from bitfast.optimizer_steps import is_in_shared_memory

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_SETTINGS: tuple[tuple[type[nn.Module], Any], ...] = (
    (
        WeightStandardizedConv2d,
        attrgetter(
            "stride", "padding", "dilation", "eps", "groups", "padding_mode", "bias", "pad", "is_wrapped"
        ),
    ),
    (GroupNormActivation, attrgetter("num_groups", "eps")),
    (GroupNormActivation, methodcaller("has_scale_and_shift")),
    (ChangeNotifier, lambda module: id(module._parameters)),
    (DynamicPad2d, attrgetter("kernel_size", "stride", "dilation", "value")),
    (nn.MaxPool2d, attrgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    (nn.ConstantPad2d, attrgetter("padding", "value")),
    (nn.GELU, attrgetter("approximate")),
    (DropPath, attrgetter("training", "drop_prob")),
)  # fmt: skip
"""What determines a module's computation, by its class: functions of the module whose results are compared."""

_children = attrgetter("_modules")
_held = itemgetter(*HOOKS, "_modules")
_weight, _bias = itemgetter("weight"), itemgetter("bias")


class StructureGuard:
    """Guards the modules of a network: their identity, their hooks, their children and their settings.

    bitfast's own modules notify of attributes that are set (:class:`ChangeNotifier`); others are compared in
    each pass.

    Args:
        modules: Those that were read as steps, and those that could not be.
        outer: Those that contain them.
    """

    def __init__(self, modules: Iterable[nn.Module], outer: Iterable[nn.Module]) -> None:
        unique = list(dict.fromkeys([*modules, *outer]))
        hooks = [vars(module)[name] for module in unique for name in HOOKS]
        self._free = tuple(hook for hook in hooks if not hook)
        self._hooked = tuple(hook for hook in hooks if hook)
        self._children = [vars(module)["_modules"] for module in unique if module._modules]
        self._children_then = [dict(children) for children in self._children]
        # In these the order of children matters, which a comparison of dictionaries does not see.
        self._sequences = [module for module in unique if isinstance(module, SEQUENCES)]
        self._orders_then = self._orders_now()
        self._others = _States(
            [module for module in unique if not isinstance(module, ChangeNotifier)]
        )
        self._notifiers = _States(
            [module for module in unique if isinstance(module, ChangeNotifier)]
        )
        self._generation = kept_weights.generation

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return (
            not any(self._free)
            and all(self._hooked)
            and self._children == self._children_then
            and self._orders_now() == self._orders_then
            and self._others.holds()
            and self._notifiers_hold()
        )

    def _orders_now(self) -> list[list[str]]:
        return list(map(list, map(_children, self._sequences)))

    def _notifiers_hold(self) -> bool:
        generation = kept_weights.generation
        if generation != self._generation:
            if not self._notifiers.holds():
                return False
            self._generation = generation
        return True


class _States:
    """The classes, hooks, children and settings of some modules, as they were at first."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules, self._dicts = tuple(modules), tuple(map(vars, modules))
        self._types = list(map(type, modules))
        self._held = list(map(_held, self._dicts))
        self._forwards = list(map(contains, self._dicts, repeat("forward")))
        self._compiled = list(map(dict.get, self._dicts, repeat("_compiled_call_impl")))
        self._settings = [
            (getter, own)
            for cls, getter in _SETTINGS
            if (own := [module for module in modules if isinstance(module, cls)])
        ]
        self._settings_then = [list(map(getter, own)) for getter, own in self._settings]

    def holds(self) -> bool:
        """Whether all of it is still the same."""
        return (
            list(map(type, self._modules)) == self._types
            # A dictionary that was replaced by an equal one makes no difference.
            and list(map(_held, self._dicts)) == self._held
            and list(map(contains, self._dicts, repeat("forward"))) == self._forwards
            and list(map(dict.get, self._dicts, repeat("_compiled_call_impl"))) == self._compiled
            and [list(map(getter, own)) for getter, own in self._settings] == self._settings_then
        )


class ParameterGuard:
    """Guards the parameters that a plan was made for: the same objects, unchanged.

    The values of norms' parameters may change, since they are read in each pass; the objects may not.

    Args:
        steps: Of the network.
        with_norms: Whether the parameters of norms must stay at their addresses as well.
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
                type(w) is nn.Parameter and not w.is_inference() and not is_in_shared_memory(w)
                for w in self._weights
            )
            and all(isinstance(t, Tensor) for t in (*self._scales, *self._shifts))
            and _are_together([*self._weights, *self._scales, *self._shifts])
        )
        """Whether all are plain parameters on one device, and torch counts the changes of the weights."""
        if self.may_be_kept:
            self._versions = self._versions_now()
            self._addresses = self._addresses_now()
        self._generation = kept_weights.generation
        self._sources: list[Any] | None = None

    def note_what_is_kept(self) -> None:
        """Note which forms of the weights are kept, once the plan has made all that it needs."""
        # Otherwise something was dropped meanwhile, maybe of these weights.
        if kept_weights.generation == self._generation:
            self._sources = list(map(kept_weights.source_of, self._weights))

    def holds(self) -> bool:
        """Whether they are the same objects, unchanged."""
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
            and self._are_kept()
        )

    def _are_kept(self) -> bool:
        """Whether no kept form of the weights has been dropped since."""
        generation = kept_weights.generation
        if generation != self._generation:
            if self._sources is None or None in self._sources:
                return False
            if not all(map(is_, map(kept_weights.source_of, self._weights), self._sources)):
                return False
            self._generation = generation
        return True

    def _versions_now(self) -> list[int]:
        return list(map(attrgetter("_version"), self._weights))

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._placed))


def _are_together(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.device for tensor in tensors}) == 1 and not tensors[0].is_meta


def outer_modules(network: nn.Module, parts: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the network and the modules inside it, but not these parts nor what is inside them."""
    inner = set(parts)
    found: list[nn.Module] = []
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if module not in inner:
            found.append(module)
            waiting += [child for child in module._modules.values() if child is not None]
    return found


__all__ = ["ParameterGuard", "StructureGuard", "outer_modules"]
