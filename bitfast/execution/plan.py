"""Plans: how one network is computed in one setting, decided once.

Executing a plan decides nothing. It executes programs one after the other, and between them calls the modules
that somebody has hooked, wrapped or replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bitfast.backends import why_unavailable
from bitfast.execution import cpu, cuda, op_by_op
from bitfast.execution.graph import GraphedPlan, Recorder, Results
from bitfast.execution.guard import ParameterGuard
from bitfast.execution.program import Choice, Program, ProgramBuilder
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, shapes_of
from bitfast.execution.steps import Block, CallModule, Convolve, Join, Step, Steps
from bitfast.execution.weights import standardized_weights
from bitfast.memory import keep_freed_memory
from bitfast.ops.norm_convolution import OP, uses_norm_convolution

SLICE_BYTES = 7 * 2**20
"""Bytes of the first stage's output for the images that go through the high-resolution stages together."""

FUSED_SLICE_BYTES = 28 * 2**20
"""What :data:`SLICE_BYTES` is where convolutions normalize what they read. Less memory passes through the cache
then; what matters is that feature maps stay below 32 MiB, from which on the C library maps each one anew."""

STAGES_IN_SLICES = 2
"""Stages that a batch goes through in slices. Later ones have small feature maps and large weights, which are
best read once for the whole batch."""


class Lowering(Protocol):
    """What a module that lowers steps for a device has."""

    IMAGES_IN_SLICES: bool
    """Whether a batch goes through the high-resolution stages a few images at a time."""

    RESERVED_PLACES: int
    """How many places of a program the lowering uses for itself."""

    NEEDS_ADDRESSES_OF_NORMS: bool
    """Whether programs hold addresses of norms' parameters, so that these must not move."""

    def serves(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it lowers networks with feature maps of this dtype, in this thread, as torch is set now."""

    def lower(self, blocks: Sequence[Block], builder: ProgramBuilder, setting: Setting) -> None:
        """Emit the calls that compute the steps of some blocks.

        Args:
            blocks: In order; none calls a module.
            builder: Of the program, whose input is channels_last unless the builder is told otherwise.
            setting: A setting for which :meth:`serves` is true.

        Raises:
            ValueError: a block cannot add its branch to its shortcut, or an image is too small for a window.
        """


LOWERINGS: tuple[Any, ...] = (cuda, cpu)
"""The lowerings, in order of preference."""


class Request(NamedTuple):
    """The outputs of a network that are asked for.

    Attributes:
        last: How many stages are computed.
        wanted: The stages (0 is the stem) whose outputs are returned, in order.
        is_normed: Whether the final norm is applied to the last of all stages.
    """

    last: int
    wanted: tuple[int, ...]
    is_normed: bool

    def suits(self, steps: Steps) -> bool:
        """Whether the steps that are not asked for may be left out, since they call no hooked module."""
        return self.is_normed or steps.calls_none_from(self.last)


class Plan:
    """How a network is computed in one setting.

    Attributes:
        parts: Executed one after the other.
        calls_modules: Whether some part calls a module that somebody has hooked, wrapped or replaced.
    """

    def __init__(
        self,
        steps: Steps,
        parameters: ParameterGuard,
        setting: Setting,
        request: Request,
        lowering: Lowering,
        slice_bytes: int | None,
    ) -> None:
        self._parameters, self._steps = parameters, steps
        self._graph: GraphedPlan | None = None
        self._device = setting.device.index
        values = [steps.outputs[number] for number in request.wanted]
        wanted = list(dict.fromkeys(values))
        self.parts = _Planner(steps, setting, lowering, wanted, slice_bytes).parts()
        first = self.parts[0]
        self._takes_any_layout = isinstance(first, _ProgramPart) and first.program.takes_any_layout
        # A stage without blocks returns its input, so that two outputs may be one value.
        self._repeated = [wanted.index(v) for v in values] if len(wanted) < len(values) else None
        parameters.note_what_is_kept()
        self.calls_modules = any(isinstance(part, _ModulePart) for part in self.parts)

    def holds(self) -> bool:
        """Whether the parameters are still those that the plan was made for."""
        return self._parameters.holds()

    def choices(self) -> list[tuple[Convolve, str, str]]:
        """Return for each convolution what computes it, and why; none where the lowering has no choice.

        Those after a module that is called are there once the plan has been executed.
        """
        chosen = dict(item for part in self.parts for item in part.choices().items())
        found = []
        for step in self._steps.all():
            choice = chosen.get(step.result)
            if isinstance(step, Convolve) and choice is not None:
                what = OP if choice.fuses else "convolution"
                found.append((step, what, "; ".join(filter(None, (choice.reason, choice.shared)))))
        return found

    def graphed(self, images: Tensor, recorder: Recorder) -> GraphedPlan:
        """Return the plan as a CUDA graph, which is recorded at first."""
        if self._graph is None:
            self._graph = GraphedPlan(self.execute, images, recorder)
        return self._graph

    def execute(self, images: Tensor) -> Results:
        """Compute the network; return the wanted outputs and the result, channels_last."""
        if self._device is not None and torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                return self._execute(images)
        return self._execute(images)

    def _execute(self, images: Tensor) -> Results:
        x = images
        if not self._takes_any_layout:
            x = images.contiguous(memory_format=torch.channels_last)
        outputs: list[Tensor] = []
        for part in self.parts:
            more, x = part.execute(x)
            outputs += more
        if self._repeated is not None:
            outputs = [outputs[number] for number in self._repeated]
        return outputs, x


# ---- the parts of a plan ------------------------------------------------------------------------------


class Part(Protocol):
    """Some blocks of a network."""

    def execute(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the wanted outputs among the values of the blocks, and the last of these."""

    def choices(self) -> Mapping[int, Choice]:
        """Return how the convolutions are computed, by the value that they compute."""


class _ProgramPart:
    """Blocks whose input shape is known beforehand."""

    def __init__(self, program: Program, is_last_wanted: bool) -> None:
        self.program, self._wanted = program, None if is_last_wanted else -1

    def execute(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        results = self.program.execute(x)
        return results[: self._wanted], results[-1]

    def choices(self) -> Mapping[int, Choice]:
        return self.program.choices


class _SlicedPart:
    """Blocks that a few images go through at a time.

    Their feature maps are then still in a cache when the next layer reads them, and small enough for the memory
    allocator to use the same pages again.
    """

    def __init__(
        self, size: int, program: Program, remainder: Program | None, is_last_wanted: bool
    ) -> None:
        self.size, self.program, self.remainder = size, program, remainder
        self._wanted = None if is_last_wanted else -1

    def execute(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        slices = []
        for images in x.split(self.size):
            is_whole = self.remainder is None or images.shape[0] == self.size
            program = self.program if is_whole else self.remainder
            slices.append(program.execute(images))  # type: ignore[union-attr]
        results = [torch.cat(parts) for parts in zip(*slices, strict=True)]
        return results[: self._wanted], results[-1]

    def choices(self) -> Mapping[int, Choice]:
        return self.program.choices


class _ModulePart:
    """A module that somebody has hooked, wrapped or replaced, and which is therefore called."""

    def __init__(self, module: nn.Module, is_wanted: bool) -> None:
        self.module, self._is_wanted = module, is_wanted

    def execute(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self.module(x)
        return [x] if self._is_wanted else [], x

    def choices(self) -> Mapping[int, Choice]:
        return {}


class _LatePart:
    """Blocks after such a module. They are lowered when its output, which may be anything, is there."""

    def __init__(self, planner: _Planner, blocks: Sequence[Block]) -> None:
        self._planner, self._blocks = planner, blocks
        self._programs: dict[Shape, _ProgramPart] = {}

    def execute(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        setting = self._planner.setting
        is_usual = type(x) is Tensor and x.dim() == 4 and x.device == setting.device
        if not is_usual or x.dtype != setting.compute_dtype:
            return self._planner.compute_op_by_op(self._blocks, x)
        shape = tuple(x.shape)
        part = self._programs.get(shape)
        if part is None:
            part = self._planner.program_part(self._blocks, shape)
            self._programs[shape] = part
        return part.execute(x.contiguous(memory_format=torch.channels_last))

    def choices(self) -> Mapping[int, Choice]:
        return next((part.choices() for part in self._programs.values()), {})


class _Planner:
    """Cuts a network into the parts of a plan."""

    def __init__(
        self,
        steps: Steps,
        setting: Setting,
        lowering: Lowering,
        wanted: Sequence[int],
        slice_bytes: int | None,
    ) -> None:
        self.steps, self.setting, self.lowering, self.wanted = steps, setting, lowering, wanted
        self.slice_bytes = slice_bytes or _slice_bytes(setting)

    def parts(self) -> list[Part]:
        blocks = [block for block in self.steps.blocks() if block]
        parts: list[Part] = []
        shape: Shape | None = tuple(self.setting.shape)
        early = self.early_blocks()
        size = self.images_at_a_time(early) if early else self.setting.shape[0]
        if size < self.setting.shape[0]:
            parts.append(self.sliced_part(early, size))
            shape = self.shape_after(early, tuple(self.setting.shape))
            blocks = blocks[len(early) :]
        for calls, group in itertools.groupby(
            blocks, lambda block: isinstance(block[0], CallModule)
        ):
            members = list(group)
            if calls:
                parts += [self.module_part(*block) for block in members]
                shape = None
            elif shape is None:
                parts.append(_LatePart(self, members))
            else:
                parts.append(self.program_part(members, shape))
        return parts

    def program_part(self, blocks: Sequence[Block], shape: Shape) -> _ProgramPart:
        kept = self.kept(blocks)
        return _ProgramPart(self.program(blocks, shape, kept), self.is_wanted(kept[-1]))

    def program(self, blocks: Sequence[Block], shape: Shape, kept: Sequence[int]) -> Program:
        source = blocks[0][0].source
        shared = (source, *self.steps.outputs)  # hooks may hold on to what modules have returned
        steps = [step for block in blocks for step in block]
        builder = ProgramBuilder(steps, source, shape, kept, shared, self.lowering.RESERVED_PLACES)
        self.lowering.lower(blocks, builder, self.setting)
        return builder.program()

    def module_part(self, step: Step) -> _ModulePart:
        assert isinstance(step, CallModule)
        return _ModulePart(step.module, self.is_wanted(step.result))

    def kept(self, blocks: Sequence[Block]) -> list[int]:
        """Return the wanted values that the blocks compute, then their last value."""
        made = {step.result for block in blocks for step in block}
        last = blocks[-1][-1].result
        return [*(v for v in self.wanted if v in made and v != last), last]

    def is_wanted(self, value: int) -> bool:
        return value in self.wanted

    def compute_op_by_op(self, blocks: Sequence[Block], x: Tensor) -> tuple[list[Tensor], Tensor]:
        steps = self.steps._replace(stem=(), stages=(tuple(blocks),), norm=())
        steps = steps._replace(result=blocks[-1][-1].result)
        wanted = [self.steps.outputs.index(v) for v in self.kept(blocks) if self.is_wanted(v)]
        standardize = partial(standardized_weights, channels_last=False)
        return op_by_op.compute(steps, x, standardize, wanted, source=blocks[0][0].source)

    # ---- slices ----------------------------------------------------------------------------------------

    def early_blocks(self) -> list[Block]:
        """Return the blocks that a batch goes through in slices; none if it must not be cut."""
        early = [self.steps.stem, *itertools.chain(*self.steps.stages[:STAGES_IN_SLICES])]
        may_be_cut = self.lowering.IMAGES_IN_SLICES and self.steps.stages and self.steps.stages[0]
        if not may_be_cut or any(isinstance(step, CallModule) for block in early for step in block):
            return []  # a hooked module must be called once for the whole batch
        return early

    def images_at_a_time(self, early: Sequence[Block]) -> int:
        """Return how many images should go through the early blocks together."""
        _, channels, height, width = self.shape_after(early[:2], tuple(self.setting.shape))
        per_image = channels * height * width * self.setting.compute_dtype.itemsize
        return max(1, self.slice_bytes // per_image)

    def shape_after(self, blocks: Sequence[Block], shape: Shape) -> Shape:
        steps = [step for block in blocks for step in block]
        return shapes_of(steps, steps[0].source, shape)[steps[-1].result]

    def sliced_part(self, blocks: Sequence[Block], size: int) -> _SlicedPart:
        count, *rest = self.setting.shape
        kept = self.kept(blocks)
        program = self.program(blocks, (size, *rest), kept)
        remainder = None
        if count % size:
            remainder = self.program(blocks, (count % size, *rest), kept)
        return _SlicedPart(size, program, remainder, self.is_wanted(kept[-1]))


def _slice_bytes(setting: Setting) -> int:
    is_fused = uses_norm_convolution(setting.device.type, setting.compute_dtype)
    return FUSED_SLICE_BYTES if is_fused else SLICE_BYTES


# ---- making plans ----------------------------------------------------------------------------------------


def make_plan(
    network: Any,
    steps: Steps | None,
    images: Tensor,
    setting: Setting,
    request: Request,
    slice_bytes: int | None = None,
) -> Plan | None:
    """Return the plan of a network for a request; None if there cannot be one.

    Args:
        network: A ``ForwardPass``.
        steps: The steps of the whole network, or None.
        images: Images of that setting.
        setting: The setting to plan for.
        request: The outputs to compute.
        slice_bytes: Bytes of the first stage's output for the images that go through the high-resolution
            stages together, where the lowering cuts a batch. None: as much as suits the kernels.

    Raises:
        TypeError, ValueError: The network cannot take such images.
    """
    lowering = lowering_for(setting.device.type, setting.compute_dtype)
    if lowering is None or steps is None or not request.suits(steps):
        return None
    network.check(images)
    if not all(convolution.keeps_weight() for convolution in steps.convolutions()):
        return None
    steps = steps.up_to(request.last, (), request.is_normed)
    parameters = ParameterGuard(steps, lowering.NEEDS_ADDRESSES_OF_NORMS)
    if not parameters.may_be_kept or _drops_paths(steps):
        return None
    keep_freed_memory()
    return Plan(steps, parameters, setting, request, lowering, slice_bytes)


def lowering_for(device_type: str, dtype: torch.dtype) -> Lowering | None:
    """Return the lowering for networks with feature maps of this dtype, or None."""
    return next((each for each in LOWERINGS if each.serves(device_type, dtype)), None)


def why_no_plan(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why there is no plan for networks with feature maps of this dtype; None if there is one."""
    if lowering_for(device_type, dtype) is not None:
        return None
    needed = {"cpu": ("native", "group_norm_act", "packed_convolution")}
    backend, *ops = needed.get(device_type, ("triton", "group_norm_act"))
    reasons = (why_unavailable(op, backend, device_type, dtype) for op in ops)
    reason = next((reason for reason in reasons if reason is not None), None)
    return reason or "another backend is demanded, or torch's oneDNN is switched off"


def _drops_paths(steps: Steps) -> bool:
    """Whether a branch may be dropped at random, as in training."""
    return any(
        step.drop_path is not None
        and type(step.drop_path) is not nn.Identity
        and step.drop_path.training
        for step in steps.all()
        if isinstance(step, (Convolve, Join))
    )


__all__ = ["Plan", "Request", "lowering_for", "make_plan", "why_no_plan"]
