"""Which implementation of each op runs: the registry, the default choice and the explicit override.

A *backend* is one way to compute an op: ``"triton"`` (GPU kernels), ``"native"`` (the C++/CUDA
extension) or ``"reference"`` (plain PyTorch, always there). By default the first of these that can
serve the tensor at hand is used. :func:`use_backend` demands one instead, and a demand that cannot be
met is an error that says why; it never falls back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bitfast.torch_state import must_use_plain_pytorch

BACKENDS = ("triton", "native", "reference")
"""Every backend name, in order of preference."""

CONVOLUTIONS = ("packed_convolution", "norm_convolution")
"""The ops that stand for several of the others, in inference. A general demand for "native" or "triton" kernels
leaves these their default; one for the reference of an op that they stand for is one for theirs."""

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
    """Returns why the kernel cannot run on this machine, or None when it can."""

    on_demand: bool
    """Runs only where :func:`use_backend` asks for it: it is there for tests, not for speed."""

    unsuitable: Callable[[torch.dtype], str | None] | None
    """Returns why this machine should not run one of the dtypes, or None; itself None if that never is so."""


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
    """The backend each op was asked to use in this thread (empty: the default choice).

    A thread-local rather than a ContextVar because torch.compile can trace and guard the former only.
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
    on_demand: bool = False,
    unsuitable: Callable[[torch.dtype], str | None] | None = None,
) -> None:
    """Announce that ``backend`` implements ``op`` for ``dtypes`` on ``device_type`` ("cpu", "cuda").

    Called once per kernel by ``bitfast/ops/<op>.py`` when it is imported. ``unavailable`` is asked
    only when the op first meets such a tensor, so announcing a kernel loads nothing. An ``on_demand``
    kernel is never the default. ``unsuitable`` is asked about single dtypes.
    """
    _kernels[op, backend, device_type] = Kernel(dtypes, unavailable, on_demand, unsuitable)


def select_backend(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Return the backend that runs ``op`` for a tensor of this device type and dtype.

    Under function transforms, forward-mode differentiation and ``torch.jit.trace`` that is the reference,
    also where another is demanded: of a kernel they would see nothing.

    Raises:
        BackendUnavailableError: :func:`use_backend` demands one that cannot.
    """
    requested = requested_backend(op)
    if requested is not None:
        reason = why_unavailable(op, requested, device_type, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"backend {requested!r} cannot run {op}: {reason}")
    if must_use_plain_pytorch():
        return "reference"
    if requested is not None:
        return requested
    for backend in BACKENDS:
        if not _is_on_demand(op, backend, device_type) and (
            why_unavailable(op, backend, device_type, dtype) is None
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
    op: str, backend: str, device_type: str, dtype: torch.dtype | None = None
) -> str | None:
    """Return why ``backend`` cannot run ``op`` on such a tensor; None when it can.

    ``dtype=None`` asks about the device type alone.
    """
    if backend == "reference":
        return None
    kernel = _kernels.get((op, backend, device_type))
    if kernel is None:
        return f"no {backend} kernel of {op} exists for {device_type} tensors"
    if dtype is not None and dtype not in kernel.dtypes:
        supported = ", ".join(sorted(str(d) for d in kernel.dtypes))
        return f"it supports {supported}, not {dtype}"
    reason = kernel.unavailable()
    if reason is None and dtype is not None and kernel.unsuitable is not None:
        reason = kernel.unsuitable(dtype)
    return reason


def _is_on_demand(op: str, backend: str, device_type: str) -> bool:
    kernel = _kernels.get((op, backend, device_type))
    return kernel is not None and kernel.on_demand


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
    import bitfast.ops  # noqa: F401  (announces the kernels)

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
