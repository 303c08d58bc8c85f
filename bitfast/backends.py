"""Which implementation of each op is used: the registry, the default choice and the explicit override.

A *backend* is one way to compute an op: ``"native"`` (the C++/CUDA extension), ``"triton"`` (GPU kernels)
or ``"reference"`` (plain PyTorch, always there). By default the first of these that can
take the tensor at hand is used. :func:`use_backend` demands one instead; where that one cannot be used, an
error says why, and no other is tried. Some kernels are used on demand only, among them those that no card has
proved yet; :func:`enable_kernel` lets one be used like any other.
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
    """Whether the kernel, made for tests, not the fastest here or not proved yet, is used only if
    :func:`use_backend` demands it, or :func:`enable_kernel` has enabled it."""

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
    on_demand: str = ""
    """"on demand", or "enabled" by :func:`enable_kernel`; "" for a kernel that needs neither."""


KernelKey = tuple[str, str, str]
"""Op, backend and device type."""

_kernels: dict[KernelKey, Kernel] = {}

_enabled: frozenset[KernelKey] = frozenset()
"""The kernels on demand that :func:`enable_kernel` has enabled. Replaced, never changed."""

_enabling = threading.Lock()


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
    the op first meets such a tensor, so that nothing is loaded before. An ``on_demand`` kernel is not the
    default unless it is enabled; that may depend on the machine. ``unsuitable`` is called with a dtype.
    ``memory_format`` is the only one that the kernel takes.
    """
    _kernels[op, backend, device_type] = Kernel(
        dtypes, unavailable, on_demand, unsuitable, memory_format
    )


def select_backend(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format | None = None,
    enabled: frozenset[KernelKey] | None = None,
) -> str:
    """Return the backend that computes ``op`` for a tensor of this device type, dtype and memory format.

    Without a memory format: for a tensor in the format that the backend likes best. ``enabled``: the kernels on
    demand that are used like others, as :func:`enabled_kernels` returned them; None: those that are now.

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
        if not _is_on_demand(op, backend, device_type, enabled) and (
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


def _is_on_demand(
    op: str, backend: str, device_type: str, enabled: frozenset[KernelKey] | None = None
) -> bool:
    """Whether a kernel is used only if it is demanded: it is made for that, and not enabled."""
    kernel = _kernels.get((op, backend, device_type))
    if kernel is None or (op, backend, device_type) in (_enabled if enabled is None else enabled):
        return False
    return kernel.on_demand() if callable(kernel.on_demand) else kernel.on_demand


# ---- kernels on demand ----------------------------------------------------------------------------


def enable_kernel(op: str, backend: str, device_type: str) -> None:
    """Let a kernel that is used on demand only be used by default where it can, in all threads of this process.

    Networks are planned anew for it. One that runs as a CUDA graph has to be captured again.

    Args:
        op: One of :data:`OPS`.
        backend: "native" or "triton".
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: an unknown op or backend, or there is no such kernel on demand.
    """
    global _enabled
    key = _kernel_on_demand(op, backend, device_type)
    with _enabling:
        _enabled |= {key}


def disable_kernel(op: str, backend: str, device_type: str) -> None:
    """Undo :func:`enable_kernel`: let the kernel be used on demand only. Takes the same arguments.

    Raises:
        ValueError: an unknown op or backend, or there is no such kernel on demand.
    """
    global _enabled
    key = _kernel_on_demand(op, backend, device_type)
    with _enabling:
        _enabled -= {key}


def enabled_kernels() -> frozenset[KernelKey]:
    """Return the kernels that :func:`enable_kernel` has enabled: op, backend and device type of each."""
    return _enabled


def _kernel_on_demand(op: str, backend: str, device_type: str) -> KernelKey:
    import bitfast.ops  # noqa: F401  (registers the kernels)

    _check_names(op, backend)
    on_demand = [key for key, kernel in _kernels.items() if kernel.on_demand is not False]
    key = op, backend, device_type
    if key not in on_demand:
        known = ", ".join(f"{op}/{backend}/{device}" for op, backend, device in sorted(on_demand))
        raise ValueError(
            f"there is no {backend} kernel of {op} for {device_type} tensors that is used on demand only; such"
            f" are {known}"
        )
    return key


# ---- demands --------------------------------------------------------------------------------------


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
        _check_names(op, name)
    previous = _requested.by_op
    _requested.by_op = {**previous, **demanded}
    try:
        yield
    finally:
        _requested.by_op = previous


def _check_names(op: str, backend: str) -> None:
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; choose from {', '.join(OPS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")


# ---- the table ------------------------------------------------------------------------------------


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
                state = _state(op, backend, device)
                default = available and not chosen and state != ON_DEMAND
                rows.append(Row(op, device, backend, available, default, reason or "", state))
                chosen = chosen or default
    return rows


ON_DEMAND, ENABLED = "on demand", "enabled"


def _state(op: str, backend: str, device_type: str) -> str:
    if (op, backend, device_type) in _enabled:
        return ENABLED
    return ON_DEMAND if _is_on_demand(op, backend, device_type) else ""
