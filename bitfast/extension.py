"""The C++/CUDA extension: two shared libraries, either of which may be missing.

Loading one defines operators in ``torch.ops.bitfast`` and touches no device. The CUDA half is loaded
only into a torch that has CUDA, whose symbols it needs.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch

logger = logging.getLogger("bitfast")

HOW_TO_BUILD = "install bitfast from source, with a C++ compiler"


@dataclass(frozen=True)
class SharedLibrary:
    """One half of the extension.

    Attributes:
        path: The file, or None if it was not built.
        problem: Why its operators cannot run, or None if they can.
    """

    path: str | None
    problem: str | None


def _load(module: str, how_to_build: str) -> SharedLibrary:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return SharedLibrary(None, f"{module} was not built; {how_to_build}")
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        # A file that is there and does not load is a broken installation, so it is said at once.
        problem = f"{spec.origin} cannot be loaded ({error}); {how_to_build} for this torch"
        logger.warning("bitfast runs without its extension: %s", problem)
        return SharedLibrary(spec.origin, problem)
    return SharedLibrary(spec.origin, None)


def _load_cuda() -> SharedLibrary:
    if CPU.problem is not None:
        return SharedLibrary(None, f"the CPU half is missing: {CPU.problem}")
    if torch.version.cuda is None:
        return SharedLibrary(None, "this torch was built without CUDA")
    return _load("bitfast._native_cuda", f"{HOW_TO_BUILD} and nvcc")


CPU = _load("bitfast._native", HOW_TO_BUILD)
"""The schemas, and the CPU kernels."""

CUDA = _load_cuda()
"""The CUDA kernels."""
