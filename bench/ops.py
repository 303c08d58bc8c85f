"""The cases that are about single ops, beside plain PyTorch, which is what a user has without bitfast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
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
from bitfast.ops.norm_convolution import (
    has_norm_convolution_kernel,
    norm_convolution,
    uses_norm_convolution,
)
from bitfast.ops.same_padding import same_max_pool, same_pad
from bitfast.ops.weight_standardization import weight_standardization, weight_standardization_all

from .accuracy import Float64Judge
from .cases import (
    OURS,
    PLAIN,
    Case,
    Contestant,
    Problem,
    Results,
    Running,
    as_list,
    called,
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
MOST_SETS = 48
"""Input sets that take turns on a GPU."""

Function = Callable[..., Results]
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

    def parameters(self) -> list[Tensor]:
        """Draw a norm's weight and bias."""
        channels = self.shape[1]
        scale = torch.rand(channels, device=self.device) + 0.5
        return [scale.to(self.dtype), torch.randn(channels, device=self.device).to(self.dtype)]


# ---- what is computed, by plain PyTorch and by bitfast ------------------------------------------------


def plain_pad(x: Tensor) -> Tensor:
    """TensorFlow's padding for a 3x3 convolution of stride 2 on an even size: 0 before and 1 after."""
    return F.pad(x, (0, 1, 0, 1))


def our_pad(x: Tensor) -> Tensor:
    """As :func:`plain_pad`."""
    return same_pad(x, 3, 2)


def plain_pool(x: Tensor) -> Tensor:
    """Put zeros around feature maps, which take part in the stem's max-pool."""
    return F.max_pool2d(F.pad(x, SIDES), 3, 2)


def our_pool(x: Tensor) -> Tensor:
    """As :func:`plain_pool`, in one op."""
    return same_max_pool(x, 3, 2, padding=SIDES)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize groups of channels, then ReLU."""
    return F.relu(F.group_norm(x, GROUPS, weight, bias))


def our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As :func:`plain_norm`, in one op."""
    return group_norm_act(x, weight, bias, GROUPS)


def plain_residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
    """Add a residual; return the sum and its activated norm."""
    total = x + residual
    return total, plain_norm(total, weight, bias)


def our_residual_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
    """As :func:`plain_residual_norm`, in one op."""
    return add_group_norm_act(x, residual, weight, bias, GROUPS)


def plain_standardizations(*weights: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Standardize weights one after the other, as transformers does: as a batch norm."""
    results = []
    for weight in weights:
        flat = weight.reshape(1, weight.shape[0], -1)
        result = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
        wanted = weight.dtype if weight.dtype == torch.float64 else dtype or weight.dtype
        results.append(result.reshape(weight.shape).to(wanted))
    return results


def our_standardization(weight: Tensor) -> Tensor:
    """Standardize one weight."""
    return weight_standardization(weight)


def our_standardizations(*weights: Tensor, dtype: torch.dtype | None = None) -> Results:
    """As :func:`plain_standardizations`, in one op."""
    return weight_standardization_all(weights, 1e-8, dtype, channels_last=dtype is not None)


def one_map(inputs: Inputs) -> list[Tensor]:
    """Draw feature maps, or one weight."""
    return [inputs.feature_maps()]


def norm_inputs(inputs: Inputs) -> list[Tensor]:
    """Draw feature maps, and a norm's weight and bias."""
    return [inputs.feature_maps(), *inputs.parameters()]


def residual_norm_inputs(inputs: Inputs) -> list[Tensor]:
    """Draw feature maps, a residual, and a norm's weight and bias."""
    return [inputs.feature_maps(), inputs.feature_maps(), *inputs.parameters()]


def all_weights(inputs: Inputs) -> list[Tensor]:
    """Draw all standardized weights of R50x1, whatever the shape asked for."""
    with torch.device("meta"):
        model = BitModel(BitConfig())
    layers = [m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]
    return [inputs._replace(shape=tuple(m.weight.shape)).feature_maps() for m in layers]


def clear_of_the_kink(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
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
        maps: How many of them, from the first, count as bytes; the others are few numbers.
        is_training: Whether the gradients of all inputs are computed too.
        rereads_input: Whether the backward pass reads the inputs again.
        is_clear: Where gradients of the results may be anything but 0; None: everywhere.
        source: The dtype of the inputs, if it is not that of the results.
        backend_of: The op whose backend is told, if it is not ``op``.
    """

    op: str
    form: str
    plain: Function
    ours: Function
    draw: Callable[[Inputs], list[Tensor]]
    maps: int | None = 1
    is_training: bool = False
    rereads_input: bool = True
    is_clear: Callable[..., Tensor] | None = None
    source: torch.dtype | None = None
    backend_of: str | None = None

    def case(
        self, inputs: Inputs, threads: int, *, is_quick: bool = False, is_compiled: bool = False
    ) -> Case:
        """Return the row of these inputs; ``is_compiled``: beside compiled PyTorch too."""
        dtype = name_of(inputs.dtype)
        dtypes = f"{name_of(self.source)} to {dtype}" if self.source else dtype
        layout = "" if self.source else inputs.layout
        words = ["x".join(map(str, inputs.shape)), self.form, dtypes, layout]
        return Case(
            "op",
            self.op,
            " ".join(word for word in words if word),
            dtype,
            lambda: nullcontext(self.problem(inputs, is_compiled)),
            inputs.device,
            threads,
            "host" if inputs.device == "cpu" else "kernels",
            self.is_training,
            is_quick,
        )

    def problem(self, inputs: Inputs, is_compiled: bool) -> Problem:
        """Draw inputs, and as many sets of them as a GPU's cache asks for."""
        given = inputs._replace(dtype=self.source or inputs.dtype)
        first = self.draw(given)
        sets = [first, *(self.draw(given) for _ in range(sets_of(first) - 1))]
        results = [result.detach() for result in as_list(self.plain(*first))]
        read, written = bytes_of(first[: self.maps]), bytes_of(results)
        count = read + written
        plain, ours = self.plain, self.ours
        if self.is_training:
            grads = [torch.randn_like(result) for result in results]
            if self.is_clear is not None:
                grads = [grad * self.is_clear(*first) for grad in grads]
            plain, ours = gradients(plain, grads), gradients(ours, grads)
            for tensor in (tensor for each in sets for tensor in each):
                tensor.requires_grad_()
            count += written + read * (1 + self.rereads_input)
        backend = select_backend(self.backend_of or self.op, inputs.device, inputs.dtype)
        dtype = name_of(inputs.dtype)

        def on_sets(function: Function) -> Callable[[ExitStack], Running]:
            return called(lambda number: function(*sets[number]), len(sets))

        contestants = [Contestant(PLAIN, dtype, on_sets(plain))]
        if inputs.device == "cuda" and self.draw is not all_weights and inputs.layout != NCHW:
            contestants.append(Contestant(PLAIN_NCHW, dtype, on_sets(in_nchw(plain, sets))))
        if is_compiled:
            begin = partial(
                begin_compiled, self.plain, on_sets, grads if self.is_training else None
            )
            contestants.append(Contestant(COMPILED, dtype, begin, is_compiled=True))
        contestants.append(Contestant(OURS, dtype, on_sets(ours), f"backend: {backend}"))
        oracle = [result.detach() for result in as_list(plain(*doubled(first)))]
        return Problem(contestants, Float64Judge(oracle), count)


def gradients(function: Function, grads: Sequence[Tensor]) -> Function:
    """Return what computes the gradients of all inputs, given those of the results."""

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


def begin_compiled(
    plain: Function,
    on_sets: Callable[[Function], Callable[[ExitStack], Running]],
    grads: Sequence[Tensor] | None,
    stack: ExitStack,
) -> Running:
    """Compile plain PyTorch, for its gradients too where some are given."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(plain, dynamic=False)
    return on_sets(compiled if grads is None else gradients(compiled, grads))(stack)


def sets_of(inputs: list[Tensor]) -> int:
    """Return how many input sets must take turns so that a GPU finds none of them in its L2 cache."""
    if not inputs[0].is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_SETS, math.ceil(4 * cache / bytes_of(inputs))))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in float64, wanting gradients as they do."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# ---- cases of another form ------------------------------------------------------------------------------


def functions_problem(
    contestants: dict[str, Callable[[], Results]],
    oracle: Callable[[], Results],
    note: str,
    flops: int = 0,
) -> Problem:
    """Return the problem of functions that hold their inputs, all of one dtype; ``note`` is said of ours."""
    with torch.no_grad():
        dtype = name_of(as_list(contestants[PLAIN]())[0].dtype)
    entries = [
        Contestant(name, dtype, called(lambda _, f=function: f()), note if name == OURS else "")
        for name, function in contestants.items()
    ]
    return Problem(entries, Float64Judge([t.detach() for t in as_list(oracle())]), flops=flops)


def norm_convolution_problem(inputs: Inputs, out_channels: int, kernel_size: int) -> Problem:
    """A norm, ReLU and a convolution, as in a preactivation block; the weights are standardized beforehand."""
    x = inputs.feature_maps()
    channels, dtype = inputs.shape[1], inputs.dtype
    norm = GroupNormActivation(GROUPS, channels, activation="relu").eval()
    convolution = WeightStandardizedConv2d(channels, out_channels, kernel_size).to(dtype).eval()
    weight = weight_standardization(convolution.weight.detach(), convolution.eps)
    scale, shift = norm.weight.detach(), norm.bias.detach()
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

    def ours() -> Tensor:
        if not is_fused:  # the norm, then a convolution with packed weights
            return convolution(norm(x))
        own = convolution.weight, convolution.eps, convolution.stride[0]
        return norm_convolution(x, None, norm.op_parameters(), *own, wants_moments=False)[0]

    given = x, scale, shift, weight
    return functions_problem(
        {PLAIN: lambda: plain(*given), OURS: ours},
        lambda: plain(*doubled(given)),
        f"backend: {select_backend('group_norm_act', 'cpu', dtype)}",
        2 * x[:, 0].numel() * weight.numel(),
    )


def dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a call as such: one pixel is padded to four."""
    x = torch.ones(1, 1, 1, 1, requires_grad=is_recorded)
    return functions_problem(
        {PLAIN: lambda: F.pad(x, (0, 1, 0, 1)), OURS: lambda: same_pad(x, 2, 1)},
        lambda: F.pad(x.double(), (0, 1, 0, 1)),
        f"backend: {select_backend('same_padding', 'cpu', x.dtype)}",
    )


def norm_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of a norm's call on a GPU, of its operator, and of its launch alone: four pixels."""
    from bitfast.kernels import group_norm_act as kernels

    inputs = Inputs((1, GROUPS, 2, 2), FLOAT, CHANNELS_LAST, "cuda")
    given = x, weight, bias = norm_inputs(inputs)
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
    return functions_problem(
        {
            PLAIN: lambda: plain_norm(*given),
            OURS: lambda: our_norm(*given),
            "bitfast, the operator": lambda: operator(*given, GROUPS, 1e-5, "relu")[0],
            **({} if is_recorded else {"bitfast, the launch alone": launched}),
        },
        lambda: plain_norm(*doubled(given)),
        f"backend: {select_backend('group_norm_act', 'cuda', FLOAT)}",
    )


def weight_dispatch_problem(is_recorded: bool) -> Problem:
    """The cost of standardizing 32 filters of 32 numbers on a GPU."""
    weight = Inputs((32, 32, 1, 1), FLOAT, NCHW, "cuda").feature_maps().requires_grad_(is_recorded)
    return functions_problem(
        {
            PLAIN: lambda: as_list(plain_standardizations(weight))[0],
            OURS: lambda: our_standardization(weight),
        },
        lambda: plain_standardizations(weight.double()),
        f"backend: {select_backend('weight_standardization', 'cuda', FLOAT)}",
    )


# ---- the rows -------------------------------------------------------------------------------------------

PAD = Family("same_padding", "pad", plain_pad, our_pad, one_map)
POOL = Family("same_padding", "max-pool", plain_pool, our_pool, one_map)
POOL_TRAINING = Family(
    "same_padding", "max-pool forward+backward", plain_pool, our_pool, one_map,
    is_training=True, rereads_input=False,
)  # fmt: skip
NORM = Family("group_norm_act", "", plain_norm, our_norm, norm_inputs)
RESIDUAL_NORM = Family(
    "group_norm_act", "with residual", plain_residual_norm, our_residual_norm, residual_norm_inputs, maps=2
)  # fmt: skip
NORM_TRAINING = Family(
    "group_norm_act", "forward+backward", plain_norm, our_norm, norm_inputs,
    is_training=True, is_clear=clear_of_the_kink,
)  # fmt: skip


def weights_family(op: str, form: str, *, is_training: bool, **options: Any) -> Family:
    """Return a family of weight standardization, of one weight or of all of R50x1."""
    is_one = op == "weight_standardization"
    dtypes = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    return Family(
        op,
        f"{form}forward+backward" if is_training else form.strip(),
        partial(plain_standardizations, **dtypes),
        our_standardization if is_one else partial(our_standardizations, **dtypes),
        one_map if is_one else all_weights,
        maps=None,
        is_training=is_training,
        backend_of="weight_standardization",
        **options,
    )


WEIGHT, WEIGHT_TRAINING = (
    weights_family("weight_standardization", "", is_training=t) for t in (False, True)
)
WEIGHTS, WEIGHTS_TRAINING = (
    weights_family("weight_standardization_all", "R50x1 ", is_training=t) for t in (False, True)
)

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
    ((8, 256, 56, 56), 64, 1),
    ((8, 64, 56, 56), 64, 3),
    ((8, 64, 56, 56), 256, 1),
    ((8, 1024, 14, 14), 256, 1),
    ((8, 256, 14, 14), 256, 3),
    ((1, 256, 14, 14), 1024, 1),
)
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
    """Yield the rows of a CPU."""
    for is_recorded in (False, True):
        name = "same_pad of one pixel" + (", recorded by autograd" if is_recorded else "")
        yield opened_by(
            partial(dispatch_problem, is_recorded), "dispatch", name, FLOAT, threads,
            is_training=is_recorded, is_quick=True,
        )  # fmt: skip
    for shape, out_channels, kernel_size in CONVOLUTIONS:
        for dtype in (FLOAT, BFLOAT):
            words = "x".join(map(str, shape)), f"{kernel_size}x{kernel_size} to {out_channels}"
            inputs = Inputs(shape, dtype, CHANNELS_LAST)
            yield opened_by(
                partial(norm_convolution_problem, inputs, out_channels, kernel_size),
                "norm_convolution",
                f"{' '.join(words)} channels {name_of(dtype)} channels_last",
                dtype,
                threads,
                is_quick=shape[0] == 8 and shape[-1] == 14,
            )
    for family, shapes, quick in CPU_FAMILIES:
        for shape, dtype, layout in product(shapes, (FLOAT, BFLOAT), LAYOUTS):
            stands_for_rest = shape in (STEM[0], STAGE, ALL_WEIGHTS)
            is_quick = stands_for_rest and (
                quick == "each" or f"{name_of(dtype)} {layout}" in quick
            )
            yield family.case(Inputs(shape, dtype, layout), threads, is_quick=is_quick)


def opened_by(
    make: Callable[[], Problem],
    op: str,
    name: str,
    dtype: torch.dtype,
    threads: int,
    **options: Any,
) -> Case:
    """Return the case of a problem that is made without arguments, timed by the host's clock."""
    return Case(
        "op", op, name, name_of(dtype), lambda: nullcontext(make()), threads=threads, **options
    )


def gpu_cases() -> Iterator[Case]:
    """Yield the rows of a GPU, the most telling first: what comes last may fall to a time limit."""
    for source, dtype, is_training, is_compiled in (
        (FLOAT, BFLOAT, False, True),
        (BFLOAT, BFLOAT, True, False),
        (BFLOAT, BFLOAT, False, False),
        (FLOAT, BFLOAT, True, False),
        (FLOAT, FLOAT, False, False),
    ):
        family = weights_family(
            "weight_standardization_all",
            "R50x1 ",
            is_training=is_training,
            source=source,
            dtype=dtype,
        )
        inputs = Inputs(ALL_WEIGHTS, dtype, NCHW, "cuda")
        yield family.case(inputs, 0, is_quick=is_compiled, is_compiled=is_compiled)

    def norms(
        families: Sequence[Family],
        batch: int,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype = BFLOAT,
    ) -> Iterator[Case]:
        for family, (channels, size) in product(families, shapes):
            inputs = Inputs((batch, channels, size, size), dtype, CHANNELS_LAST, "cuda")
            is_telling = (batch, dtype) == (128, BFLOAT) and (
                (channels, size) in FEW_GPU_NORMS
                if family is NORM
                else (channels, size) == (256, 56)
            )
            yield family.case(inputs, 0, is_quick=is_telling, is_compiled=is_telling)

    others = (RESIDUAL_NORM, NORM_TRAINING)
    yield from norms((NORM,), 128, GPU_NORMS)
    yield from norms(others, 128, GPU_NORMS[:1])
    for layout, dtype in product((CHANNELS_LAST, NCHW), (BFLOAT, FLOAT)):
        yield POOL.case(
            Inputs((128, *STEM[0][1:]), dtype, layout, "cuda"), 0, is_quick=dtype is BFLOAT
        )
    for is_recorded in (False, True):
        for make, what in (
            (norm_dispatch_problem, "group_norm_act of 4 pixels"),
            (weight_dispatch_problem, "weight_standardization of 32 filters"),
        ):
            name = what + (", recorded by autograd" if is_recorded else "")
            yield opened_by(
                partial(make, is_recorded),
                "dispatch",
                name,
                FLOAT,
                0,
                device="cuda",
                is_training=is_recorded,
            )
    for batch in (1, 8):
        yield from norms((NORM,), batch, GPU_NORMS)
    yield from norms(others, 128, GPU_NORMS[1:])
    for dtype in (HALF, FLOAT):
        yield from norms((NORM,), 128, FEW_GPU_NORMS, dtype)
    for batch in (1, 8):
        yield from norms(others, batch, FEW_GPU_NORMS)
    for dtype in (HALF, FLOAT):
        yield from norms(others, 128, FEW_GPU_NORMS, dtype)
