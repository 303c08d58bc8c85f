"""GroupNorm and activation for given shapes: the launches are prepared once, and then only launched.

The functions that are returned take the handle of the device's current stream, and addresses (``data_ptr()``)
that are multiples of 16 bytes. The device must be the current one. They may be called from several threads, and
while a CUDA graph is recorded: memory for partial results is allocated in each call, on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .group_norm_act import backward_launches, forward_launches
from .launch import Launch, PreparedLaunch, aligned_count, as_current, device_of, prepare

Forward = Callable[[int, int, int, int, int, int, int, int, int], None]
"""Takes stream, x, residual, weight, bias, total, result, mean, rstd; 0 for missing tensors."""

Backward = Callable[[int, int, int, int, int, int, int, int, int, int, int, int], None]
"""Takes stream, grad, grad_total, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias, result; 0 for
missing tensors."""


def prepare_forward(
    shape: tuple[int, int, int, int],
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
    """Return a function that launches ``group_norm_act.forward_launches``, which see for the tensors.

    The result may take the place of x or of the residual, never that of the total.

    Args:
        shape: (N, C, H, W), of x, residual, total and result; N may be 0.
        dtype: Of x, residual, total and result.
        device: Where the tensors will be.
        is_channels_last: Whether they are dense in channels_last; else they are contiguous.
        groups, eps, activation: As in the op.
        weight_dtype, bias_dtype: Of the parameters.
        has_residual: Whether ``residual`` is added first; ``total`` is the sum.
        sum_in_place: Whether ``total`` is x or ``residual``, which it must not be otherwise.
        keeps_statistics: Whether ``mean`` and ``rstd`` are stored.
    """

    def example() -> Tensor:
        return _example(shape, dtype, is_channels_last)

    x, residual = example(), example() if has_residual else None
    total = None if residual is None else x if sum_in_place else example()
    statistic = torch.empty(shape[0], groups, device="meta") if keeps_statistics else None
    launches = forward_launches(
        x, residual, _parameter(shape, weight_dtype), _parameter(shape, bias_dtype), eps, activation,
        is_channels_last, total=total, result=example(), mean=statistic, rstd=statistic, groups=groups,
        device=device_of(device),
    )  # fmt: skip
    prepared = _prepare_all(launches, device)
    if not prepared:
        return lambda *addresses: None
    if len(prepared) == 1:
        return _whole_forward(*prepared)
    partials = launches[0].arguments["partial_mean"].numel()
    return _split_forward(*prepared, has_residual, aligned_count(partials), device)


def _whole_forward(launch: PreparedLaunch) -> Forward:
    def launch_all(stream: int, *addresses: int) -> None:
        x, residual, weight, bias, total, result, mean, rstd = addresses
        launch(stream, x, residual, total, weight, bias, result, mean, rstd)

    return launch_all


def _split_forward(
    moments: PreparedLaunch,
    apply: PreparedLaunch,
    has_residual: bool,
    partials: int,
    device: torch.device,
) -> Forward:
    def launch_all(stream: int, *addresses: int) -> None:
        x, residual, weight, bias, total, result, mean, rstd = addresses
        buffer = torch.empty(2 * partials, dtype=torch.float32, device=device)
        means = buffer.data_ptr()
        squares = means + 4 * partials
        moments(stream, x, residual, total, means, squares)
        normalized = total if has_residual else x
        apply(stream, normalized, weight, bias, means, squares, result, mean, rstd)

    return launch_all


def prepare_backward(
    shape: tuple[int, int, int, int],
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
    """Return a function that launches ``group_norm_act.backward_launches``, which see for the tensors.

    Args:
        shape, dtype, device, is_channels_last, groups, activation, weight_dtype, bias_dtype: As in
            :func:`prepare_forward`; the gradients have the dtypes of what they belong to.
        has_grad_total: Whether ``grad_total`` is added to the gradient of x.
        recomputes: Whether ``result``, what the forward pass gave for x, is stored too.
    """

    def example() -> Tensor:
        return _example(shape, dtype, is_channels_last)

    weight, bias = _parameter(shape, weight_dtype), _parameter(shape, bias_dtype)
    statistic = torch.empty(shape[0], groups, device="meta")
    launches = backward_launches(
        example(), example() if has_grad_total else None, example(), weight, bias, statistic, statistic,
        activation, is_channels_last, grad_x=example(), grad_weight=weight, grad_bias=bias,
        result=example() if recomputes else None, device=device_of(device),
    )  # fmt: skip
    *others, last = _prepare_all(launches, device)
    sums = aligned_count(launches[-1].arguments["channel_d"].numel())
    if not others:
        return _empty_backward(last)
    if len(others) == 1:
        return _whole_backward(*others, last, sums, device)
    partials = aligned_count(launches[0].arguments["partial_d"].numel())
    return _split_backward(*others, last, sums, partials, device)


def _empty_backward(last: PreparedLaunch) -> Backward:
    def launch_all(stream: int, *addresses: int) -> None:
        *_, grad_weight, grad_bias, _ = addresses
        last(stream, 0, 0, grad_weight, grad_bias)

    return launch_all


def _whole_backward(
    whole: PreparedLaunch, last: PreparedLaunch, sums: int, device: torch.device
) -> Backward:
    def launch_all(stream: int, *addresses: int) -> None:
        *inputs, grad_x, grad_weight, grad_bias, result = addresses
        buffer = torch.empty(2 * sums, dtype=torch.float32, device=device)
        d = buffer.data_ptr()
        dh = d + 4 * sums
        whole(stream, *inputs, grad_x, result, d, dh)
        last(stream, d, dh, grad_weight, grad_bias)

    return launch_all


def _split_backward(
    first: PreparedLaunch,
    second: PreparedLaunch,
    last: PreparedLaunch,
    sums: int,
    partials: int,
    device: torch.device,
) -> Backward:
    def launch_all(stream: int, *addresses: int) -> None:
        *inputs, grad_x, grad_weight, grad_bias, result = addresses
        buffer = torch.empty(2 * sums + 2 * partials, dtype=torch.float32, device=device)
        d = buffer.data_ptr()
        dh, part_d = d + 4 * sums, d + 8 * sums
        part_dh = part_d + 4 * partials
        grad, _, *others = inputs
        first(stream, grad, *others, d, dh, part_d, part_dh)
        second(stream, *inputs, part_d, part_dh, grad_x, result)
        last(stream, d, dh, grad_weight, grad_bias)

    return launch_all


def _example(shape: tuple[int, ...], dtype: torch.dtype, is_channels_last: bool) -> Tensor:
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape[1], dtype=dtype, device="meta")


def _prepare_all(launches: list[Launch], device: torch.device) -> list[PreparedLaunch]:
    with as_current(device):
        return [prepare(launch) for launch in launches]


__all__ = ["Backward", "Forward", "prepare_backward", "prepare_forward"]
