"""Models in the form that programs should be made of: ``torch.export``, AOTInductor packages, ONNX files.

In an exported program the ops are whole. On the CPU it calls the C++ kernels by name: whoever runs it loads the
extension (``torch.ops.load_library`` of ``bitfast.extension.CPU.path``), and needs nothing of bitfast's Python.
ONNX has no such operators; the plain PyTorch behind them is exported where that is demanded::

    with bitfast.use_backend("reference"):
        torch.onnx.export(exportable(model), (images,), dynamo=True)

On the CPU a package of AOTInductor is fastest in channels_last: of ``exportable(model)`` brought into it by
``.to(memory_format=torch.channels_last)``, given such images.

On a GPU the norms are Triton kernels, which Python launches: a program of any sizes that is to run without
bitfast is exported with the reference demanded, too.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.weight_standardization import weight_standardization

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def exportable(model: Module) -> Module:
    """Return a copy of a model in the form that programs should be made of, for inference.

    Its convolutions hold their weights standardized, which a program would otherwise do in every run. It
    returns tuples of tensors: a process without bitfast has no classes for bitfast's outputs, and cannot
    load a program that returns them.

    Args:
        model: One of bitfast's, or one with bitfast's layers inside (see :func:`bitfast.accelerate`).

    Returns:
        Of the same class, in evaluation; with the numbers that ``model`` has in evaluation, up to rounding.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        if type(module) is WeightStandardizedConv2d:
            weight = module.weight
            weight.copy_(weight_standardization(weight, module.eps, weight.dtype))
            module.__class__ = StandardizedConv2d
    config: Any = getattr(twin, "config", None)
    if config is not None:
        config.return_dict = False
    return twin


class StandardizedConv2d(WeightStandardizedConv2d):
    """A convolution whose filters were standardized for good, and which uses them as they are."""

    standardizes = False

    def filters(self) -> Tensor:
        """Return what the input is convolved with: the weight."""
        return self.weight

    def keeps_weight(self) -> bool:
        """Whether other forms of it may be kept: no, the kernels would standardize it again."""
        return False


__all__ = ["StandardizedConv2d", "exportable"]
