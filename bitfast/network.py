"""The network of Big Transfer: stem, stages, encoder.

A ResNet-v2 with GroupNorm for BatchNorm and standardized convolution weights. ``layer_type="bottleneck"``
is the post-activation form that ViT hybrids use. Modules are named as in transformers, so that checkpoints
load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast import outputs
from bitfast.blocks import LAYERS, convolution, norm, round_to_multiple
from bitfast.change_notifier import ChangeNotifier
from bitfast.configuration import BitConfig
from bitfast.convolution_owner import ConvolutionOwner
from bitfast.ops.common import is_autocast_on
from bitfast.pooling import MaxPool2d


def stage_widths(config: BitConfig) -> list[int]:
    """Return the channels of each stage's output. There are as many stages as both depths and hidden sizes."""
    sizes = config.hidden_sizes[: len(config.depths)]
    return [round_to_multiple(size * config.width_factor) for size in sizes]


def smallest_image(config: BitConfig) -> int:
    """Return the least height and width of an image whose stem output has at least one pixel."""
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
        x = pixel_values
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> list[nn.Module]:
        """Return the modules that the images go through, in order."""
        return [self.convolution, self.pad, self.norm, self.pooler]

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
        # There may be no parameters: they are sharded, or replaced by buffers.
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


class BitStage(ChangeNotifier):
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
        """Whether the backward pass recomputes the blocks."""
        return self.gradient_checkpointing and self.training

    @property
    def recomputation(self) -> dict[str, Any] | None:
        """The checkpoint options with which the backward pass recomputes the blocks; None if it does not."""
        return self.checkpoint_options if self.is_recomputed else None

    def parts(self) -> list[nn.Module]:
        """Return the blocks, in order."""
        return list(self.layers)

    def calls_each_block(self) -> bool:
        """Whether :meth:`forward` calls the blocks one by one, not a module that contains them."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        for layer in self.parts():
            x = checkpoint(layer, x, **self.checkpoint_options) if self.is_recomputed else layer(x)
        return x


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
        hidden_states = [hidden_state]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
            if not output_hidden_states:
                del hidden_states[0]
        last = hidden_states[-1]
        output = self.output_class(last, tuple(hidden_states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


def drop_path_rates(config: BitConfig) -> list[list[float]]:
    """Return the drop-path rates of each stage's blocks, which rise evenly from 0 to the configured rate."""
    # On the CPU even where the model is built elsewhere, for instance on the meta device.
    rates = torch.linspace(
        0, config.drop_path_rate, sum(config.depths), dtype=torch.float64, device="cpu"
    )
    return [stage.tolist() for stage in rates.float().split(list(config.depths))]
