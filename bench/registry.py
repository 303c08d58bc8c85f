"""The benchmark cases: one row each, with the contestants that compute the same thing.

The first contestant of a case is what a user has without bitfast; the others are set beside it, on the
same inputs. ``check`` compares each result with the first one's before any time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.backends import use_backend, why_unavailable
from bitfast.ops import (
    add_group_norm_act,
    group_norm_act,
    same_max_pool,
    same_pad,
    weight_standardization,
)

Contestants = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """One row: what is computed, on what, and by whom.

    Attributes:
        op: The word of the op, "dispatch" for the cost of a call as such, or "model".
        name: Shape, dtype and layout, for people.
        make: Draws the inputs and returns the contestants.
        tolerance: Largest relative difference (norm over norm) from the first contestant's result.
        training: Whether autograd records what the contestants do.
    """

    op: str
    name: str
    make: Callable[[], Contestants]
    tolerance: float
    training: bool = False

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op}: {self.name}"


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Plain PyTorch rounds to the dtype between its steps; two such roundings may differ.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(result: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the relative difference of two results.

    Raises:
        AssertionError: it is larger than ``tolerance``.
    """
    result, expected = result.detach().double(), expected.detach().double()
    difference = (result - expected).norm() / expected.norm()
    if not difference <= tolerance:
        raise AssertionError(f"relative difference {difference:.2e} > {tolerance:.0e}: not timed")
    return float(difference)


def demanding(backend: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the function with every op on the named backend."""

    def run() -> Tensor:
        with use_backend(backend):
            return function()

    return run


def on_every_backend(op: str, function: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return the function once per backend that this machine has for an op on the CPU."""
    return {
        f"bitfast {backend}": demanding(backend, function)
        for backend in ("native", "reference")
        if why_unavailable(op, backend, "cpu") is None
    }


def image_batch(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Draw a batch of feature maps."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


# ---- the ops ------------------------------------------------------------------------------------


def pad_case(dtype: torch.dtype, layout: str) -> Contestants:
    """TensorFlow's padding of the stem's output, which is odd-sized nowhere: 0 before and 1 after."""
    x = image_batch((8, 64, 112, 112), dtype, layout)
    return {
        "F.pad": lambda: F.pad(x, (0, 1, 0, 1)),
        **on_every_backend("same_padding", lambda: same_pad(x, 3, 2)),
    }


def pool_case(dtype: torch.dtype, layout: str) -> Contestants:
    """The stem's max-pool, whose zeros take part."""
    x = image_batch((8, 64, 112, 112), dtype, layout)
    sides = (1, 1, 1, 1)
    return {
        "F.pad, F.max_pool2d": lambda: F.max_pool2d(F.pad(x, sides), 3, 2),
        **on_every_backend("same_padding", lambda: same_max_pool(x, 3, 2, padding=sides)),
    }


def pool_training_case(dtype: torch.dtype, layout: str) -> Contestants:
    """The same, forward and backward; the result is the gradient."""
    x = image_batch((8, 64, 112, 112), dtype, layout).requires_grad_()
    grad = image_batch((8, 64, 56, 56), dtype, layout)
    sides = (1, 1, 1, 1)

    def step(pool: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(pool(), x, grad)[0]

    ours = on_every_backend("same_padding", lambda: same_max_pool(x, 3, 2, padding=sides))
    return {
        "F.pad, F.max_pool2d": step(lambda: F.max_pool2d(F.pad(x, sides), 3, 2)),
        **{name: step(pool) for name, pool in ours.items()},
    }


def group_norm_case(dtype: torch.dtype, layout: str) -> Contestants:
    """A norm of the first stage of R50x1."""
    x = image_batch((8, 256, 56, 56), dtype, layout)
    weight, bias = torch.rand(256).to(dtype) + 0.5, torch.randn(256).to(dtype)
    return {
        "F.group_norm, F.relu": lambda: F.relu(F.group_norm(x, 32, weight, bias)),
        **on_every_backend("group_norm_act", lambda: group_norm_act(x, weight, bias, 32)),
    }


def residual_norm_case(dtype: torch.dtype, layout: str) -> Contestants:
    """The same after a residual sum; the result is the activated norm."""
    x, residual = (image_batch((8, 256, 56, 56), dtype, layout) for _ in range(2))
    weight, bias = torch.rand(256).to(dtype) + 0.5, torch.randn(256).to(dtype)
    return {
        "+, F.group_norm, F.relu": lambda: F.relu(F.group_norm(x + residual, 32, weight, bias)),
        **on_every_backend(
            "group_norm_act", lambda: add_group_norm_act(x, residual, weight, bias, 32)[1]
        ),
    }


def standardization_case(dtype: torch.dtype, layout: str) -> Contestants:
    """The largest filters of R50x1."""
    weight = image_batch((512, 512, 3, 3), dtype, layout)
    flat = (1, 512, -1)
    return {
        "F.batch_norm": lambda: F.batch_norm(
            weight.reshape(flat), None, None, training=True, momentum=0.0, eps=1e-8
        ).reshape(weight.shape),
        **on_every_backend("weight_standardization", lambda: weight_standardization(weight)),
    }


def dispatch_case(requires_grad: bool) -> Contestants:
    """The cost of a call as such: one pixel is padded to four."""
    x = torch.ones(1, 1, 1, 1, requires_grad=requires_grad)
    operators = torch.ops.bitfast.same_pad
    return {
        "F.pad": lambda: F.pad(x, (0, 1, 0, 1)),
        "same_pad": lambda: same_pad(x, 2, 1),
        "same_pad, reference": demanding("reference", lambda: same_pad(x, 2, 1)),
        "operator, native": lambda: operators.native(x, [0, 1, 0, 1], 0.0),
        "operator, reference": lambda: operators.reference(x, [0, 1, 0, 1], 0.0),
    }


# ---- whole models -------------------------------------------------------------------------------


def resnet_case(batch: int, layout: str) -> Contestants:
    """R50x1 with random weights at 224x224, float32, in evaluation."""
    import transformers

    from bitfast import BitConfig, BitForImageClassification

    theirs = transformers.BitForImageClassification(transformers.BitConfig(num_labels=1000)).eval()
    ours = BitForImageClassification(BitConfig(num_labels=1000)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = image_batch((batch, 3, 224, 224), torch.float32, layout)
    return {
        "transformers": lambda: theirs(x).logits,
        "bitfast": lambda: ours(x).logits,
    }


# ---- the rows -----------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Yield every row."""
    for recorded in (False, True):
        name = "same_pad of one pixel" + (", recorded by autograd" if recorded else "")
        yield Case("dispatch", name, lambda r=recorded: dispatch_case(r), 0.0, recorded)
    ops: list[tuple[str, str, Any]] = [
        ("same_padding", "pad 8x64x112x112", pad_case),
        ("same_padding", "max-pool 8x64x112x112", pool_case),
        ("same_padding", "max-pool 8x64x112x112 forward+backward", pool_training_case),
        ("group_norm_act", "8x256x56x56", group_norm_case),
        ("group_norm_act", "8x256x56x56 with residual", residual_norm_case),
        ("weight_standardization", "512x512x3x3", standardization_case),
    ]
    for op, shape, make in ops:
        for dtype, tolerance in TOLERANCES.items():
            for layout in LAYOUTS:
                name = f"{shape} {str(dtype).removeprefix('torch.')} {layout}"
                training = make is pool_training_case
                yield Case(
                    op, name, lambda m=make, d=dtype, la=layout: m(d, la), tolerance, training
                )
    for batch in (1, 8):
        name = f"R50x1 224x224 batch {batch} float32 NCHW"
        yield Case("model", name, lambda b=batch: resnet_case(b, "NCHW"), 1e-5)


def select(pattern: str) -> list[Case]:
    """Return the rows whose title contains the pattern."""
    return [case for case in cases() if pattern in case.title]


__all__ = ["Case", "Contestants", "cases", "check", "select"]
