"""A network's steps computed one op after the other: differentiable, traceable, on any device and backend.

Networks are trained this way, and use it in inference where no plan can be made. A residual block is one op
where that can be (:mod:`bitfast.execution.nodes`). A residual is added together with the norm that comes next,
so that the sum is written once and read once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfast.activations import activation_name
from bitfast.blocks import add_to_shortcut
from bitfast.execution.nodes import AnyNode, Node, parameters_of
from bitfast.execution.steps import (
    IMAGES,
    Block,
    CallModule,
    Convolve,
    Join,
    Normalize,
    Pool,
    Step,
    Steps,
    ZeroPad,
    last_reads,
    normalized,
)
from bitfast.execution.weights import Weights
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.norm_convolution import may_train
from bitfast.torch_state import is_concrete

Layout = Callable[[Tensor], Tensor]
"""Returns a tensor in another memory format."""

Standardize = Callable[[Sequence[WeightStandardizedConv2d]], Weights]
"""Returns the standardized weights of those convolutions that do not standardize them themselves."""


def compute(
    steps: Steps,
    images: Tensor,
    standardize: Standardize,
    wanted: Container[int],
    replaced: Layout | None = None,
    source: int = IMAGES,
) -> tuple[list[Tensor], Tensor]:
    """Compute a network.

    Args:
        steps: Of the network.
        images: (N, num_channels, H, W), in the layout to compute in.
        standardize: Called for the stem and the first stage, then for each other stage before it is computed.
            So autograd has the gradients of a stage's weights as soon as it is through with that stage.
        wanted: The numbers of the stages (0 is the stem) whose outputs to return.
        replaced: Applied to each wanted output. The next step reads what it returns, in the layout to compute
            in. None: the outputs are returned as they are.
        source: The number of the value that ``images`` stand for, if the steps do not begin with the images.

    Returns:
        The wanted outputs, in order, and the result.
    """
    return _Pass(steps, images, wanted, replaced, source).compute(standardize)


class _Pass:
    """One computation of a network."""

    def __init__(
        self,
        steps: Steps,
        images: Tensor,
        wanted: Container[int],
        replaced: Layout | None,
        source: int,
    ) -> None:
        self.steps = steps
        self.replaced = replaced
        self.values: dict[int, Tensor] = {source: images}
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}
        """Values that are still to be computed: branch and shortcut, which the next norm adds."""
        self.moments: dict[int, Tensor] = {}
        """Of the channels of values, as ``norm_convolution`` computes them."""
        self.weights: Weights = {}
        self.may_use_nodes = is_concrete(images)
        self.adds: dict[torch.dtype, bool] = {}
        """Whether convolutions add to the shortcut themselves, by the dtype of the feature maps."""
        self.replacements: list[Tensor] = []
        self.wanted = [value for number, value in enumerate(steps.outputs) if number in wanted]
        kept = {steps.result} if replaced is not None else {steps.result, *self.wanted}
        self.dead = iter(last_reads(steps.all(), kept))

    def compute(self, standardize: Standardize) -> tuple[list[Tensor], Tensor]:
        steps = self.steps
        first, *others = steps.stages or ((),)
        for blocks in ((steps.stem, *first), *others, (steps.norm,)):
            self.weights = standardize(_convolutions_of(blocks))
            for block in blocks:
                self.compute_block(block)
        outputs = self.replacements if self.replaced is not None else map(self.read, self.wanted)
        return list(outputs), self.read(steps.result)

    def compute_block(self, block: Block) -> None:
        node = self.steps.nodes.get(block[-1].result) if block and self.may_use_nodes else None
        if node is not None and self.compute_node(node, block):
            self.forget([value for _ in block for value in next(self.dead)])
            self.replace(block[-1].result)
            return
        for step in block:
            self.compute_step(step)
            self.forget(next(self.dead))
            self.replace(step.result)

    def compute_node(self, node: AnyNode, block: Block) -> bool:
        """Compute a block as one op; return whether that could be done."""
        source, last = block[0].source, block[-1]
        if isinstance(last, CallModule) and not torch.compiler.is_compiling():
            assert isinstance(node, Node)
            self.recompute(node, last)
            return True
        pending = self.pending.get(source) if node.takes_residual else None
        x, residual = (self.read(source), None) if pending is None else pending
        if torch.compiler.is_compiling() and not node.may_be_compiled(x):
            return False
        parameters = parameters_of(node, self.filters_of)
        if not node.suits(x, residual, parameters):
            return False
        follows = isinstance(last, Convolve) and last.then is not None
        sums = not follows or self.convolutions_add(x)
        moments = self.moments.get(source) if residual is None else None
        computed = node.compute(x, residual, moments, parameters, sums=sums)
        if computed.shortcut is None:
            self.values[last.result] = computed.branch
        else:
            self.pending[last.result] = computed.branch, computed.shortcut
        if computed.moments is not None:
            self.moments[last.result] = computed.moments
        return True

    def recompute(self, node: Node, step: CallModule) -> None:
        """Compute a block in a checkpoint, with its weights standardized there: only its input is kept."""
        assert step.options is not None
        once = node._replace(recomputation=None)

        def compute(x: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor | None]:
            parameters = parameters_of(once, WeightStandardizedConv2d.filters)
            if not once.suits(x, None, parameters):
                return step.module(x), None
            computed = once.compute(x, None, moments, parameters, sums=True)
            return computed.branch, computed.moments

        x, moments = self.read(step.source), self.moments.get(step.source)
        self.values[step.result], moments = checkpoint(compute, x, moments, **step.options)
        if moments is not None:
            self.moments[step.result] = moments.detach()

    def convolutions_add(self, x: Tensor) -> bool:
        if x.dtype not in self.adds:
            self.adds[x.dtype] = may_train(x.device.type, x.dtype)
        return self.adds[x.dtype]

    # ---- values ----------------------------------------------------------------------------------

    def read(self, value: int) -> Tensor:
        """Return a value."""
        if value in self.pending:
            self.values[value] = add_to_shortcut(*self.pending.pop(value))
        return self.values[value]

    def forget(self, values: Sequence[int]) -> None:
        for value in values:
            for kept in (self.values, self.pending, self.moments):
                kept.pop(value, None)

    def replace(self, value: int) -> None:
        """Let a wanted value be what is returned for it, so that gradients with respect to that exist."""
        times = self.wanted.count(value)  # a stage without blocks returns its input
        if self.replaced is None or not times:
            return
        x = self.read(value)
        outer = self.replaced(x)
        self.replacements += [outer] * times
        self.values[value] = _laid_out_like(x, outer)

    def filters_of(self, convolution: WeightStandardizedConv2d) -> Tensor:
        weight = self.weights.get(convolution)
        if weight is None:
            weight = self.weights[convolution] = convolution.filters()
        return weight

    # ---- steps -----------------------------------------------------------------------------------

    def compute_step(self, step: Step) -> None:
        values = self.values
        if isinstance(step, Convolve):
            self.convolve(step)
        elif isinstance(step, Normalize):
            values[step.result] = self.normalized(step.source, step.norm)
        elif isinstance(step, Join):
            branch = _through(step.drop_path, _norm(step.norm, self.read(step.source)))
            total = add_to_shortcut(branch, self.read(step.shortcut))
            values[step.result] = step.activation(total)
        elif isinstance(step, Pool):
            values[step.result] = step.pooler.with_zeros(self.read(step.source), step.zeros)
        elif isinstance(step, ZeroPad):
            values[step.result] = F.pad(self.read(step.source), (step.zeros,) * 4)
        else:
            values[step.result] = _call(step, self.read(step.source))

    def convolve(self, step: Convolve) -> None:
        convolution = step.convolution
        source, norm = step.source, step.norm
        x = self.read(source) if norm is None else self.normalized(source, norm)
        if convolution.pad is not None:
            x = convolution.pad(x)
        branch = convolution._conv_forward(x, self.filters_of(convolution), None)
        if step.shortcut is None:
            self.values[step.result] = branch
            return
        branch, shortcut = _through(step.drop_path, branch), self.read(step.shortcut)
        if step.then is None or _may_differ(branch, shortcut):
            self.values[step.result] = add_to_shortcut(branch, shortcut)
        else:
            self.pending[step.result] = branch, shortcut

    def normalized(self, source: int, norm: GroupNormActivation) -> Tensor:
        """Return the normalized value, which another step may have computed already."""
        place, values = normalized(source), self.values
        if place not in values:
            pending = self.pending.pop(source, None)
            if pending is None:
                values[place] = _norm(norm, values[source])
            else:
                branch, shortcut = pending
                values[source], values[place] = add_group_norm_act(
                    branch, shortcut, *_arguments(norm)
                )
        return values[place]


def _convolutions_of(blocks: Sequence[Block]) -> list[WeightStandardizedConv2d]:
    return [step.convolution for block in blocks for step in block if isinstance(step, Convolve)]


def _laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """Return ``other`` in the layout of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return other.contiguous(memory_format=torch.channels_last)
    return other


def _may_differ(branch: Tensor, shortcut: Tensor) -> bool:
    """Whether branch and shortcut differ in shape, because somebody has changed a convolution."""
    return (
        is_concrete(branch) and not torch.compiler.is_compiling() and branch.shape != shortcut.shape
    )


def _norm(norm: GroupNormActivation, x: Tensor) -> Tensor:
    return group_norm_act(x, *_arguments(norm))


def _arguments(norm: GroupNormActivation) -> tuple[Tensor, Tensor, int, float, str]:
    name = activation_name(norm.activation)
    assert name is not None
    return norm.weight, norm.bias, norm.num_groups, norm.eps, name


def _through(drop_path: nn.Module | None, branch: Tensor) -> Tensor:
    is_idle = drop_path is None or type(drop_path) is nn.Identity
    return branch if is_idle else drop_path(branch)  # type: ignore[misc]


def _call(step: CallModule, x: Tensor) -> Tensor:
    if step.options is None:
        return step.module(x)
    return checkpoint(step.module, x, **step.options)


__all__ = ["compute"]
