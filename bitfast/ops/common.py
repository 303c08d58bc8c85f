"""What every op file needs: the library that holds the schemas, argument checks, the autocast rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from bitfast.backends import register_kernel
from bitfast.torch_state import constant_when_compiled

LIBRARY = torch.library.Library("bitfast", "FRAGMENT")
"""Owns every schema that Python defines. An operator is called ``bitfast::<name>.<backend>``: one
overload per backend, all of one signature."""


def define_operator(
    name: str,
    backend: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    tags: tuple[torch.Tag, ...] = (),
) -> torch._ops.OpOverload:
    """Define ``bitfast::<name>.<backend>`` with its implementation, its fake and its tags; return it."""
    LIBRARY.define(f"{name}.{backend}{signature}", tags=tags)
    LIBRARY.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitfast::{name}.{backend}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops.bitfast, name), backend)


def complete_operator(name: str, backend: str, signature: str, fake: Callable[..., Any]) -> None:
    """Give ``bitfast::<name>.<backend>``, which the extension defines and implements, its fake.

    Raises:
        RuntimeError: the extension was built for another signature.
    """
    operator = getattr(getattr(torch.ops.bitfast, name), backend)
    expected = torch._C.parse_schema(f"bitfast::{name}.{backend}{signature}")
    if operator._schema != expected:
        raise RuntimeError(
            f"the extension defines {operator._schema}, this bitfast expects {expected}; install again"
        )
    torch.library.register_fake(f"bitfast::{name}.{backend}", fake, lib=LIBRARY)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks of results on x's device; None where autocast is off.

    float64 tensors are left alone, as torch's own autocast leaves them.
    """
    if x.dtype == torch.float64 or not is_autocast_on(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a type of device; for the meta device, which torch cannot tell, it is not."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {x.dtype}")


def check_nchw(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a floating-point tensor of shape (N, C, H, W)."""
    check_floating(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (N, C, H, W), got {tuple(x.shape)}")


def check_pair(op: str, name: str, value: int | Sequence[int], minimum: int = 1) -> tuple[int, int]:
    """Return value as (height, width), both at least ``minimum``."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < minimum for v in pair):
        raise ValueError(
            f"{op}: {name} must be an integer >= {minimum} or two of them (height, width), got {value!r}"
        )
    return pair


NATIVE_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
"""The dtypes that the C++ kernels of norms and weights take; others are left to the reference."""

# ---- Triton ---------------------------------------------------------------------------------------

TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""The dtypes that the Triton kernels take; others are left to the reference."""

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)
"""Compute capability of the oldest GPU that the Triton kernels are compiled for in the tests."""


def register_triton_kernels(op: str) -> None:
    """Register the Triton kernels of ``op``: for GPUs, and on demand for the interpreter on the CPU."""
    register_kernel(op, "triton", "cuda", TRITON_DTYPES, why_no_triton)
    register_kernel(op, "triton", "cpu", TRITON_DTYPES, why_no_interpreter, on_demand=True)


@constant_when_compiled
def why_no_triton() -> str | None:
    """Return why Triton kernels cannot run on this machine's GPU; None when they can."""
    return _why_no_triton()


@lru_cache
def _why_no_triton() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels were never tried on AMD GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _is_interpreting():
        return "TRITON_INTERPRET is set, so that kernels are interpreted, not compiled"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        return f"the GPU's compute capability is {'.'.join(map(str, capability))}, 8.0 is needed"
    return None


@constant_when_compiled
def why_no_interpreter() -> str | None:
    """Return why Triton kernels cannot run on CPU tensors; None if Triton interprets them."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _is_interpreting():
        return (
            "Triton kernels run on GPUs; TRITON_INTERPRET=1 interprets them on the CPU, for tests"
        )
    return None


def _is_interpreting() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return triton.knobs.runtime.interpret


def launch_kernels(launches: Sequence[Any], x: Tensor) -> None:
    """Launch kernels of ``bitfast.kernels`` one after the other, on the device of x.

    While a compiler traces (see :func:`show_launches`), the launches are recorded instead.
    """
    if isinstance(x, FunctionalTensor):
        for launch in launches:
            launch.launch(torch.library.wrap_triton(launch.kernel))
        return
    with torch.cuda.device_of(x):
        for launch in launches:
            launch.launch()


def show_launches(name: str, implementation: Callable[..., Any]) -> None:
    """Let compilers see the launches that ``bitfast::<name>.triton`` consists of.

    Inductor then launches the kernels itself, without the cost of an operator call, and plans their memory.
    The launches depend on the sizes. Where those are symbolic, and in ``torch.export``, which keeps operators
    whole, the operator is not taken apart.
    """

    def decompose(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        has_symbols = any(isinstance(n, torch.SymInt) for t in tensors for n in t.shape)
        if has_symbols or torch.compiler.is_exporting() or _is_interpreting():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return implementation(*args, **kwargs)

    torch.library.register_torch_dispatch(
        f"bitfast::{name}.triton", FunctionalTensorMode, decompose, lib=LIBRARY
    )
