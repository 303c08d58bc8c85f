"""Models in the form to export: by ``torch.export``, as AOTInductor packages or as ONNX files.

In an exported program the ops are whole operators. On the CPU it calls the C++ kernels by name: a process that
runs it loads the extension (``torch.ops.load_library`` of ``bitfast.extension.CPU.path``), and needs none of
bitfast's Python. ONNX has no such operators; plain PyTorch is exported instead where it is demanded::

    with bitfast.use_backend("reference"):
        torch.onnx.export(exportable(model), (images,), dynamo=True)

On the CPU a package of AOTInductor is fastest in channels_last: export
``exportable(model).to(memory_format=torch.channels_last)`` with channels_last images.

On a GPU the norms are Triton kernels, which are launched from Python. A program for any sizes that is to run
without bitfast must be exported with the reference demanded.
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
    """Return a copy of a model in the form to export, for inference.

    Its convolutions hold standardized weights, which the program would otherwise compute in every run. It
    returns tuples of tensors, since a process without bitfast has no classes for bitfast's outputs.

    Args:
        model: One of bitfast's, or one with bitfast's layers inside (see :func:`bitfast.accelerate`).

    Returns:
        A model of the same class, in evaluation mode. Its results are those of ``model`` in evaluation mode, up
        to rounding.
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
    """A convolution whose weight is standardized already, and used as it is."""

    standardizes = False

    def filters(self) -> Tensor:
        """Return the weight, which the input is convolved with."""
        return self.weight

    def keeps_weight(self) -> bool:
        """Whether forms of the weight may be kept: no, they would be standardized a second time."""
        return False


__all__ = ["StandardizedConv2d", "exportable"]
