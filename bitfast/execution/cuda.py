"""Lowering to the kernels of a GPU: from pass to pass only the addresses of tensors change.

The launches of norms, by CUDA or by Triton kernels, are prepared beforehand. Norms overwrite what they read
where they may, and store no statistics. The norm after a residual block also adds the branch to the
shortcut, in the memory of the shortcut, and writes its result over the branch. Convolutions are torch's, but
for the stem's where the op ``stem`` serves, from images of any layout, and for those that
:mod:`~bitfast.execution.cuda_choice` chooses to fuse with their norms.

For tests, Triton's interpreter executes these programs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.activations import ACTIVATIONS, activation_name
from bitfast.backends import select_backend
from bitfast.execution.cuda_norm_convolution import FusedConvolutions
from bitfast.execution.graph import is_recorded_by_others
from bitfast.execution.program import RESERVED, Places, ProgramBuilder
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape
from bitfast.execution.stem import FusedStem, fused_stem
from bitfast.execution.steps import (
    IMAGES,
    Block,
    Convolve,
    Join,
    Normalize,
    Pool,
    Step,
    ZeroPad,
    normalized,
)
from bitfast.execution.weights import kept_packed_filters, kept_standardized, recorded_weights
from bitfast.kernels.launch import as_current
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.group_norm_act_eager import kernels_of, prepare_forward
from bitfast.ops.norm_convolution_cuda import pack_filters, uses_fused_convolution
from bitfast.torch_state import unseen

IMAGES_IN_SLICES = False

RESERVED_PLACES = 3

NEEDS_ADDRESSES_OF_NORMS = True

STREAM, WEIGHTS, ADDRESSES = range(RESERVED, RESERVED + RESERVED_PLACES)
"""The places of the stream's handle, of the standardized weights, and of their addresses."""

Norm = Callable[[Places, Tensor, Tensor | None, Tensor], None]
"""Takes the places, x, a residual or None, and the tensor for the result."""


def serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this module lowers networks whose feature maps have this dtype."""
    if device_type not in ("cuda", "cpu"):
        return False
    backend = select_backend("group_norm_act", device_type, dtype, torch.channels_last)
    # Triton on "cpu" is its interpreter.
    return backend == "triton" or (backend == "native" and device_type == "cuda")


def lower(blocks: Sequence[Block], builder: ProgramBuilder, setting: Setting) -> None:
    """Emit the calls of some blocks; see :class:`~bitfast.execution.plan.Lowering`."""
    steps = [step for block in blocks for step in block]
    lowering = _Lowering(blocks, builder, setting, fused_stem(steps, builder, setting))
    lowering.begin(steps)
    for step in lowering.after_stem(steps):
        lowering.lower(step)


class _Lowering:
    """Lowers the steps of blocks, one after the other, to calls of a :class:`ProgramBuilder`."""

    def __init__(
        self,
        blocks: Sequence[Block],
        builder: ProgramBuilder,
        setting: Setting,
        stem: FusedStem | None,
    ) -> None:
        self.builder = builder
        self.setting = setting
        self.stem = stem
        self.dtype, self.device = setting.compute_dtype, setting.device
        self.numbers: dict[tuple[WeightStandardizedConv2d, bool], int] = {}
        """Which of the weights are those of each convolution, packed for fused convolutions or not."""
        self.fused: FusedConvolutions | None = None
        if may_fuse(setting):
            fused = FusedConvolutions(
                blocks, builder, setting, STREAM, ADDRESSES, self.packed_number, self.normalized
            )
            builder.choices = fused.choices.by_result
            self.fused = fused if fused.is_needed else None

    def begin(self, steps: Sequence[Step]) -> None:
        """Emit the first call, which puts the stream and the weights into their places."""
        uses = [(s.convolution, self.is_fused(s)) for s in steps if isinstance(s, Convolve)]
        self.numbers = {use: n for n, use in enumerate(dict.fromkeys(uses))}
        forms = [(c, self.preparation(c, is_packed)) for c, is_packed in self.numbers]
        convolutions = [convolution for convolution, _ in self.numbers]
        kept = self.kept_weights()
        addresses = list(map(Tensor.data_ptr, kept))
        fused, index = self.fused, self.device.index

        def call(places: Places) -> None:
            places[STREAM] = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
            places[WEIGHTS], places[ADDRESSES] = kept, addresses
            if is_recorded_by_others():
                # The graph is replayed without asking whether weights have changed.
                fresh = recorded_weights(convolutions, channels_last=True)
                places[WEIGHTS] = made = [
                    prepare(fresh[c] if c in fresh else c.filters()) for c, prepare in forms
                ]
                places[ADDRESSES] = list(map(Tensor.data_ptr, made))
            if fused is not None:
                fused.begin(places)

        self.builder.emit("begin", call)

    def kept_weights(self) -> list[Tensor]:
        """Return the weights in the order of their numbers, from those that are kept."""
        stem = None if self.stem is None else self.stem.convolution
        plain = [c for c, is_packed in self.numbers if not is_packed and c is not stem]
        standardized = kept_standardized(plain, channels_last=True)
        if self.stem is not None:
            standardized[self.stem.convolution] = self.stem.kept_filters(self.setting)
        packed = kept_packed_filters([c for c, is_packed in self.numbers if is_packed], self.dtype)
        return [packed[c] if is_packed else standardized[c] for c, is_packed in self.numbers]

    def preparation(
        self, convolution: WeightStandardizedConv2d, is_packed: bool
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that makes what a launch reads of a convolution's standardized weight."""
        if self.stem is not None and convolution is self.stem.convolution:
            return self.stem.prepared
        return pack_filters if is_packed else _unchanged

    def is_fused(self, step: Convolve) -> bool:
        """Whether a convolution normalizes what it reads."""
        return self.fused is not None and self.fused.choices.fuses(step)

    def packed_number(self, convolution: WeightStandardizedConv2d) -> int:
        """Return which of the weights are the packed filters of a convolution."""
        return self.numbers[convolution, True]

    def after_stem(self, steps: Sequence[Step]) -> Sequence[Step]:
        """Emit the call for the steps that the op ``stem`` does, if there are any; return the others."""
        stem, builder = self.stem, self.builder
        if stem is None:
            return steps
        for step in stem.steps:
            builder.find_shape(step)
        first, last = stem.steps[0], stem.steps[-1]
        source, number = builder.place(first.source), self.numbers[stem.convolution, False]
        builder.free_after(first)
        builder.free_after(last)
        result = builder.new(last.result)
        run = stem.function(self.setting)

        def call(places: Places) -> None:
            places[result] = run(places[STREAM], places[source], places[WEIGHTS][number])

        builder.emit("stem", call)
        builder.takes_any_layout = builder.is_last_read(first, first.source)
        return steps[len(stem.steps) :]

    def lower(self, step: Step) -> None:
        is_uneven = self.builder.find_shape(step)
        if isinstance(step, Convolve) and self.is_fused(step):
            assert self.fused is not None
            self.fused.convolve(step)
        elif isinstance(step, Convolve):
            self.convolve(step, is_uneven)
        elif isinstance(step, Normalize):
            self.normalized(step)
            self.builder.move(step.result, normalized(step.source))
            self.builder.free_after(step)
        elif isinstance(step, Join):
            self.join(step)
        elif isinstance(step, Pool):
            source = self.builder.shapes[step.source]
            pool = step.pooler.prepared(source, step.zeros, self.device.type, self.dtype)
            self.apply("same_max_pool", step, pool)
        else:
            assert isinstance(step, ZeroPad)
            sides = (step.zeros,) * 4
            self.apply("zeros", step, lambda x: F.pad(x, sides))

    def apply(self, name: str, step: Step, function: Callable[[Tensor], Tensor]) -> None:
        """Emit a call of a function that returns a new tensor."""
        source = self.builder.place(step.source)
        self.builder.free_after(step)
        result = self.builder.new(step.result)

        def call(places: Places) -> None:
            places[result] = function(places[source])

        self.builder.emit(name, call)

    # ---- convolutions -------------------------------------------------------------------------------------

    def convolve(self, step: Convolve, is_uneven: bool) -> None:
        builder = self.builder
        source = builder.place(step.source) if step.norm is None else self.normalized(step)
        convolve = self.convolution(step)
        if step.shortcut is None:
            builder.free_after(step)
            result = builder.new(step.result)

            def call(places: Places) -> None:
                places[result] = convolve(places, places[source])

            builder.emit("convolution", call)
            return
        shortcut = builder.place(step.shortcut)
        owns_shortcut = builder.may_overwrite(step, step.shortcut)
        if step.then is None or is_uneven:
            builder.free_after(step)
            result = builder.new(step.result)

            def call_and_add(places: Places) -> None:
                branch = convolve(places, places[source])
                places[result] = branch + places[shortcut]

            builder.emit("convolution, add", call_and_add)
            return
        norm = self.norm(step.then, builder.shapes[step.result], True)
        builder.free_after(step)
        result, following = builder.new(step.result), builder.new(normalized(step.result))

        def call_and_normalize(places: Places) -> None:
            branch, total = convolve(places, places[source]), places[shortcut]
            if not owns_shortcut:
                total = total.clone()
            norm(places, branch, total, branch)
            places[result], places[following] = total, branch

        builder.emit("convolution, add_group_norm_act", call_and_normalize)

    def convolution(self, step: Convolve) -> Callable[[Places, Tensor], Tensor]:
        """Return a function of the places and a tensor that pads, casts and convolves the tensor."""
        convolution, number = step.convolution, self.numbers[step.convolution, False]
        stride, padding, dilation = convolution.geometry
        shape = self.builder.shapes[step.source]
        pad = self.builder.pad_before(step, self.setting)
        dtype = None if self.setting.dtype == self.dtype or step.source != IMAGES else self.dtype
        direct = _direct_arguments(self.setting, shape)

        def convolve(places: Places, x: Tensor) -> Tensor:
            if pad is not None:
                x = pad(x)
            if dtype is not None:
                x = x.to(dtype)
            weight = places[WEIGHTS][number]
            if direct is None:
                return torch.conv2d(x, weight, None, stride, padding, dilation)
            return torch.cudnn_convolution(x, weight, padding, stride, dilation, 1, *direct)

        return convolve

    # ---- norms ----------------------------------------------------------------------------------------------

    def normalized(self, step: Convolve | Normalize) -> int:
        """Return the place of the normalized source; it overwrites the source where nobody else reads that."""
        builder, value = self.builder, normalized(step.source)
        assert step.norm is not None
        if builder.has(value):
            return builder.place(value)
        source = builder.place(step.source)
        norm = self.norm(step.norm, builder.shapes[step.source], False)
        if builder.may_overwrite(step, step.source):
            place = builder.move(value, step.source)

            def call_in_place(places: Places) -> None:
                x = places[place]
                norm(places, x, None, x)

            builder.emit("group_norm_act", call_in_place)
            return place
        result = builder.new(value)

        def call(places: Places) -> None:
            x = places[source]
            places[result] = made = torch.empty_like(x)
            norm(places, x, None, made)

        builder.emit("group_norm_act", call)
        return result

    def norm(self, norm: GroupNormActivation, shape: Shape, adds: bool) -> Norm:
        """Return a function that normalizes x into a result, which may be x itself.

        With ``adds`` it first adds x to a second tensor, in place, and normalizes that sum.
        """
        weight, bias, groups, eps, activation = norm.op_parameters()
        addresses = weight.data_ptr(), bias.data_ptr()
        backend = kernels_of(
            self.device, self.dtype, torch.channels_last, (weight.dtype, bias.dtype)
        )
        if any(a % 16 for a in addresses) or not weight.is_contiguous() or backend is None:
            return _norm_by_operator(norm, adds)
        run = prepare_forward(
            backend, shape,
            self.dtype, self.device, True, groups, eps, activation, weight.dtype, bias.dtype,
            has_residual=adds, sum_in_place=adds, keeps_statistics=False,
        )  # fmt: skip

        def launch(places: Places, x: Tensor, residual: Tensor | None, result: Tensor) -> None:
            total = 0 if residual is None else residual.data_ptr()
            run(places[STREAM], x.data_ptr(), total, *addresses, total, result.data_ptr(), 0, 0)

        return launch

    def join(self, step: Join) -> None:
        builder = self.builder
        norm = self.norm(step.norm, builder.shapes[step.source], False)
        name = activation_name(step.activation)
        assert name is not None
        activate = torch.relu_ if name == "relu" else ACTIVATIONS[name]
        source, shortcut = builder.place(step.source), builder.place(step.shortcut)
        result = builder.move(step.result, step.source)
        builder.free_after(step)

        def call(places: Places) -> None:
            x = places[source]
            norm(places, x, None, x)
            places[result] = activate(x + places[shortcut])

        builder.emit("group_norm_act, add", call)


def may_fuse(setting: Setting) -> bool:
    """Whether convolutions may be fused with norms in this setting.

    Raises:
        BackendUnavailableError: that is demanded, and cannot be done.
    """
    with as_current(setting.device):
        return uses_fused_convolution(setting.device.type, setting.compute_dtype, setting.enabled)


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _norm_by_operator(norm: GroupNormActivation, adds: bool) -> Norm:
    """Return a :data:`Norm` that calls the op, for parameters not aligned as prepared launches need."""
    parameters = norm.op_parameters()

    def run(places: Places, x: Tensor, residual: Tensor | None, result: Tensor) -> None:
        if residual is None:
            result.copy_(group_norm_act(x, *parameters))
            return
        total, following = add_group_norm_act(x, residual, *parameters)
        residual.copy_(total)
        result.copy_(following)

    return run


# ---- cuDNN ------------------------------------------------------------------------------------------------


def _direct_arguments(setting: Setting, shape: Shape) -> tuple[bool, bool, bool] | None:
    """Return the flags of ``torch.cudnn_convolution``: benchmark, deterministic, TF32; None: use ``conv2d``.

    The direct call skips three layers of torch that choose cuDNN anew in each call.
    """
    if setting.device.type != "cuda" or setting.shape[0] == 0 or min(shape[1:]) < 1:
        return None
    is_on, *others = setting.switches
    if not is_on or why_not_direct(setting.compute_dtype) is not None:
        return None
    return tuple(others)  # type: ignore[return-value]


@lru_cache
def why_not_direct(dtype: torch.dtype) -> str | None:
    """Return why convolutions of this dtype cannot call cuDNN directly on this machine; None if they can."""
    with unseen():
        if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN"
        x = torch.linspace(-1, 1, 2 * 16 * 25, device="cuda").view(2, 16, 5, 5).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.linspace(1, -1, 32 * 16 * 9, device="cuda").view(32, 16, 3, 3).to(dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        expected = torch.conv2d(x, weight, None, (2, 2), (1, 1), (1, 1))
        try:
            result = torch.cudnn_convolution(
                x, weight, (1, 1), (2, 2), (1, 1), 1, False, False, True
            )
        except (AttributeError, RuntimeError, TypeError) as error:
            return f"this torch's entry to cuDNN cannot be used: {error}"
        if result.stride() != expected.stride() or not torch.allclose(result, expected, 1e-2, 1e-1):
            return "this torch's entry to cuDNN gives other results than its convolutions"
        return None


__all__ = ["lower", "may_fuse", "serves", "why_not_direct"]
