"""group_norm_act by CUDA kernels, ``csrc/group_norm_act.cu``, past torch's dispatcher.

They take feature maps that are dense in channels_last, in float32, bfloat16 or float16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.kernels.launch import as_current
from bitfast.ops.common import why_no_triton
from bitfast.ops.first_use import difference
from bitfast.ops.native_cuda import ADDRESS, DTYPES, entry, workspace_size
from bitfast.torch_state import constant_when_compiled

Forward = Callable[[int, int, int, int, int, int, int, int, int], None]
"""Takes stream, x, residual, weight, bias, total, result, mean, rstd; 0 for missing tensors."""

CLUSTERS = (9, 0)
"""Compute capability of the oldest GPU with thread-block clusters, by which these kernels are fast."""


class Call(ctypes.Structure):
    """``GroupNormActCall`` of ``csrc/group_norm_act_cuda.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "groups")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("activation", "dtype", "weight_dtype", "bias_dtype")),
        ("is_aligned", ctypes.c_int32),
    )

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        groups: int,
        eps: float,
        activation: str,
        weight_dtype: torch.dtype,
        bias_dtype: torch.dtype,
        is_aligned: bool = True,
    ) -> Call:
        """Return the call for such tensors; ``is_aligned``: maps have addresses that are multiples of 16."""
        images, channels, height, width = shape
        dtypes = (DTYPES[d] for d in (dtype, weight_dtype, bias_dtype))
        kind = tuple(ACTIVATIONS).index(activation)
        return cls(images, height * width, channels, groups, eps, kind, *dtypes, is_aligned)


def prepare_forward(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    is_channels_last: bool,
    groups: int,
    eps: float,
    activation: str,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    *,
    has_residual: bool = False,
    sum_in_place: bool = False,
    keeps_statistics: bool = True,
) -> Forward:
    """Return a function that launches the kernels.

    It takes the handle of the device's current stream, and addresses; those of feature maps are multiples
    of 16. The device must be the current one. It may be called from several threads, and while a CUDA graph is
    recorded: memory for partial results is allocated in each call, on the current stream. ``total`` may be x or
    the residual, and the result may be either where the total is not.

    Args:
        shape: (N, C, H, W), of x, residual, total and result; N may be 0.
        dtype: Of these.
        device: Where the tensors will be.
        is_channels_last: True: there are no kernels for another format.
        groups, eps, activation: As in the op.
        weight_dtype, bias_dtype: Of the parameters.
        has_residual, sum_in_place, keeps_statistics: As in ``kernels.group_norm_act_prepared``; these kernels
            see it by the addresses.

    Raises:
        RuntimeError: there are no CUDA kernels here, or these cannot take the arguments.
        ValueError: the feature maps are not channels_last.
    """
    if not is_channels_last:
        raise ValueError("the native CUDA kernels of group_norm_act need channels_last")
    call = Call.of(shape, dtype, groups, eps, activation, weight_dtype, bias_dtype)
    told = ctypes.byref(call)
    size = workspace_size("bitfast_group_norm_act_workspace", told, device)
    launch = entry("bitfast_group_norm_act_forward", *(ADDRESS,) * 11)

    def launch_all(stream: int, *addresses: int) -> None:
        launch(told, stream, *addresses, 0)

    def launch_with_workspace(stream: int, *addresses: int) -> None:
        workspace = torch.empty(size, dtype=torch.float32, device=device)
        launch(told, stream, *addresses, workspace.data_ptr())

    return launch_with_workspace if size > 0 else launch_all


@constant_when_compiled
def is_slower_than_triton() -> bool:
    """Whether the GPU has no clusters, and Triton's kernels can run."""
    if not torch.cuda.is_available() or why_no_triton() is not None:
        return False
    return torch.cuda.get_device_capability() < CLUSTERS


# ---- first use ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call that the check before the first use makes."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    groups: int = 32
    activation: str = "relu"
    adds: bool = False


CHECKED = (
    Case((40, 256, 56, 56), torch.bfloat16, adds=True),
    Case((300, 64, 14, 14), torch.float16, adds=True),
    Case((600, 64, 2, 3), torch.bfloat16),
    Case((2, 256, 56, 56), torch.float32),
    Case((2, 96, 20, 20), torch.bfloat16, groups=8, activation="gelu"),
    Case((2, 6, 30, 30), torch.float32, groups=2, adds=True),
    Case((2, 24, 30, 30), torch.bfloat16, groups=8, adds=True),
)
"""By clusters and by single blocks that do several images; slices of channels; groups that are no multiple of a
vector; in two launches, one number at a time and by vectors."""


def check_forward(device: torch.device, cases: Sequence[Case] = CHECKED) -> str | None:
    """Run the kernels on a device; return how one differs from plain PyTorch in float64, or None."""
    for case in cases:
        problem = _problem_of(case, device)
        if problem is not None:
            return f"the norm of {case.shape}, {case.dtype}, {case.activation}: {problem}"
    return None


def _problem_of(case: Case, device: torch.device) -> str | None:
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    def draw_map() -> Tensor:
        return draw(*case.shape).to(dtype=case.dtype, memory_format=torch.channels_last)

    x, residual = draw_map() + 3, draw_map() if case.adds else None
    weight, bias = draw(case.shape[1]), draw(case.shape[1]).to(case.dtype)
    total = x if residual is None else torch.full_like(x, float("nan"))
    result = torch.full_like(x, float("nan"))
    mean, rstd = (torch.empty(case.shape[0], case.groups, device=device) for _ in range(2))
    run = prepare_forward(
        case.shape, case.dtype, device, True, case.groups, 1e-5, case.activation, weight.dtype, bias.dtype,
        has_residual=case.adds,
    )  # fmt: skip
    with as_current(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        tensors = (x, residual, weight, bias, total, result, mean, rstd)
        run(stream, *(0 if t is None else t.data_ptr() for t in tensors))
    expected_total = x if residual is None else x + residual
    if not torch.equal(total, expected_total):
        return "the sum is another"
    step = max(1, 2**22 // x[0].numel())  # float64 takes memory
    for first in range(0, case.shape[0], step):
        part = slice(first, first + step)
        expected = reference.group_norm_act_forward(
            expected_total[part].double(),
            weight.double(),
            bias.double(),
            case.groups,
            1e-5,
            case.activation,
        )
        found = (result[part], mean[part], rstd[part])
        for name, a, b in zip(("the result", "mean", "rstd"), found, expected, strict=True):
            roundings = 4.0 if a.dtype != torch.float32 else 64.0
            problem = difference(name, a, b, roundings)
            if problem is not None:
                return problem
    return None


__all__ = ["Call", "Case", "Forward", "check_forward", "is_slower_than_triton", "prepare_forward"]
