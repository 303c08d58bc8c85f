"""Accelerating the BiT inside a model of transformers or timm, in place, and undoing it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from bitfast.in_place.changes import class_before, is_changed, undo
from bitfast.layers import WeightStandardizedConv2d

KNOWN = "transformers' BitModel, or a BiT ResNetV2 of timm"


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` has done; ``print`` it for a summary.

    Attributes:
        replaced: By name, the modules that are bitfast's now: what each was and is.
        left: By name, the modules of a BiT that were left as they are: why.
        others: How many modules are no part of a BiT.
    """

    replaced: dict[str, str]
    left: dict[str, str]
    others: int

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules are bitfast's now:"]
        kinds = Counter(self.replaced.values())
        lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
        if self.left:
            lines.append(f"{len(self.left)} modules of a BiT are left as they are:")
            lines += [f"  {name or 'the model itself'}: {why}" for name, why in self.left.items()]
        if self.others:
            lines.append(f"{self.others} other modules are no part of a BiT")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Let the BiT inside a model run on bitfast's modules, in place.

    Finds, at any depth, the BiT of transformers (``BitModel``, with or without a head, ``BitBackbone``, and so
    DPT-hybrid, UperNet and whatever else has one for a backbone) and of timm (``resnetv2_*_bit``, and the
    ResNet of hybrid ViTs). Its convolutions, norms, pools, blocks and stages become bitfast's, and the network
    that holds them computes them as bitfast's own network does. Each module stays the same object: parameters,
    the keys of the state dictionary, hooks, dtype, device and mode are not touched, and optimizers, wrappers
    and references keep working. Modules that cannot be replaced without changing results are left, and the
    report says why. A second call brings the model up to date.

    Args:
        model: Any module; it is changed, and :func:`restore` changes it back. Copies and pickles of it can be
            restored as well.

    Returns:
        What was replaced, and what was left and why (not the model).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no BiT in it; nothing was changed.
    """
    _require_module("accelerate", model)
    if any(map(is_changed, model.modules())):
        restore(model)
    from bitfast.in_place.planning import (
        plan_changes,  # imported when needed, not with every import of bitfast
    )

    changes, left = plan_changes(model)
    if not any(change.becomes is WeightStandardizedConv2d for change in changes.values()):
        raise ValueError(_nothing_found(model, left))
    for module, change in changes.items():
        change.apply(module)
    names = {module: name for name, module in model.named_modules()}
    inner = {part for module in changes for part in module.modules()}
    return AccelerationReport(
        replaced={
            name: f"{_describe(class_before(module))} -> {type(module).__name__}"
            for module, name in names.items()
            if module in changes
        },
        left={name: left[module] for module, name in names.items() if module in left},
        others=sum(module not in inner and module not in left for module in names),
    )


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module has its former class again, and keeps its present parameters.

    Args:
        model: The model, a part of it, or a copy.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in it was accelerated.
    """
    _require_module("restore", model)
    changed = [module for module in model.modules() if is_changed(module)]
    if not changed:
        raise ValueError(f"restore: nothing in this {type(model).__name__} was accelerated")
    for module in changed:
        undo(module)


def _nothing_found(model: nn.Module, left: dict[nn.Module, str]) -> str:
    what = f"accelerate: this {type(model).__name__}"
    if left:
        reasons = "; ".join(dict.fromkeys(left.values()))
        return f"{what} has no weight-standardized convolution that could be replaced: {reasons}"
    if any(isinstance(module, WeightStandardizedConv2d) for module in model.modules()):
        return f"{what} is made of bitfast's modules already"
    return f"{what} contains no BiT that is known here, which is {KNOWN}"


def _require_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _describe(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}"


__all__ = ["AccelerationReport", "accelerate", "restore"]
