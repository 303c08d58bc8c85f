"""The cases that are about single ops: one row each, with the contestants that compute the same thing.

The first contestant of a case, plain PyTorch, is what a user has without bitfast; the others are set beside
it, on the same inputs. Whole models are in ``models.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import BitConfig, BitModel
from bitfast.backends import select_backend
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.norm_convolution import (
    has_norm_convolution_kernel,
    norm_convolution,
    uses_norm_convolution,
)
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all

PLAIN = "plain PyTorch"
OURS = "bitfast"

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
GROUPS = 32
CLEAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Larger than what rounding does to a normalized number."""
SIDES = (1, 1, 1, 1)
"""The zeros that the stem puts around its output before the max-pool."""


Results = Tensor | Sequence[Tensor]
Function = Callable[..., Results]


@dataclass(frozen=True)
class Problem:
    """What a case computes, on inputs that have been drawn.

    Attributes:
        contestants: By name, the functions to be timed.
        oracle: The same in float64.
        bytes: The least that must be read and written: each tensor once. 0: it is not about bytes.
        backend: Which of bitfast's backends serves the inputs.
    """

    contestants: dict[str, Callable[[], Results]]
    oracle: Callable[[], Results]
    bytes: int
    backend: str


@dataclass(frozen=True)
class Case:
    """One row: what is computed, on what.

    Attributes:
        op: The word of the op, or "dispatch" for the cost of a call as such.
        name: Shape, dtype and layout, for people.
        dtype: Of the inputs.
        make: Draws the inputs.
        is_training: Whether autograd records what the contestants do.
        is_quick: Whether it stands for its like, in ``--quick`` and in the README.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[], Problem]
    is_training: bool = False
    is_quick: bool = False

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op}: {self.name}"


def feature_maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Draw a batch of feature maps, or a convolution's weight."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float64, wanting gradients as they do."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def problem(
    op: str, inputs: Sequence[Tensor], plain: Function, ours: Function, count: int
) -> Problem:
    """Return the problem of computing ``plain(*inputs)``, which is also the oracle in float64."""
    return Problem(
        {PLAIN: lambda: plain(*inputs), OURS: lambda: ours(*inputs)},
        lambda: plain(*doubled(inputs)),
        count,
        select_backend(op, "cpu", inputs[0].dtype),
    )


def training_problem(
    op: str,
    inputs: Sequence[Tensor],
    plain: Function,
    ours: Function,
    grads: Sequence[Tensor],
    count: int,
) -> Problem:
    """Return the problem of the gradients of all inputs, given those of the results."""
    for tensor in inputs:
        tensor.requires_grad_()

    def step(function: Function) -> Function:
        def run(*tensors: Tensor) -> Results:
            results = as_list(function(*tensors))
            given = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
            return torch.autograd.grad(results, tensors, given)

        return run

    return problem(op, inputs, step(plain), step(ours), count)


def as_list(results: Results) -> list[Tensor]:
    """Return one result or several as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


# ---- the ops ------------------------------------------------------------------------------------


def pad_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """TensorFlow's padding for a 3x3 convolution of stride 2 on an even size: 0 before and 1 after."""
    x = feature_maps(shape, dtype, layout)

    def plain(x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))

    return problem("same_padding", [x], plain, lambda x: same_pad(x, 3, 2), bytes_of(x, plain(x)))


def plain_pool(x: Tensor) -> Tensor:
    """Put zeros around feature maps and take the stem's max-pool."""
    return F.max_pool2d(F.pad(x, SIDES), 3, 2)


def our_pool(x: Tensor) -> Tensor:
    """Do the same in one op."""
    return same_max_pool(x, 3, 2, padding=SIDES)


def pool_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """The stem's max-pool, whose zeros take part."""
    x = feature_maps(shape, dtype, layout)
    return problem("same_padding", [x], plain_pool, our_pool, bytes_of(x, plain_pool(x)))


def pool_training_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """The same, forward and backward."""
    x = feature_maps(shape, dtype, layout)
    grad = torch.randn_like(plain_pool(x))
    count = 2 * bytes_of(x, grad)  # the input and the result, and their gradients
    return training_problem("same_padding", [x], plain_pool, our_pool, [grad], count)


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Draw feature maps, and the norm's weight and bias."""
    channels = shape[1]
    x = feature_maps(shape, dtype, layout)
    return [x, torch.rand(channels).to(dtype) + 0.5, torch.randn(channels).to(dtype)]


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups of channels, then ReLU."""
    return F.relu(F.group_norm(x, GROUPS, weight, bias))


def our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do the same in one op."""
    return group_norm_act(x, weight, bias, GROUPS)


def norm_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """A norm with its activation."""
    inputs = norm_inputs(shape, dtype, layout)
    return problem("group_norm_act", inputs, plain_norm, our_norm, 2 * bytes_of(inputs[0]))


def norm_training_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """The same, forward and backward.

    Where the ReLU's argument is so near to 0 that rounding decides on which side, no gradient arrives: one
    such pixel would make a difference of 1e-3, which says nothing about accuracy.
    """
    inputs = norm_inputs(shape, dtype, layout)
    x, weight, bias = doubled(inputs)
    is_clear = F.group_norm(x, GROUPS, weight, bias).abs() > CLEAR[dtype]
    grad = torch.randn_like(inputs[0]) * is_clear
    count = 5 * bytes_of(grad)  # x in either pass, the result, its gradient, that of x
    return training_problem("group_norm_act", inputs, plain_norm, our_norm, [grad], count)


def residual_norm_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """A residual is added first; the results are the sum and its activated norm."""
    x, weight, bias = norm_inputs(shape, dtype, layout)
    residual = feature_maps(shape, dtype, layout)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
        total = x + residual
        return total, plain_norm(total, weight, bias)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
        return add_group_norm_act(x, residual, weight, bias, GROUPS)

    return problem("group_norm_act", [x, residual, weight, bias], plain, ours, 4 * bytes_of(x))


def plain_standardization(weight: Tensor) -> Tensor:
    """Standardize a weight as transformers does: as a batch norm."""
    flat = weight.reshape(1, weight.shape[0], -1)
    result = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
    return result.reshape(weight.shape)


def weight_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """One weight."""
    weight = feature_maps(shape, dtype, layout)
    functions = plain_standardization, weight_standardization
    return problem("weight_standardization", [weight], *functions, 2 * bytes_of(weight))


def weight_training_problem(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """One weight, forward and backward."""
    weight = feature_maps(shape, dtype, layout)
    functions = plain_standardization, weight_standardization
    grads, count = [torch.randn_like(weight)], 5 * bytes_of(weight)
    return training_problem("weight_standardization", [weight], *functions, grads, count)


def standardized_weights(dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Draw all standardized weights of R50x1."""
    with torch.device("meta"):
        model = BitModel(BitConfig())
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]
    return [feature_maps(tuple(shape), dtype, layout) for shape in shapes]


def plain_standardizations(*weights: Tensor) -> Results:
    """Standardize several weights, one after the other."""
    return [plain_standardization(weight) for weight in weights]


def our_standardizations(*weights: Tensor) -> Results:
    """Do the same in one op."""
    return weight_standardization_all(weights)


def all_weights_problem(_: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """All weights of R50x1."""
    weights = standardized_weights(dtype, layout)
    functions = plain_standardizations, our_standardizations
    return problem("weight_standardization", weights, *functions, 2 * bytes_of(*weights))


def all_weights_training_problem(_: tuple[int, ...], dtype: torch.dtype, layout: str) -> Problem:
    """All weights of R50x1, forward and backward."""
    weights = standardized_weights(dtype, layout)
    functions = plain_standardizations, our_standardizations
    grads, count = [torch.randn_like(w) for w in weights], 5 * bytes_of(*weights)
    return training_problem("weight_standardization", weights, *functions, grads, count)


def norm_convolution_problem(
    shape: tuple[int, ...], out_channels: int, kernel_size: int, dtype: torch.dtype
) -> Problem:
    """A norm, ReLU and a convolution, as in a preactivation block; the weights are standardized beforehand."""
    x = feature_maps(shape, dtype, CHANNELS_LAST)
    norm = GroupNormActivation(GROUPS, shape[1], activation="relu").eval()
    convolution = WeightStandardizedConv2d(shape[1], out_channels, kernel_size).to(dtype).eval()
    weight = weight_standardization(convolution.weight.detach(), convolution.eps)
    inputs = x, norm.weight.detach(), norm.bias.detach(), weight
    is_fused = (
        uses_norm_convolution(x.device.type, dtype)
        and convolution.pad is None
        and has_norm_convolution_kernel(
            convolution.weight, convolution.geometry, dtype, x.shape[2:]
        )
    )

    def plain(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        normalized = F.group_norm(x, GROUPS, scale.to(x.dtype), shift.to(x.dtype))
        return F.conv2d(F.relu(normalized), weight, padding=kernel_size // 2)

    def ours(x: Tensor, *_: Tensor) -> Tensor:
        if not is_fused:  # the norm, then a convolution with packed weights
            return convolution(norm(x))
        own = convolution.weight, convolution.eps, convolution.stride[0]
        return norm_convolution(x, None, norm.op_parameters(), *own, wants_moments=False)[0]

    return problem("group_norm_act", inputs, plain, ours, 0)


def dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a call as such: one pixel is padded to four."""
    x = torch.ones(1, 1, 1, 1, requires_grad=is_recorded)
    sides = (0, 1, 0, 1)
    return Problem(
        {PLAIN: lambda: F.pad(x, sides), OURS: lambda: same_pad(x, 2, 1)},
        lambda: F.pad(x.double(), sides),
        0,
        select_backend("same_padding", "cpu", x.dtype),
    )


# ---- the rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Cases that differ in shape, dtype and layout alone.

    Attributes:
        op: The word of the op.
        form: What is said after the shape.
        make: Draws a problem of a shape, dtype and layout.
        shapes: Of the feature maps (N, C, H, W) or of the weight (out, in, height, width).
        quick: Which combinations of shape, dtype and layout stand for the rest.
        is_training: Whether autograd records what the contestants do.
    """

    op: str
    form: str
    make: Callable[[tuple[int, ...], torch.dtype, str], Problem]
    shapes: tuple[tuple[int, ...], ...]
    quick: tuple[tuple[tuple[int, ...], torch.dtype, str], ...] = ()
    is_training: bool = False

    def cases(self) -> Iterator[Case]:
        """Yield its rows."""
        for shape in self.shapes:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    words = ["x".join(map(str, shape)), self.form, name_of(dtype), layout]
                    yield Case(
                        self.op,
                        " ".join(word for word in words if word),
                        dtype,
                        partial(self.make, shape, dtype, layout),
                        self.is_training,
                        (shape, dtype, layout) in self.quick,
                    )


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


STEM = ((8, 64, 112, 112), (1, 64, 112, 112))
"""The stem's output of R50x1 at 224x224."""
STAGES = (
    (8, 64, 56, 56),
    (8, 256, 56, 56),
    (8, 512, 28, 28),
    (8, 1024, 14, 14),
    (8, 2048, 7, 7),
    (1, 256, 56, 56),
    (1, 1024, 14, 14),
)
"""Feature maps in R50x1 at 224x224."""
FEW_STAGES = ((8, 256, 56, 56), (8, 1024, 14, 14), (1, 256, 56, 56))
CONVOLUTIONS = (
    ((8, 256, 56, 56), 64, 1),
    ((8, 64, 56, 56), 64, 3),
    ((8, 64, 56, 56), 256, 1),
    ((8, 1024, 14, 14), 256, 1),
    ((8, 256, 14, 14), 256, 3),
    ((1, 256, 14, 14), 1024, 1),
)
"""Inputs of convolutions in R50x1 at 224x224, the output channels, and the size of the filters."""
LARGEST_WEIGHT = (512, 512, 3, 3)
ALL_WEIGHTS: tuple[int, ...] = ()
"""No single shape."""

FLOAT, BFLOAT = DTYPES
NCHW, CHANNELS_LAST = LAYOUTS
STAGE = (8, 256, 56, 56)
EACH_LAYOUT = tuple((STAGE, dtype, layout) for dtype in DTYPES for layout in LAYOUTS)
EACH_STEM = tuple((STEM[0], dtype, layout) for dtype in DTYPES for layout in LAYOUTS)

FAMILIES = (
    Family("same_padding", "pad", pad_problem, STEM[:1]),
    Family("same_padding", "max-pool", pool_problem, STEM, EACH_STEM),
    Family(
        "same_padding",
        "max-pool forward+backward",
        pool_training_problem,
        STEM[:1],
        ((STEM[0], FLOAT, NCHW),),
        is_training=True,
    ),
    Family("group_norm_act", "", norm_problem, STAGES, EACH_LAYOUT),
    Family("group_norm_act", "with residual", residual_norm_problem, FEW_STAGES, EACH_LAYOUT),
    Family(
        "group_norm_act",
        "forward+backward",
        norm_training_problem,
        FEW_STAGES[:2],
        ((STAGE, FLOAT, NCHW), (STAGE, FLOAT, CHANNELS_LAST)),
        is_training=True,
    ),
    Family("weight_standardization", "", weight_problem, (LARGEST_WEIGHT, (1024, 256, 1, 1))),
    Family(
        "weight_standardization",
        "forward+backward",
        weight_training_problem,
        (LARGEST_WEIGHT,),
        is_training=True,
    ),
    Family(
        "weight_standardization_all",
        "R50x1",
        all_weights_problem,
        (ALL_WEIGHTS,),
        ((ALL_WEIGHTS, FLOAT, NCHW), (ALL_WEIGHTS, BFLOAT, NCHW)),
    ),
    Family(
        "weight_standardization_all",
        "R50x1 forward+backward",
        all_weights_training_problem,
        (ALL_WEIGHTS,),
        ((ALL_WEIGHTS, FLOAT, NCHW),),
        is_training=True,
    ),
)


def cases() -> Iterator[Case]:
    """Yield every row."""
    for is_recorded in (False, True):
        yield Case(
            "dispatch",
            "same_pad of one pixel" + (", recorded by autograd" if is_recorded else ""),
            torch.float32,
            partial(dispatch_problem, is_recorded),
            is_recorded,
            is_quick=True,
        )
    for shape, out_channels, kernel_size in CONVOLUTIONS:
        for dtype in DTYPES:
            words = "x".join(map(str, shape)), f"{kernel_size}x{kernel_size} to {out_channels}"
            yield Case(
                "norm_convolution",
                f"{' '.join(words)} channels {name_of(dtype)} channels_last",
                dtype,
                partial(norm_convolution_problem, shape, out_channels, kernel_size, dtype),
                is_quick=shape[0] == 8 and shape[-1] == 14,
            )
    for family in FAMILIES:
        yield from family.cases()
