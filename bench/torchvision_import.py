"""Imports torchvision next to a torch without CUDA too, as transformers does when it finds torchvision.

On PyPI torchvision is a CUDA build. Its transforms are plain Python and run anywhere, but beside a CPU
build of torch its library of kernels does not load, and the import fails where it describes the results
of two operators which that library would define. Defined without an implementation, they do no harm.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

from torch.library import Library

OPERATORS = ("nms", "qnms")
"""Both take (dets, scores, iou_threshold)."""


def import_torchvision() -> ModuleType | None:
    """Return torchvision, None where it is not installed; call it before transformers is imported."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    define_operators()
    return importlib.import_module("torchvision")


@cache  # operators go with the object that defines them
def define_operators() -> Library:
    """Define what the library of kernels would, without an implementation."""
    library = Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
