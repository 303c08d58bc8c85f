"""The backward of group_norm_act by CUDA kernels, ``csrc/group_norm_act_backward.cu``, past torch's dispatcher.

They take feature maps that are dense in channels_last, in float32, bfloat16 or float16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfast import reference
from bitfast.activations import ACTIVATIONS
from bitfast.kernels.launch import as_current
from bitfast.ops.first_use import difference
from bitfast.ops.native_cuda import ADDRESS, DTYPES, entry, workspace_size

Backward = Callable[[int, int, int, int, int, int, int, int, int, int, int, int], None]
"""Takes stream, grad, grad_total, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias, result; 0 for a
missing ``grad_total`` or ``result``."""


class Call(ctypes.Structure):
    """``GroupNormActBackwardCall`` of ``csrc/group_norm_act_backward_cuda.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "groups")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "bias_dtype", "activation")),
    )


def prepare_backward(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    is_channels_last: bool,
    groups: int,
    activation: str,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    *,
    has_grad_total: bool = False,
    recomputes: bool = False,
) -> Backward:
    """Return a function that launches the kernels.

    It takes the handle of the device's current stream, and addresses; those of feature maps are multiples
    of 16. The device must be the current one. It may be called from several threads, and while a CUDA graph is
    recorded: memory for partial results is allocated in each call, on the current stream.

    Args:
        shape: (N, C, H, W), of grad, grad_total, x, grad_x and result; N may be 0.
        dtype: Of these.
        device: Where the tensors will be.
        is_channels_last: True: there are no kernels for another format.
        groups, activation: As in the op.
        weight_dtype, bias_dtype: Of the parameters and their gradients.
        has_grad_total, recomputes: As in ``kernels.group_norm_act_prepared``; these kernels see it by the
            addresses.

    Raises:
        RuntimeError: there are no CUDA kernels here, or these cannot take the arguments.
        ValueError: the feature maps are not channels_last, or a dtype is not float32, bfloat16 or float16.
    """
    if not is_channels_last:
        raise ValueError("the native CUDA kernels of group_norm_act_backward need channels_last")
    for unknown in {dtype, weight_dtype, bias_dtype} - DTYPES.keys():
        raise ValueError(
            f"the native CUDA kernels of group_norm_act_backward do not take {unknown}"
        )
    images, channels, height, width = shape
    dtypes = (DTYPES[d] for d in (dtype, weight_dtype, bias_dtype))
    call = Call(
        images, height * width, channels, groups, *dtypes, tuple(ACTIVATIONS).index(activation)
    )
    told = ctypes.byref(call)
    size = workspace_size("bitfast_group_norm_act_backward_workspace", told, device)
    launch = entry("bitfast_group_norm_act_backward", *(ADDRESS,) * 14)

    def launch_all(stream: int, *addresses: int) -> None:
        workspace = torch.empty(size, dtype=torch.float32, device=device)
        launch(told, stream, *addresses, workspace.data_ptr())

    return launch_all


# ---- first use ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call that the check before the first use makes."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    groups: int = 32
    activation: str = "relu"
    has_total: bool = False
    recomputes: bool = False


CHECKED = (
    Case((40, 64, 50, 50), torch.bfloat16),
    Case((8, 128, 28, 28), torch.float16, has_total=True),
    Case((600, 64, 2, 3), torch.bfloat16, has_total=True),
    Case((2, 64, 20, 20), torch.float32, activation="none"),
    Case((2, 48, 30, 30), torch.bfloat16, groups=16, activation="gelu"),
    Case((2, 6, 30, 30), torch.float32, groups=2, has_total=True),
    Case((40, 64, 50, 50), torch.bfloat16, has_total=True, recomputes=True),
    Case((600, 64, 2, 3), torch.bfloat16, activation="none", recomputes=True),
    Case((2, 48, 30, 30), torch.bfloat16, groups=16, activation="gelu", recomputes=True),
)
"""By clusters that do several units (on an H100), and by clusters that do one; by single blocks; in two
passes, with vectors and one number at a time. Last, those that also give the result."""


def check_backward(device: torch.device, cases: Sequence[Case] = CHECKED) -> str | None:
    """Run the kernels on a device; return how one differs from plain PyTorch in float64, or None."""
    for case in cases:
        problem = _problem_of(case, device)
        if problem is not None:
            return f"the backward of {case.shape}, {case.dtype}, {case.activation}: {problem}"
    return None


class _Tensors(NamedTuple):
    grad: Tensor
    grad_total: Tensor | None
    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    rstd: Tensor


def _problem_of(case: Case, device: torch.device) -> str | None:
    given = _draw(case, device)
    results = _run(case, given)
    expected = _expected(case, given)
    names = ("grad_x", "grad_weight", "grad_bias", "result")[: len(results)]
    for name, result, right in zip(names, results, expected, strict=True):
        roundings = 64 if result.dtype == torch.float32 else 4
        problem = difference(name, result, right, roundings)
        if problem is not None:
            return problem
    return None


def _run(case: Case, given: _Tensors) -> list[Tensor]:
    """Return what the kernels compute."""
    device, x, weight, bias = given.x.device, given.x, given.weight, given.bias
    maps = (x, weight, bias, *([x] if case.recomputes else []))
    results = [torch.full_like(t, float("nan")) for t in maps]
    run = prepare_backward(
        case.shape, case.dtype, device, True, case.groups, case.activation, weight.dtype, bias.dtype,
        has_grad_total=case.has_total, recomputes=case.recomputes,
    )  # fmt: skip
    addresses = [0 if t is None else t.data_ptr() for t in (*given, *results)]
    with as_current(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        run(stream, *addresses, *([] if case.recomputes else [0]))
    return results


def _expected(case: Case, given: _Tensors) -> list[Tensor]:
    """Return the same in float64."""
    grad_x, result = (torch.empty_like(given.x, dtype=torch.float64) for _ in range(2))
    grad_weight, grad_bias = (
        torch.zeros_like(grad_x[0, :, 0, 0]),
        torch.zeros_like(grad_x[0, :, 0, 0]),
    )
    weight, bias = given.weight.double(), given.bias.double()
    for part in _parts(case):
        total = None if given.grad_total is None else given.grad_total[part].double()
        grad, x, mean, rstd = (
            t[part].double() for t in (given.grad, given.x, given.mean, given.rstd)
        )
        grad_x[part], of_weight, of_bias, result[part] = reference.group_norm_act_recompute(
            grad, total, x, weight, bias, mean, rstd, case.groups, case.activation
        )
        grad_weight += of_weight
        grad_bias += of_bias
    return [grad_x, grad_weight, grad_bias, *([result] if case.recomputes else [])]


def _parts(case: Case) -> Iterator[slice]:
    """Yield the images of a case, a few at a time: float64 takes memory."""
    step = max(1, 2**20 // (case.shape[1] * case.shape[2] * case.shape[3]))
    for first in range(0, case.shape[0], step):
        yield slice(first, first + step)


def _draw(case: Case, device: torch.device) -> _Tensors:
    """Return random arguments. No rounding decides whether a gradient passes the activation."""
    random = torch.Generator(device).manual_seed(0)
    channels = case.shape[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    def draw_map() -> Tensor:
        return draw(*case.shape).to(dtype=case.dtype, memory_format=torch.channels_last)

    grad, total, x = draw_map(), draw_map() if case.has_total else None, draw_map() + 3
    weight, bias = draw(channels), draw(channels).to(case.dtype)
    mean, rstd = (torch.empty(case.shape[0], case.groups, device=device) for _ in range(2))
    for part in _parts(case):
        before, mean[part], rstd[part] = reference.group_norm_act_forward(
            x[part].float(), weight, bias, case.groups, 1e-5, "none"
        )
        grad[part] = grad[part].masked_fill(before.abs() < 1e-3, 0)
    return _Tensors(grad, total, x, weight, bias, mean, rstd)


__all__ = ["Backward", "Call", "Case", "check_backward", "prepare_backward"]
