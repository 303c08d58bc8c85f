"""The cases that are about single ops, beside plain PyTorch, which is what a user has without bitfast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import BitConfig, BitModel
from bitfast.backends import select_backend
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all

from .accuracy import Float64Judge
from .cases import (
    OURS,
    PLAIN,
    Begin,
    Case,
    Contestant,
    Problem,
    Results,
    Running,
    as_list,
    called,
    calling,
    name_of,
)

PLAIN_NCHW, COMPILED = f"{PLAIN} NCHW", f"{PLAIN} compiled"

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
NCHW, CHANNELS_LAST = LAYOUTS
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
GROUPS = 32
CLEAR = {FLOAT: 1e-4, HALF: 4e-3, BFLOAT: 3e-2}
"""Larger than what rounding does to a normalized number."""
SIDES = (1, 1, 1, 1)
"""The zeros that the stem puts around its output before the max-pool."""
STEM_ZEROS = (3, 3, 3, 3)
"""Those around the images."""
MOST_SETS = 48
"""Input sets that take turns on a GPU."""

Function = Callable[..., Results]
Make = Callable[[], Results]
Shape = tuple[int, ...]


class Inputs(NamedTuple):
    """Of which kind inputs are: shape of the feature maps (N, C, H, W) or of the weight (out, in, h, w)."""

    shape: Shape
    dtype: torch.dtype
    layout: str
    device: str = "cpu"

    def feature_maps(self) -> Tensor:
        """Draw a batch of feature maps, or a weight."""
        drawn = torch.randn(self.shape, device=self.device).to(self.dtype)
        return drawn.contiguous(memory_format=LAYOUTS[self.layout])

    def with_norm(self, batches: int = 1) -> list[Tensor]:
        """Draw so many batches of feature maps, and a norm's weight and bias."""
        maps = [self.feature_maps() for _ in range(batches)]
        channels = self.shape[1]
        weight = torch.rand(channels, device=self.device) + 0.5
        bias = torch.randn(channels, device=self.device)
        return [*maps, weight.to(self.dtype), bias.to(self.dtype)]


def all_weights(inputs: Inputs) -> list[Tensor]:
    """Draw all standardized weights of R50x1, whatever the shape asked for."""
    with torch.device("meta"):
        model = BitModel(BitConfig())
    layers = [m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]
    return [inputs._replace(shape=tuple(m.weight.shape)).feature_maps() for m in layers]


def images_and_filters(inputs: Inputs) -> list[Tensor]:
    """Draw images, standardized filters of a stem, and the same filters as our kernel takes them."""
    from bitfast.ops.stem import prepare_filters  # another commit may lack it

    weight = torch.randn(64, 3, 7, 7, device=inputs.device).to(inputs.dtype)
    filters = prepare_filters(weight, STEM_ZEROS)
    return [
        inputs.feature_maps(),
        weight.contiguous(memory_format=LAYOUTS[inputs.layout]),
        filters,
    ]


# ---- plain PyTorch ------------------------------------------------------------------------------------


def plain_pad(x: Tensor) -> Tensor:
    """TensorFlow's padding for a 3x3 convolution of stride 2 on an even size: 0 before and 1 after."""
    return F.pad(x, (0, 1, 0, 1))


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, GROUPS, weight, bias))


def plain_residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
    total = x + residual
    return total, plain_norm(total, weight, bias)


def plain_stem(images: Tensor, weight: Tensor, filters: Tensor) -> Tensor:
    return F.max_pool2d(F.pad(F.conv2d(images, weight, None, 2, 3), SIDES), 3, 2)


def our_stem(images: Tensor, weight: Tensor, filters: Tensor) -> Tensor:
    from bitfast.ops.stem import stem

    return stem(images, filters, STEM_ZEROS, SIDES)


def plain_standardizations(*weights: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Standardize weights one after the other, as transformers does: as a batch norm."""
    results = []
    for weight in weights:
        flat = weight.reshape(1, weight.shape[0], -1)
        result = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
        wanted = weight.dtype if weight.dtype == torch.float64 else dtype or weight.dtype
        results.append(result.reshape(weight.shape).to(wanted))
    return results


# ---- from a function to a problem -------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Cases that differ in shape, dtype and layout alone.

    Attributes:
        op: The word of the op.
        form: What is said after the shape.
        plain, ours: Of the inputs.
        draw: Draws them.
        is_training: Whether the gradients of all inputs are computed too.
        rereads_input: Whether the backward pass reads the inputs again.
        is_clear: Where gradients of the results may be anything but 0; None: everywhere.
        source: The dtype of the inputs, if it is not that of the results.
    """

    op: str
    form: str
    plain: Function
    ours: Function
    draw: Callable[[Inputs], list[Tensor]] = lambda inputs: [inputs.feature_maps()]
    is_training: bool = False
    rereads_input: bool = True
    is_clear: Callable[..., Tensor] | None = None
    source: torch.dtype | None = None

    def case(self, inputs: Inputs, threads: int, is_compiled: bool = False, **options: Any) -> Case:
        """Return the row of these inputs; ``is_compiled``: beside compiled PyTorch too."""
        dtype = name_of(inputs.dtype)
        words = [
            "x".join(map(str, inputs.shape)),
            self.form,
            "forward+backward" if self.is_training else "",
            f"{name_of(self.source)} to {dtype}" if self.source else f"{dtype} {inputs.layout}",
        ]
        return case_of(
            partial(self.problem, inputs, is_compiled),
            self.op, " ".join(filter(None, words)), inputs.dtype, threads, device=inputs.device,
            clock="host" if inputs.device == "cpu" else "kernels", is_training=self.is_training, **options,
        )  # fmt: skip

    def problem(self, inputs: Inputs, is_compiled: bool) -> Problem:
        """Draw inputs, and as many sets of them as a GPU's cache asks for."""
        given = inputs._replace(dtype=self.source or inputs.dtype)
        first = self.draw(given)
        sets = [first, *(self.draw(given) for _ in range(sets_of(first) - 1))]
        results = [result.detach() for result in as_list(self.plain(*first))]
        # A norm's parameters are few numbers, and do not count.
        read, written = bytes_of([t for t in first if t.dim() > 1]), bytes_of(results)
        count = read + written
        grads = None
        if self.is_training:
            grads = [torch.randn_like(result) for result in results]
            if self.is_clear is not None:
                grads = [grad * self.is_clear(*first) for grad in grads]
            for tensor in (tensor for each in sets for tensor in each):
                tensor.requires_grad_()
            count += written + read * (1 + self.rereads_input)
        plain = with_gradients(self.plain, grads)

        def in_turns(function: Function) -> Begin:
            return called(lambda number: function(*sets[number]), len(sets))

        def begin_compiled(stack: ExitStack) -> Running:
            torch._dynamo.reset()
            compiled: Any = torch.compile(self.plain, dynamic=False)
            return in_turns(with_gradients(compiled, grads))(stack)

        dtype = name_of(inputs.dtype)
        contestants = [Contestant(PLAIN, dtype, in_turns(plain))]
        if inputs.device == "cuda" and self.draw is not all_weights and inputs.layout != NCHW:
            contestants.append(Contestant(PLAIN_NCHW, dtype, in_turns(in_nchw(plain, sets))))
        if is_compiled:
            contestants.append(Contestant(COMPILED, dtype, begin_compiled, is_compiled=True))
        note = backend_note(self.op.removesuffix("_all"), inputs.device, inputs.dtype)
        ours = in_turns(with_gradients(self.ours, grads))
        contestants.append(Contestant(OURS, dtype, ours, note))
        oracle = [result.detach() for result in as_list(plain(*doubled(first)))]
        return Problem(contestants, Float64Judge(oracle), count)


def case_of(
    make: Callable[[], Problem], op: str, name: str, dtype: torch.dtype, threads: int, **options: Any
) -> Case:  # fmt: skip
    """Return the case of a problem that holds nothing but memory."""
    dtype_name = name_of(dtype)
    return Case("op", op, name, dtype_name, lambda: nullcontext(make()), threads=threads, **options)


def backend_note(op: str, device: str, dtype: torch.dtype) -> str:
    return f"backend: {select_backend(op, device, dtype)}"


def with_gradients(function: Function, grads: Sequence[Tensor] | None) -> Function:
    """Return what computes the gradients of all inputs, given those of the results; None: the function."""
    if grads is None:
        return function

    def step(*tensors: Tensor) -> Results:
        results = as_list(function(*tensors))
        given = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
        return torch.autograd.grad(results, tensors, given)

    return step


def in_nchw(function: Function, sets: list[list[Tensor]]) -> Function:
    """Return a function on copies of the input sets in the other layout, which it makes once."""
    copies = {
        id(each[0]): [t.detach().contiguous().requires_grad_(t.requires_grad) for t in each]
        for each in sets
    }
    return lambda first, *_: function(*copies[id(first)])


def sets_of(inputs: list[Tensor]) -> int:
    """Return how many input sets must take turns so that a GPU finds none of them in its L2 cache."""
    if not inputs[0].is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, math.ceil(4 * cache / bytes_of(inputs))))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float64, wanting gradients as they do."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# ---- cases of another form ------------------------------------------------------------------------------


def functions_problem(
    op: str, functions: Mapping[str, Make], oracle: Make, flops: int = 0
) -> Problem:
    """Return the problem of functions that hold their inputs; ``op`` is whose backend is told."""
    with torch.no_grad():
        result = as_list(functions[PLAIN]())[0]
    dtype = name_of(result.dtype)
    notes = {OURS: backend_note(op, result.device.type, result.dtype)}
    contestants = [
        Contestant(name, dtype, calling(f), notes.get(name, "")) for name, f in functions.items()
    ]
    return Problem(contestants, Float64Judge([t.detach() for t in as_list(oracle())]), flops=flops)


def norm_convolution_problem(inputs: Inputs, out_channels: int, kernel_size: int) -> Problem:
    """A norm, ReLU and a convolution, as in a preactivation block; the weights are standardized beforehand."""
    from bitfast.ops import norm_convolution as op  # another commit may lack it

    x = inputs.feature_maps()
    channels, dtype = inputs.shape[1], inputs.dtype
    norm = GroupNormActivation(GROUPS, channels, activation="relu").eval()
    convolution = WeightStandardizedConv2d(channels, out_channels, kernel_size).to(dtype).eval()
    weight = weight_standardization(convolution.weight.detach(), convolution.eps)
    has_kernel = op.has_norm_convolution_kernel(
        convolution.weight, convolution.geometry, dtype, x.shape[2:]
    )
    is_fused = (
        op.uses_norm_convolution(x.device.type, dtype) and convolution.pad is None and has_kernel
    )

    def plain(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        normalized = plain_norm(x, scale.to(x.dtype), shift.to(x.dtype))
        return F.conv2d(normalized, weight, padding=kernel_size // 2)

    def ours() -> Tensor:
        if not is_fused:  # the norm, then a convolution with packed weights
            return convolution(norm(x))
        own = convolution.weight, convolution.eps, convolution.stride[0]
        return op.norm_convolution(x, None, norm.op_parameters(), *own, wants_moments=False)[0]

    given = x, norm.weight.detach(), norm.bias.detach(), weight
    functions = {PLAIN: lambda: plain(*given), OURS: ours}
    flops = 2 * x[:, 0].numel() * weight.numel()
    return functions_problem("group_norm_act", functions, lambda: plain(*doubled(given)), flops)


def dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a call as such: one pixel is padded to four."""
    x = torch.ones(1, 1, 1, 1, requires_grad=is_recorded)
    functions = {PLAIN: lambda: plain_pad(x), OURS: lambda: same_pad(x, 2, 1)}
    return functions_problem("same_padding", functions, lambda: plain_pad(x.double()))


def norm_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a norm's call on a GPU, of its operator, and of its launch alone: four pixels."""
    from bitfast.kernels import group_norm_act as kernels

    inputs = Inputs((1, GROUPS, 2, 2), FLOAT, CHANNELS_LAST, "cuda")
    given = x, weight, bias = inputs.with_norm()
    result, mean = torch.empty_like(x), torch.empty(1, GROUPS, device="cuda")
    (launch,) = kernels.forward_launches(
        x, None, weight, bias, 1e-5, "relu", True,
        total=None, result=result, mean=mean, rstd=mean.clone(),
    )  # fmt: skip

    def launched() -> Tensor:
        launch.launch()
        return result

    x.requires_grad_(is_recorded)
    operator = torch.ops.bitfast.group_norm_act.triton
    functions = {
        PLAIN: lambda: plain_norm(*given),
        OURS: lambda: our_norm(*given),
        "bitfast, the operator": lambda: operator(*given, GROUPS, 1e-5, "relu")[0],
        **({} if is_recorded else {"bitfast, the launch alone": launched}),
    }
    return functions_problem("group_norm_act", functions, lambda: plain_norm(*doubled(given)))


def weight_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of standardizing 32 filters of 32 numbers on a GPU."""
    weight = Inputs((32, 32, 1, 1), FLOAT, NCHW, "cuda").feature_maps().requires_grad_(is_recorded)
    plain, ours = WEIGHT.plain, WEIGHT.ours
    functions = {PLAIN: lambda: plain(weight), OURS: lambda: ours(weight)}
    return functions_problem("weight_standardization", functions, lambda: plain(weight.double()))


# ---- the rows -------------------------------------------------------------------------------------------


def is_clear_of_the_kink(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Whether a norm's result is not so near to 0 that rounding decides on which side of ReLU's kink it is.

    One such pixel would change gradients by 1e-3, which says nothing about accuracy: none reaches it.
    """
    exact = F.group_norm(x.double(), GROUPS, weight.double(), bias.double())
    return exact.abs() > CLEAR[FLOAT if x.is_cuda else x.dtype]


PAD = Family("same_padding", "pad", plain_pad, lambda x: same_pad(x, 3, 2))
POOL = Family(
    "same_padding", "max-pool",
    lambda x: F.max_pool2d(F.pad(x, SIDES), 3, 2), lambda x: same_max_pool(x, 3, 2, padding=SIDES),
)  # fmt: skip
IMAGES_TO_POOL = Family("stem", "with max-pool", plain_stem, our_stem, images_and_filters)
POOL_TRAINING = replace(POOL, is_training=True, rereads_input=False)
our_norm = partial(group_norm_act, num_groups=GROUPS)
NORM = Family("group_norm_act", "", plain_norm, our_norm, Inputs.with_norm)
NORM_TRAINING = replace(NORM, is_training=True, is_clear=is_clear_of_the_kink)
RESIDUAL_NORM = Family(
    "group_norm_act", "with residual",
    plain_residual_norm, partial(add_group_norm_act, num_groups=GROUPS), partial(Inputs.with_norm, batches=2),
)  # fmt: skip
RESIDUAL_NORM_TRAINING = replace(
    RESIDUAL_NORM,
    is_training=True,
    is_clear=lambda x, residual, *parameters: is_clear_of_the_kink(x + residual, *parameters),
)
WEIGHT = Family("weight_standardization", "", plain_standardizations, weight_standardization)
WEIGHT_TRAINING = replace(WEIGHT, is_training=True)


def weights_family(op: str, form: str, dtype: torch.dtype | None = None, **options: Any) -> Family:
    """Return a family of the standardization of all weights at once, to a dtype other than theirs if given."""

    def ours(*weights: Tensor) -> Results:
        return weight_standardization_all(weights, 1e-8, dtype, channels_last=dtype is not None)

    plain = partial(plain_standardizations, dtype=dtype)
    return Family(op, form, plain, ours, all_weights, **options)


WEIGHTS = weights_family("weight_standardization_all", "R50x1")
WEIGHTS_TRAINING = replace(WEIGHTS, is_training=True)

STEM = ((8, 64, 112, 112), (1, 64, 112, 112))
"""The stem's output of R50x1 at 224x224."""
STAGE = (8, 256, 56, 56)
STAGES = (
    (8, 64, 56, 56), STAGE, (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7), (1, 256, 56, 56),
    (1, 1024, 14, 14),
)  # fmt: skip
"""Feature maps in R50x1 at 224x224."""
FEW_STAGES = (STAGE, (8, 1024, 14, 14), (1, 256, 56, 56))
CONVOLUTIONS = (
    ((8, 256, 56, 56), 64, 1), ((8, 64, 56, 56), 64, 3), ((8, 64, 56, 56), 256, 1),
    ((8, 1024, 14, 14), 256, 1), ((8, 256, 14, 14), 256, 3), ((1, 256, 14, 14), 1024, 1),
)  # fmt: skip
"""Inputs of convolutions in R50x1 at 224x224, the output channels, and the size of the filters."""
LARGEST_WEIGHT = (512, 512, 3, 3)
ALL_WEIGHTS: Shape = ()
"""No single shape."""

CPU_FAMILIES: tuple[tuple[Family, tuple[Shape, ...], str], ...] = (
    (PAD, STEM[:1], ""),
    (POOL, STEM, "each"),
    (POOL_TRAINING, STEM[:1], "float32 NCHW"),
    (NORM, STAGES, "each"),
    (RESIDUAL_NORM, FEW_STAGES, "each"),
    (NORM_TRAINING, FEW_STAGES[:2], "float32 NCHW, float32 channels_last"),
    (WEIGHT, (LARGEST_WEIGHT, (1024, 256, 1, 1)), ""),
    (WEIGHT_TRAINING, (LARGEST_WEIGHT,), ""),
    (WEIGHTS, (ALL_WEIGHTS,), "float32 NCHW, bfloat16 NCHW"),
    (WEIGHTS_TRAINING, (ALL_WEIGHTS,), "float32 NCHW"),
)
"""Families, their shapes, and which dtypes and layouts of a shape stand for the rest: for the stem's output of
batch 8, for :data:`STAGE` and for all weights."""

GPU_NORMS = (
    (256, 56), (64, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
"""Channels and height of what R50x1 normalizes at 224x224."""
FEW_GPU_NORMS = ((256, 56), (1024, 14), (2048, 7))


def cases(device: str, threads: int) -> Iterator[Case]:
    """Yield every row of a device."""
    yield from cpu_cases(threads) if device == "cpu" else gpu_cases()


def cpu_cases(threads: int) -> Iterator[Case]:
    makers = {"same_pad of one pixel": dispatch_problem}
    yield from dispatch_cases(makers, threads, is_quick=True)
    for (maps, out_channels, size), dtype in product(CONVOLUTIONS, (FLOAT, BFLOAT)):
        words = f"{'x'.join(map(str, maps))} {size}x{size} to {out_channels} channels"
        inputs = Inputs(maps, dtype, CHANNELS_LAST)
        yield case_of(
            partial(norm_convolution_problem, inputs, out_channels, size),
            "norm_convolution", f"{words} {name_of(dtype)} channels_last", dtype, threads,
            is_quick=maps[0] == 8 and maps[-1] == 14,
        )  # fmt: skip
    for family, shapes, quick in CPU_FAMILIES:
        for shape, dtype, layout in product(shapes, (FLOAT, BFLOAT), LAYOUTS):
            is_chosen = quick == "each" or f"{name_of(dtype)} {layout}" in quick
            is_quick = is_chosen and shape in (STEM[0], STAGE, ALL_WEIGHTS)
            yield family.case(Inputs(shape, dtype, layout), threads, is_quick=is_quick)


def dispatch_cases(
    makers: Mapping[str, Callable[[bool], Problem]], threads: int, **options: Any
) -> Iterator[Case]:
    for is_recorded, (what, make) in product((False, True), makers.items()):
        name = what + ", recorded by autograd" * is_recorded
        options["is_training"] = is_recorded
        yield case_of(partial(make, is_recorded), "dispatch", name, FLOAT, threads, **options)


def gpu_cases() -> Iterator[Case]:
    """Yield the rows of a GPU, the most telling first: what comes last may fall to a time limit."""
    telling = FLOAT, BFLOAT, False
    bfloat_alone = (BFLOAT, BFLOAT, True), (BFLOAT, BFLOAT, False)
    for row in (telling, *bfloat_alone, (FLOAT, BFLOAT, True), (FLOAT, FLOAT, False)):
        source, dtype, is_training = row
        options = {"source": source, "is_training": is_training}
        family = weights_family(WEIGHTS.op, WEIGHTS.form, dtype, **options)
        inputs = Inputs(ALL_WEIGHTS, dtype, NCHW, "cuda")
        yield family.case(inputs, 0, is_quick=row == telling, is_compiled=row == telling)
    others = (RESIDUAL_NORM, NORM_TRAINING, RESIDUAL_NORM_TRAINING)
    yield from gpu_norms((NORM,), (128,), GPU_NORMS)
    yield from gpu_norms(others, (128,), GPU_NORMS[:1])
    for layout, dtype in product((CHANNELS_LAST, NCHW), (BFLOAT, FLOAT)):
        inputs = Inputs((128, *STEM[0][1:]), dtype, layout, "cuda")
        yield POOL.case(inputs, 0, is_quick=dtype is BFLOAT)
        if layout == CHANNELS_LAST:
            yield POOL_TRAINING.case(inputs, 0, is_quick=dtype is BFLOAT)
            yield PAD.case(inputs, 0)
    for batch, layout in product((128, 1), (CHANNELS_LAST, NCHW)):
        inputs = Inputs((batch, 3, 224, 224), BFLOAT, layout, "cuda")
        is_telling = (batch, layout) == (128, CHANNELS_LAST)
        yield IMAGES_TO_POOL.case(inputs, 0, is_quick=is_telling, is_compiled=is_telling)
    makers = {
        "group_norm_act of 4 pixels": norm_dispatch_problem,
        "weight_standardization of 32 filters": weight_dispatch_problem,
    }
    yield from dispatch_cases(makers, 0, device="cuda")
    yield from gpu_norms((NORM,), (1, 8), GPU_NORMS)
    yield from gpu_norms(others, (128,), GPU_NORMS[1:])
    yield from gpu_norms((NORM,), (128,), FEW_GPU_NORMS, (HALF, FLOAT))
    yield from gpu_norms(others, (1, 8), FEW_GPU_NORMS)
    yield from gpu_norms(others, (128,), FEW_GPU_NORMS, (HALF, FLOAT))


def gpu_norms(
    families: Sequence[Family],
    batches: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype] = (BFLOAT,),
) -> Iterator[Case]:
    """Yield the rows of norms of these (channels, height)."""
    for batch, dtype, family, shape in product(batches, dtypes, families, shapes):
        channels, size = shape
        inputs = Inputs((batch, channels, size, size), dtype, CHANNELS_LAST, "cuda")
        telling_shapes = FEW_GPU_NORMS if family is NORM else FEW_GPU_NORMS[:1]
        is_telling = (batch, dtype) == (128, BFLOAT) and shape in telling_shapes
        yield family.case(inputs, 0, is_quick=is_telling, is_compiled=is_telling)
