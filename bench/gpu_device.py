"""Parts of the GPU report about the machine: what it is, its ceilings, and what a call costs the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .gpu_timing import (
    Session,
    WrongResultError,
    copy_sample,
    host_sample,
    measure,
    relative_error,
    run_parts,
)

PEERS = ("transformers", "timm", "torchvision", "triton", "matplotlib", "hypothesis")


def environment(session: Session) -> None:
    """Describe the machine and what is installed."""
    from bitfast.commands import environment as ours

    facts = ours.describe()
    facts["commit"] = commit()
    facts["peers"] = {name: ours.package_version(name) for name in PEERS}
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        facts[tool] = shutil.which(tool)
    if session.device == "cuda" and torch.cuda.is_available():
        facts["driver"] = driver_version()
        properties = torch.cuda.get_device_properties(0)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = properties.L2_cache_size
        facts["cudnn"] = torch.backends.cudnn.version()
    session.add("machine", "environment", "described", facts=facts)
    for name, version in facts["peers"].items():
        if version is None:
            session.add("machine", name, "not installed")
    backends = [row for row in facts["backends"] if row["device"] == session.device]
    defaults = {row["op"]: row["backend"] for row in backends if row["default"]}
    wanted = {
        "weight_standardization": "triton", "group_norm_act": "triton", "same_padding": "native"
    }  # fmt: skip
    if session.device == "cuda":
        for op, backend in wanted.items():
            status = "described" if defaults.get(op) == backend else "failed"
            session.add("default backends", op, status, note=f"runs on {defaults.get(op)}")


def commit() -> str | None:
    """Return the commit; the checkout's, or what BITFAST_COMMIT says where there is only a copy."""
    command = ["git", "describe", "--always", "--dirty"]
    given = os.environ.get("BITFAST_COMMIT")
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return given
    return given or process.stdout.strip()


def driver_version() -> str | None:
    """Return the version of the GPU's driver, None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.split("\n")[0].strip()


def ceilings(session: Session) -> None:
    """Measure what the device can do: bytes moved per second, and bfloat16 operations per second."""

    def copy() -> None:
        sample, nbytes = copy_sample(session.device, session.is_smoke)
        session.add(
            f"copy of {nbytes // 2 / 2**30:.3g} GiB",
            "device to device",
            **sample._asdict(),
            gigabytes_per_second=nbytes / sample.seconds / 1e9,
            check=0.0,
        )

    def product() -> None:
        n = 64 if session.is_smoke else 8192
        a, b = (torch.randn(n, n, device=session.device).bfloat16() for _ in range(2))
        row = torch.mv(b.T.double(), a[0].double())
        error = relative_error((a @ b)[0], row)
        if not error < 1e-2:
            raise WrongResultError(f"error {error:.1e}")
        sample = measure([lambda: a @ b], session.device, 0.0 if session.is_smoke else 0.2)
        session.add(
            f"bfloat16 matrix product {n}x{n}x{n}",
            "torch",
            **sample._asdict(),
            teraflops_per_second=2 * n**3 / sample.seconds / 1e12,
            check=error,
        )

    session.attempt("copy", "device to device", copy)
    session.attempt("bfloat16 matrix product", "torch", product)


def dispatch(session: Session) -> None:
    """Measure what calls cost the host, on tensors so small that nothing else counts."""
    from bitfast.ops.group_norm_act import group_norm_act
    from bitfast.ops.weight_standardization import weight_standardization

    x = torch.randn(1, 32, 2, 2, device=session.device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(32, device=session.device), torch.zeros(32, device=session.device)
    filters = torch.randn(32, 32, 1, 1, device=session.device)
    contestants: dict[str, Callable[[], Any]] = {
        "F.group_norm, F.relu": lambda: F.relu(F.group_norm(x, 32, weight, bias)),
        "group_norm_act": session.on_ours(lambda: group_norm_act(x, weight, bias, 32)),
        "operator bitfast::group_norm_act.triton": lambda: torch.ops.bitfast.group_norm_act.triton(
            x, weight, bias, 32, 1e-5, "relu"
        ),
        "Triton launch alone": tiny_launch(x, weight, bias),
        "F.batch_norm of a filter bank": lambda: F.batch_norm(
            filters.view(1, 32, -1), None, None, training=True, momentum=0.0, eps=1e-8
        ),
        "weight_standardization": session.on_ours(lambda: weight_standardization(filters)),
    }
    calls = 2 if session.is_smoke else 100
    repeats = 2 if session.is_smoke else 15
    for is_recorded in (False, True):
        case = "a call, recorded by autograd" if is_recorded else "a call"
        x.requires_grad_(is_recorded)
        filters.requires_grad_(is_recorded)
        for name, function in contestants.items():
            if is_recorded and "alone" in name:
                continue

            def run(name: str = name, function: Any = function, case: str = case) -> None:
                function()
                sample = host_sample(function, session.device, calls, repeats)
                is_baseline = name.startswith("F.group_norm")
                session.add(case, name, **sample._asdict(), is_baseline=is_baseline)

            session.attempt(case, name, run)


def tiny_launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], None]:
    """Return the launch that group_norm_act makes for x, and nothing of what surrounds it."""
    from bitfast.kernels import group_norm_act as kernels

    result = torch.empty_like(x)
    statistics = [torch.empty(1, 32, device=x.device) for _ in range(2)]
    (launch,) = kernels.forward_launches(
        x, None, weight, bias, 1e-5, "relu", True,
        total=None, result=result, mean=statistics[0], rstd=statistics[1],
    )  # fmt: skip
    return launch.launch


PARTS = {"environment": environment, "ceilings": ceilings, "dispatch": dispatch}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
