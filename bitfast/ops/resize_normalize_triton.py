"""resize_normalize in Triton: the extension plans a batch on the host, then two kernels are launched."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from bitfast import extension
from bitfast.kernels.device_cache import is_capturing
from bitfast.ops.common import launch_kernels, why_no_interpreter, why_no_triton
from bitfast.ops.resize_filters import Plan, filter_store
from bitfast.ops.resize_normalize import Arguments
from bitfast.ops.staging import upload

NO_PLANS = "its tables are made by the extension's CPU half, which is missing: "


def why_unavailable_on_gpu() -> str | None:
    """Return why the kernels cannot run on this machine's GPU; None if they can."""
    return why_no_triton() or _why_no_plans()


def why_unavailable_on_cpu() -> str | None:
    """Return why the kernels cannot run on CPU tensors; None if Triton interprets them."""
    return why_no_interpreter() or _why_no_plans()


def _why_no_plans() -> str | None:
    problem = extension.CPU.problem
    return None if problem is None else NO_PLANS + problem


def forward(arguments: Arguments) -> Tensor:
    """Compute ``bitfast::resize_normalize.triton``. The host does not wait for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured. Its replays would read tables of this batch's sizes
            and addresses, which do not live as long.
    """
    from bitfast.kernels import resize_normalize as kernels

    if is_capturing():
        raise RuntimeError(
            "resize_normalize cannot be captured in a CUDA graph: preprocess before the capture"
        )
    device = arguments.images[0].device
    stream = _stream(device)

    def plan_with(filters: Tensor) -> Plan:
        return Plan(
            *torch.ops.bitfast.resize_plan.native(
                arguments.images, arguments.sizes, arguments.crop, arguments.offsets,
                arguments.first_axes, arguments.layout == "CHW", filters,
                (kernels.ROWS, kernels.INNER), device.type == "cuda",
            )
        )  # fmt: skip

    plan, filters = filter_store(arguments.resample, device, stream).plan(plan_with)
    values = _on_device(arguments.values_of_bytes(), device, stream)
    result = arguments.empty_result()
    first, second = kernels.tables_of(plan.tables.to(device, non_blocking=True), plan.places)
    launches = []
    if first.programs.shape[0]:
        launches.append(
            kernels.first_pass_launch(
                first.programs, first.segments, filters, filters,
                intermediate=plan.between, channels=arguments.channels,
            )
        )  # fmt: skip
    launches.append(
        kernels.second_pass_launch(
            second.programs, second.segments, filters, filters, values,
            intermediate=plan.between, result=result, channels_last=arguments.channels_last,
        )
    )  # fmt: skip
    launch_kernels(launches, result)
    return result


def _stream(device: torch.device) -> int:
    """Return the current stream. Tables are kept by stream: on another one their copy may not be done yet."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _on_device(table: Tensor, device: torch.device, stream: int) -> Tensor:
    """Return a copy of a table on the device."""
    return upload([table], device)[0]
