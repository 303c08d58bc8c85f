"""Which variants of the Triton kernels whole models and batches of images take: what to build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfast.activations import ACTIVATIONS
from bitfast.kernels import resize_normalize as image_kernels
from bitfast.kernels.launch import Launch

from .shapes import Dtypes, Norm, all_weights_launch, norm_launches, shapes_of, weight_launch

ARCHITECTURES = (80, 90, 100)
"""Compute capability times ten: A100, H100 and H200, B200."""

BATCHES = {"R50x1": (1, 8, 128), "R152x4": (1, 16)}
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (Dtypes(FLOAT32, FLOAT32), Dtypes(BFLOAT16, FLOAT32), Dtypes(FLOAT16, FLOAT16))
"""float32; 16 bits under autocast; 16 bits throughout. (The 16-bit types differ in conversions alone.)"""

TRITON_TYPES = {
    FLOAT32: "*fp32", BFLOAT16: "*bf16", FLOAT16: "*fp16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
PASSES = (False, True)  # forward and backward
NORM_PASSES: tuple[dict[str, bool], ...] = (
    {"backward": False},
    {"backward": True},
    {"backward": True, "recomputes": True},
)


class Variant(NamedTuple):
    """What one compilation depends on, besides the chip."""

    kernel: str  # "module.function", within ``bitfast.kernels``
    signature: tuple[
        tuple[str, str], ...
    ]  # name and type of every parameter: constants are "constexpr"
    aligned: tuple[str, ...]  # parameters that are multiples of 16
    constants: tuple[tuple[str, Any], ...]  # name and value
    warps: int  # per program

    @classmethod
    def of(cls, launch: Launch) -> Variant:
        """Return what Triton would compile for a launch: it specializes on ones and multiples of 16."""
        signature, aligned, constants = [], [], dict(launch.constants)
        for name in launch.kernel.arg_names:
            value: Any = launch.arguments.get(name)
            address: Any = None  # or a number
            if name in constants:
                kind = "constexpr"
            elif isinstance(value, Tensor):
                kind, address = TRITON_TYPES[value.dtype], value.storage_offset() * value.itemsize
            elif isinstance(value, float):
                kind = "fp32"
            elif value == 1:
                kind, constants[name] = "constexpr", 1
            else:
                kind, address = "i32" if value < 2**31 else "i64", value
            signature.append((name, kind))
            if address is not None and address % 16 == 0:
                aligned.append(name)
        function = launch.kernel.fn
        kernel = f"{function.__module__.removeprefix('bitfast.kernels.')}.{function.__name__}"
        constant = tuple(constants.items())
        return cls(kernel, tuple(signature), tuple(aligned), constant, launch.warps)

    @property
    def title(self) -> str:
        """All of it in one line: the key of the table of results. ":16" marks multiples of 16."""
        types = {name: kind for name, kind in self.signature if kind != "constexpr"}
        types |= {name: f"{types[name]}:16" for name in self.aligned}
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({' '.join(types.values())}) {constants} warps={self.warps}"

    @property
    def compute_type(self) -> str:
        """The type of the feature maps, standardized weights or pixels."""
        types = dict(self.signature)
        names = ("x", "total", "result", "grad", "grad_bias", "intermediate")
        return next(types[name] for name in names if name in types)


# ---- which variants there are -------------------------------------------------------------------


def variants_of(launches: Iterable[Launch]) -> list[Variant]:
    """Return the distinct variants, in order."""
    return list(dict.fromkeys(Variant.of(launch) for launch in launches))


def norms_of(model: str) -> list[Norm]:
    """Return the distinct norms of a model at 224x224."""
    return list(dict.fromkeys(shapes_of(model, 224).norms))


def model_launches(model: str, dtypes: Dtypes) -> Iterator[Launch]:
    """Yield the launches of a model's norms, channels_last, and weights, forward and backward."""
    weights = shapes_of(model, 224).weights
    for which, norm, batch in product(NORM_PASSES, norms_of(model), BATCHES[model]):
        yield from norm_launches(norm, batch, dtypes, **which)
    for backward in PASSES:
        for shape, turned in product(dict.fromkeys(weights), (False, True)):
            yield weight_launch(shape, dtypes, backward=backward, to_channels_last=turned)
        yield all_weights_launch(weights, dtypes, backward=backward)


def other_launches(norms: Iterable[Norm], dtypes: Dtypes) -> Iterator[Launch]:
    """Yield launches of norms as the models do not have them, each in both ways of working: in one launch
    and in two.

    With every activation; ``norms`` in the other layout; with over 2^31 elements in an image; and without
    statistics, with the sum in the place of x, as in inference.
    """
    batches_of = {Norm(256, 56, 56, True, True): (8, 128), Norm(1024, 14, 14, True, True): (8,)}
    for activation, (norm, batches) in product(ACTIVATIONS, batches_of.items()):
        for batch, which in product(batches, NORM_PASSES):
            yield from norm_launches(norm, batch, dtypes, activation=activation, **which)
    for norm, which in product(norms, NORM_PASSES):
        yield from norm_launches(norm, 8, dtypes, is_channels_last=False, **which)
    giants = ((64, 4096, 8192, 32), (2**25, 7, 7, 2**20), (2**20, 56, 56, 2**15))
    for (channels, height, width, groups), which in product(giants, NORM_PASSES):
        norm = Norm(channels, height, width, True, True)
        yield from norm_launches(norm, 2, dtypes, groups=groups, **which)
    inference = partial(norm_launches, dtypes=dtypes, backward=False, keeps_statistics=False)
    for (norm, batches), has_sum in product(batches_of.items(), (False, True)):
        norm = norm._replace(has_residual=has_sum, is_sum_used=has_sum)
        yield from chain(*(inference(norm, batch, in_place=has_sum) for batch in batches))


def image_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the launches of batches of images, gray and colored, that are resized and normalized."""
    empty = partial(torch.empty, device="meta")
    numbers = partial(empty, dtype=torch.int32)
    images = empty(2, len(image_kernels.FIELDS), dtype=torch.int64)
    tables = numbers(640, 3), images, numbers(448), numbers(9000)
    between = empty(600_000, dtype=torch.uint8)
    for channels in (1, 3):
        yield image_kernels.first_pass_launch(*tables, intermediate=between, channels=channels)
        values = empty(256, channels, dtype=dtype)
        for channels_last, edge in product((False, True), (224, 225)):
            result = empty(2, channels, edge, edge, dtype=dtype)
            yield image_kernels.second_pass_launch(
                *tables, values, intermediate=between, result=result, channels_last=channels_last
            )


Job = tuple[Variant, int]  # and the chip to build it for


def all_jobs() -> list[Job]:
    """Return the full sweep."""
    launches = [model_launches(model, dtypes) for model, dtypes in product(BATCHES, DTYPES)]
    launches += [image_launches(dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
    launches += [other_launches(norms_of("R50x1"), dtypes) for dtypes in DTYPES[:2]]
    return list(product(variants_of(chain(*launches)), ARCHITECTURES))


def quick_jobs() -> list[Job]:
    """Return a part of the sweep for every change: every kind of kernel in every dtype for every chip; and for
    one chip, under autocast to bfloat16, every tile of the models, activation, both layouts, 64-bit offsets."""
    jobs: dict[Any, Job] = {}
    for variant, architecture in all_jobs():
        values = {**dict(variant.signature), **dict(variant.constants)}
        details = ("KIND", "like") if architecture == 90 else ()
        what = (values.get(name) for name in details)
        kind = (variant.kernel, variant.compute_type, architecture, *what)
        jobs.setdefault(kind, (variant, architecture))
    launches = [model_launches(model, DTYPES[1]) for model in BATCHES]
    launches += [other_launches(norms_of("R50x1")[::5], DTYPES[1]), image_launches(BFLOAT16)]
    for variant in variants_of(chain(*launches)):
        jobs.setdefault((variant.kernel, variant.constants, variant.warps), (variant, 90))
    return list(dict.fromkeys(jobs.values()))


def sampled_jobs() -> list[Job]:
    """Return a part of the quick jobs that still has every kernel in every dtype for every chip, every value of
    every constant, and every pair of modes: what is no size, such as the activation or the layout."""
    jobs = {job: _properties(job) for job in quick_jobs()}
    missing = set[Any]().union(*jobs.values())
    sampled = []
    while missing:
        most = max(jobs, key=lambda job: len(jobs[job] & missing))
        missing -= jobs[most]
        sampled.append(most)
    return sampled


def _properties(job: Job) -> set[Any]:
    variant, architecture = job
    constants = [("warps", variant.warps), *variant.constants]
    modes = sorted(c for c in constants if c[0] == "KIND" or isinstance(c[1], bool | str))
    found = [(variant.compute_type, architecture), *constants, *combinations(modes, 2)]
    return {(variant.kernel, each) for each in found}
