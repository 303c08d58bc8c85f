"""How a network of bitfast's modules runs: in which layout, with which weights, how many images at a time.

:class:`~bitfast.BitModel` runs so, and so does a network of somebody else once its modules are bitfast's.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfast.fusion import Deferred, fusable_norm
from bitfast.layers import runs_channels_last, runs_packed, standardized_convolutions
from bitfast.memory import keep_freed_memory
from bitfast.memory_format import contiguous_nchw, is_channels_last, laid_out
from bitfast.network import (
    BitEmbeddings,
    BitStage,
    last_of_stages,
    preparable_convolutions,
    run_stages,
)
from bitfast.ops.common import autocast_dtype
from bitfast.ops.norm_convolution import fuses
from bitfast.prepared_weights import PreparedWeights
from bitfast.watching import is_plain, runs_as_written

SLICE_BYTES = 7 * 2**20
"""Of the first stage's output: what goes through the stages of high resolution together on a CPU."""

FUSED_SLICE_BYTES = 28 * 2**20
"""The same where convolutions normalize what they read: less memory passes by, and all that matters is that
the C library has no map of its own for a feature map, as from 32 MiB on."""

STAGES_IN_SLICES = 2
"""Later ones have small feature maps and large weights, which the whole batch should share."""


class ForwardPass(nn.Module):
    """What runs the stem and the stages of a network; a base class of that network's own.

    Subclasses say where these are, and have a ``prepared_weights``.
    """

    prepared_weights: PreparedWeights

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return what maps images to the first feature map, and what follows it one by one."""
        raise NotImplementedError

    def run(
        self, pixel_values: Tensor, last: int, wanted: Container[int], norm: nn.Module | None
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the stem (0) and the stages from 1 to ``last``.

        Args:
            pixel_values: (N, num_channels, H, W).
            last: The last stage to compute.
            wanted: The stages whose outputs to return.
            norm: Applied to the output of the last, or None.

        Returns:
            The wanted outputs, in order, in the layout that plain convolutions would give them; and what
            ``norm`` makes of the last one, in the layout that the network runs in. Where gradients are
            recorded, the network goes on from the outputs, so that there are gradients with respect to them.
        """
        stem, stages = self.stem_and_stages()
        stages = stages[:last]
        if isinstance(stem, BitEmbeddings):
            stem.check(pixel_values)
        layout = self.layout_of_outputs(pixel_values)
        channels_last = runs_channels_last(pixel_values)
        if channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        convolutions = []
        if not runs_packed(self, pixel_values):
            convolutions = preparable_convolutions(stem, stages)
        with self.prepared_weights.prepared(convolutions, channels_last):
            if torch.is_grad_enabled() and wanted:
                outputs, x = self._through(pixel_values, stem, stages, wanted, layout)
                x = x if norm is None else norm(x)
            else:
                outputs, x = self._at_once(pixel_values, stem, stages, wanted, norm)
                outputs = [*map(layout, outputs)]
        return outputs, x

    def _through(
        self,
        pixel_values: Tensor,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        wanted: Container[int],
        layout: Callable[[Tensor], Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the stem and the stages one by one, each from what the one before returns to the caller.

        Returns:
            The wanted outputs, and the last one.
        """
        outputs = []
        x = pixel_values
        for number, module in enumerate((stem, *stages)):
            x = last_of_stages([module], x) if number else module(x)
            if number in wanted:
                x = layout(x)
                outputs.append(x)
                if number < len(stages) and runs_channels_last(x):
                    x = x.contiguous(memory_format=torch.channels_last)
        return outputs, x

    def _at_once(
        self,
        pixel_values: Tensor,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        wanted: Container[int],
        norm: nn.Module | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the same with norms that what comes before them applies, across stages, too.

        Returns:
            The wanted outputs, and the last one normalized; in the layout that the network runs in.
        """
        x, outputs, done = self._begin(pixel_values, stem, stages, wanted)
        preactivated: Tensor | Deferred | None = None
        following = None if norm is None else fusable_norm(norm)
        steps = run_stages(stages[done:], x, following)
        for number, (x, preactivated) in enumerate(steps, start=done + 1):  # noqa: B007
            if number in wanted:
                outputs.append(x)
        if isinstance(preactivated, Deferred):
            x = preactivated.value()
        elif norm is not None:
            x = norm(x) if preactivated is None else preactivated
        return outputs, x

    def _begin(
        self,
        pixel_values: Tensor,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        wanted: Container[int],
    ) -> tuple[Tensor, list[Tensor], int]:
        """Compute the stem, and in inference on the CPU the stages of high resolution, a few images at a time.

        Their feature maps are then still in a cache when the next layer reads them, and small enough for the
        memory allocator to use the same pages again.

        Returns:
            The last output, the wanted ones, and the number of stages that were computed.
        """
        if runs_packed(self, pixel_values):
            keep_freed_memory()
        early = stages[:STAGES_IN_SLICES]
        size = images_at_a_time(self, pixel_values, stem, early)
        if size >= pixel_values.shape[0]:
            x = stem(pixel_values)
            return x, [x] if 0 in wanted else [], 0
        done = len(early)
        slices = []
        for images in pixel_values.split(size):
            outputs = [stem(images)]
            outputs += [x for x, _ in run_stages(early, outputs[0], None)]
            slices.append([x for n, x in enumerate(outputs) if n in wanted or n == done])
        results = [torch.cat(parts) for parts in zip(*slices, strict=True)]
        return results[-1], results if done in wanted else results[:-1], done

    def layout_of_outputs(self, pixel_values: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what brings feature maps into the layout that plain convolutions would give them.

        That is channels_last if the images or the weights are.
        """
        stem, _ = self.stem_and_stages()
        weights = (convolution.weight for convolution in standardized_convolutions(stem))
        if is_channels_last(pixel_values) or any(map(is_channels_last, weights)):
            return lambda x: laid_out(x, torch.channels_last)
        return contiguous_nchw

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation, and forget the weights kept for inference."""
        self.prepared_weights.drop()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.prepared_weights.drop()
        return super()._apply(fn, recurse)


def images_at_a_time(
    network: ForwardPass, pixel_values: Tensor, stem: nn.Module, early: Sequence[nn.Module]
) -> int:
    """Return how many images should go through the stem and the early stages together.

    It is all of them where nothing is gained: in training, where gradients are recorded, or where a compiler
    plans the memory. Nor is a batch cut where somebody watches a module, and would see it called more than
    once.
    """
    count = pixel_values.shape[0]
    if torch.compiler.is_compiling() or not runs_packed(network, pixel_values):
        return count
    first = next(iter(early), None)
    if first is None or not is_plain(first, BitStage):
        return count
    height, width = (-(-n // 4) for n in pixel_values.shape[2:])
    dtype = autocast_dtype(pixel_values) or pixel_values.dtype
    per_image = first.out_channels * height * width * dtype.itemsize
    is_fused = fuses(pixel_values.device.type, dtype)
    size = max(1, (FUSED_SLICE_BYTES if is_fused else SLICE_BYTES) // per_image)
    if size >= count or not all(
        runs_as_written(m) for part in (stem, *early) for m in part.modules()
    ):
        return count
    return size


__all__ = ["ForwardPass", "images_at_a_time"]
