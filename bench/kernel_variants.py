"""Which variants of the Triton kernels whole models and batches of images take: what to build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, product
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
"""float32; 16 bits under autocast; 16 bits throughout. (The two 16-bit types give the same code but for the
conversions.)"""

TRITON_TYPES = {
    FLOAT32: "*fp32", BFLOAT16: "*bf16", FLOAT16: "*fp16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
PASSES = (False, True)
"""Forward and backward."""


class Variant(NamedTuple):
    """What one compilation depends on, besides the chip.

    Attributes:
        kernel: "module.function", within ``bitfast.kernels``.
        signature: "name: type" of every parameter; the type is "constexpr" for constants.
        aligned: The parameters that are multiples of 16.
        constants: "name=value" of every constant.
        warps: Per program.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int

    @classmethod
    def of(cls, launch: Launch) -> Variant:
        """Return what Triton would compile for a launch: it specializes on ones and multiples of 16."""
        signature, aligned, constants = [], [], dict(launch.constants)
        for name in launch.kernel.arg_names:
            value: Any = launch.arguments.get(name)
            if name in constants:
                kind = "constexpr"
            elif isinstance(value, Tensor):
                kind = TRITON_TYPES[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, float):
                kind = "fp32"
            elif value == 1:
                kind, constants[name] = "constexpr", 1
            else:
                kind = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
            signature.append((name, kind))
        module = launch.kernel.fn.__module__.removeprefix("bitfast.kernels.")
        return cls(
            f"{module}.{launch.kernel.fn.__name__}",
            tuple(signature),
            tuple(aligned),
            tuple(constants.items()),
            launch.warps,
        )

    @property
    def title(self) -> str:
        """All of it in one line: the key of the table of results. ":16" marks multiples of 16."""
        types = " ".join(
            kind + (":16" if name in self.aligned else "")
            for name, kind in self.signature
            if kind != "constexpr"
        )
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({types}) {constants} warps={self.warps}"

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
    for backward in PASSES:
        for norm, batch in product(norms_of(model), BATCHES[model]):
            yield from norm_launches(norm, batch, dtypes, backward=backward)
        for shape, turned in product(dict.fromkeys(weights), (False, True)):
            yield weight_launch(shape, dtypes, backward=backward, to_channels_last=turned)
        yield all_weights_launch(weights, dtypes, backward=backward)


def other_launches(norms: Iterable[Norm], dtypes: Dtypes) -> Iterator[Launch]:
    """Yield launches of norms as the models do not have them, each in every way of working: in two launches,
    in one tile, and in a moving tile.

    With every activation; ``norms`` in the other layout; with over 2^31 elements in an image; and without
    statistics, with the sum in the place of x, as in inference.
    """
    batches_of = {Norm(256, 56, 56, True, True): (8, 128), Norm(1024, 14, 14, True, True): (8,)}
    for activation, (norm, batches) in product(ACTIVATIONS, batches_of.items()):
        for batch, backward in product(batches, PASSES):
            yield from norm_launches(norm, batch, dtypes, backward=backward, activation=activation)
    for norm, backward in product(norms, PASSES):
        yield from norm_launches(norm, 8, dtypes, backward=backward, is_channels_last=False)
    groups_of = {
        Norm(64, 4096, 8192, True, True): 32,
        Norm(2**25, 7, 7, True, True): 2**20,
        Norm(2**20, 56, 56, True, True): 2**15,
    }
    for (norm, groups), backward in product(groups_of.items(), PASSES):
        yield from norm_launches(norm, 2, dtypes, backward=backward, groups=groups)
    inference: Any = {"backward": False, "keeps_statistics": False}
    for (norm, batches), has_sum in product(batches_of.items(), (False, True)):
        norm = norm._replace(has_residual=has_sum, is_sum_used=has_sum)
        for batch in batches:
            yield from norm_launches(norm, batch, dtypes, **inference, in_place=has_sum)


def image_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Yield the launches of batches of images, gray and colored, that are resized and normalized."""

    def table(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    fields = len(image_kernels.FIELDS)
    tables = (
        table(640, 3, kind=torch.int32), table(2, fields, kind=torch.int64),
        table(448, kind=torch.int32), table(9000, kind=torch.int32),
    )  # fmt: skip
    between = table(600_000, kind=torch.uint8)
    for channels in (1, 3):
        yield image_kernels.first_pass_launch(*tables, intermediate=between, channels=channels)
        for channels_last, edge in product((False, True), (224, 225)):
            yield image_kernels.second_pass_launch(
                *tables,
                table(256, channels, kind=dtype),
                intermediate=between,
                result=table(2, channels, edge, edge, kind=dtype),
                channels_last=channels_last,
            )


Job = tuple[Variant, int]
"""A variant and the chip to build it for."""


def all_jobs() -> list[Job]:
    """Return the full sweep."""
    launches = [model_launches(model, dtypes) for model, dtypes in product(BATCHES, DTYPES)]
    launches += [image_launches(dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
    launches += [other_launches(norms_of("R50x1"), dtypes) for dtypes in DTYPES[:2]]
    return list(product(variants_of(chain(*launches)), ARCHITECTURES))


def quick_jobs() -> list[Job]:
    """Return a part of the sweep for every change.

    Every kind of kernel in every dtype for every chip; and for one chip, under autocast to bfloat16, every
    tile of the models, every activation, both layouts and 64-bit offsets.
    """
    jobs: dict[Any, Job] = {}
    for variant, architecture in all_jobs():
        values = {**dict(variant.signature), **dict(variant.constants)}
        details = ("ONE_TILE", "KIND", "like") if architecture == 90 else ("ONE_TILE",)
        what = (values.get(name) for name in details)
        kind = (variant.kernel, variant.compute_type, architecture, *what)
        jobs.setdefault(kind, (variant, architecture))
    dtypes = DTYPES[1]
    launches = chain(
        *(model_launches(model, dtypes) for model in BATCHES),
        other_launches(norms_of("R50x1")[::5], dtypes),
        image_launches(BFLOAT16),
    )
    for variant in variants_of(launches):
        jobs.setdefault((variant.kernel, variant.constants, variant.warps), (variant, 90))
    return list(dict.fromkeys(jobs.values()))
