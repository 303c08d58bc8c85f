"""What the cases about single ops are made of: inputs, plain PyTorch's functions and ours, and problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast import BitConfig, BitModel
from bitfast.backends import select_backend
from bitfast.layers import GroupNormActivation, WeightStandardizedConv2d
from bitfast.ops.group_norm_act import group_norm_act
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization

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

our_norm = partial(group_norm_act, num_groups=GROUPS)

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


def plain_pool(x: Tensor) -> Tensor:
    """The stem's: of 3x3 pixels, stride 2, with a pixel of zeros around."""
    return F.max_pool2d(F.pad(x, SIDES), 3, 2)


def our_pool(x: Tensor) -> Tensor:
    return same_max_pool(x, 3, 2, padding=SIDES)


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


def is_clear_of_the_kink(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Whether a norm's result is not so near to 0 that rounding decides on which side of ReLU's kink it is.

    One such pixel would change gradients by 1e-3, which says nothing about accuracy: none reaches it.
    """
    exact = F.group_norm(x.double(), GROUPS, weight.double(), bias.double())
    return exact.abs() > CLEAR[FLOAT if x.is_cuda else x.dtype]


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


def recompute_problem(inputs: Inputs) -> Problem:
    """The backward pass of a norm whose result was not kept, and that result."""
    given = x, *_ = inputs.with_norm()
    grad = torch.randn_like(x) * is_clear_of_the_kink(*given)
    backend = select_backend("group_norm_act", x.device.type, x.dtype, LAYOUTS[inputs.layout])
    ops = torch.ops.bitfast
    forward, operator = (
        getattr(op, backend) for op in (ops.group_norm_act, ops.group_norm_act_recompute)
    )
    statistics = forward(*given, GROUPS, 1e-5, "relu")[1:]

    def plain(*tensors: Tensor) -> Results:
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            result = plain_norm(*leaves)
        return [*torch.autograd.grad(result, leaves, grad.to(result.dtype)), result.detach()]

    functions = {
        PLAIN: lambda: plain(*given),
        OURS: lambda: operator(grad, None, *given, *statistics, GROUPS, "relu"),
    }
    return functions_problem("group_norm_act", functions, lambda: plain(*doubled(given)))


def statistics_problem() -> Problem:
    """A norm's statistics from the moments of its input's channels."""
    moments = torch.rand(2, 8, 256, dtype=torch.float64)

    def exact() -> list[Tensor]:
        means, variances = moments.unflatten(2, (GROUPS, -1))
        return [means.mean(2), (variances.mean(2) + means.var(2, correction=0) + 1e-5).rsqrt()]

    functions: dict[str, Make] = {
        PLAIN: lambda: [statistic.float() for statistic in exact()],
        OURS: lambda: torch.ops.bitfast.group_statistics.native(moments, GROUPS, 1e-5),
    }
    return functions_problem("norm_convolution", functions, exact)


def dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a call as such: one pixel is padded to four."""
    x = torch.ones(1, 1, 1, 1, requires_grad=is_recorded)
    functions = {PLAIN: lambda: plain_pad(x), OURS: lambda: same_pad(x, 2, 1)}
    return functions_problem("same_padding", functions, lambda: plain_pad(x.double()))


def norm_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a norm's call on a GPU, of its operator, and of Triton's launch alone: four pixels."""
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
    backend = select_backend("group_norm_act", "cuda", FLOAT, torch.channels_last)
    operator = getattr(torch.ops.bitfast.group_norm_act, backend)
    functions = {
        PLAIN: lambda: plain_norm(*given),
        OURS: lambda: our_norm(*given),
        "bitfast, the operator": lambda: operator(*given, GROUPS, 1e-5, "relu")[0],
        **({} if is_recorded else {"bitfast, Triton's launch alone": launched}),
    }
    return functions_problem("group_norm_act", functions, lambda: plain_norm(*doubled(given)))


def weight_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of standardizing 32 filters of 32 numbers on a GPU."""
    weight = Inputs((32, 32, 1, 1), FLOAT, NCHW, "cuda").feature_maps().requires_grad_(is_recorded)
    plain = plain_standardizations
    functions = {PLAIN: lambda: plain(weight), OURS: lambda: weight_standardization(weight)}
    return functions_problem("weight_standardization", functions, lambda: plain(weight.double()))


def pool_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of the max-pool's call on a GPU: 16 pixels."""
    x = (
        Inputs((1, 8, 4, 4), FLOAT, CHANNELS_LAST, "cuda")
        .feature_maps()
        .requires_grad_(is_recorded)
    )
    functions = {PLAIN: lambda: plain_pool(x), OURS: lambda: our_pool(x)}
    return functions_problem("same_padding", functions, lambda: plain_pool(x.double()))
