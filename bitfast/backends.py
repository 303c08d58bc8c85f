"""Which implementation of each op is used: the registry, the default choice and the explicit override.

A *backend* is one way to compute an op: ``"native"`` (the C++/CUDA extension), ``"triton"`` (GPU kernels)
or ``"reference"`` (plain PyTorch, always there). By default the first of these that can
take the tensor at hand is used. :func:`use_backend` demands one instead; where that one cannot be used, an
error says why, and no other is tried.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bitfast.torch_state import must_use_plain_pytorch

BACKENDS = ("native", "triton", "reference")
"""Every backend name, in order of preference."""

CONVOLUTIONS = ("packed_convolution", "norm_convolution", "stem")
"""Ops that do the work of several others, in inference. A general demand for "native" or "triton" does not
concern them; a demand for the reference of an op whose work they do keeps them from being used."""

OPS = (
    "weight_standardization",
    "group_norm_act",
    "same_padding",
    *CONVOLUTIONS,
    "resize_normalize",
)
"""Every op name."""


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run the op; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """What one backend offers for one op on one device type."""

    dtypes: frozenset[torch.dtype]
    unavailable: Callable[[], str | None]
    """Returns why the kernel cannot run on this machine; None if it can."""

    on_demand: bool | Callable[[], bool]
    """Whether the kernel, made for tests or not the fastest here, is used only if :func:`use_backend` demands
    it."""

    unsuitable: Callable[[torch.dtype], str | None] | None
    """Returns why this machine should not run a dtype, or None; itself None if it should run all of them."""

    memory_format: torch.memory_format | None
    """The only memory format that it takes, or None if it takes all."""


@dataclass(frozen=True)
class Row:
    """One line of the backend table that ``bitfast env`` prints."""

    op: str
    device: str
    backend: str
    available: bool
    default: bool
    reason: str


_kernels: dict[tuple[str, str, str], Kernel] = {}


class _Requested(threading.local):
    """The backends that are demanded in this thread, by op.

    A thread-local rather than a ContextVar, which torch.compile can neither trace nor guard.
    """

    def __init__(self) -> None:
        self.by_op: dict[str, str] = {}


_requested = _Requested()


def register_kernel(
    op: str,
    backend: str,
    device_type: str,
    dtypes: frozenset[torch.dtype],
    unavailable: Callable[[], str | None],
    on_demand: bool | Callable[[], bool] = False,
    unsuitable: Callable[[torch.dtype], str | None] | None = None,
    memory_format: torch.memory_format | None = None,
) -> None:
    """Register that ``backend`` implements ``op`` for ``dtypes`` on ``device_type`` ("cpu", "cuda").

    ``bitfast/ops/<op>.py`` calls this once per kernel when it is imported. ``unavailable`` is called only when
    the op first meets such a tensor, so that nothing is loaded before. An ``on_demand`` kernel is never the
    default; that may depend on the machine. ``unsuitable`` is called with a dtype. ``memory_format`` is the
    only one that the kernel takes.
    """
    _kernels[op, backend, device_type] = Kernel(
        dtypes, unavailable, on_demand, unsuitable, memory_format
    )


def select_backend(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format | None = None,
) -> str:
    """Return the backend that computes ``op`` for a tensor of this device type, dtype and memory format.

    Without a memory format: for a tensor in the format that the backend likes best.

    Under function transforms, forward-mode differentiation and ``torch.jit.trace``, which cannot see into
    kernels, that is the reference, also where another backend is demanded.

    Raises:
        BackendUnavailableError: the backend that :func:`use_backend` demands cannot.
    """
    requested = requested_backend(op)
    if requested is not None:
        reason = why_unavailable(op, requested, device_type, dtype, memory_format)
        if reason is not None:
            raise BackendUnavailableError(f"backend {requested!r} cannot run {op}: {reason}")
    if must_use_plain_pytorch():
        return "reference"
    if requested is not None:
        return requested
    for backend in BACKENDS:
        if not _is_on_demand(op, backend, device_type) and (
            why_unavailable(op, backend, device_type, dtype, memory_format) is None
        ):
            return backend
    raise AssertionError("unreachable: the reference serves every tensor")


def requested_backends() -> dict[str, str]:
    """Return the demands of :func:`use_backend` that hold in this thread, by op; not to be changed."""
    return _requested.by_op


def requested_backend(op: str) -> str | None:
    """Return the backend that :func:`use_backend` demands for ``op`` in this thread, or None."""
    return _requested.by_op.get(op)


def why_unavailable(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> str | None:
    """Return why ``backend`` cannot compute ``op`` for such a tensor; None if it can.

    With ``dtype=None``, why it cannot for any dtype; with ``memory_format=None``, for any memory format.
    """
    if backend == "reference":
        return None
    kernel = _kernels.get((op, backend, device_type))
    if kernel is None:
        return f"no {backend} kernel of {op} exists for {device_type} tensors"
    if dtype is not None and dtype not in kernel.dtypes:
        supported = ", ".join(sorted(str(d) for d in kernel.dtypes))
        return f"it supports {supported}, not {dtype}"
    if memory_format is not None and kernel.memory_format not in (None, memory_format):
        return f"it supports {kernel.memory_format}, not {memory_format}"
    reason = kernel.unavailable()
    if reason is None and dtype is not None and kernel.unsuitable is not None:
        reason = kernel.unsuitable(dtype)
    return reason


def has_kernel(op: str, backend: str, device_type: str) -> bool:
    """Whether bitfast has a kernel that such tensors get without being asked for it, where it can run."""
    is_there = (op, backend, device_type) in _kernels
    return is_there and not _is_on_demand(op, backend, device_type)


def _is_on_demand(op: str, backend: str, device_type: str) -> bool:
    kernel = _kernels.get((op, backend, device_type))
    if kernel is None:
        return False
    return kernel.on_demand() if callable(kernel.on_demand) else kernel.on_demand


@contextmanager
def use_backend(backend: str | None = None, **backend_by_op: str) -> Iterator[None]:
    """Demand a backend for every op (``use_backend("reference")``) or for some of them
    (``use_backend(same_padding="native")``), in this thread, until the block ends. General demands concern
    :data:`CONVOLUTIONS` only if they are for the reference.

    Blocks nest; an inner one wins for the ops that it names. An op whose demanded backend cannot
    serve the tensor it is given raises :class:`BackendUnavailableError`.

    Raises:
        ValueError: an unknown backend or op name, or nothing demanded.
    """
    if backend is None and not backend_by_op:
        raise ValueError(f"use_backend needs a backend; choose from {', '.join(BACKENDS)}")
    demanded = {}
    if backend is not None:
        ops = OPS if backend == "reference" else [op for op in OPS if op not in CONVOLUTIONS]
        demanded = dict.fromkeys(ops, backend)
    demanded.update(backend_by_op)
    for op, name in demanded.items():
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    previous = _requested.by_op
    _requested.by_op = {**previous, **demanded}
    try:
        yield
    finally:
        _requested.by_op = previous


def backend_table() -> list[Row]:
    """List every backend of every op on "cpu" and "cuda", whether it can run here, and why not."""
    import bitfast.ops  # noqa: F401  (registers the kernels)

    rows = []
    for op in OPS:
        for device in ("cpu", "cuda"):
            chosen = False
            for backend in BACKENDS:
                reason = why_unavailable(op, backend, device)
                if reason is None and device == "cuda" and not torch.cuda.is_available():
                    reason = "torch sees no CUDA device"
                available = reason is None
                default = available and not chosen and not _is_on_demand(op, backend, device)
                rows.append(Row(op, device, backend, available, default, reason or ""))
                chosen = chosen or default
    return rows
