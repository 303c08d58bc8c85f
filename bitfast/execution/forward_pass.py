"""The forward pass of a network of bitfast's modules: by a plan, op by op, or by calling its modules.

:class:`~bitfast.BitModel` has this forward pass, and so has a network of another library that
:func:`bitfast.accelerate` has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitfast.execution import op_by_op
from bitfast.execution.operator import compute_as_operator
from bitfast.execution.plan import Request
from bitfast.execution.plans import Plans
from bitfast.execution.setting import planned_setting, prefers_channels_last
from bitfast.execution.steps import Steps
from bitfast.execution.weights import standardized_weights
from bitfast.layers import WeightStandardizedConv2d
from bitfast.memory_format import contiguous_nchw, in_channels_last, is_channels_last
from bitfast.network import BitEmbeddings
from bitfast.torch_state import is_concrete
from bitfast.watching import runs_as_written


class ForwardPass(nn.Module):
    """A base class of networks: computes the stem, the stages and the final norm.

    Subclasses say where these modules are, and set ``plans``.
    """

    plans: Plans
    norm: nn.Module

    def stem_and_stages(self) -> tuple[nn.Module, Sequence[nn.Module]]:
        """Return the stem, which maps images to the first feature map, and the stages in order."""
        raise NotImplementedError

    def final_norm(self) -> nn.Module:
        """Return the module that normalizes the output of the last stage."""
        return self.norm

    def stages_in_order(self) -> Sequence[nn.Module]:
        """Return the stages."""
        return self.stem_and_stages()[1]

    def is_known(self) -> bool:
        """Whether the modules around the stages are those that this class knows, not replaced by others."""
        return True

    def containers(self) -> Sequence[nn.Module]:
        """Return the modules that hold the stages and call them, if the modules are called as written."""
        return ()

    def check(self, pixel_values: Tensor) -> None:
        """Raise TypeError or ValueError unless the network can take the images."""
        stem, _ = self.stem_and_stages()
        if isinstance(stem, BitEmbeddings):
            stem.check(pixel_values)

    def compute(
        self, pixel_values: Tensor, request: Request
    ) -> tuple[Sequence[Tensor], Tensor] | None:
        """Compute the outputs that are asked for.

        Args:
            pixel_values: (N, num_channels, H, W).
            request: Which outputs.

        Returns:
            The wanted outputs, in order, in the layout that plain convolutions would give them, and the result,
            in the layout that the network computes in. None if the modules have to be called one by one: those
            around the stages are hooked or wrapped, or a tracer follows each module.
        """
        computed = self.compute_in_own_layout(pixel_values, request)
        if computed is None or torch.is_grad_enabled() or not computed[0]:
            return computed
        outputs, result = computed
        return list(map(self.layout_of_outputs(pixel_values), outputs)), result

    def compute_features(
        self, pixel_values: Tensor, output_hidden_states: bool
    ) -> tuple[tuple[Tensor, ...] | None, Tensor] | None:
        """Compute the whole network, its final norm included.

        Args:
            pixel_values: (N, num_channels, H, W).
            output_hidden_states: Also return the stem's and each stage's output.

        Returns:
            The hidden states, or None, in the layout that plain convolutions would give them; and the
            normalized output, in the layout that the network computes in. None if the modules have to be called
            one by one.
        """
        if not self.is_known():
            return None
        last = len(self.stages_in_order())
        wanted = tuple(range(last + 1)) if output_hidden_states else ()
        computed = self.compute(pixel_values, Request(last, wanted, is_normed=True))
        if computed is None:
            return None
        hidden_states, normalized = computed
        return tuple(hidden_states) if output_hidden_states else None, normalized

    def compute_in_own_layout(
        self, pixel_values: Tensor, request: Request
    ) -> tuple[Sequence[Tensor], Tensor] | None:
        """Compute what :meth:`compute` does. Without gradients, outputs keep the layout of the computation."""
        if not self.is_known():
            return None
        setting = None if self.training else planned_setting(pixel_values)
        if setting is not None:
            plan = self.plans.find(self, pixel_values, setting, request)
            if plan is not None:
                return plan.execute(pixel_values)
        if not is_concrete(pixel_values):
            return None
        self.check(pixel_values)
        channels_last = prefers_channels_last(pixel_values)
        if is_compiled_inference(self) and all(map(runs_as_written, self.containers())):
            computed = compute_as_operator(self, pixel_values, request, channels_last)
            if computed is not None:
                return computed
        steps = self.plans.steps(self)
        if steps is None or not request.suits(steps):
            return None
        cuts = request.wanted if torch.is_grad_enabled() else ()
        steps = steps.up_to(request.last, cuts, request.is_normed)
        return self._compute_op_by_op(steps, pixel_values, request.wanted, channels_last)

    def _compute_op_by_op(
        self, steps: Steps, images: Tensor, wanted: Sequence[int], channels_last: bool
    ) -> tuple[list[Tensor], Tensor]:
        # With gradients, later stages must read the very tensors that are returned: callers may ask for
        # gradients with respect to them.
        replaced = self.layout_of_outputs(images) if torch.is_grad_enabled() and wanted else None
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        standardize = partial(standardized_weights, channels_last=channels_last)
        return op_by_op.compute(steps, images, standardize, wanted, replaced)

    def layout_of_outputs(self, pixel_values: Tensor) -> Any:
        """Return a function that brings feature maps into the layout that plain convolutions would give them.

        That is channels_last if the images or the weights of the stem are channels_last.
        """
        if is_channels_last(pixel_values):
            return in_channels_last
        stem, _ = self.stem_and_stages()
        # Convolutions are usually direct children, and a walk through all modules takes ten times as long.
        found = _convolutions(stem._modules.values()) or _convolutions(stem.modules())
        return (
            in_channels_last if any(is_channels_last(c.weight) for c in found) else contiguous_nchw
        )

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation, and forget the plans."""
        self.plans.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.plans.clear()
        return super()._apply(fn, recurse)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.plans = Plans(self)


def _convolutions(modules: Iterable[nn.Module | None]) -> list[WeightStandardizedConv2d]:
    return [module for module in modules if isinstance(module, WeightStandardizedConv2d)]


def is_compiled_inference(network: nn.Module) -> bool:
    """Whether ``torch.compile``, not ``torch.export``, traces the network for inference."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not network.training
    )


__all__ = ["ForwardPass", "Request"]
