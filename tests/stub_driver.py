"""``python -m tests.stub_driver``: what reaches the CUDA driver of prepared and of ordinary launches, as JSON.

Needs no GPU: kernels are compiled for sm_90, and Triton's own driver and launchers run against
``cuda_driver.c``, which stands in for libcuda. Runs in a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from bitfast.kernels import group_norm_act, weight_standardization
from bitfast.kernels.launch import Launch, PreparedLaunch, prepare

STREAM = 77
BYTES = {"fp32": "f", "i32": "i", "i64": "q"}


class StubLibrary:
    """The stand-in for libcuda, loaded under its name."""

    def __init__(self, folder: str) -> None:
        path = f"{folder}/libcuda.so.1"
        include = Path(nvidia.__file__).parent / "include"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}",
             str(Path(__file__).parent / "cuda_driver.c"), "-o", path],
            check=True,
        )  # fmt: skip
        Path(f"{folder}/libcuda.so").symlink_to(path)
        knobs.nvidia.libcuda_path = folder
        self.library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    def value(self, kind: Any, name: str) -> Any:
        return kind.in_dll(self.library, name)

    def expect(self, kinds: list[str]) -> None:
        """Say what the parameters of the next launch are, besides the two for memory of the kernel's own."""
        sizes = [4 if kind in ("i32", "fp32") else 8 for kind in [*kinds, "*", "*"]]
        self.value(ctypes.c_int, "parameter_count").value = len(sizes)
        for place, size in enumerate(sizes):
            self.value(ctypes.c_int * 64, "parameter_sizes")[place] = size

    def seen(self, kinds: list[str]) -> dict[str, Any]:
        """Return the last launch."""
        raw = self.value((ctypes.c_char * 8) * 64, "parameters")
        return {
            "launches": self.value(ctypes.c_int, "launches").value,
            "numbers": list(self.value(ctypes.c_ulonglong * 10, "numbers")),
            "parameters": [
                struct.unpack_from(BYTES.get(kind, "Q"), raw[place].raw)[0]
                for place, kind in enumerate([*kinds, "*", "*"])
            ],
        }


class StubDriver(nvidia.CudaDriver):
    """Triton's driver, but for its questions to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class UnknownLauncher:
    """A launcher as some other version of Triton may have it."""

    def __init__(self, *arguments: Any) -> None:
        self.hidden = nvidia.CudaLauncher(*arguments)

    def __call__(self, *arguments: Any) -> None:
        self.hidden(*arguments)


def calls_of(function: Callable[[], Any]) -> list[str]:
    """Return the names of the Python functions that are called."""
    names = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names.append(
                frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
            )

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]  # without the lambda itself


def norm_launches(
    batch: int, size: int, channels_last: bool = True, offset: int = 0
) -> list[Launch]:
    """Return the launches of both passes; parameters that begin ``offset`` elements into their memory."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, total, result, grad, grad_x = (
        torch.empty(batch, 64, size, size, dtype=torch.bfloat16).contiguous(memory_format=layout)
        for _ in range(6)
    )
    weight, bias, grad_weight, grad_bias = (torch.empty(64 + offset)[offset:] for _ in range(4))
    mean, rstd = torch.empty(batch, 32), torch.empty(batch, 32)
    settings = ("relu", channels_last)
    return [
        *group_norm_act.forward_launches(
            x, residual, weight, bias, 1e-5, *settings,
            total=total, result=result, mean=mean, rstd=rstd,
        ),
        *group_norm_act.backward_launches(
            grad, None, x, weight, bias, mean, rstd, *settings,
            grad_x=grad_x, grad_weight=grad_weight, grad_bias=grad_bias,
        ),
    ]  # fmt: skip


def weight_launches() -> list[Launch]:
    weight = torch.empty(64, 48, 3, 3)
    mean, rstd, result = torch.empty(64), torch.empty(64), torch.empty(64, 48, 3, 3)
    table = weight_standardization.table_of([weight], [0], True)
    assert table is not None
    return [
        weight_standardization.forward_launch(
            weight, 1e-8, True, result=result, mean=mean, rstd=rstd
        ),
        weight_standardization.forward_all_launch(
            table, [weight], 1e-8, result=result.flatten(), mean=mean, rstd=rstd
        ),
    ]


def addresses_of(launch: Launch) -> list[int]:
    return [value.data_ptr() for value in launch.arguments.values() if isinstance(value, Tensor)]


def accesses_in_place(size: int) -> list[dict[str, Any]]:
    """Look into each forward launch with the sum in the place of x.

    Returns:
        For each launch: by how many threads an element of a tile is loaded, for each load; and the kinds of
        loads in PTX code.
    """
    x, residual, result = (
        torch.empty(2, 64, size, size, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(3)
    )
    weight = torch.empty(64)
    seen = []
    for launch in group_norm_act.forward_launches(
        x, residual, weight, weight, 1e-5, "relu", True, total=x, result=result, groups=32
    ):
        compiled = launch.kernel.warmup(
            **launch.arguments, **launch.constants, grid=(1,), num_warps=launch.warps
        )
        code = compiled.asm["ttgir"]
        loads = re.findall(r"tt\.load .*: tensor<(\d+)x(\d+)x!tt\.ptr<bf16>, (#\w+)>", code)
        seen.append(
            {
                "kernel": launch.kernel.__name__,
                "threads": [
                    max(elements_in(code, layout) / (int(rows) * int(columns)), 1)
                    for rows, columns, layout in loads
                ],
                "loads": re.findall(r"ld\.global([.\w:]*)", compiled.asm["ptx"]),
            }
        )
    return seen


def elements_in(code: str, layout: str) -> int:
    """Return how many elements all threads of a program have in a blocked layout of Triton's."""
    (definition,) = re.findall(rf"{layout} = #ttg\.blocked<(.*)>", code)
    numbers = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(.*?)\]", definition)
    return math.prod(int(number) for text in numbers for number in text.split(","))


@contextmanager
def hooks(names: list[str]) -> Iterator[None]:
    """Let Triton note the kernels that are launched, as a profiler does."""

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    knobs.runtime.launch_exit_hook.add(note)
    yield
    knobs.runtime.launch_enter_hook.remove(note)
    knobs.runtime.launch_exit_hook.remove(note)


def looked_at(launch: Launch, library: StubLibrary) -> dict[str, Any]:
    """Run a launch in every way and return what the driver saw of each."""
    compiled = launch.kernel.warmup(
        **launch.arguments, **launch.constants, grid=(launch.programs,), num_warps=launch.warps
    )
    kinds = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    library.expect(kinds)
    prepared = prepare(launch)
    before = library.seen(kinds)["launches"]
    prepared(STREAM, *addresses_of(launch))
    direct = library.seen(kinds)
    launch.launch()
    ordinary = library.seen(kinds)
    watched_names: list[str] = []
    with hooks(watched_names):
        prepared(STREAM, *addresses_of(launch))
    watched = library.seen(kinds)
    moved = [address + 4096 for address in addresses_of(launch)]
    prepared(STREAM + 1, *moved)
    return {
        "kernel": launch.kernel.__name__,
        "kinds": kinds,
        "why_not_direct": prepared.why_not_direct,
        "kind": type(prepared).__name__,
        "aligned": list(prepared.aligned),
        "launches_before": before,
        "direct": direct,
        "ordinary": ordinary,
        "watched": watched,
        "moved": library.seen(kinds),
        "addresses": addresses_of(launch),
        "programs": launch.programs,
        "warps": launch.warps,
        "numbers": [n for n in launch.arguments.values() if not isinstance(n, Tensor) and n != 1],
        "hook_names": watched_names,
        "calls": calls_of(lambda: prepared(STREAM, *moved)),
        "errors": errors_of(prepared, moved),
    }  # fmt: skip


def errors_of(prepared: PreparedLaunch, addresses: list[int]) -> list[str]:
    messages = []
    for given in (addresses[1:], [*addresses, 0]):
        try:
            prepared(STREAM, *given)
        except TypeError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    """Print what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        library = StubLibrary(folder)
        triton.runtime.driver.set_active(StubDriver())
        launches = {
            "split": norm_launches(4, 128),
            "whole": norm_launches(32, 7),
            "misaligned": norm_launches(1, 128, channels_last=False, offset=1),
            "weights": weight_launches(),
        }
        seen: dict[str, list[Any]] = {
            name: [looked_at(launch, library) for launch in members]
            for name, members in launches.items()
        }
        triton.runtime.driver.active.launcher_cls = UnknownLauncher
        seen["unknown"] = [looked_at(launch, library) for launch in norm_launches(2, 9)[:2]]
        seen["in place"] = [one for size in (1, 3, 128) for one in accesses_in_place(size)]
        print(json.dumps({"triton": triton.__version__, "seen": seen}))


if __name__ == "__main__":
    main()
