"""Lowering to the CPU's kernels: the only place that chooses among them.

A block whose convolutions have a kernel for it runs as ``norm_convolution``: each convolution normalizes what
it reads, and takes the statistics of what it writes. Other blocks run norms in place and convolutions with
packed weights, of which the last adds to the shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.activations import ACTIVATIONS, activation_name
from bitfast.backends import select_backend
from bitfast.execution.program import NOTHING, UNUSED, Places, ProgramBuilder
from bitfast.execution.setting import Setting
from bitfast.execution.shapes import Shape, padded_by
from bitfast.execution.steps import (
    IMAGES,
    Block,
    Convolve,
    Join,
    Normalize,
    Pool,
    ZeroPad,
    normalized,
    shrinks,
)
from bitfast.layers import WeightStandardizedConv2d
from bitfast.ops.norm_convolution import (
    NO_NORM,
    has_norm_convolution_kernel,
    packed_for,
    uses_norm_convolution,
)
from bitfast.ops.packed_convolution import (
    add_convolve_packed_,
    convolve_packed,
    packed_weight,
    uses_packed_weights,
)

IMAGES_IN_SLICES = True

RESERVED_PLACES = 0

NEEDS_ADDRESSES_OF_NORMS = False

POINTWISE = (1, 1), (0, 0), (1, 1)
"""Stride, padding and dilation of a convolution that keeps the size."""


def serves(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this module lowers networks whose feature maps have this dtype."""
    return (
        device_type == "cpu"
        and select_backend("group_norm_act", device_type, dtype) == "native"
        and uses_packed_weights(device_type, dtype)
    )


def lower(blocks: Sequence[Block], builder: ProgramBuilder, setting: Setting) -> None:
    """Emit the calls of some blocks; see :class:`~bitfast.execution.plan.Lowering`."""
    lowering = _Lowering(builder, setting)
    for block in blocks:
        lowering.lower(block)


class _Lowering:
    """Lowers steps, one after the other, to calls of a :class:`ProgramBuilder`."""

    def __init__(self, builder: ProgramBuilder, setting: Setting) -> None:
        self.builder = builder
        self.setting = setting
        self.dtype = setting.compute_dtype
        self.casts = setting.dtype != setting.compute_dtype
        self.uses_norm_convolution = uses_norm_convolution("cpu", self.dtype)
        self.is_uneven = False
        self.made_new: set[int] = set()
        """Normalized values that have memory of their own, not that of the value they were computed from."""
        self.spare: tuple[int, Shape] | None = None
        """Place and shape of a tensor that is not needed any more; the next norm may be written there."""

    def lower(self, block: Block) -> None:
        fused = self.uses_norm_convolution and self.can_fuse_norms(block)
        for step in block:
            source = self.builder.shapes[step.source]
            self.is_uneven = self.builder.find_shape(step)
            if isinstance(step, Convolve):
                if fused and self.has_fused_kernel(step.convolution, source) and not self.is_uneven:
                    self.norm_convolution(step, block)
                else:
                    self.packed_convolution(step, fused)
            elif isinstance(step, Normalize):
                self.normalize(step)
            elif isinstance(step, Join):
                self.join(step, fused)
            elif isinstance(step, Pool):
                self.pool(step)
            else:
                assert isinstance(step, ZeroPad)
                self.zero_pad(step)

    # ---- choices --------------------------------------------------------------------------------------

    def can_fuse_norms(self, block: Block) -> bool:
        """Whether the convolutions of a residual block can normalize what they read."""
        last = block[-1]
        is_preactivated = isinstance(last, Convolve) and last.shortcut is not None
        if not is_preactivated and not isinstance(last, Join):
            return False
        *outer, middle, final = (s.convolution for s in block if isinstance(s, Convolve))
        x = self.builder.shapes[block[0].source]
        return (
            not shrinks(middle)
            and all(self.has_fused_kernel(convolution, x) for convolution in (*outer, final))
            and (isinstance(last, Join) or final.geometry == POINTWISE)
        )

    def has_fused_kernel(self, convolution: WeightStandardizedConv2d, x: Shape) -> bool:
        """Whether a kernel can normalize an input of shape x and convolve it in one pass."""
        # For 1x1 filters "same" padding adds nothing, whatever the stride.
        is_padded_by_itself = convolution.pad is not None and convolution.kernel_size != (1, 1)
        return not is_padded_by_itself and has_norm_convolution_kernel(
            convolution.weight, convolution.geometry, self.dtype, torch.Size(x[2:])
        )

    # ---- convolutions that normalize what they read -----------------------------------------------------

    def norm_convolution(self, step: Convolve, block: Block) -> None:
        builder, convolution = self.builder, step.convolution
        norm = NO_NORM if step.norm is None else step.norm.op_parameters()
        if step.norm is not None:
            self.compute_moments_once(step, block)
        weight, bias, groups, eps, activation = norm
        packed = packed_for(convolution.weight, convolution.eps, self.dtype)
        channels, _, size, _ = convolution.weight.shape
        stride, wants = convolution.geometry[0][0], step.then is not None
        if step.shortcut is None:
            source, moments = builder.place(step.source), builder.moments(step.source)
            builder.free_after(step)
            result = builder.new(step.result)
            result_moments = builder.new_moments(step.result) if wants else UNUSED
            op = torch.ops.bitfast.norm_convolution.native._op

            def call(places: Places) -> None:
                places[result], places[result_moments] = op(
                    places[source], places[moments], weight, bias, groups, eps, activation, packed,
                    channels, size, stride, wants,
                )  # fmt: skip

            builder.emit("norm_convolution", call)
            return
        total = self.owned_shortcut(step)
        source, moments = builder.place(step.source), builder.moments(step.source)
        builder.free_after(step)
        total_moments = builder.new_moments(step.result) if wants else UNUSED
        add = torch.ops.bitfast.norm_convolution_add_.native._op

        def call_add(places: Places) -> None:
            places[total_moments] = add(
                places[source], places[moments], weight, bias, groups, eps, activation, packed,
                places[total], size, 1, wants,
            )  # fmt: skip

        builder.emit("norm_convolution_add_", call_add)

    def compute_moments_once(self, step: Convolve, block: Block) -> None:
        """Emit a call for the moments of a value with several readers; a single one computes them itself."""
        builder, value = self.builder, step.source
        readers = [
            other for other in block if isinstance(other, Convolve) and other.source == value
        ]
        if len(readers) < 2 or builder.moments(value) != NOTHING:
            return
        source, moments = builder.place(value), builder.new_moments(value)
        op = torch.ops.bitfast.channel_moments.native._op

        def call(places: Places) -> None:
            places[moments] = op(places[source])

        builder.emit("channel_moments", call)

    def owned_shortcut(self, step: Convolve) -> int:
        """Return the place of the result, which holds the shortcut until the convolution is added to it."""
        builder = self.builder
        assert step.shortcut is not None
        if builder.may_overwrite(step, step.shortcut):
            return builder.move(step.result, step.shortcut)
        shortcut, result = builder.place(step.shortcut), builder.new(step.result)

        def call(places: Places) -> None:
            places[result] = places[shortcut].clone()

        builder.emit("clone", call)
        return result

    # ---- convolutions with packed weights ---------------------------------------------------------------

    def packed_convolution(self, step: Convolve, fused: bool) -> None:
        builder, convolution = self.builder, step.convolution
        shape = builder.shapes[step.source]
        source = builder.place(step.source) if step.norm is None else self.normalized(step)
        pad = self.builder.pad_before(step, self.setting)
        padded = (*shape[:2], *padded_by(convolution.pad, shape[2:]))
        geometry = convolution.geometry
        packed = packed_weight(
            convolution.weight, convolution.eps, geometry, self.dtype, torch.Size(padded)
        )
        dtype = self.dtype if self.casts and step.source == IMAGES else None

        def read(places: Places) -> Tensor:
            x = places[source]
            x = x if pad is None else pad(x)
            return x if dtype is None else x.to(dtype)

        is_plain = pad is None and dtype is None
        if step.shortcut is None:
            self.keep_spare(step, fused)
            builder.free_after(step)
            result = builder.new(step.result)

            def call(places: Places) -> None:
                x = places[source] if is_plain else read(places)
                places[result] = convolve_packed(x, packed, geometry)

            builder.emit("packed_convolution", call)
            return
        adds = not fused and geometry == POINTWISE and pad is None and not self.is_uneven
        if adds and builder.may_overwrite(step, step.shortcut):
            total = builder.move(step.result, step.shortcut)
            builder.free_after(step)

            def call_add(places: Places) -> None:
                add_convolve_packed_(places[source], packed, places[total], geometry)

            builder.emit("packed_convolution_add_", call_add)
            return
        shortcut = builder.place(step.shortcut)
        adds_with_norm = (
            step.then is not None and not self.uses_norm_convolution and not self.is_uneven
        )
        builder.free_after(step)
        result = builder.new(step.result)
        if not adds_with_norm:

            def call_and_add(places: Places) -> None:
                branch = convolve_packed(read(places), packed, geometry)
                places[result] = branch + places[shortcut]

            builder.emit("packed_convolution, add", call_and_add)
            return
        assert step.then is not None
        following = builder.new(normalized(step.result))
        op, norm = torch.ops.bitfast.add_group_norm_act.native._op, step.then.op_parameters()

        def call_and_normalize(places: Places) -> None:
            branch = convolve_packed(read(places), packed, geometry)
            places[result], places[following], *_ = op(branch, places[shortcut], *norm)

        builder.emit("packed_convolution, add_group_norm_act", call_and_normalize)

    # ---- norms --------------------------------------------------------------------------------------------

    def normalized(self, step: Convolve | Normalize) -> int:
        """Return the place of the normalized source; it overwrites the source where nobody else reads that."""
        builder, value = self.builder, normalized(step.source)
        assert step.norm is not None
        if builder.has(value):
            return builder.place(value)
        source, moments = builder.place(step.source), builder.moments(step.source)
        shape = builder.shapes[step.source]
        norm = step.norm.op_parameters()
        if builder.may_overwrite(step, step.source):
            place = builder.move(value, step.source)
            op = torch.ops.bitfast.group_norm_act_.native._op

            def call_in_place(places: Places) -> None:
                op(places[place], places[moments], *norm, None)

            builder.emit("group_norm_act_", call_in_place)
            return place
        into = torch.ops.bitfast.group_norm_act_into.native._op
        self.made_new.add(value)
        if self.spare is not None and self.spare[1] == shape:
            result = builder.put(value, self.spare[0])
            self.spare = None

            def call_into(places: Places) -> None:
                into(places[source], places[moments], *norm, None, places[result])

        else:
            result = builder.new(value)

            def call_into(places: Places) -> None:
                x = places[source]
                places[result] = made = torch.empty_like(x)
                into(x, places[moments], *norm, None, made)

        builder.emit("group_norm_act_into", call_into)
        return result

    def keep_spare(self, step: Convolve, fused: bool) -> None:
        """Keep the memory of a block's first normalized value for the first norm of the next block."""
        builder, value = self.builder, normalized(step.source)
        if fused or value not in self.made_new or not builder.may_overwrite(step, value):
            return
        if self.spare is not None:
            builder.free_place(self.spare[0])
        self.spare = builder.take(value), builder.shapes[step.source]

    def normalize(self, step: Normalize) -> None:
        self.normalized(step)
        self.builder.move(step.result, normalized(step.source))
        self.builder.free_after(step)

    def join(self, step: Join, fused: bool) -> None:
        builder = self.builder
        name = activation_name(step.activation)
        assert name is not None
        activate = ACTIVATIONS[name]
        source, moments = builder.place(step.source), builder.moments(step.source)
        shortcut = builder.place(step.shortcut)
        op = torch.ops.bitfast.group_norm_act_.native._op
        weight, bias, groups, eps, _ = step.norm.op_parameters()
        adds = fused and not self.is_uneven
        result = builder.move(step.result, step.source)
        builder.free_after(step)

        def call(places: Places) -> None:
            x = places[source]
            if adds:
                op(x, places[moments], weight, bias, groups, eps, name, places[shortcut])
            else:
                op(x, places[moments], weight, bias, groups, eps, "none", None)
                places[result] = activate(x + places[shortcut])

        builder.emit("group_norm_act_, add", call)

    # ---- the stem -------------------------------------------------------------------------------------------

    def pool(self, step: Pool) -> None:
        builder = self.builder
        pool = step.pooler.prepared(builder.shapes[step.source], step.zeros, "cpu", self.dtype)
        source = builder.place(step.source)
        builder.free_after(step)
        result = builder.new(step.result)

        def call(places: Places) -> None:
            places[result] = pool(places[source])

        builder.emit("same_max_pool", call)

    def zero_pad(self, step: ZeroPad) -> None:
        builder, sides = self.builder, (step.zeros,) * 4
        source = builder.place(step.source)
        builder.free_after(step)
        result = builder.new(step.result)

        def call(places: Places) -> None:
            places[result] = F.pad(places[source], sides)

        builder.emit("zeros", call)


__all__ = ["lower", "serves"]
