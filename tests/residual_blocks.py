"""Residual blocks as hypothesis draws them, and what they compute in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.ops.residual_block import (
    Convolution,
    Drop,
    Form,
    Join,
    Link,
    NormSettings,
    residual_block,
)
from tests.drawn_cases import SEEDS
from tests.plain_ops import plain_norm

EPS = 1e-5
KEEP = 0.75


@dataclass(frozen=True)
class BlockCase:
    """One block and its input.

    Attributes:
        is_preactivation: Whether it begins with a norm; else it ends with one, and an activation.
        channels: Of the input, between the convolutions, and of the output, in groups.
        has_shortcut: Whether a convolution computes the shortcut; else the output is like the input.
        is_same: Whether the padding is TensorFlow's.
        adds: Whether a residual is added to the input first.
        sums: Whether branch and shortcut are added by the op.
        drops: Whether there is stochastic depth.
        trained: Which of the inputs that may need a gradient do: a bit each.
    """

    is_preactivation: bool
    batch: int
    groups: int
    channels: tuple[int, int, int]
    size: tuple[int, int]
    stride: int
    has_shortcut: bool
    is_same: bool
    adds: bool
    sums: bool
    drops: bool
    activation: str
    dtype: torch.dtype
    layout: torch.memory_format
    seed: int
    trained: int = -1

    @property
    def form(self) -> Form:
        """What the op is told."""
        shape = (self.stride, self.stride)
        zeros, one = (0, 0), (1, 1)
        window = ((3, 3), shape, one) if self.is_same else None
        first = [Convolution((one, zeros, one))]
        if self.has_shortcut:
            first.append(Convolution((shape, zeros, one)))
        second = Convolution((shape, zeros if self.is_same else one, one), window)
        third = Convolution((one, zeros, one))
        norm = NormSettings(self.groups, EPS, self.activation)
        links = (
            Link(norm if self.is_preactivation else None, tuple(first)),
            Link(norm, (second,)),
            Link(norm, (third,)),
        )
        if self.is_preactivation:
            return Form(links)
        bare = norm._replace(activation="none")
        return Form(links, Join(bare, bare if self.has_shortcut else None, self.activation))

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters, in the op's order."""
        given, mid, out = (n * self.groups for n in self.channels)
        first: list[tuple[int, ...]] = [(mid, given, 1, 1)]
        if self.has_shortcut:
            first.append((out, given, 1, 1))
        norms = [(given,)] * 2 if self.is_preactivation else []
        middle = [(mid,), (mid,), (mid, mid, 3, 3), (mid,), (mid,), (out, mid, 1, 1)]
        last = 0 if self.is_preactivation else 4 if self.has_shortcut else 2
        return [*norms, *first, *middle, *[(out,)] * last]


def whole(case: BlockCase) -> BlockCase:
    """Take from a case what cannot be."""
    if not case.has_shortcut:
        given, mid, _ = case.channels
        case = replace(case, channels=(given, mid, given), stride=1)
    return case if case.is_preactivation else replace(case, adds=False, sums=True)


def block_cases(dtypes: Sequence[torch.dtype], **fixed: Any) -> st.SearchStrategy[BlockCase]:
    few = st.integers(1, 3)
    drawn: dict[str, Any] = {
        "is_preactivation": st.booleans(),
        "batch": few,
        "groups": few,
        "channels": st.tuples(few, few, few),
        "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "stride": st.integers(1, 3),
        "has_shortcut": st.booleans(),
        "is_same": st.booleans(),
        "adds": st.booleans(),
        "sums": st.booleans(),
        "drops": st.booleans(),
        "activation": st.sampled_from([n for n in sorted(ACTIVATIONS) if n != "none"]),
        "dtype": st.sampled_from(dtypes),
        "layout": st.sampled_from([torch.contiguous_format, torch.channels_last]),
        "seed": SEEDS,
    }
    return st.builds(BlockCase, **{**drawn, **fixed}).map(whole)


@dataclass(frozen=True)
class Inputs:
    """The tensors that a block is given."""

    x: Tensor
    residual: Tensor | None
    mask: Tensor | None
    parameters: list[Tensor]

    @classmethod
    def of(cls, case: BlockCase) -> Inputs:
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
            return x.contiguous(memory_format=case.layout) if x.dim() == 4 else x

        shape = case.batch, case.channels[0] * case.groups, *case.size
        parameters = []
        for number, of_one in enumerate(case.shapes()):
            fan = of_one[1] * of_one[2] * of_one[3] if len(of_one) == 4 else 4
            parameters.append(normal(*of_one) / fan**0.5)
            if len(of_one) == 1 and len(case.shapes()[number - 1]) == 4:
                parameters[-1] = parameters[-1] + 1
        mask = None
        if case.drops:
            mask = (torch.arange(case.batch) % 3 != 1).to(case.dtype).view(-1, 1, 1, 1)
        inputs = cls(normal(*shape), normal(*shape) if case.adds else None, mask, parameters)
        for number, tensor in enumerate(inputs.leaves()):
            tensor.requires_grad_(bool(case.trained >> number & 1))
        return inputs

    def leaves(self) -> list[Tensor]:
        """Return what may need a gradient, in order."""
        return [self.x, *([] if self.residual is None else [self.residual]), *self.parameters]

    def trained(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves() if leaf.requires_grad]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same numbers in another dtype, all of which need a gradient but the mask.

        Where x does not, torch's own group_norm reads memory that is not there, in channels_last (2.13).
        """

        def moved(x: Any) -> Any:
            return None if x is None else x.detach().to(dtype, copy=True).requires_grad_()

        mask = None if self.mask is None else self.mask.to(dtype)
        return Inputs(moved(self.x), moved(self.residual), mask, list(map(moved, self.parameters)))


def computed(case: BlockCase, inputs: Inputs, moments: Tensor | None = None) -> list[Tensor]:
    """Return what the op computes: the sum, or branch and shortcut."""
    drop = None if inputs.mask is None else Drop(KEEP, inputs.mask)
    found = residual_block(
        case.form, inputs.x, inputs.residual, moments, drop, inputs.parameters, sums=case.sums
    )
    return [found.branch] if found.shortcut is None else [found.branch, found.shortcut]


def plain(case: BlockCase, inputs: Inputs) -> list[Tensor]:
    """Return what PyTorch computes, in the dtype of the inputs and the case's layout.

    Its own convolutions round differently in each layout.
    """
    rest: Iterator[Tensor] = iter(inputs.parameters)
    x = inputs.x if inputs.residual is None else inputs.x + inputs.residual

    def norm(x: Tensor, activation: str = case.activation) -> Tensor:
        result = plain_norm(x, next(rest), next(rest), case.groups, activation)
        return result.contiguous(memory_format=case.layout)

    read = norm(x) if case.is_preactivation else x
    branch = F.conv2d(read, next(rest))
    shortcut = F.conv2d(read, next(rest), stride=case.stride) if case.has_shortcut else x
    read = norm(branch)
    if case.is_same:
        sides = [side for n in reversed(case.size) for side in _same(n, case.stride)]
        branch = F.conv2d(F.pad(read, sides), next(rest), stride=case.stride)
    else:
        branch = F.conv2d(read, next(rest), stride=case.stride, padding=1)
    branch = F.conv2d(norm(branch), next(rest))
    if not case.is_preactivation:
        branch = norm(branch, "none")
        shortcut = norm(shortcut, "none") if case.has_shortcut else shortcut
    if inputs.mask is not None:
        branch = branch.div(KEEP) * inputs.mask
    if not case.is_preactivation:
        return [ACTIVATIONS[case.activation](branch + shortcut)]
    return [branch + shortcut] if case.sums else [branch, shortcut]


def _same(size: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's padding before and after, of a window of 3."""
    total = max(0, (-(-size // stride) - 1) * stride + 3 - size)
    return total // 2, total - total // 2
