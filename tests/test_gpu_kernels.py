"""What the GPU report holds the norms' gradients to, and how exact their order of summation is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu_kernels
from bench.gpu_timing import Session
from bitfast.kernels import group_norm_act as kernels
from bitfast.kernels.launch import H100

BATCH, CHANNELS, SIZE, GROUPS = 128, 256, 56, 32
"""Of the case whose gradient of the weight was 1.4e-4 from float64 on the H100."""


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the first axis, halves onto halves, as the threads of a program do."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = values[:half] + values[half:]
    return values[0]


def sum_of_range(values: Tensor, block: int) -> Tensor:
    """Sum (images, pixels, channels) over the pixels as _range_sums does."""
    total = torch.zeros(block, *values[:, 0].shape)
    for first in range(0, values.shape[1], block):
        rows = values[:, first : first + block].transpose(0, 1)
        total[: len(rows)] += rows
    return tree_sum(total)


def sum_of_rows(values: Tensor, block: int = 64) -> Tensor:
    """Sum (rows, channels) over the rows as parameter_gradients_kernel does."""
    total = torch.zeros(block, values.shape[1])
    for rows in values.split(block):
        total[: len(rows)] += rows
    return tree_sum(total)


@pytest.fixture(scope="module")
def block() -> dict[str, Tensor]:
    return draw()


def draw() -> dict[str, Tensor]:
    """What one column of programs sums up at that size, and the ReLU's input, in both precisions."""
    pixels, per_group = SIZE * SIZE, CHANNELS // GROUPS
    x = torch.randn(BATCH, pixels, per_group)
    grad = torch.randn(x.shape)
    exact = x.double()
    mean, variance = exact.mean((1, 2), True), exact.var((1, 2), False, keepdim=True)
    rstd = (variance + 1e-5).rsqrt()
    # Not drawn: how much an element at the kink weighs depends on them.
    weight, bias = torch.linspace(0.5, 1.5, per_group), torch.linspace(-2, 2, per_group)
    h = (x - mean.float()) * rstd.float()
    exact_h = (exact - mean) * rstd
    return {
        "grad": grad, "h": h, "exact h": exact_h,
        "z": h * weight + bias, "exact z": exact_h * weight.double() + bias.double(),
    }  # fmt: skip


def expected_norm(block: dict[str, Tensor]) -> float:
    """Of the channels' sums, over draws of the gradient; in a single draw they may cancel to a third of it."""
    return float((block["exact h"] * (block["exact z"] > 0)).norm())


def pairwise_sum(values: Tensor) -> Tensor:
    """Sum (images, pixels, channels) over images and pixels, halves onto halves."""
    rows = values.flatten(0, 1)
    count = 1 << (len(rows) - 1).bit_length()
    return tree_sum(F.pad(rows, (0, 0, 0, count - len(rows))))


def test_the_order_of_summation_is_as_exact_as_a_pairwise_one() -> None:
    """At full size, against float64: a pairwise sum of everything could not be told from it."""
    tiling = kernels.choose_tiling(BATCH, SIZE * SIZE, CHANNELS, GROUPS, 4, True, 2, H100)
    assert (tiling.is_whole, tiling.splits) == (False, 1)
    errors = []
    for _ in range(4):  # draws of eight sums each
        block = draw()
        passes = block["exact z"] > 0
        terms = torch.where(passes, block["grad"] * block["h"], 0.0)
        exact = (block["grad"].double() * block["exact h"] * passes).sum((0, 1))
        sums = sum_of_rows(sum_of_range(terms, tiling.block_pixels)), pairwise_sum(terms)
        errors.append([float((s.double() - exact).norm()) / expected_norm(block) for s in sums])
    ours, pairwise = torch.tensor(errors).square().mean(0).sqrt()
    assert ours < 1e-6
    assert ours < 2 * pairwise + 2**-23


def test_one_element_at_the_kink_outweighs_all_roundings(block: dict[str, Tensor]) -> None:
    """It is what the H100 showed: an element that float32 has on the other side of 0."""
    of_all_channels = expected_norm(block) * math.sqrt(GROUPS)
    at_the_kink = block["exact z"].abs() < 1e-3
    jumps = (block["grad"] * block["h"])[at_the_kink].abs() / of_all_channels
    assert jumps.median() > 2e-5
    assert jumps.max() > 1e-4


def test_a_gradient_that_rounding_decides_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every channel has a pixel at the kink; each contestant has some of them on the other side."""

    class AtTheKink(gpu_kernels.Norms):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            x, grad = self.nchw[0]
            h = F.group_norm(x.double(), self.groups, self.weight.double())
            self.bias = -h[0, :, 2, 3].float()
            grad[0, :, 2, 3] = 3.0
            self.last[0][1].copy_(grad)

    monkeypatch.setattr(gpu_kernels, "Norms", AtTheKink)
    monkeypatch.setattr(gpu_kernels, "bandwidth", lambda *_: 1.0)
    rows = tmp_path / "rows.jsonl"
    session = Session("group_norm_act", "cpu", False, True, rows, math.inf)
    gpu_kernels.norm_contest(session, "forward+backward", 2, 64, 9, torch.float32, False)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["status"] for row in found] == ["checked"] * 3, found
    assert max(row["check"] for row in found) < 1e-5
