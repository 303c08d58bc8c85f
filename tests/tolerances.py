"""The accuracy contract, in one place: derived from plain PyTorch's own error, never tuned by hand.

``error(bitfast) <= 2 x error(plain PyTorch in the same dtype) + one rounding``, both errors against the
same computation in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Norm of the difference over norm of the oracle, both in float64."""
    oracle = oracle.double()
    return float((actual.double() - oracle).norm() / oracle.norm().clamp_min(1e-300))


def assert_within_contract(actual: Tensor, plain: Tensor, oracle: Tensor, what: str = "") -> None:
    """Hold ``actual`` to the contract, by the largest and by the root-mean-square difference.

    Args:
        actual: bitfast's result.
        plain: plain PyTorch's, in the same dtype.
        oracle: The same computation in float64, on the same (rounded) inputs.
        what: Named in the failure.
    """
    assert actual.shape == oracle.shape, f"{what}: {actual.shape} is not {oracle.shape}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} is not {plain.dtype}"
    if oracle.numel() == 0:
        return
    oracle = oracle.double()
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    rounding = torch.finfo(actual.dtype).eps / 2
    error, allowed = (actual.double() - oracle).abs(), (plain.double() - oracle).abs()
    largest = 2 * allowed.max() + rounding * oracle.abs().max()
    assert error.max() <= largest, f"{what}: largest error {error.max():.3e} > {largest:.3e}"
    rms = 2 * allowed.square().mean().sqrt() + rounding * oracle.square().mean().sqrt()
    error_rms = error.square().mean().sqrt()
    assert error_rms <= rms, f"{what}: root-mean-square error {error_rms:.3e} > {rms:.3e}"
