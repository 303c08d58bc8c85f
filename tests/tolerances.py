"""The accuracy contract, in one place: derived from plain PyTorch's own error, never tuned by hand.

``error(bitfast) <= 2 x error(plain PyTorch in the same dtype) + one rounding``, both errors against the
same computation in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


Triples = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""By name: bitfast's result, plain PyTorch's, and float64's."""


def assert_draws_within_contract(draw: Callable[[], Triples], count: int) -> Triples:
    """Hold the results of several draws of fresh numbers together to the contract; return the first.

    The largest error of a few numbers is much a matter of luck, for us and for plain PyTorch. So draws are
    pooled, and where they fail, five times as many are judged, and again: luck is gone then, a mistake is not.
    """
    draws: list[Triples] = []
    for wanted in (count, 5 * count, 25 * count):
        draws += [draw() for _ in range(wanted - len(draws))]
        try:
            _assert_pooled(draws)
        except AssertionError as error:
            print(f"of {wanted} draws {error}")
            failure = error
        else:
            return draws[0]
    raise failure


def _assert_pooled(draws: list[Triples]) -> None:
    for name in draws[0]:
        pooled = zip(*(results[name] for results in draws), strict=True)
        assert_within_contract(*(torch.stack(tensors) for tensors in pooled), name)
