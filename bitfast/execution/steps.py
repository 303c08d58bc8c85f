"""The network as data: what is to be computed, step by step.

A step holds modules, not tensors; the values that it reads and computes have numbers. A module is read as a
step only if nobody can tell that from calling it. Where somebody hooks, wraps, replaces, subclasses or
compiles a module, the block (or stem, or stage) around it becomes one step that calls it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from bitfast.activations import activation_name
from bitfast.blocks import (
    BitBottleneckLayer,
    BitDownsampleConv,
    BitPreActivationBottleneckLayer,
    ResidualBlock,
)
from bitfast.execution.nodes import AnyNode, bottleneck_node, preactivation_node, stem_node
from bitfast.layers import DynamicPad2d, GroupNormActivation, WeightStandardizedConv2d
from bitfast.network import BitStage
from bitfast.pooling import MaxPool2d
from bitfast.watching import is_plain, runs_as_written

IMAGES = 0
"""The number of the images, the value that a network is given."""


class Convolve(NamedTuple):
    """``result = convolution(norm(source))``, or that added to a shortcut.

    Attributes:
        source: The value that is read.
        norm: Applied to the source first, with its activation.
        convolution: Applied with its padding.
        result: The value that is computed.
        shortcut: The value that the convolution is added to.
        drop_path: Applied to the convolution before it is added; does nothing in inference.
        then: The norm that is applied to the result next, if nothing else reads the result in between.
    """

    source: int
    norm: GroupNormActivation | None
    convolution: WeightStandardizedConv2d
    result: int
    shortcut: int | None = None
    drop_path: nn.Module | None = None
    then: GroupNormActivation | None = None


class Normalize(NamedTuple):
    """``result = norm(source)``, with its activation."""

    source: int
    norm: GroupNormActivation
    result: int


class ZeroPad(NamedTuple):
    """``result`` is the source, padded with ``zeros`` zeros on each of its four sides."""

    source: int
    zeros: int
    result: int


class Pool(NamedTuple):
    """``result = pooler(source)``, the source being padded with ``zeros`` zeros on each side first."""

    source: int
    zeros: int
    pooler: MaxPool2d
    result: int


class Join(NamedTuple):
    """``result = activation(norm(source) + shortcut)``; the norm has no activation of its own."""

    source: int
    norm: GroupNormActivation
    shortcut: int
    drop_path: nn.Module
    activation: nn.Module
    result: int


class CallModule(NamedTuple):
    """``result = module(source)``: a module that cannot be read as a step, and is called.

    ``options`` are those of ``torch.utils.checkpoint.checkpoint`` if the backward pass recomputes the module.
    """

    source: int
    module: nn.Module
    result: int
    options: dict[str, Any] | None = None


Step: TypeAlias = Convolve | Normalize | ZeroPad | Pool | Join | CallModule
Block: TypeAlias = tuple[Step, ...]
"""The steps of a stem, of a residual block, or of the final norm."""


def normalized(value: int) -> int:
    """Return the number of a value after the norm that is applied to it."""
    return ~value


def reads_of(step: Step) -> tuple[int, ...]:
    """Return the values that a step reads, normalized ones among them."""
    reads: tuple[int, ...] = (step.source,)
    if isinstance(step, (Convolve, Normalize)) and step.norm is not None:
        reads += (normalized(step.source),)
    if isinstance(step, (Convolve, Join)) and step.shortcut is not None:
        reads += (step.shortcut,)
    return reads


def last_reads(steps: Sequence[Step], kept: Container[int]) -> list[list[int]]:
    """Return, for each step, the values that it reads last, without those that are to be kept."""
    dead: list[list[int]] = []
    read_later: set[int] = set()
    for step in reversed(steps):
        reads = reads_of(step)
        dead.append([v for v in dict.fromkeys(reads) if v not in read_later and v not in kept])
        read_later.update(reads)
    return dead[::-1]


class Steps(NamedTuple):
    """A network, or the first stages of one.

    Attributes:
        stem: Its steps.
        stages: The blocks of each stage.
        norm: The step of the final norm; empty if there is none.
        outputs: The values that the stem and each stage compute.
        result: The last value, after the final norm if there is one.
        values: How many values there are.
        read: The modules that were read as steps, and those that only contain others.
        unusual: The modules that could not be read: hooked, wrapped, replaced or the like.
        nodes: The blocks that may be one node of autograd's graph, by the value that they compute.
    """

    stem: Block
    stages: tuple[tuple[Block, ...], ...]
    norm: Block
    outputs: tuple[int, ...]
    result: int
    values: int
    read: tuple[nn.Module, ...]
    unusual: tuple[nn.Module, ...]
    nodes: dict[int, AnyNode]

    def blocks(self) -> list[Block]:
        """Return the stem, all blocks and the final norm, in order."""
        return [self.stem, *(block for stage in self.stages for block in stage), self.norm]

    def all(self) -> list[Step]:
        """Return all steps in order."""
        return [step for block in self.blocks() for step in block]

    def convolutions(self) -> list[WeightStandardizedConv2d]:
        """Return the convolutions that are steps."""
        return [step.convolution for step in self.all() if isinstance(step, Convolve)]

    def is_plannable(self) -> bool:
        """Whether no module has to be called, all convolutions keep their weights, and no stage is empty."""
        return (
            all(self.stages)
            and not any(isinstance(step, CallModule) for step in self.all())
            and all(convolution.keeps_weight() for convolution in self.convolutions())
        )

    def calls_none_from(self, stage: int) -> bool:
        """Whether nothing after the first ``stage`` stages, the final norm included, calls a module."""
        later = [step for blocks in self.stages[stage:] for block in blocks for step in block]
        return not any(isinstance(step, CallModule) for step in (*later, *self.norm))

    def up_to(self, last: int, cuts: Iterable[int], is_normed: bool) -> Steps:
        """Return the steps of the stem and the first stages.

        Args:
            last: How many stages.
            cuts: The stages (1 is the first) whose outputs are handed to the caller, so that the next norm must
                not be computed together with them.
            is_normed: Whether the final norm follows, after all of the stages.
        """
        stages = list(self.stages[:last])
        for number in {*cuts, *(() if is_normed else (last,))}:
            if 1 <= number <= last and stages[number - 1]:
                *blocks, (*steps, final) = stages[number - 1]
                if isinstance(final, Convolve):
                    final = final._replace(then=None)
                stages[number - 1] = (*blocks, (*steps, final))
        return self._replace(
            stages=tuple(stages),
            norm=self.norm if is_normed else (),
            outputs=self.outputs[: last + 1],
            result=self.result if is_normed else self.outputs[last],
        )


def steps_of(
    stem: nn.Module, stages: Sequence[nn.Module], norm: nn.Module, containers: Sequence[nn.Module]
) -> Steps | None:
    """Read a network.

    Args:
        stem: Maps images to the first feature map.
        stages: In order.
        norm: Normalizes the output of the last stage.
        containers: Modules that contain the stages and do nothing but call them.

    Returns:
        The steps; None if a container is hooked, wrapped or replaced, and must be called.
    """
    return _Reader().read(stem, stages, norm, containers)


class _Reader:
    """Reads one network."""

    def __init__(self) -> None:
        self.values = 1
        self.seen: list[nn.Module] = []
        self.unusual: list[nn.Module] = []
        self.nodes: dict[int, AnyNode] = {}

    def read(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        containers: Sequence[nn.Module],
    ) -> Steps | None:
        if not self.can_read(*containers):
            return None
        stem_steps, x = self.stem(stem)
        outputs = [x]
        blocks: list[list[Block]] = []
        for stage in stages:
            blocks.append([])
            for module, options in self.parts(stage):
                steps, x = self.block(module, options, x)
                blocks[-1].append(steps)
            outputs.append(x)
        final, result = self.final_norm(norm, x)
        self.note_following_norms(blocks, final)
        return Steps(
            stem_steps,
            tuple(map(tuple, blocks)),
            final,
            tuple(outputs),
            result,
            self.values,
            tuple(self.seen),
            tuple(self.unusual),
            self.nodes,
        )

    def value(self) -> int:
        self.values += 1
        return self.values - 1

    # ---- what can be read ----------------------------------------------------------------------

    def can_read(self, *modules: nn.Module | None) -> bool:
        """Whether all modules run as written; they are noted as read, the first that does not as unusual."""
        for module in modules:
            if module is None:
                continue
            if not runs_as_written(module):
                self.unusual.append(module)
                return False
            self.seen.append(module)
        return True

    def can_read_convolution(self, convolution: nn.Module) -> bool:
        return (
            is_plain(convolution, WeightStandardizedConv2d)
            and (convolution.pad is None or is_plain(convolution.pad, DynamicPad2d))
            and self.can_read(convolution, convolution.pad)
            and convolution.is_simple()
        )

    def can_read_norm(self, norm: nn.Module) -> bool:
        return (
            is_plain(norm, GroupNormActivation)
            and self.can_read(norm)
            and norm.has_scale_and_shift()
            and self.can_read(norm.activation)
            and norm.fused_activation() is not None
        )

    def can_read_drop_path(self, block: ResidualBlock) -> bool:
        return type(block.drop_path) in block.idle_in_inference and self.can_read(block.drop_path)

    def can_read_downsample(self, downsample: BitDownsampleConv | None) -> bool:
        if downsample is None:
            return True
        if type(downsample) is not BitDownsampleConv or not self.can_read(
            downsample, downsample.norm
        ):
            return False
        is_normed = type(downsample.norm) is not nn.Identity
        return self.can_read_convolution(downsample.conv) and (
            not is_normed or self.can_read_norm(downsample.norm)
        )

    # ---- the stem ----------------------------------------------------------------------------------

    def stem(self, stem: nn.Module) -> tuple[Block, int]:
        """Return the steps of a stem, and the number of its output."""
        steps: list[Step] = []
        x = IMAGES
        if not _parts_describe_forward(stem) or not self.can_read(stem):
            return self.call(stem, x)
        zeros = 0
        for part in stem.parts():  # type: ignore[operator]
            if (more := zeros_of(part)) is not None and self.can_read(part):
                zeros += more
                continue
            if zeros and not isinstance(part, MaxPool2d):
                steps.append(ZeroPad(x, zeros, x := self.value()))
                zeros = 0
            if self.can_read_convolution(part):
                steps.append(Convolve(x, None, part, x := self.value()))
            elif self.can_read_norm(part):
                steps.append(Normalize(x, part, x := self.value()))
            elif is_plain(part, MaxPool2d) and self.can_read(part, part.pad) and part.is_fused():
                steps.append(Pool(x, zeros, part, x := self.value()))
                zeros = 0
            else:
                return self.call(stem, IMAGES)
        if zeros or not steps:
            return self.call(stem, IMAGES)
        first, *between, last = steps[0], *steps[1:-1], steps[-1]
        is_usual = [type(step) for step in between] in ([], [Normalize], [ZeroPad, Normalize])
        if is_usual and isinstance(first, Convolve) and isinstance(last, Pool):
            zeros = sum(step.zeros for step in between if isinstance(step, ZeroPad))
            norm = next((step.norm for step in between if isinstance(step, Normalize)), None)
            node = stem_node(first.convolution, zeros, norm, last.pooler, last.zeros)
            self.nodes |= {} if node is None else {x: node}
        return tuple(steps), x

    # ---- stages and blocks ---------------------------------------------------------------------------

    def parts(self, stage: nn.Module) -> list[tuple[nn.Module, dict[str, Any] | None]]:
        """Return the blocks of a stage (or the stage itself), each with options of a checkpoint or None."""
        if (
            not isinstance(stage, BitStage)
            or not _parts_describe_forward(stage)
            or not self.can_read(stage)
            or not stage.calls_each_block()
        ):
            return [(stage, None)]
        self.seen.append(stage.layers)
        options = stage.recomputation
        return [(layer, options) for layer in stage.parts()]

    def block(self, module: nn.Module, options: dict[str, Any] | None, x: int) -> tuple[Block, int]:
        """Return the steps of a block, and the number of its output."""
        if self.can_read(module):
            found = None
            if is_plain(module, BitPreActivationBottleneckLayer):
                if self.can_read_preactivation(module):
                    found = self.preactivation(module, x), preactivation_node(module)
            elif is_plain(module, BitBottleneckLayer) and self.can_read_bottleneck(module):
                found = self.bottleneck(module, x), bottleneck_node(module)
            if found is not None:
                (steps, result), node = found
                if options is not None:
                    steps = (CallModule(x, module, result, options),)
                if node.pads_with_zeros():
                    self.nodes[result] = node._replace(recomputation=options)
                return steps, result
        return self.call(module, x, options)

    def call(
        self, module: nn.Module, x: int, options: dict[str, Any] | None = None
    ) -> tuple[Block, int]:
        result = self.value()
        return (CallModule(x, module, result, options),), result

    def can_read_preactivation(self, block: BitPreActivationBottleneckLayer) -> bool:
        downsample = block.downsample
        return (
            all(map(self.can_read_norm, (block.norm1, block.norm2, block.norm3)))
            and all(map(self.can_read_convolution, (block.conv1, block.conv2, block.conv3)))
            and self.can_read_drop_path(block)
            and self.can_read_downsample(downsample)
            and (downsample is None or type(downsample.norm) is nn.Identity)
        )

    def preactivation(self, block: BitPreActivationBottleneckLayer, x: int) -> tuple[Block, int]:
        steps: list[Step] = []
        shortcut = x
        if block.downsample is not None:
            shortcut = self.value()
            steps.append(Convolve(x, block.norm1, block.downsample.conv, shortcut))
        first, second, result = self.value(), self.value(), self.value()
        steps += [
            Convolve(x, block.norm1, block.conv1, first, then=block.norm2),
            Convolve(first, block.norm2, block.conv2, second, then=block.norm3),
            Convolve(second, block.norm3, block.conv3, result, shortcut, block.drop_path),
        ]
        return tuple(steps), result

    def can_read_bottleneck(self, block: BitBottleneckLayer) -> bool:
        return (
            all(map(self.can_read_norm, (block.norm1, block.norm2, block.norm3)))
            and block.norm3.fused_activation() == "none"
            and all(map(self.can_read_convolution, (block.conv1, block.conv2, block.conv3)))
            and self.can_read_drop_path(block)
            and self.can_read_downsample(block.downsample)
            and self.can_read(block.activation)
            and activation_name(block.activation) is not None
        )

    def bottleneck(self, block: BitBottleneckLayer, x: int) -> tuple[Block, int]:
        steps: list[Step] = []
        shortcut = x
        if block.downsample is not None:
            norm: Any = block.downsample.norm
            then = None if type(norm) is nn.Identity else norm
            steps.append(
                Convolve(x, None, block.downsample.conv, shortcut := self.value(), then=then)
            )
            if then is not None:
                steps.append(Normalize(shortcut, then, shortcut := self.value()))
        first, second, third, result = (self.value() for _ in range(4))
        steps += [
            Convolve(x, None, block.conv1, first, then=block.norm1),
            Convolve(first, block.norm1, block.conv2, second, then=block.norm2),
            Convolve(second, block.norm2, block.conv3, third, then=block.norm3),
            Join(third, block.norm3, shortcut, block.drop_path, block.activation, result),
        ]
        return tuple(steps), result

    # ---- the norms between -----------------------------------------------------------------------------

    def final_norm(self, norm: nn.Module, x: int) -> tuple[Block, int]:
        if type(norm) is nn.Identity and self.can_read(norm):
            return (), x
        if self.can_read_norm(norm):
            result = self.value()
            return (Normalize(x, norm, result),), result  # type: ignore[arg-type]
        return self.call(norm, x)

    def note_following_norms(self, stages: list[list[Block]], final: Block) -> None:
        """Note in the last step of each block which norm reads its result next."""
        places = [(blocks, k) for blocks in stages for k in range(len(blocks))]
        followers = [*(blocks[k] for blocks, k in places[1:]), final]
        for (blocks, k), following in zip(places, followers, strict=False):
            last = blocks[k][-1]
            loses = any(isinstance(s, Convolve) and shrinks(s.convolution) for s in blocks[k])
            if isinstance(last, Convolve) and following and not loses:
                blocks[k] = (
                    *blocks[k][:-1],
                    last._replace(then=getattr(following[0], "norm", None)),
                )


def shrinks(convolution: WeightStandardizedConv2d) -> bool:
    """Whether the output is smaller than the input because the convolution has no padding."""
    return (
        convolution.kernel_size != (1, 1)
        and convolution.pad is None
        and convolution.geometry[1] == (0, 0)
    )


def _parts_describe_forward(module: nn.Module) -> bool:
    """Whether one class defines both ``parts`` and ``forward``, so that the parts are what forward calls."""
    definers = [
        next((cls for cls in type(module).__mro__ if name in vars(cls)), None)
        for name in ("forward", "parts")
    ]
    return definers[0] is definers[1]


def zeros_of(pad: nn.Module) -> int | None:
    """Return how many zeros a module pads each side with; None if it does anything else."""
    if type(pad) is nn.Identity:
        return 0
    if type(pad) not in (nn.ConstantPad2d, nn.ZeroPad2d) or pad.value != 0:
        return None
    zeros, *others = pad.padding  # type: ignore[misc]
    return zeros if zeros >= 0 and all(n == zeros for n in others) else None
