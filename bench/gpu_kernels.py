"""Parts of the GPU report about single ops: each checked against float64, then timed beside PyTorch.

Kernels are timed in a captured CUDA graph, so that what a call costs the host stays out of it; inputs that
would fit in the L2 cache take turns with others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gpu_timing import Contest, Session, copy_bandwidth, l2_bytes, run_parts

R50X1_NORMS = (
    (256, 56), (64, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
"""Channels and height of what R50x1 normalizes at 224x224."""

FEW_NORMS = ((256, 56), (1024, 14), (2048, 7))
GROUPS = 32
KINK = 1e-4
"""Inputs of ReLU this near to 0 may come out on either side: float32 rounds them by 1e-6 at most."""


@lru_cache(maxsize=1)
def bandwidth(device: str, is_smoke: bool) -> float:
    """Return the copy bandwidth, measured once per process."""
    return copy_bandwidth(device, is_smoke)


def name_of(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


# ---- group_norm_act -------------------------------------------------------------------------------


class Norms:
    """Inputs of one norm, in both layouts, and the ways to compute it."""

    def __init__(
        self,
        session: Session,
        batch: int,
        channels: int,
        size: int,
        dtype: torch.dtype,
        tensors: int,
    ) -> None:
        shape = (batch, channels, size, size)
        self.nbytes = batch * channels * size * size * dtype.itemsize
        self.sets = session.input_sets(self.nbytes)
        self.nchw = [
            [torch.randn(shape, device=session.device).to(dtype) for _ in range(tensors)]
            for _ in range(self.sets)
        ]
        self.last = [
            [x.contiguous(memory_format=torch.channels_last) for x in tensors]
            for tensors in self.nchw
        ]
        self.weight = (torch.rand(channels, device=session.device) + 0.5).to(dtype)
        self.bias = torch.randn(channels, device=session.device).to(dtype)
        self.groups = min(GROUPS, channels)

    def drop_gradients_at_kinks(self) -> None:
        """Let no gradient reach input set 0 where rounding decides on which side of ReLU's kink it is.

        One such element among the 400,000 of a channel changes the gradient of its weight a thousand times
        more than all roundings of the sum do, and plain PyTorch has as many of them.
        """
        x, grad = self.nchw[0]
        z = F.group_norm(x.double(), self.groups, self.weight.double(), self.bias.double())
        grad.masked_fill_(z.abs() < KINK, 0.0)
        self.last[0][1].copy_(grad)

    def exact(self) -> list[Tensor]:
        """Return input set 0 and the parameters in float64."""
        return [t.double() for t in (*self.nchw[0], self.weight, self.bias)]


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """GroupNorm and ReLU as PyTorch has them."""
    return F.relu(F.group_norm(x, groups, weight, bias))


def plain_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The same of a sum, which is also wanted."""
    total = x + residual
    return total, plain_norm(total, weight, bias, groups)


def gradients(
    norm: Callable[..., Tensor], x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, ...]:
    """Run a norm forward and backward."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(norm(*inputs, groups), inputs, grad)


def norm_in(form: str, norm: Callable[..., Any]) -> Callable[..., Any]:
    """Return a norm as it is, or in "forward+backward" what computes the gradients of its inputs."""
    return partial(gradients, norm) if form == "forward+backward" else norm


def norm_contest(
    session: Session,
    form: str,
    batch: int,
    channels: int,
    size: int,
    dtype: torch.dtype,
    is_compiled: bool,
) -> None:
    """Check and time one shape in one of the forms "forward", "residual" and "forward+backward"."""
    from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act

    # How many input tensors there are, and how often a tensor of this size is read or written.
    plain_function, our_function, tensors, moved = {
        "forward": (plain_norm, group_norm_act, 1, 2),
        "residual": (plain_add_norm, add_group_norm_act, 2, 4),
        "forward+backward": (plain_norm, group_norm_act, 2, 5),
    }[form]
    plain, ours = norm_in(form, plain_function), norm_in(form, our_function)
    case = f"GroupNorm+ReLU {form} {batch}x{channels}x{size}x{size} {name_of(dtype)}"
    norms = Norms(session, batch, channels, size, dtype, tensors)
    if form == "forward+backward":
        norms.drop_gradients_at_kinks()
    parameters = (norms.weight, norms.bias, norms.groups)
    contestants: dict[str, Callable[[int], Any]] = {
        "torch eager, NCHW": lambda i: plain(*norms.nchw[i], *parameters),
        "torch eager, channels_last": lambda i: plain(*norms.last[i], *parameters),
        "bitfast": session.on_ours(lambda i: ours(*norms.last[i], *parameters)),
    }
    if is_compiled and not session.is_check_only:
        torch._dynamo.reset()
        compiled = norm_in(form, session.compile(plain_function, dynamic=False))
        contestants["torch compiled, channels_last"] = lambda i: compiled(
            *norms.last[i], *parameters
        )
    nbytes = moved * norms.nbytes
    contest = Contest(
        case,
        contestants,
        "torch eager, channels_last",
        lambda: plain(*norms.exact(), norms.groups),
        norms.sets,
        nbytes,
        nbytes / bandwidth(session.device, session.is_smoke),
        rounding_of(dtype),
        {
            "form": form,
            "batch": batch,
            "channels": channels,
            "size": size,
            "dtype": name_of(dtype),
            "exceeds_l2": norms.nbytes > l2_bytes(session.device),
        },
    )
    with torch.no_grad():
        session.contest(contest)


def norm_cases(session: Session) -> list[tuple[str, int, tuple[int, int], torch.dtype, bool]]:
    """Return the cases, the most telling first: what comes last may fall to the time limit."""
    bfloat16 = torch.bfloat16
    if session.is_smoke:
        return [
            ("forward", 2, (8, 3), bfloat16, True),
            ("residual", 1, (12, 2), torch.float32, False),
            ("forward+backward", 2, (8, 2), torch.float32, True),
        ]
    forms = ("forward", "residual", "forward+backward")
    others = (torch.float16, torch.float32)
    return [
        *(("forward", 128, shape, bfloat16, shape in FEW_NORMS) for shape in R50X1_NORMS),
        *((form, 128, FEW_NORMS[0], bfloat16, True) for form in forms[1:]),
        *(("forward", batch, shape, bfloat16, False) for batch in (1, 8) for shape in R50X1_NORMS),
        *((form, 128, shape, bfloat16, False) for form in forms[1:] for shape in R50X1_NORMS[1:]),
        *(("forward", 128, shape, dtype, False) for dtype in others for shape in FEW_NORMS),
        *(
            (form, batch, shape, bfloat16, False)
            for batch in (1, 8)
            for form in forms[1:]
            for shape in FEW_NORMS
        ),
        *((form, 128, shape, dtype, False) for dtype in others for form in forms[1:]
          for shape in FEW_NORMS),
    ]  # fmt: skip


def group_norm_act(session: Session) -> None:
    """All norms."""
    for form, batch, (channels, size), dtype, is_compiled in norm_cases(session):
        case = f"GroupNorm+ReLU {form} {batch}x{channels}x{size}x{size} {name_of(dtype)}"
        session.attempt(
            case,
            "all",
            lambda f=form, b=batch, c=channels, s=size, d=dtype, o=is_compiled: norm_contest(
                session, f, b, c, s, d, o
            ),
        )


# ---- weight_standardization -----------------------------------------------------------------------


def convolution_weights(session: Session, dtype: torch.dtype) -> list[Tensor]:
    """Return random weights of the shapes of R50x1's standardized convolutions."""
    from bitfast import BitConfig, BitModel
    from bitfast.layers import WeightStandardizedConv2d

    tiny = {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "num_groups": 2}
    with torch.device("meta"):
        model = BitModel(BitConfig(**(tiny if session.is_smoke else {})))
    layers = [m for m in model.modules() if isinstance(m, WeightStandardizedConv2d)]
    shapes = [layer.weight.shape for layer in layers]
    return [(0.1 * torch.randn(s, device=session.device) + 0.01).to(dtype) for s in shapes]


def plain_standardization(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Standardize layer after layer, as transformers does."""
    results = []
    for weight in weights:
        flat = weight.reshape(1, weight.shape[0], -1)
        result = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
        results.append(result.reshape(weight.shape).to(dtype))
    return results


def standardization_contest(
    session: Session, source: torch.dtype, dtype: torch.dtype, with_backward: bool, compiled: bool
) -> None:
    """Check and time all weights of R50x1; ``source`` is their dtype, ``dtype`` that of the results."""
    from bitfast.ops.weight_standardization import weight_standardization_all

    first = convolution_weights(session, source)
    numel = sum(weight.numel() for weight in first)
    sets = 2 if session.is_smoke else 3
    weights = [first, *(convolution_weights(session, source) for _ in range(sets - 1))]
    grads = [[torch.randn_like(w).to(dtype) for w in weights[i]] for i in range(sets)]

    def ours(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return weight_standardization_all(weights, 1e-8, dtype, channels_last=True)

    def both_ways(function: Any) -> Callable[..., Any]:
        def run(weights: list[Tensor], dtype: torch.dtype, grads: list[Tensor]) -> Any:
            with torch.enable_grad():
                weights = [w.detach().requires_grad_() for w in weights]
                return torch.autograd.grad(function(weights, dtype), weights, grads)

        return run if with_backward else lambda weights, dtype, _: function(weights, dtype)

    plain = both_ways(plain_standardization)
    contestants: dict[str, Callable[[int], Any]] = {
        "F.batch_norm per layer": lambda i: plain(weights[i], dtype, grads[i]),
        "bitfast, one launch": session.on_ours(
            lambda i: both_ways(ours)(weights[i], dtype, grads[i])
        ),
    }
    if compiled and not session.is_check_only:
        torch._dynamo.reset()
        fused = both_ways(session.compile(plain_standardization, dynamic=False))
        contestants["F.batch_norm per layer, compiled"] = lambda i: fused(
            weights[i], dtype, grads[i]
        )
    # Forward reads the weights and writes the results; backward reads gradients and weights, and
    # writes gradients.
    nbytes = numel * (source.itemsize + dtype.itemsize)
    if with_backward:
        nbytes += numel * (2 * source.itemsize + dtype.itemsize)
    form = "forward+backward" if with_backward else "forward"
    case = f"weights of R50x1 {form} {name_of(source)} to {name_of(dtype)}"
    facts = {"form": form, "source": name_of(source), "dtype": name_of(dtype)}
    with torch.no_grad():
        session.contest(
            Contest(
                case,
                contestants,
                "F.batch_norm per layer",
                lambda: plain(
                    [w.double() for w in weights[0]], torch.float64, [g.double() for g in grads[0]]
                ),
                sets,
                nbytes,
                nbytes / bandwidth(session.device, session.is_smoke),
                rounding_of(dtype),
                facts,
            )
        )


def weight_standardization(session: Session) -> None:
    """All weights of a model in one launch."""
    single, half = torch.float32, torch.bfloat16
    cases = [
        (single, half, False, True),
        (half, half, True, False),
        (half, half, False, False),
        (single, half, True, False),
        (single, single, False, False),
    ]
    for source, dtype, with_backward, compiled in cases[: 2 if session.is_smoke else None]:
        case = f"weights of R50x1 {name_of(source)} to {name_of(dtype)}"
        session.attempt(
            case,
            "all",
            lambda s=source, d=dtype, w=with_backward, c=compiled: standardization_contest(
                session, s, d, w, c
            ),
        )


# ---- same_padding ---------------------------------------------------------------------------------


def pool_contest(session: Session, dtype: torch.dtype, layout: str) -> None:
    """Check and time the stem's max-pool, whose zeros take part."""
    from bitfast.ops.same_padding import same_max_pool

    batch, channels, size = (1, 4, 8) if session.is_smoke else (128, 64, 112)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    shape = (batch, channels, size, size)
    sets = session.input_sets(batch * channels * size * size * dtype.itemsize)
    x = [torch.randn(shape, device=session.device).to(dtype) for _ in range(sets)]
    x = [t.contiguous(memory_format=memory_format) for t in x]
    sides = (1, 1, 1, 1)
    nbytes = x[0].nbytes * 5 // 4
    contest = Contest(
        f"max-pool {batch}x{channels}x{size}x{size} {name_of(dtype)} {layout}",
        {
            "F.pad, F.max_pool2d": lambda i: F.max_pool2d(F.pad(x[i], sides), 3, 2),
            "bitfast": lambda i: same_max_pool(x[i], 3, 2, padding=sides),
        },
        "F.pad, F.max_pool2d",
        lambda: F.max_pool2d(F.pad(x[0].double(), sides), 3, 2),
        sets,
        nbytes,
        nbytes / bandwidth(session.device, session.is_smoke),
        0.0,
        {"form": "forward", "dtype": name_of(dtype), "layout": layout},
    )
    with torch.no_grad():
        session.contest(contest)


def same_padding(session: Session) -> None:
    """The pool in both layouts."""
    for layout in ("channels_last", "NCHW"):
        for dtype in (torch.bfloat16, torch.float32):
            session.attempt(
                f"max-pool {name_of(dtype)} {layout}",
                "all",
                lambda d=dtype, la=layout: pool_contest(session, d, la),
            )


PARTS = {
    "group_norm_act": group_norm_act,
    "weight_standardization": weight_standardization,
    "same_padding": same_padding,
}

if __name__ == "__main__":
    run_parts(PARTS, __doc__)
