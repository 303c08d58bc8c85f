"""What ``bitfast env`` says: versions, hardware, and which backends run here, or why not."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bitfast
from bitfast import backends, extension
from bitfast.execution.plan import why_no_plan
from bitfast.ops import first_use
from bitfast.ops.norm_convolution import why_no_norm_convolution
from bitfast.ops.packed_convolution import why_not_packed

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pillow",
    "safetensors",
    "huggingface_hub",
)
"""The distributions whose versions matter. They are looked up, not imported."""


def describe() -> dict[str, Any]:
    """Return everything that ``bitfast env`` prints, ready for JSON."""
    return {
        "versions": versions(),
        "system": platform.platform(),
        "cpu": cpu(),
        "cuda": cuda(),
        "extension": {
            "cpu": dataclasses.asdict(extension.CPU),
            "cuda": dataclasses.asdict(extension.CUDA),
        },
        "instruction_set": instruction_set(),
        "packed_convolutions": {
            str(dtype).removeprefix("torch."): why_not_packed(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        },
        "norm_convolutions": {
            str(dtype).removeprefix("torch."): why_no_norm_convolution(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        },
        "plans": {
            f"{device}, {str(dtype).removeprefix('torch.')}": why_no_plan(device, dtype)
            for device in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16)
        },
        "backends": [dataclasses.asdict(row) for row in backends.backend_table()],
        "first_use": first_use.failures(),  # of the checks that the table has run
    }


def instruction_set() -> str | None:
    """Return what the C++ kernels of norms and weights run on: "avx512", "avx2" or "baseline"."""
    return torch.ops.bitfast.instruction_set() if extension.CPU.problem is None else None


def versions() -> dict[str, str | None]:
    """Return the version of bitfast, Python and each package; None where it is not installed."""
    found = {"bitfast": bitfast.__version__, "python": platform.python_version()}
    return {**found, **{package: package_version(package) for package in PACKAGES}}


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Return the processor's name, its cores and how torch uses them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # no Linux
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cuda() -> dict[str, Any]:
    """Return the CUDA devices, or why there is none."""
    problem = cuda_problem()
    devices = []
    if problem is None:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    version = torch.version.cuda or torch.version.hip
    return {"version": version, "devices": devices, "problem": problem}


def cuda_problem() -> str | None:
    """Return why torch has no CUDA device; None when it has one."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return reason if visible is None else f"{reason} (CUDA_VISIBLE_DEVICES={visible!r})"
    return None


def missing_kernels(found: dict[str, Any]) -> list[str]:
    """Return which kernels of bitfast do not run on a device of this machine, and why.

    These are the ops that run as plain PyTorch though there is a kernel, and kernels that give wrong results.

    Args:
        found: What :func:`describe` returned.
    """
    devices = {"cpu"} if found["cuda"]["problem"] else {"cpu", "cuda"}
    slow = {
        (row["op"], row["device"])
        for row in found["backends"]
        if row["device"] in devices and row["default"] and row["backend"] == "reference"
    }
    wrong = [f"{op} on cuda: the native kernel {text}" for op, text in found["first_use"].items()]
    return wrong + [
        f"{row['op']} on {row['device']}: the {row['backend']} kernel does not run: {row['reason']}"
        for row in found["backends"]
        if (row["op"], row["device"]) in slow
        and backends.has_kernel(row["op"], row["backend"], row["device"])
    ]


# ---- as text ------------------------------------------------------------------------------------


def as_text(found: dict[str, Any]) -> str:
    """Return what :func:`describe` found, for people."""
    versions = [[name, version or "not installed"] for name, version in found["versions"].items()]
    machine = [["system", found["system"]], _cpu_row(found["cpu"]), *_cuda_rows(found["cuda"])]
    extension = [_extension_row(half, library) for half, library in found["extension"].items()]
    extension.append(
        ["C++ kernels use", found["instruction_set"] or "nothing: they were not built"]
    )
    for kind in ("packed_convolutions", "norm_convolutions", "plans"):
        extension += [_convolution_row(kind, *item) for item in found[kind].items()]
    return "\n".join(
        [
            *_aligned([*versions, [], *machine, [], *extension]),
            "",
            "Backends (* runs by default; on demand: only by use_backend or enable_kernel)",
            *_aligned([_backend_row(row) for row in found["backends"]], indent="  "),
        ]
    )


def _cpu_row(cpu: dict[str, Any]) -> list[str]:
    cores = f"{cpu['cores']} cores"
    if cpu["cores_allowed"] != cpu["cores"]:
        cores += f", {cpu['cores_allowed']} of them for this process"
    torch_uses = f"torch uses {cpu['torch_threads']} threads and {cpu['torch_capability']}"
    return ["cpu", f"{cpu['model']}, {cores}; {torch_uses}"]


def _cuda_rows(cuda: dict[str, Any]) -> list[list[str]]:
    if cuda["problem"] is not None:
        return [["cuda", f"none: {cuda['problem']}"]]
    rows = [["cuda", f"version {cuda['version']}"]]
    for index, device in enumerate(cuda["devices"]):
        memory = f"{device['memory_bytes'] / 2**30:.1f} GiB"
        rows.append(
            [f"cuda:{index}", f"{device['name']}, capability {device['capability']}, {memory}"]
        )
    return rows


def _extension_row(half: str, library: dict[str, str | None]) -> list[str]:
    problem = library["problem"]
    return [f"extension, {half}", str(library["path"]) if problem is None else f"none: {problem}"]


def _convolution_row(kind: str, dtype: str, problem: str | None) -> list[str]:
    return [f"{kind.replace('_', ' ')}, {dtype}", "yes" if problem is None else f"no: {problem}"]


def _backend_row(row: dict[str, Any]) -> list[str]:
    mark = "*" if row["default"] else ""
    state = "runs" if row["available"] else f"no: {row['reason']}"
    if row["on_demand"]:
        state = f"{state} ({row['on_demand']})"
    return [row["op"], row["device"], row["backend"] + mark, state]


def _aligned(rows: list[list[str]], indent: str = "") -> list[str]:
    """Return one line per row, its cells in columns; an empty row makes an empty line."""
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(columns - 1)]
    return [
        indent + "  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) if row else ""
        for row in rows
    ]
