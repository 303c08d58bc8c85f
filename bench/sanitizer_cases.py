"""Every variant of every kernel once, on small tensors: what compute-sanitizer watches.

``compute-sanitizer --tool memcheck python -m bench.sanitizer_cases``. Results are compared with the
reference too, since a kernel that the sanitizer finds nothing in may still be wrong.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfast import reference
from bitfast.backends import BackendUnavailableError, use_backend
from bitfast.kernels import group_norm_act as norms
from bitfast.kernels import weight_standardization as standardization
from bitfast.kernels.launch import Device, Launch
from bitfast.ops.resize_normalize import resize_normalize
from bitfast.ops.weight_standardization import pack, unpack

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SMALL_DEVICE = Device(multiprocessors=2, l2_bytes=4096)
"""On which the pixels of small images are shared out among programs, as those of large ones are on a GPU."""

SMALL_STREAMS = Device(multiprocessors=2, l2_bytes=2**20)
"""On which few programs each go through the images of STREAMED."""

STREAMED = ((9, 8, 3, 1367), 2)
"""A shape and its groups: too large for registers, and more in all than half the cache."""

TOLERANCE = 2e-2
"""bfloat16 rounds by 4e-3."""


class Seen:
    """The kernels that ran, with what they were compiled for."""

    def __init__(self) -> None:
        self.variants: set[tuple[str, ...]] = set()

    def record(self, launch: Launch) -> None:
        """Note a launch."""
        name = getattr(launch.kernel, "__name__", None) or launch.kernel.fn.__name__
        wanted = (
            "ONE_TILE",
            "HAS_RESIDUAL",
            "HAS_GRAD_TOTAL",
            "CHANNELS_LAST",
            "WIDE",
            "KIND",
            "PARTS",
        )
        constants = [f"{k}={launch.constants[k]}" for k in wanted if k in launch.constants]
        self.variants.add((name, *constants))


seen = Seen()


def watch_launches() -> None:
    """Record every launch that the ops make."""
    run = Launch.launch

    def recorded(self: Launch, kernel: Any = None) -> None:
        seen.record(self)
        run(self, kernel)

    Launch.launch = recorded  # type: ignore[method-assign]


def compare(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError where a result is wrong."""
    difference = (actual.double() - expected.double()).norm()
    if not difference <= TOLERANCE * expected.double().norm() + 1e-3:
        raise AssertionError(f"{what}: {difference:.2e} off")


# ---- group_norm_act -------------------------------------------------------------------------------


HELD = [((2, 8, 3, 5), 4), ((3, 12, 5, 5), 4), ((1, 6, 1, 1), 6)]
"""Shapes and groups of which a program holds all pixels; some groups are no power of two."""

SHARED_OUT = [((4, 6, 260, 17), 2), ((1, 1100, 2, 3), 1)]
"""Shapes and groups whose pixels are shared out on a small device; the second's group is cut in parts."""


def run_norm(
    shape: tuple[int, int, int, int],
    groups: int,
    layout: torch.memory_format,
    dtype: torch.dtype,
    activation: str,
    has_residual: bool,
    device: str,
) -> None:
    """Run one norm forward and backward."""

    def draw() -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)

    x, residual, grad, grad_total = draw(), draw(), draw(), draw()
    weight = torch.rand(shape[1], device=device) + 0.5
    bias = torch.randn(shape[1], device=device)
    settings = (weight, bias, groups, 1e-5, activation)
    operators = torch.ops.bitfast
    total = x
    if has_residual:
        total, result, mean, rstd = operators.add_group_norm_act.triton(x, residual, *settings)
        compare(total, x + residual, "sum")
    else:
        result, mean, rstd = operators.group_norm_act.triton(x, *settings)
    expected = reference.group_norm_act_forward(
        total.double(), weight.double(), bias.double(), groups, 1e-5, activation
    )
    compare(result, expected[0], f"norm of {shape} {groups} {dtype}")
    other = grad_total if has_residual else None
    arguments = (grad, other, total, weight, bias, mean, rstd, groups, activation)
    actual = operators.group_norm_act_backward.triton(*arguments)
    doubles = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    for a, e in zip(actual, reference.group_norm_act_backward(*doubles), strict=True):
        compare(a, e, f"gradients of {shape} {groups} {dtype}")


Round = tuple[Device | None, list[tuple[tuple[int, int, int, int], int]], bool]
"""The device to plan for (None: the one there is), shapes and groups, and whether offsets have 64 bits."""


def norms_held(device: str, is_quick: bool) -> None:
    """Run norms of which a program holds all pixels."""
    small: Round = (SMALL_DEVICE, HELD[:1], True)
    run_rounds([(None, HELD[:1] if is_quick else HELD, False), small], device)


def norms_shared_out(device: str, is_quick: bool) -> None:
    """Run norms of which programs share the pixels."""
    small: Round = (SMALL_DEVICE, HELD[:1], False)
    large: list[Round] = [(SMALL_DEVICE, SHARED_OUT, False), (SMALL_DEVICE, SHARED_OUT[:1], True)]
    run_rounds([small] if is_quick else large, device)


def norms_streamed(device: str, is_quick: bool) -> None:
    """Run norms of which a program goes through all pixels twice."""
    widths = (False,) if is_quick else (False, True)
    run_rounds([(SMALL_STREAMS, [STREAMED], is_wide) for is_wide in widths], device)


def run_rounds(rounds: list[Round], device: str) -> None:
    """Run norms, cut up as on the given devices."""
    planned = norms.device_of, norms.is_wide
    for stand_in, chosen, is_wide in rounds:
        if stand_in is not None:
            norms.device_of = lambda _, stand_in=stand_in: stand_in  # type: ignore[assignment]
        if is_wide:  # offsets of 64 bits, which only much larger images need
            norms.is_wide = lambda *_: True  # type: ignore[assignment]
        run_norms(chosen, device)
        norms.device_of, norms.is_wide = planned


def run_norms(shapes: list[tuple[tuple[int, int, int, int], int]], device: str) -> None:
    """Run these shapes in both layouts, with and without a residual, dtypes and activations in turn."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    activations = ("relu", "none", "gelu", "gelu_new", "selu")
    combinations = itertools.product(shapes, LAYOUTS, (False, True))
    for number, ((shape, groups), layout, has_residual) in enumerate(combinations):
        dtype, activation = dtypes[number % 3], activations[number % 5]
        run_norm(shape, groups, layout, dtype, activation, has_residual, device)


# ---- weight_standardization -----------------------------------------------------------------------

FILTERS = (
    (3, 16, 1, 1), (9, 64, 3, 3), (3, 2048, 1, 1), (2, 5008, 1, 1), (1, 8208, 1, 1), (3, 3, 7, 7),
    (2, 128, 3, 3), (2, 512, 3, 3), (2, 6, 5, 5), (2, 528, 3, 3),
)  # fmt: skip
"""Weights of every kind: long and short, aligned and not, with and without a change of layout."""


def all_weights(device: str, is_quick: bool) -> None:
    """Run weight standardization of each weight alone and of all together."""
    kinds = {
        standardization.kind_of(
            standardization.filters_of(torch.empty(s, device="meta"), last), True
        )
        for s in FILTERS
        for last in (False, True)
    }
    if len(kinds) != len(standardization.KINDS):
        raise AssertionError(f"only the kinds {sorted(kinds)} of filters are among the cases")
    shapes = ((3, 16, 1, 1), (2, 6, 3, 3)) if is_quick else FILTERS
    for dtype, to_channels_last in itertools.product(
        (torch.float32, torch.bfloat16), (False, True)
    ):
        weights = [torch.randn(s, device=device).to(dtype) for s in shapes]
        results = unpack(*packed(weights, to_channels_last), channels_last=to_channels_last)
        for weight, result in zip(weights, results, strict=True):
            expected = reference.weight_standardization_forward(weight.double(), 1e-8, None)[0]
            compare(result, expected, f"all of {tuple(weight.shape)}")
            for layout in LAYOUTS:
                run_one_weight(weight.contiguous(memory_format=layout), expected)


def packed(weights: list[Tensor], to_channels_last: bool) -> tuple[Tensor, list[Tensor]]:
    """Standardize all in one launch, and run the backward on the results."""
    operators = torch.ops.bitfast
    result, mean, rstd = operators.weight_standardization_all.triton(
        weights, 1e-8, torch.bfloat16, to_channels_last
    )
    grads = [torch.randn_like(w).to(torch.bfloat16) for w in weights]
    grad = pack(grads, to_channels_last, weights)
    gradient = operators.weight_standardization_all_backward.triton(
        grad, weights, mean, rstd, to_channels_last
    )
    unpacked = unpack(gradient, weights, channels_last=False)
    counts = [weight.shape[0] for weight in weights]
    for a, g, w, m, r in zip(
        unpacked, grads, weights, mean.split(counts), rstd.split(counts), strict=True
    ):
        doubles = (t.double() for t in (g, w, m, r))
        compare(a, reference.weight_standardization_backward(*doubles), f"{tuple(w.shape)}")
    return result, weights


def run_one_weight(weight: Tensor, expected: Tensor) -> None:
    """Standardize one weight, forward and backward."""
    operators = torch.ops.bitfast
    result, mean, rstd = operators.weight_standardization.triton(weight, 1e-8, None)
    compare(result, expected, f"{tuple(weight.shape)}")
    grad = torch.randn_like(weight)
    gradient = operators.weight_standardization_backward.triton(grad, weight, mean, rstd)
    doubles = (t.double() for t in (grad, weight, mean, rstd))
    compare(gradient, reference.weight_standardization_backward(*doubles), f"{tuple(weight.shape)}")


# ---- same_padding ---------------------------------------------------------------------------------


def all_paddings(device: str, is_quick: bool) -> None:
    """Run the pad and the pool of the extension, forward and backward."""
    operators = torch.ops.bitfast
    for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16, torch.float16)):
        for shape in ((2, 3, 7, 9), (1, 64, 8, 8), (2, 1, 1, 5)):
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
            for sides in ([0, 1, 0, 1], [1, 1, 1, 1], [2, 1, 0, 3]):
                window = ([2, 3], [2, 2], [1, 1])
                for backend in ("native", "reference"):
                    padded = getattr(operators.same_pad, backend)(x, sides, -1.0)
                    pool = getattr(operators.same_max_pool, backend)
                    pooled, taps = pool(x, *window, sides, 0.0, True)
                    backward = getattr(operators.same_max_pool_backward, backend)
                    gradient = backward(pooled, taps, shape[2:], *window, sides)
                    results = (padded, pooled, gradient)
                    if backend == "native":
                        native = results
                for a, e in zip(native, results, strict=True):
                    if not torch.equal(a, e):
                        raise AssertionError(f"same_padding of {shape} {dtype} {sides} differs")


def all_images(device: str, is_quick: bool) -> None:
    """Resize batches of images of several sizes, by every filter, in both layouts and orders of passes."""
    shapes = [(7, 9, 3), (40, 3, 3), (1, 1, 3), (13, 90, 3)]
    images = [torch.randint(256, shape, dtype=torch.uint8) for shape in shapes]
    for resample, layout, version in itertools.product(range(6), LAYOUTS, ((12, 1), (13, 0))):
        options: dict[str, Any] = {
            "sizes": [(9, 11), (5, 6), (4, 4), (13, 20)],
            "crop": (9, 12),
            "resample": resample,
            "rescale_factor": 1 / 255,
            "memory_format": layout,
            "pillow_version": version,
        }
        with use_backend("reference"):
            expected = resize_normalize(images, **options)
        with use_backend("triton"):
            result = resize_normalize([image.to(device) for image in images], **options)
        if not torch.equal(result.cpu(), expected):
            raise AssertionError(f"resize_normalize with filter {resample} differs")


CASES: dict[str, Callable[[str, bool], None]] = {
    "weights": all_weights,
    "norms_held": norms_held,
    "norms_shared_out": norms_shared_out,
    "norms_streamed": norms_streamed,
    "paddings": all_paddings,
    "images": all_images,
}


def main() -> None:
    """Run everything, or some of it, and print what ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a few cases only")
    parser.add_argument("--only", action="append", choices=list(CASES), default=[])
    options = parser.parse_args()
    torch.manual_seed(0)
    watch_launches()
    problems = []
    for name in options.only or CASES:
        try:
            CASES[name](options.device, options.smoke)
        except (AttributeError, BackendUnavailableError) as error:  # without the extension
            problems.append(f"{name} did not run: {error}")
    if options.device == "cuda":
        torch.cuda.synchronize()
    for variant in sorted(seen.variants):
        print(*variant)
    print(f"{len(seen.variants)} kernel variants ran")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
