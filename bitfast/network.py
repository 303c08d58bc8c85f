"""The network of Big Transfer: stem, stages, encoder.

A ResNet-v2 with GroupNorm for BatchNorm and standardized convolution weights. ``layer_type="bottleneck"``
is the post-activation form that ViT hybrids use. Modules are named as in transformers, so that checkpoints
fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast import outputs
from bitfast.blocks import (
    LAYERS,
    BitPreActivationBottleneckLayer,
    convolution,
    norm,
    round_to_multiple,
)
from bitfast.configuration import BitConfig
from bitfast.convolution_owner import ConvolutionOwner
from bitfast.fusion import Deferred, fusable_norm, is_fusable, normed
from bitfast.layers import (
    GroupNormActivation,
    WeightStandardizedConv2d,
    runs_channels_last,
    standardized_convolutions,
)
from bitfast.memory_format import contiguous_nchw
from bitfast.ops.common import is_autocast_on
from bitfast.pooling import MaxPool2d
from bitfast.watching import is_plain, runs_as_written


def stage_widths(config: BitConfig) -> list[int]:
    """Return the channels of each stage's output; ``depths`` and ``hidden_sizes`` pair up like zip."""
    sizes = config.hidden_sizes[: len(config.depths)]
    return [round_to_multiple(size * config.width_factor) for size in sizes]


def smallest_image(config: BitConfig) -> int:
    """Return the least height and width of which the stem leaves at least one pixel."""
    if config.global_padding == "VALID":
        return 7
    return 5 if config.global_padding == "SAME" and not config.embedding_dynamic_padding else 1


class BitEmbeddings(ConvolutionOwner):
    """The stem: 7x7 convolution, zero pad, (norm), 3x3 max-pool; to a quarter of the resolution."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.min_size = smallest_image(config)
        self.convolution = convolution(config, config.num_channels, config.embedding_size, 7, 2)
        self.pooler = MaxPool2d(3, 2, use_dynamic_padding=config.embedding_dynamic_padding)
        self.pad: nn.Module = (
            nn.Identity() if config.global_padding == "SAME" else nn.ConstantPad2d(1, 0.0)
        )
        self.norm: nn.Module = (
            nn.Identity()
            if config.layer_type == "preactivation"
            else norm(config, config.embedding_size)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (N, num_channels, H, W) to (N, embedding_size, about H/4, about W/4)."""
        self.check(pixel_values)
        return in_best_layout(self.run, pixel_values)

    def run(self, pixel_values: Tensor) -> Tensor:
        """Do the same in the layout at hand."""
        x = self.convolution(pixel_values)
        zeros = zeros_of(self.pad)
        if zeros is None:
            return self.pooler(normed(self.norm, self.pad(x), made_new=False))
        if type(self.norm) is not nn.Identity:  # it stands between the zeros and the pool
            x = self.pad(x) if zeros else x
            return self.pooler(normed(self.norm, x, is_fusable(self.convolution)))
        if is_plain(self.pooler, MaxPool2d) and all(map(runs_as_written, (self.norm, self.pooler))):
            return self.pooler.with_zeros(x, zeros)
        return self.pooler(self.norm(self.pad(x)))

    def check(self, pixel_values: Tensor) -> None:
        """Raise TypeError or ValueError unless :meth:`forward` can take the images."""
        if isinstance(pixel_values, torch.fx.Proxy):
            return
        if not isinstance(pixel_values, Tensor):
            raise TypeError(
                f"pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.num_channels}, height, width), the channels as"
                f" config.num_channels says; got {tuple(pixel_values.shape)}"
            )
        # Sharded, or with buffers in their place, there may be no parameters.
        dtype = next((p.dtype for p in self.parameters()), pixel_values.dtype)
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


def zeros_of(pad: nn.Module) -> int | None:
    """Return how many zeros a module puts on each side, if it does nothing else and nobody watches it."""
    if not runs_as_written(pad):
        return None
    if type(pad) is nn.Identity:
        return 0
    if type(pad) not in (nn.ConstantPad2d, nn.ZeroPad2d) or pad.value != 0:
        return None
    zeros, *others = pad.padding  # type: ignore[misc]
    return zeros if zeros >= 0 and all(n == zeros for n in others) else None


def in_best_layout(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x) in the layout of x, computed in the one that is fastest."""
    if not runs_channels_last(x) or x.is_contiguous(memory_format=torch.channels_last):
        return function(x)
    return contiguous_nchw(function(x.contiguous(memory_format=torch.channels_last)))


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
        return in_best_layout(lambda x: self.run(x, None, None)[0], x)

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
    if isinstance(stem, (BitEmbeddings, nn.Sequential)) and runs_as_written(stem):
        modules.append(stem)
    for stage in stages:
        if is_plain(stage, BitStage) and runs_as_written(stage) and not stage.is_recomputed:
            modules += [
                layer
                for layer in stage.layers
                if any(is_plain(layer, cls) for cls in LAYERS.values()) and runs_as_written(layer)
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

    output_class: ClassVar[Any] = outputs.BaseModelOutputWithNoAttention

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

    def forward(
        self, hidden_state: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> Any:
        """Compute the stages.

        Args:
            hidden_state: The stem's output, (N, embedding_size, H, W).
            output_hidden_states: Also return the input and each stage's output.
            return_dict: False: return a plain tuple of the values that are not None.

        Returns:
            BaseModelOutputWithNoAttention, or a tuple.
        """
        stages = list(self.stages)
        if output_hidden_states:
            hidden_states = [hidden_state]
            for stage in stages:
                hidden_states.append(stage(hidden_states[-1]))
            last = hidden_states[-1]
        else:
            last = in_best_layout(lambda x: last_of_stages(stages, x), hidden_state)
        output = self.output_class(last, tuple(hidden_states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


def last_of_stages(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return the output of the last stage, for the input of the first."""
    for output, _ in run_stages(stages, x, None):
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
