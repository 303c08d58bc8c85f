"""What a residual block takes and returns, and what its node of autograd's graph keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bitfast.ops.block_links import Link, Parameters
from bitfast.ops.group_norm_act_gradients import NormSettings, Statistics


class Join(NamedTuple):
    """How the block of ViT hybrids ends: ``activation(norm(branch) + shortcut)``.

    Attributes:
        norm: Of the branch; without an activation.
        shortcut_norm: Of the shortcut, if that is a convolution with a norm.
        activation: Of the sum.
    """

    norm: NormSettings
    shortcut_norm: NormSettings | None
    activation: str


class Form(NamedTuple):
    """What determines a block besides its parameters.

    Attributes:
        links: In order. A second convolution of the first computes the shortcut, which is else the input.
        join: None: the branch is added to the shortcut.
    """

    links: tuple[Link, ...]
    join: Join | None = None

    @property
    def has_shortcut_convolution(self) -> bool:
        """Whether a convolution computes the shortcut."""
        return len(self.links[0].convolutions) > 1

    def cut(self, parameters: Sequence[Any]) -> tuple[list[Parameters], tuple[Any, ...]]:
        """Share values, one for each parameter, out to the links; those of the join's norms are left."""
        values = iter(parameters)
        shares = [
            Parameters(take(values, 0 if link.norm is None else 2), take(values, len(link.convolutions)))
            for link in self.links
        ]  # fmt: skip
        return shares, tuple(values)


def take(values: Iterator[Any], count: int) -> tuple[Any, ...]:
    return tuple(next(values) for _ in range(count))


class Drop(NamedTuple):
    """Stochastic depth: the branch is divided by ``keep``, then multiplied by ``mask``, (N, 1, 1, 1)."""

    keep: float
    mask: Tensor


class Computed(NamedTuple):
    """What a block returns.

    Attributes:
        branch: The branch, still to be added to the shortcut; or the block's result.
        shortcut: None: ``branch`` is the block's result.
        moments: Of the channels of the block's result, if they are known.
    """

    branch: Tensor
    shortcut: Tensor | None
    moments: Tensor | None


class Settings(NamedTuple):
    """The arguments of a block that are no tensors.

    Attributes:
        form: What block it is.
        sums: Whether branch and shortcut are added.
        keep: The probability that a branch is kept; 1 without stochastic depth.
    """

    form: Form
    sums: bool
    keep: float


class Kept(NamedTuple):
    """What the backward pass reads, besides the inputs.

    Attributes:
        maps: What each link's norm reads; with a join what its norms read.
        statistics: Of these maps.
        before: What the gradient of the join's activation is computed from.
    """

    maps: list[Tensor]
    statistics: list[Statistics | None]
    before: Tensor | None


Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The branch or the result; the shortcut if a convolution computes it and nobody has added it; x + residual;
moments."""


class Saved(NamedTuple):
    """What a node has kept."""

    parameters: tuple[Tensor, ...]
    mask: Tensor | None
    kept: Kept

    @classmethod
    def of(cls, ctx: Any) -> Saved:
        """Return what the node has saved, which may be asked for once."""
        # Once: whoever recomputes or moves what is saved does so each time it is asked for.
        saved = ctx.saved_tensors
        tensors = iter(saved)
        parameters = take(tensors, len(saved) - 2 - ctx.maps - sum(ctx.counts))
        mask, before = next(tensors), next(tensors)
        maps = [next(tensors) for _ in range(ctx.maps)]
        statistics = [
            Statistics(origin, take(tensors, count)) if count else None
            for origin, count in zip(ctx.origins, ctx.counts, strict=True)
        ]
        return cls(parameters, mask, Kept(maps, statistics, before))


class Needs(NamedTuple):
    """Which gradients a node is asked for."""

    input: bool
    parameters: tuple[bool, ...]

    @classmethod
    def of(cls, ctx: Any) -> Needs:
        """Return which gradients the node is asked for."""
        _, _, x, residual, _, _, *parameters = ctx.needs_input_grad
        return cls(x or residual, tuple(parameters))


__all__ = [
    "Computed",
    "Drop",
    "Form",
    "Join",
    "Kept",
    "Needs",
    "Outputs",
    "Saved",
    "Settings",
]
