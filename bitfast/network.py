"""The network of Big Transfer: stem, stages, encoder.

A ResNet-v2 with GroupNorm for BatchNorm and standardized convolution weights. ``layer_type="bottleneck"``
is the post-activation form that ViT hybrids use. Modules are named as in transformers, so that checkpoints
fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast.blocks import (
    LAYERS,
    BitPreActivationBottleneckLayer,
    fusable_norm,
    is_fusable,
    normed,
    round_to_multiple,
)
from bitfast.configuration import BitConfig
from bitfast.layers import (
    Deferred,
    GroupNormActivation,
    MaxPool2d,
    WeightStandardizedConv2d,
    runs_as_written,
    runs_channels_last,
    standardized_convolutions,
)
from bitfast.memory_format import contiguous_nchw
from bitfast.ops.common import is_autocast_on

Module = TypeVar("Module", bound=nn.Module)


def stage_widths(config: BitConfig) -> list[int]:
    """Return the channels of each stage's output; ``depths`` and ``hidden_sizes`` pair up like zip."""
    sizes = config.hidden_sizes[: len(config.depths)]
    return [round_to_multiple(size * config.width_factor) for size in sizes]


def smallest_image(config: BitConfig) -> int:
    """Return the least height and width of which the stem leaves at least one pixel."""
    if config.global_padding == "VALID":
        return 7
    return 5 if config.global_padding == "SAME" and not config.embedding_dynamic_padding else 1


class BitEmbeddings(nn.Module):
    """The stem: 7x7 convolution, zero pad, (norm), 3x3 max-pool; to a quarter of the resolution."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.min_size = smallest_image(config)
        self.convolution = WeightStandardizedConv2d(
            config.num_channels,
            config.embedding_size,
            7,
            stride=2,
            padding=config.global_padding,
        )
        zero_pad = 0 if config.global_padding == "SAME" else 1
        dynamic = config.embedding_dynamic_padding
        if config.layer_type == "preactivation":
            self.pad: nn.Module = nn.Identity()
            self.norm: nn.Module = nn.Identity()
            self.pooler = MaxPool2d(zero_pad=zero_pad, dynamic_padding=dynamic)
        else:
            # The norm stands between the zeros and the pool, so the pool cannot add them itself.
            self.pad = nn.ZeroPad2d(zero_pad) if zero_pad else nn.Identity()
            self.norm = GroupNormActivation(
                config.num_groups, config.embedding_size, config.hidden_act
            )
            self.pooler = MaxPool2d(zero_pad=0, dynamic_padding=dynamic)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (N, num_channels, H, W) to (N, embedding_size, about H/4, about W/4)."""
        self.check(pixel_values)
        x = self.pad(self.convolution(pixel_values))
        made_new = is_fusable(self.convolution) and runs_as_written(self.pad)
        return self.pooler(normed(self.norm, x, made_new))

    def check(self, pixel_values: Tensor) -> None:
        """Raise TypeError or ValueError unless :meth:`forward` can take the images."""
        if not isinstance(pixel_values, Tensor):
            raise TypeError(
                f"pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.num_channels}, height, width), the channels as"
                f" config.num_channels says; got {tuple(pixel_values.shape)}"
            )
        dtype = next(self.parameters()).dtype
        converts = is_autocast_on(pixel_values.device.type)
        if pixel_values.dtype != dtype and not (converts and pixel_values.is_floating_point()):
            raise TypeError(
                f"pixel_values must have the dtype of the model's parameters, {dtype}; got {pixel_values.dtype}"
            )
        # While tracing, a symbolic size must not be compared: that would restrict the program to it.
        if not torch.compiler.is_compiling() and min(pixel_values.shape[2:]) < self.min_size:
            raise ValueError(
                f"pixel_values must be at least {self.min_size} pixels high and wide for this configuration,"
                f" got {tuple(pixel_values.shape)}"
            )


class BitStage(nn.Module):
    """Blocks of one width; the first of them changes the width and the resolution."""

    def __init__(
        self,
        config: BitConfig,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        dilation: int,
        drop_path_rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        layer_class = LAYERS[config.layer_type]
        first_dilation = 1 if dilation in (1, 2) else 2
        self.layers = nn.Sequential(
            *(
                layer_class(
                    config,
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    stride=stride if index == 0 else 1,
                    dilation=first_dilation if index == 0 else dilation,
                    drop_path_rate=rate,
                    is_first_layer=index == 0,
                )
                for index, rate in enumerate(drop_path_rates)
            )
        )
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {}

    @property
    def is_recomputed(self) -> bool:
        """Whether the backward pass runs the blocks a second time."""
        return self.gradient_checkpointing and self.training

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride), in the layout of x."""
        if not runs_channels_last(x) or x.is_contiguous(memory_format=torch.channels_last):
            return self.run(x, None, None)[0]
        x = x.contiguous(memory_format=torch.channels_last)
        return contiguous_nchw(self.run(x, None, None)[0])

    def run(
        self,
        x: Tensor,
        preactivated: Tensor | Deferred | None,
        following: GroupNormActivation | None,
    ) -> tuple[Tensor, Tensor | Deferred | None]:
        """Do the same in the layout at hand, each block applying the norm that comes next: see its ``run``."""
        layers: list[Any] = list(self.layers)
        next_norms = [*(first_norm(layer) for layer in layers[1:]), following]
        owns_x = False
        for layer, next_norm in zip(layers, next_norms, strict=False):  # a stage may be empty
            if self.is_recomputed:
                x, preactivated = checkpoint(layer, x, **self.checkpoint_options), None
            elif first_norm(layer) is None:
                x, preactivated = layer(x), None
                owns_x = False
            else:
                x, preactivated = layer.run(x, preactivated, next_norm, owns_x)
                owns_x = True
        return x, preactivated


def is_plain(module: nn.Module | None, cls: type[Module]) -> TypeGuard[Module]:
    """Say whether the module does what its class ``cls`` says: nobody's subclass computes something else."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def preparable_convolutions(
    stem: nn.Module, stages: Sequence[nn.Module]
) -> list[WeightStandardizedConv2d]:
    """Return the convolutions whose weights may be standardized before the forward pass.

    With gradients these are not those of blocks that may run a second time, in the backward pass, when
    nothing is prepared: where activations are recomputed, by a stage or by whoever wraps or hooks a module.
    """
    if not torch.is_grad_enabled():
        return standardized_convolutions(stem, *stages)
    modules: list[nn.Module] = []
    if type(stem) in (BitEmbeddings, nn.Sequential) and runs_as_written(stem):
        modules.append(stem)
    for stage in stages:
        if is_plain(stage, BitStage) and runs_as_written(stage) and not stage.is_recomputed:
            modules += [
                layer
                for layer in stage.layers
                if type(layer) in LAYERS.values() and runs_as_written(layer)
            ]
    return standardized_convolutions(*modules)


def first_norm(module: nn.Module) -> GroupNormActivation | None:
    """Return the norm that a stage or block begins with, if what comes before it may apply it.

    It may where nobody watches the modules in between, which are then not called as such.
    """
    inner: nn.Module | None = module
    if is_plain(inner, BitStage):
        if not runs_as_written(inner) or not runs_as_written(inner.layers):
            return None
        if inner.is_recomputed:
            return None
        inner = next(iter(inner.layers), None)
    if type(inner) is not BitPreActivationBottleneckLayer or not runs_as_written(inner):
        return None
    return fusable_norm(inner.norm1)


class BitEncoder(nn.Module):
    """The stages, one after the other."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        rates = drop_path_rates(config)
        in_channels, current_stride, dilation = config.embedding_size, 4, 1
        for index, out_channels in enumerate(stage_widths(config)):
            stride = 1 if index == 0 else 2
            if current_stride >= config.output_stride:
                dilation *= stride
                stride = 1
            self.stages.append(
                BitStage(
                    config,
                    in_channels,
                    out_channels,
                    stride=stride,
                    dilation=dilation,
                    drop_path_rates=rates[index],
                )
            )
            in_channels = out_channels
            current_stride *= stride

    def forward(self, x: Tensor) -> Tensor:
        """Map the stem's output to the last stage's."""
        for output, _ in run_stages(list(self.stages), x, None):
            x = output
        return x


def run_stages(
    stages: Sequence[Any], x: Tensor, following: GroupNormActivation | None
) -> Iterator[tuple[Tensor, Tensor | Deferred | None]]:
    """Yield the outputs of stages, one by one, each with what its last block's ``run`` returns.

    Args:
        stages: One after the other.
        x: The input of the first of them.
        following: The norm that comes after the last of them, if that is to apply it.
    """
    next_norms = [*(first_norm(stage) for stage in stages[1:]), following]
    preactivated: Tensor | Deferred | None = None
    for stage, next_norm in zip(stages, next_norms, strict=False):
        if first_norm(stage) is None:
            x, preactivated = stage(x), None
        else:
            x, preactivated = stage.run(x, preactivated, next_norm)
        yield x, preactivated


def drop_path_rates(config: BitConfig) -> list[list[float]]:
    """Return each stage's drop-path rates: over all blocks they rise evenly from 0 to the configured."""
    # On the CPU even where the model is built elsewhere, for instance on the meta device.
    rates = torch.linspace(
        0, config.drop_path_rate, sum(config.depths), dtype=torch.float64, device="cpu"
    )
    return [stage.tolist() for stage in rates.float().split(list(config.depths))]
