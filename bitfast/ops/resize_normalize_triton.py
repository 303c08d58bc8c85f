"""resize_normalize in Triton: the tables of a batch are made on the host, then two kernels are launched."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfast import extension
from bitfast.kernels.device_cache import is_capturing
from bitfast.ops.common import launch_kernels, why_no_interpreter, why_no_triton
from bitfast.ops.resize_normalize import Arguments
from bitfast.ops.staging import upload

if TYPE_CHECKING:
    from bitfast.kernels.resize_normalize import Axis

NO_TABLES = "its tables of filters are made by the extension's CPU half, which is missing: "


def why_unavailable_on_gpu() -> str | None:
    """Return why the kernels cannot run on this machine's GPU; None if they can."""
    return why_no_triton() or _why_no_tables()


def why_unavailable_on_cpu() -> str | None:
    """Return why the kernels cannot run on CPU tensors; None if Triton interprets them."""
    return why_no_interpreter() or _why_no_tables()


def _why_no_tables() -> str | None:
    problem = extension.CPU.problem
    return None if problem is None else NO_TABLES + problem


Line = tuple[int, int, int, int]
"""How one axis is resampled: its size before and after, the first output that is wanted, and how many."""


def forward(arguments: Arguments) -> Tensor:
    """Compute ``bitfast::resize_normalize.triton``. The host does not wait for the device.

    Raises:
        RuntimeError: a CUDA graph is being captured. Its replays would read tables of this batch's sizes
            and addresses, which do not live as long.
    """
    from bitfast.kernels import resize_normalize as kernels

    images, crop = arguments.images, arguments.crop
    device, channels = images[0].device, images[0].shape[2]
    if is_capturing():
        raise RuntimeError(
            "resize_normalize cannot be captured in a CUDA graph: preprocess before the capture"
        )
    lines, tops, lefts = _lines(arguments)
    stream = _stream(device)
    starts, weights, axes = _tables(tuple(dict.fromkeys(lines)), arguments.resample, device, stream)
    pictures = [
        kernels.Picture(
            image,
            axes.get(lines[2 * i]),
            axes.get(lines[2 * i + 1]),
            tops[i],
            lefts[i],
            arguments.first_axes[i] == 0,
        )
        for i, image in enumerate(images)
    ]
    host_tables = kernels.tables_for(pictures, (crop[0], crop[1]))
    intermediate = torch.empty(max(host_tables.buffer_size, 1), dtype=torch.uint8, device=device)
    host_tables.second_segments[:, 0] += host_tables.is_buffered * intermediate.data_ptr()
    tables = upload([*host_tables[:4]], device)
    values = _on_device(arguments.values_of_bytes(), device, stream)
    result = arguments.empty_result()
    launches = []
    if host_tables.buffer_size:
        read = sum(image.numel() for image in images)
        launches.append(
            kernels.first_pass_launch(
                tables[1], tables[0], starts, weights,
                intermediate=intermediate, channels=channels, reads=read,
            )
        )  # fmt: skip
    launches.append(
        kernels.second_pass_launch(
            tables[3], tables[2], starts, weights, values,
            intermediate=intermediate, result=result, channels_last=arguments.channels_last,
        )
    )  # fmt: skip
    launch_kernels(launches, intermediate)
    return result


def _lines(arguments: Arguments) -> tuple[list[Line], list[int], list[int]]:
    """Return the lines of all images (height and width by turns), and their tops and lefts in the window."""
    lines: list[Line] = []
    begins: tuple[list[int], list[int]] = ([], [])
    for i, image in enumerate(arguments.images):
        for axis in (0, 1):
            size, offset = arguments.sizes[2 * i + axis], arguments.offsets[2 * i + axis]
            first = min(max(offset, 0), size)
            count = min(max(offset + arguments.crop[axis], first), size) - first
            lines.append((image.shape[axis], size, first, count))
            begins[axis].append(first - offset)
    return lines, begins[0], begins[1]


def _stream(device: torch.device) -> int:
    """Return the current stream. Tables are kept by stream: on another one their copy may not be done yet."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=32)
def _tables(
    lines: tuple[Line, ...], resample: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, dict[Line, Axis]]:
    """Return the starts and weights of all lines, on the device, and where each line's are among them."""
    from bitfast.kernels.resize_normalize import Axis

    wanted = [line for line in lines if line[3] > 0]
    starts, weights, taps = torch.ops.bitfast.resampling_tables.native(
        [number for line in wanted for number in line], resample
    )
    axes: dict[Line, Axis] = {}
    first_start = first_weight = 0
    for line, n in zip(wanted, taps.tolist(), strict=True):
        count = line[3]
        inputs = starts[first_start].item(), starts[first_start + count - 1].item() + n
        is_unchanged = line[0] == line[1]
        axes[line] = Axis(count, n, first_start, first_weight, *inputs, is_unchanged)
        first_start += count
        first_weight += count * n
    on_device = upload([starts, weights] if wanted else [torch.zeros(1).int()] * 2, device)
    return on_device[0], on_device[1], axes


@lru_cache(maxsize=64)
def _on_device(table: Tensor, device: torch.device, stream: int) -> Tensor:
    """Return a copy of a table on the device."""
    return upload([table], device)[0]
