"""Kernel launches as data, which can be launched, compiled ahead of time, counted and examined."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """What launch shapes depend on: the number of multiprocessors and the bytes of the L2 cache."""

    multiprocessors: int
    l2_bytes: int


H100 = Device(multiprocessors=132, l2_bytes=50 * 2**20)
"""The device that launches are made for without a GPU: in the interpreter, and for ahead-of-time builds."""


def device_of(device: torch.device) -> Device:
    """Return the limits of the GPU that a tensor lies on."""
    return _cuda_device(device.index) if device.type == "cuda" else H100


@lru_cache
def _cuda_device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: The Triton function.
        programs: How many instances of it run.
        arguments: Tensors and numbers, in the order of the kernel's parameters.
        constants: What the kernel is compiled for.
        warps: Of 32 threads each, per program.
        reads: Bytes that must come from device memory.
        writes: Bytes that must go there.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    reads: int
    writes: int

    def launch(self, kernel: Any = None) -> None:
        """Launch on the current stream of the current device; ``kernel`` may replace the launch's own."""
        kernel = self.kernel if kernel is None else kernel
        kernel[(self.programs,)](**self.arguments, **self.constants, num_warps=self.warps)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def aligned_count(floats: int) -> int:
    """Round a number of float32 numbers up to a multiple of 16 bytes, so that what follows them is aligned."""
    return ceil_div(floats, 4) * 4


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- prepared launches ----------------------------------------------------------------------------


class PreparedLaunch:
    """A launch with fixed numbers and constants whose kernel is compiled and loaded; see :func:`prepare`.

    Attributes:
        aligned: Whether the compiled code relies on a tensor's address being a multiple of 16, for each tensor.
        why_not_direct: Why calls do not use Triton's compiled launcher directly, which costs the least; None if
            they do.
    """

    aligned: tuple[bool, ...]
    why_not_direct: str | None = None

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launch with other tensors of the same dtypes, shapes and alignment.

        The device that it was prepared for must be the current one. Only the number of addresses is checked.
        Threads may share a prepared launch, and it may be called while a CUDA graph is recorded.

        Args:
            stream: The handle of the device's current stream (``torch.cuda.Stream.cuda_stream``).
            addresses: The ``data_ptr()`` of each tensor, in the order of the launch; 0 for one that the kernel
                never touches.

        Raises:
            TypeError: too few addresses or too many.
        """
        raise NotImplementedError

    def takes(self, *addresses: int) -> bool:
        """Whether tensors at these addresses are aligned as the compiled code needs."""
        return all(
            not is_needed or address % 16 == 0
            for is_needed, address in zip(self.aligned, addresses, strict=True)
        )


def prepare(launch: Launch) -> PreparedLaunch:
    """Compile and load the kernel of a launch, without running it, so that launching costs little from then on.

    The current device must be that of the launch. Its tensors may be meta tensors: only dtype and alignment
    count, and a meta tensor is aligned. Nothing is allocated on the device besides the code. While a CUDA
    graph is recorded this works for a kernel that is loaded already, as an ordinary launch does. (Whether CUDA
    loads another one then depends on its driver.)

    In Triton's interpreter the prepared launch interprets the kernel on the memory at the addresses.

    Raises:
        ValueError: a parameter of the kernel is missing, or its tensors do not come first.
    """
    named = {**launch.arguments, **launch.constants}
    names = list(launch.kernel.arg_names)
    tensors = [name for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)]
    if names[: len(tensors)] != tensors or set(names) != set(named):
        raise ValueError(
            f"not tensors, then numbers, as {launch.kernel} has its parameters: {list(named)}"
        )
    rest = [named[name] for name in names[len(tensors) :]]
    prepared: PreparedLaunch
    try:
        prepared = _direct(launch, [named[name] for name in tensors], rest)
    except _NotDirectError as reason:
        prepared = _PublicLaunch(launch, tensors)
        prepared.why_not_direct = str(reason)
    prepared.aligned = tuple(named[name].data_ptr() % 16 == 0 for name in tensors)
    return prepared


class _NotDirectError(Exception):
    """A direct launch is not possible with this Triton or kernel; the message says why."""


def _direct(launch: Launch, tensors: list[Any], rest: list[Any]) -> PreparedLaunch:
    """Return a launch that calls the C function behind Triton's launcher of the compiled kernel.

    What the launcher passes to that function, and in what order, differs between versions of Triton. So a copy
    of the launcher, with a function that records its arguments in the place of the C function, is called once.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise _NotDirectError("Triton interprets the kernel")
    if launch.kernel.pre_run_hooks:
        raise _NotDirectError("the kernel has hooks that run before it")
    grid = (launch.programs, 1, 1)
    named = {**launch.arguments, **launch.constants}
    compiled = launch.kernel.warmup(**named, grid=grid, num_warps=launch.warps)
    if hasattr(compiled, "result"):  # it is being compiled elsewhere
        compiled = compiled.result()
    if not hasattr(compiled, "run"):
        raise _NotDirectError("a hook of Triton's has kept the kernel from being compiled")
    launcher = compiled.run  # loads the kernel
    scratch = ("global_scratch_size", "profile_scratch_size")
    if any(getattr(compiled.metadata, name, 0) for name in scratch):
        raise _NotDirectError("the kernel needs memory of its own at each launch")
    if not callable(getattr(launcher, "launch", None)):
        raise _NotDirectError(f"{type(launcher).__name__} has no function that launches")
    stream, places = object(), [object() for _ in tensors]
    recorded: list[tuple[Any, ...]] = []
    recorder = copy(launcher)
    recorder.launch = lambda *arguments: recorded.append(arguments)
    try:
        metadata = (compiled.function, compiled.packed_metadata, None, None, None)
        recorder(*grid, stream, *metadata, *places, *rest)
        (recorded_once,) = recorded
    except Exception as error:
        raise _NotDirectError(
            f"{type(launcher).__name__} does not launch as expected: {error!r}"
        ) from error
    return _direct_launch(
        recorded_once,
        stream,
        [*places, *rest],
        len(places),
        launcher.launch,
        compiled,
        grid,
        knobs.runtime,
    )


def _direct_launch(
    recorded: tuple[Any, ...],
    stream: object,
    arguments: list[Any],
    count: int,
    function: Callable[..., Any],
    compiled: Any,
    grid: tuple[int, int, int],
    runtime: Any,
) -> PreparedLaunch:
    """Return a launch that passes the recorded arguments, with its own stream and first ``count`` tensors."""
    at = [place for place, value in enumerate(recorded) if value is stream]
    kind: type[_DirectLaunch]
    if recorded and _are_same(recorded[-1], arguments):
        kind, end = _DirectLaunchOfTuple, len(recorded) - 1
    elif _are_same(recorded[len(recorded) - len(arguments) :], arguments):
        kind, end = _DirectLaunch, len(recorded) - len(arguments)
    else:
        raise _NotDirectError("Triton's launcher passes the arguments in an unknown way")
    if len(at) != 1 or at[0] >= end:
        raise _NotDirectError("Triton's launcher passes the stream in an unknown way")
    before, between = recorded[: at[0]], recorded[at[0] + 1 : end]
    return kind(function, before, between, tuple(arguments[count:]), count, compiled, grid, runtime)


def _are_same(values: Any, expected: list[Any]) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == len(expected)
        and all(value is other for value, other in zip(values, expected, strict=True))
    )


class _DirectLaunch(PreparedLaunch):
    """Calls the launcher's function, which takes the kernel's arguments one by one."""

    def __init__(
        self,
        function: Callable[..., Any],
        before: tuple[Any, ...],
        between: tuple[Any, ...],
        rest: tuple[Any, ...],
        count: int,
        compiled: Any,
        grid: tuple[int, int, int],
        runtime: Any,
    ) -> None:
        self._function, self._before, self._between, self._rest = function, before, between, rest
        self._count, self._compiled, self._grid, self._runtime = count, compiled, grid, runtime

    def __call__(self, stream: int, *addresses: int) -> None:
        enter, leave = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        if len(addresses) != self._count or (
            # Usually the chains of hooks are empty. (This is checked without calling Python functions.)
            (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        ):
            return self._launch_with_hooks(stream, addresses)
        self._function(*self._before, stream, *self._between, *addresses, *self._rest)

    def _launch_with_hooks(self, stream: int, addresses: tuple[int, ...]) -> None:
        """Launch by Triton's public call, which calls the hooks that a profiler has set."""
        if len(addresses) != self._count:
            raise TypeError(
                f"the kernel takes {self._count} tensors, got {len(addresses)} addresses"
            )
        self._compiled[self._grid](*addresses, *self._rest, stream=stream)


class _DirectLaunchOfTuple(_DirectLaunch):
    """Calls the launcher's function, which takes the kernel's arguments as one tuple."""

    def __call__(self, stream: int, *addresses: int) -> None:
        enter, leave = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        if len(addresses) != self._count or (
            (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        ):
            return self._launch_with_hooks(stream, addresses)
        self._function(*self._before, stream, *self._between, (*addresses, *self._rest))


class _PublicLaunch(PreparedLaunch):
    """Launches by Triton's public call, on the current stream: in the interpreter and unknown versions."""

    def __init__(self, launch: Launch, tensors: list[str]) -> None:
        self._dtypes = {name: launch.arguments[name].dtype for name in tensors}
        numbers = {name: n for name, n in launch.arguments.items() if name not in self._dtypes}
        self._rest = {**numbers, **launch.constants, "num_warps": launch.warps}
        self._launch = launch.kernel[(launch.programs,)]
        from triton.runtime.jit import JITFunction

        self._at = _Pointer if isinstance(launch.kernel, JITFunction) else _tensor_at

    def __call__(self, stream: int, *addresses: int) -> None:
        if len(addresses) != len(self._dtypes):
            raise TypeError(
                f"the kernel takes {len(self._dtypes)} tensors, got {len(addresses)} addresses"
            )
        pointers = zip(self._dtypes.items(), addresses, strict=True)
        self._launch(
            **{name: self._at(address, dtype) for (name, dtype), address in pointers}, **self._rest
        )


@dataclass(frozen=True)
class _Pointer:
    """Looks like a tensor to Triton."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _tensor_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of one element at an address of the host; the interpreter needs no more."""
    if address == 0:
        return torch.empty(1, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)
