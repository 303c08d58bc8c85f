"""What depends on the machine and not on the data: the dtype of the computation, images at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfast.finetuning.processes import Processes, share
from bitfast.finetuning.recipe import Choice

MOST_ON_A_CPU = 32
"""Images at a time: more need more memory and are hardly faster. (R50x1, 128x128, 64 images: 8.2 s of CPU time
8 at a time, 7.2 s 16 at a time, 7.1 s 32 at a time.)"""
SHARE_OF_MEMORY = {"cuda": 0.6, "cpu": 0.25}
"""Of all memory, for what a network keeps for the backward pass."""
MOST_WORKERS = 8
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


# ---- dtype --------------------------------------------------------------------------------------


def choose_dtype(device: torch.device, given: str | None) -> tuple[torch.dtype, Choice]:
    """Return the dtype that autocast computes in, and why; float32 means no autocast.

    Args:
        device: Where the network is.
        given: ``"float32"`` or ``"bfloat16"``; None: bfloat16 where the device has instructions for it.
    """
    if given is not None:
        return getattr(torch, given), Choice("dtype", given, "given")
    reason = why_bfloat16_is_fast(device)
    if reason is None:
        return torch.float32, Choice("dtype", "float32", "bfloat16 is not fast on this device")
    return torch.bfloat16, Choice("dtype", "bfloat16", f"autocast: {reason}; --dtype float32")


def why_bfloat16_is_fast(device: torch.device) -> str | None:
    """Return what makes bfloat16 fast on a device, or None if nothing does."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else None
    capabilities = _cpu_capabilities()
    for name, title in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if capabilities.get(name):
            return f"this CPU has {title}"
    return None


def _cpu_capabilities() -> dict[str, Any]:
    """Return what torch knows of the CPU; nothing where it does not tell (before torch 2.12)."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return dict(ask()) if ask is not None else _flags_of_linux()


def _flags_of_linux() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return dict.fromkeys(flags.split(), True)


# ---- workers ------------------------------------------------------------------------------------


def choose_workers(processes: Processes, given: int | None) -> int:
    """Return how many processes shall read and resize images, for each process that trains.

    A GPU leaves the cores to them; on a CPU they get a quarter of what trains.
    """
    if given is not None:
        return given
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = (allowed or 1) // processes.local_world_size
    return min(MOST_WORKERS, cores - 1 if processes.device.type == "cuda" else cores // 4)


# ---- images at a time ---------------------------------------------------------------------------


def choose_micro_batch(
    model: torch.nn.Module,
    batch_size: int,
    crop: int,
    dtype: torch.dtype,
    processes: Processes,
    given: int | None,
) -> tuple[int, Choice]:
    """Return how many images go through the network at a time, and why.

    The gradients of micro-batches are added up, so that it makes no difference beyond rounding. The number is a
    power of two, or the whole of a process's share of the batch.

    Args:
        model: The network, on a CPU.
        batch_size: Images of a step, over all processes.
        crop: Their height and width.
        dtype: That the network computes in.
        processes: Which share the batch.
        given: The number, if it is given.
    """
    all_images = share(batch_size, processes)
    if given is not None:
        return min(given, all_images), Choice("micro_batch", str(min(given, all_images)), "given")
    device = processes.device
    memory = memory_of(device)
    usable = SHARE_OF_MEMORY[device.type] * memory
    if device.type == "cpu":
        usable /= processes.local_world_size
    per_image = bytes_per_image(model, crop, dtype)
    fitting = max(2, int(usable // max(per_image, 1)))
    most = min(fitting, MOST_ON_A_CPU) if device.type == "cpu" else fitting
    number = all_images if all_images <= most else 1 << (most.bit_length() - 1)
    reason = f"an image needs {per_image / 2**20:.0f} MiB of {memory / 2**30:.0f} GiB"
    if device.type == "cpu" and fitting >= MOST_ON_A_CPU:
        reason = f"at most {MOST_ON_A_CPU} on a CPU, where more are not faster"
    return number, Choice("micro_batch", str(number), reason)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a device, or of what this process may use of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return memory  # no limit ("max"), or none that is told


def bytes_per_image(model: torch.nn.Module, crop: int, dtype: torch.dtype) -> int:
    """Return what a network keeps of an image for the backward pass, measured on a CPU."""
    return _kept_bytes(model, 2, crop, dtype) - _kept_bytes(model, 1, crop, dtype)


def _kept_bytes(model: torch.nn.Module, images: int, crop: int, dtype: torch.dtype) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = torch.zeros(images, 3, crop, crop).contiguous(memory_format=torch.channels_last)
    is_training = model.training
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        model(pixels)
    model.train(is_training)
    return sum(kept.values())
