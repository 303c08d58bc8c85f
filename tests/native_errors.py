"""``python -m tests.native_errors LIBRARY``: what the extension's operators say of wrong arguments, as JSON.

Loads the library alone, without the rest of bitfast, so that one that was built in another way can be asked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent

Message = tuple[str, str, str]
"""An operator, what it said, and the words that this must end with."""


class Wrong(NamedTuple):
    """A call that an operator must refuse, and with what words."""

    operator: str
    arguments: tuple[Any, ...]
    words: str


X = torch.zeros(2, 4, 3, 3)
LAST = X.contiguous(memory_format=torch.channels_last)
DOUBLE = X.double()
C4, C3 = torch.ones(4), torch.ones(3)
STATISTIC = torch.zeros(4)
PARAMETERS = (C4, C4, 2, 1e-5, "relu")
DIVIDES = "num_groups must divide the 4 channels of x, got 3"
CHANNELS = "weight and bias must have shape (C,)"
KINDS = "the native CPU kernels support float32 and bfloat16"


def norms() -> list[Wrong]:
    """Return wrong calls of group_norm_act and what belongs to it."""
    moments = torch.zeros(2, 2, 4)
    saved = (X, C4, C4, STATISTIC, STATISTIC, 2, "relu")
    return [
        Wrong("group_norm_act", (X[0], *PARAMETERS), "x must have shape (N, C, H, W), got 3 dimensions"),
        Wrong("group_norm_act", (X, C4, C4, 3, 1e-5, "relu"), DIVIDES),
        Wrong("group_norm_act", (X, C3, C4, 2, 1e-5, "relu"), CHANNELS),
        Wrong("group_norm_act", (DOUBLE, *PARAMETERS), f"group_norm_act: {KINDS}"),
        Wrong(
            "group_norm_act",
            (X, C4, C4, 2, 1e-5, "swish"),
            "activation must be none, relu, gelu, gelu_new or selu, got swish",
        ),
        Wrong("add_group_norm_act", (X, DOUBLE, *PARAMETERS), "residual must be like x"),
        Wrong("add_group_norm_act", (X, X[:1], *PARAMETERS), "residual must have the shape of x"),
        Wrong(
            "group_norm_act_",
            (X, moments, *PARAMETERS, None),
            "moments must be float64, contiguous, of shape (2, N, C)",
        ),
        Wrong(
            "group_norm_act_into",
            (X, None, *PARAMETERS, None, LAST),
            "x and result must both be contiguous or both channels_last",
        ),
        Wrong(
            "group_norm_act_backward",
            (X, None, X, C4, C4, C3, STATISTIC, 2, "relu"),
            "mean and rstd must be float32, contiguous, of shape (N, num_groups)",
        ),
        Wrong("group_norm_act_backward", (X[:1], None, *saved), "grad must have the shape of x"),
        Wrong("group_norm_act_recompute", (X, X[:1], *saved), "grad_total must have the shape of x"),
        Wrong(
            "group_statistics", (moments, 2, 1e-5), "moments must be float64, contiguous, of shape (2, N, C)"
        ),
        Wrong(
            "group_statistics",
            (moments.double(), 3, 1e-5),
            "num_groups must divide the 4 channels of the moments, got 3",
        ),
    ]  # fmt: skip


def weights() -> list[Wrong]:
    """Return wrong calls of weight_standardization and what belongs to it."""
    op, backward = "weight_standardization", "weight_standardization_backward"
    two = torch.zeros(2)
    return [
        Wrong(op, (X[0], 1e-8, None), "weight must have shape (out, in, height, width), none of them 0"),
        Wrong(op, (DOUBLE, 1e-8, None), f"{op}: {KINDS}"),
        Wrong(backward, (X[0], X, two, two), "grad must have the shape of weight"),
        Wrong(backward, (X[:1], X, two, two), "grad must have the shape of weight"),
        Wrong(
            backward, (X, X, C3, two), "mean and rstd must be float32, contiguous, with one value per filter"
        ),
        Wrong(f"{op}_all", ([X, X.bfloat16()], 1e-8, None, False), "weights must be of one dtype"),
        Wrong(
            f"{op}_all_backward",
            (C3, [X], two, two, False),
            "grad must have the size of the weights' buffer, 128",
        ),
    ]  # fmt: skip


def paddings() -> list[Wrong]:
    """Return wrong calls of same_padding's operators."""
    pool, backward, sides = "same_max_pool", "same_max_pool_backward", [0, 0, 0, 0]
    window = ([2, 2], [1, 1], [1, 1])
    taps = torch.zeros(2, 4, 2, 2, dtype=torch.uint8)
    grad = torch.zeros(2, 4, 2, 2)
    positive = "kernel_size, stride and dilation must each be two positive numbers (height, width)"
    dtypes = "same_padding: the native kernels support float32, bfloat16 and float16"
    return [
        Wrong("same_pad", (X[0], sides, 0.0), "x must have shape (N, C, H, W), got 3 dimensions"),
        Wrong("same_pad", (X, [1], 0.0), "padding must be (top, bottom, left, right), got 1 numbers"),
        Wrong(
            "same_pad", (X, [-2, -2, 0, 0], 0.0), "cannot crop more than the 3 x 3 pixels that there are"
        ),
        Wrong("same_pad", (DOUBLE, sides, 0.0), dtypes),
        Wrong(pool, (X, [0, 1], [1, 1], [1, 1], sides, 0.0, False), positive),
        Wrong(
            pool,
            (X, [182, 182], [1, 1], [1, 1], sides, 0.0, False),
            "kernel_size must cover at most 32767 pixels, got 182 x 182",
        ),
        Wrong(pool, (X, *window, [-1, 0, 0, 0], 0.0, False), "the padding of a pool must not be negative"),
        Wrong(
            pool,
            (X, [9, 9], [1, 1], [1, 1], sides, 0.0, False),
            "x must be at least as large as the window once it is padded: 3 < 9",
        ),
        Wrong(backward, (grad, taps, [3], *window, sides), "size must be (height, width)"),
        Wrong(backward, (grad, grad, [3, 3], *window, sides), "taps must be 4-D and uint8"),
        Wrong(
            backward,
            (grad, taps.transpose(0, 1), [3, 3], *window, sides),
            "taps must be contiguous or channels_last",
        ),
        Wrong(backward, (grad, taps, [9, 9], *window, sides), "taps do not fit the size of x"),
        Wrong(backward, (grad[0], taps, [3, 3], *window, sides), "grad must be 4-D"),
        Wrong(backward, (grad[:1], taps, [3, 3], *window, sides), "grad must have the shape of taps"),
    ]  # fmt: skip


def pictures() -> list[Wrong]:
    """Return wrong calls of resize_normalize's operators."""
    image, values = torch.zeros(3, 3, 3, dtype=torch.uint8), torch.zeros(256, 3)

    def resize(words: str, images: Any = (image,), sizes: Any = (2, 2), crop: Any = (2, 2),
               resample: int = 2, values: Tensor | None = values) -> Wrong:  # fmt: skip
        arguments = (list(images), list(sizes), list(crop), [0, 0], resample, values, False, [0])
        return Wrong("resize_normalize_pixels", arguments, words)

    return [
        resize("sizes, offsets and first_axes must fit the number of images, which is at least 1", []),
        resize("crop must be a positive height and width", crop=(0, 2)),
        resize("resample must be one of Pillow's filters, 0 to 5, got 6", resample=6),
        resize("sizes must be from 1 to 2147483647", sizes=(0, 2)),
        resize("images must have shape (H, W, C), none of them 0, and one dtype and C", [image[0]]),
        resize(
            "images must have sides up to 2147483647", [image[:1, :1, :1].expand(2**31, 1, 1)]
        ),
        resize("images must be uint8 with values, float32 without", values=None),
        resize("values must have shape (256, C)", values=values[1:]),
        resize("values must have elements of 1, 2, 4 or 8 bytes", values=values.to(torch.complex128)),
    ]  # fmt: skip


def image_plans() -> list[Wrong]:
    """Return wrong calls of what plans resize_normalize for other devices, and packs images for them."""
    image, known = torch.zeros(3, 3, 3, dtype=torch.uint8), torch.zeros(0, 9, dtype=torch.int64)
    filters, pack, places = "resize_filters", "pack_images", "packed_places"

    def plan(words: str, images: Any = (image,), known: Tensor = known, tile: Any = (8, 256),
             crop: Any = (2, 2), first_axes: Any = (0,), channels_first: bool = False) -> Wrong:  # fmt: skip
        sizes = [2, 2] * len(images)
        arguments = (images, sizes, crop, sizes, first_axes, channels_first, known, tile, False)
        return Wrong("resize_plan", arguments, words)

    table = "the table of filters must be int64 of shape (lines, 9), contiguous, on the CPU"
    piece = torch.zeros(4, dtype=torch.uint8)
    return [
        plan("sizes, offsets and first_axes must fit the number of images, which is at least 1", first_axes=()),
        plan("crop must be a positive height and width", crop=(0, 2)),
        plan("images must have shape (C, H, W), none of them 0, and one dtype and C", [image[0]],
             channels_first=True),
        plan("images must be uint8", [image.float()]),
        plan("tile must be two positive numbers", tile=(8,)),
        plan(table, known=known[:, 1:]),
        plan(table, known=known.int()),
        plan("a row of a result must have fewer than 2147483647 numbers, and a column fewer rows",
             crop=(2, 2**31 // 3)),
        Wrong(filters, (known, [1, 2, 3], 0, 0), "lines must hold four numbers each"),
        Wrong(
            filters,
            (known, [4, 2, 1, 2], 0, 0),
            "a line must be (in_size, out_size, first, count) with outputs that exist"
        ),
        Wrong(filters, (known, [], 7, 0), "resample must be one of Pillow's filters, 0 to 5, got 7"),
        Wrong(filters, (known.int(), [], 0, 0), table),
        Wrong(places, ([image], 0), "alignment must be at least 1"),
        Wrong(places, ([image.to("meta")], 16), "images must be on the CPU"),
        Wrong(pack, ([image.to("meta")], [0], 0, piece), "images must be on the CPU"),
        Wrong(pack, ([image], [], 0, piece), "starts must hold one number for each image"),
        Wrong(pack, ([image], [0], 0, piece.int()), "piece must be uint8, contiguous, on the CPU"),
    ]  # fmt: skip


def convolutions() -> list[Wrong]:
    """Return wrong calls of norm_convolution's operators; most of them need AVX-512 to come that far."""
    op, pack = "norm_convolution", "pack_norm_convolution"
    unpacked = "weight must be float32 or bfloat16, of shape (out, in, height, width)"
    kernels = "weights are packed for 1x1 convolutions, and in float32 for 3x3 convolutions"
    calls = [
        Wrong(pack, (X[0], False), unpacked),
        Wrong(pack, (X, True), kernels),
    ]
    return calls + (fused_convolutions() if problem_here() == "" else refused_convolutions(op))


def problem_here() -> str:
    """Return why norm_convolution cannot run here, or nothing."""
    return torch.ops.bitfast.norm_convolution_problem(False)


def refused_convolutions(op: str) -> list[Wrong]:
    """Return calls that no CPU like this one can serve."""
    call = (LAST, torch.zeros(2, 2, 4).double(), C4, C4, 2, 1e-5, "relu", C4, 4, 1, 1, False)
    return [
        Wrong(op, call, f"norm_convolution cannot run here: {problem_here()}"),
        Wrong("channel_moments", (LAST,), f"channel_moments cannot run here: {problem_here()}"),
        Wrong(
            "pack_norm_convolution",
            (torch.zeros(4, 4, 1, 1), False),
            f"weights cannot be packed here: {problem_here()}",
        ),
        weight_gradient(f"convolution_weight_gradient cannot run here: {problem_here()}"),
    ]


def weight_gradient(
    words: str, x: Tensor | None = None, statistics: Any = (None, None), norm: Any = (None, None, 2),
    grad: Tensor | None = None, stride: Any = (1, 1), winograd: bool = False, result: Tensor | None = None,
) -> Wrong:  # fmt: skip
    """Return a call for the gradient of 1x1 filters, with some arguments replaced."""
    x = channels_last(2, 4, 3, 3) if x is None else x
    grad = channels_last(2, 4, 3, 3) if grad is None else grad
    result = torch.zeros(4, 4, 1, 1) if result is None else result
    arguments = (
        x,
        *statistics,
        *norm,
        "relu",
        grad,
        list(stride),
        [0, 0],
        [1, 1],
        winograd,
        result,
    )
    return Wrong("convolution_weight_gradient", arguments, words)


def channels_last(*shape: int) -> Tensor:
    """Return zeros."""
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


def fused_convolutions() -> list[Wrong]:
    """Return wrong calls of what runs on this CPU."""
    op = "norm_convolution"
    moments = torch.zeros(2, 2, 4, dtype=torch.float64)
    packed = torch.ops.bitfast.pack_norm_convolution.native(torch.zeros(4, 4, 1, 1), False)
    norm = (C4, C4, 2, 1e-5, "relu")

    def convolve(words: str, x: Tensor = LAST, moments: Tensor = moments, norm: Any = norm,
                 packed: Tensor = packed, kernel_size: int = 1) -> Wrong:  # fmt: skip
        arguments = (x, moments, *norm, packed, 4, kernel_size, 1, False)
        return Wrong(op, arguments, words)

    return [
        convolve("x must have shape (N, C, H, W), got 3 dimensions", LAST[0]),
        convolve(
            "norm_convolution is for 1x1 filters, and for 3x3 filters of stride 1 in float32",
            kernel_size=5,
        ),
        convolve("x and the result must be channels_last", X),
        convolve("moments must be float64, contiguous, of shape (2, N, C)", moments=moments.float()),
        convolve("the weight was packed for another convolution", packed=C4),
        convolve(DIVIDES, norm=(C4, C4, 3, 1e-5, "relu")),
        convolve("a norm has a weight and a bias", norm=(C4, None, 2, 1e-5, "relu")),
        convolve("the norm's weight and bias must have shape (C,)", norm=(C3, C4, 2, 1e-5, "relu")),
        Wrong("channel_moments", (X,), "x must be channels_last, of shape (N, C, H, W)"),
        Wrong(
            "norm_convolution_add_",
            (LAST, moments, *norm, packed, LAST[:1], 1, 1, False),
            "total must have the dtype and the shape of the convolution",
        ),
        Wrong(
            op,
            (LAST, moments, *norm, packed, 4, 1, 1, False, LAST[:1]),
            "residual must have the dtype and the shape of the convolution, and be channels_last",
        ),
        *weight_gradients(),
    ]  # fmt: skip


def weight_gradients() -> list[Wrong]:
    """Return wrong calls for the gradient of a convolution's weight."""
    statistics = torch.zeros(2, 2), torch.zeros(2, 2)
    return [
        weight_gradient("stride must be two numbers of at least 1", stride=(0, 1)),
        weight_gradient(
            "grad and result must have the dtype of x", grad=channels_last(2, 4, 3, 3).bfloat16()
        ),
        weight_gradient(
            "result must have the channels of grad and x", result=torch.zeros(5, 4, 1, 1)
        ),
        weight_gradient("grad must have as many images as x", grad=channels_last(1, 4, 3, 3)),
        weight_gradient(
            "grad must have the shape of the convolution's result", grad=channels_last(2, 4, 2, 3)
        ),
        weight_gradient("x and grad must be channels_last", x=torch.zeros(2, 4, 3, 3)),
        weight_gradient(
            "result must be contiguous or channels_last", result=torch.zeros(4, 8, 1, 1)[:, ::2]
        ),
        weight_gradient(
            "Winograd's products are for 3x3 filters of stride and padding 1, in float32", winograd=True
        ),
        weight_gradient("a norm has a weight, a bias, a mean and an rstd", norm=(C4, C4, 2)),
        weight_gradient(
            "mean and rstd must be float32, contiguous, of shape (N, num_groups)",
            statistics=(C4, torch.zeros(3)), norm=(C4, C4, 2),
        ),
        weight_gradient(
            "the norm's weight and bias must have shape (C,)",
            statistics=statistics, norm=(C4, C3, 2),
        ),
    ]  # fmt: skip


def what_is_said(wrong: Wrong) -> str:
    """Return the message with which the operator refuses the call."""
    try:
        getattr(torch.ops.bitfast, wrong.operator).native(*wrong.arguments)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def messages(library: Path, **environment: str) -> list[Message]:
    """Return what a library says of each wrong call; the last message is torch's own."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.native_errors", str(library)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return [tuple(row) for row in json.loads(process.stdout.splitlines()[-1])]


def assert_whole(found: list[Message]) -> None:
    """Hold the messages to their words, and to where they say that they come from."""
    *ours, (_, of_torch, _) = found
    for operator, message, words in ours:
        assert re.fullmatch(rf"\w+(\(\))?, \S+:\d+, {re.escape(words)}", message), (
            operator,
            message,
        )
    assert re.search(r"API call failed at \S+, line \d+$", of_torch), of_torch


def main() -> None:
    """Print of each wrong call the operator, the message and the words that it must end with.

    The last call fails within torch, on memory that no machine has: torch's headers say so.
    """
    torch.ops.load_library(sys.argv[1])
    calls = [*norms(), *weights(), *paddings(), *pictures(), *image_plans(), *convolutions()]
    too_large = Wrong("same_pad", (X, [2**40, 2**40, 0, 0], 0.0), "")
    print(json.dumps([(w.operator, what_is_said(w), w.words) for w in (*calls, too_large)]))


if __name__ == "__main__":
    main()
