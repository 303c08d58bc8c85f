"""The norms and the convolution weights of whole models, and the kernel launches that they take."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bitfast import BitConfig, BitModel, layers
from bitfast.execution import nodes, op_by_op
from bitfast.kernels import group_norm_act as norm_kernels
from bitfast.kernels import weight_standardization as weight_kernels
from bitfast.kernels.launch import Launch
from bitfast.ops.weight_standardization import starts_of


def wide_resnet(width: int, depths: list[int]) -> dict[str, Any]:
    sizes = [width * size for size in (256, 512, 1024, 2048)]
    return {"embedding_size": 64 * width, "hidden_sizes": sizes, "depths": depths}


MODELS: dict[str, dict[str, Any]] = {
    "R50x1": {},
    "R101x3": wide_resnet(3, [3, 4, 23, 3]),
    "R152x4": wide_resnet(4, [3, 8, 36, 3]),
}
"""What differs from the default configuration."""

GROUPS = 32
EPS = 1e-5


class Norm(NamedTuple):
    """One norm of a model, and its feature map."""

    channels: int
    height: int
    width: int
    has_residual: bool  # added first; the sum is kept
    is_sum_used: bool  # elsewhere too, so that the backward pass adds a gradient to its own

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def numel(self) -> int:
        """Elements of one image's feature map."""
        return self.channels * self.pixels


class Shapes(NamedTuple):
    """A model's norms and its standardized weights, each in order of execution."""

    norms: list[Norm]
    weights: list[tuple[int, ...]]


@lru_cache
def shapes_of(model: str, image_size: int) -> Shapes:
    """Return what a model of ``MODELS`` runs on square images.

    It runs, forward and backward, on tensors without contents: what is fused here is what it really fuses. Its
    blocks run step by step, which call the norms that a block's node calls.
    """
    weights: list[tuple[int, ...]] = []
    maps: list[Any] = []
    residuals, used_sums = set[int](), set[int]()  # numbers of norms

    def standardize(weight: Tensor, *_: Any) -> Tensor:
        weights.append(tuple(weight.shape))
        return weight

    def normalize(x: Tensor, *_: Any) -> Tensor:
        maps.append(x.shape[1:])
        return x.clone()

    def add_and_normalize(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        number = len(maps)
        residuals.add(number)
        total = x + residual
        total.register_hook(lambda _: used_sums.add(number))  # called if it gets a gradient
        return total, normalize(x + residual)

    with (
        torch.device("meta"),
        mock.patch.object(layers, "weight_standardization", standardize),
        mock.patch.object(nodes.Node, "suits", return_value=False),
        mock.patch.object(nodes.StemNode, "suits", return_value=False),
        mock.patch.object(op_by_op, "group_norm_act", normalize),
        mock.patch.object(op_by_op, "add_group_norm_act", add_and_normalize),
    ):
        network = BitModel(BitConfig(num_groups=GROUPS, **MODELS[model])).train()
        features = network(torch.empty(1, 3, image_size, image_size)).pooler_output
        features.backward(torch.empty_like(features))
    norms = [Norm(c, h, w, n in residuals, n in used_sums) for n, (c, h, w) in enumerate(maps)]
    return Shapes(norms, weights)


# ---- the launches that a model takes ----------------------------------------------------------------

empty = partial(torch.empty, device="meta")


class Dtypes(NamedTuple):
    """Of the feature maps and prepared weights, and of the parameters that they come from."""

    compute: torch.dtype
    parameter: torch.dtype


def norm_launches(
    norm: Norm,
    batch: int,
    dtypes: Dtypes,
    *,
    backward: bool,
    activation: str = "relu",
    is_channels_last: bool = True,
    groups: int = GROUPS,
    keeps_statistics: bool = True,
    in_place: bool = False,
    recomputes: bool = False,
) -> list[Launch]:
    """Return the launches of one norm as they are planned without a GPU.

    ``keeps_statistics`` and ``in_place`` (the sum takes the place of x) are of forward launches, ``recomputes``
    (they give the result again) of backward launches.
    """
    shape = (batch, norm.channels, norm.height, norm.width)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    x = empty(shape, dtype=dtypes.compute, memory_format=layout)
    parameter = empty(norm.channels, dtype=dtypes.parameter)
    statistic = empty(batch, groups)
    if backward:
        return norm_kernels.backward_launches(
            x, x if norm.is_sum_used else None, x, parameter, parameter, statistic, statistic,
            activation, is_channels_last, grad_x=x, grad_weight=parameter, grad_bias=parameter,
            result=torch.empty_like(x) if recomputes else None,
        )  # fmt: skip
    other = torch.empty_like(x) if norm.has_residual else None
    total = (x if in_place else torch.empty_like(x)) if norm.has_residual else None
    kept = statistic if keeps_statistics else None
    return norm_kernels.forward_launches(
        x, other, parameter, parameter, EPS, activation, is_channels_last,
        total=total, result=torch.empty_like(x), mean=kept, rstd=kept, groups=groups,
    )  # fmt: skip


def weight_launch(
    shape: tuple[int, ...], dtypes: Dtypes, *, backward: bool, to_channels_last: bool
) -> Launch:
    """Return the launch for one contiguous weight."""
    weight, result = empty(shape, dtype=dtypes.parameter), empty(shape, dtype=dtypes.compute)
    mean = rstd = empty(shape[0])
    if backward:
        backward_launch = weight_kernels.backward_launch
        return backward_launch(result, weight, mean, rstd, to_channels_last, grad_weight=weight)
    launch = weight_kernels.forward_launch
    return launch(weight, 1e-8, to_channels_last, result=result, mean=mean, rstd=rstd)


def all_weights_launch(
    shapes: list[tuple[int, ...]], dtypes: Dtypes, *, backward: bool, to_channels_last: bool = True
) -> Launch:
    """Return the launch for all weights of a model, contiguous."""
    weights = [empty(shape, dtype=dtypes.parameter) for shape in shapes]
    starts, end = starts_of([weight.numel() for weight in weights])
    table: Any = weight_kernels.table_of(weights, starts, to_channels_last)
    buffer = empty(end, dtype=dtypes.compute)
    mean = rstd = empty(sum(shape[0] for shape in shapes))
    if backward:
        grads = empty(end, dtype=dtypes.parameter)
        backward_launch = weight_kernels.backward_all_launch
        return backward_launch(table, buffer, weights, mean, rstd, grad_weight=grads)
    launch = weight_kernels.forward_all_launch
    return launch(table, weights, 1e-8, result=buffer, mean=mean, rstd=rstd)
