"""``python -m bench.precision``: what computes in what in each mode of precision, and the errors of that.

Beside transformers in the same mode, on the same weights and images. The oracle is float64 on the weights and
images as the mode has rounded them, so an error is that of computing, not of storing.

What the first table says is in :data:`MODES`; ``tests/test_precision.py`` holds the models to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfast
from bitfast.ops.weight_standardization import weight_standardization

from .accuracy import OURS, overall_error, relative_error
from .cases import name_of
from .rows import machine
from .torchvision_import import import_torchvision

# ---- the modes ----------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The dtype that each part of a network computes in, by name."""

    standardization: str
    """Means and deviations of filters, and the arithmetic; the result is rounded to that of convolution."""
    convolution: str
    """What is multiplied; sums are float32 everywhere."""
    statistics: str
    """Means and deviations of GroupNorm, or something wider, and its arithmetic; the result is rounded once."""
    residual: str
    pooling: str
    classifier: str
    output: str


class Mode(NamedTuple):
    """One way to compute a model."""

    name: str
    dtype: torch.dtype
    """Of the parameters and the images."""
    parts: Parts
    autocast: torch.dtype | None = None
    has_tf32: bool = False

    @property
    def result(self) -> torch.dtype:
        """The dtype of what a model returns."""
        return self.autocast or self.dtype

    def entered(self, device: str) -> AbstractContextManager[Any]:
        """Return the context in which models compute so."""
        autocast = torch.autocast(device, self.autocast) if self.autocast else nullcontext()
        return autocast if device == "cpu" else on_gpu(self.has_tf32, autocast)

    def why_not(self, device: str) -> str | None:
        """Say why the mode cannot run there; None if it can."""
        return "needs a GPU" if self.has_tf32 and device == "cpu" else None


def everything_in(dtype: str) -> Parts:
    """Return the parts of a mode that stores its feature maps in a dtype."""
    return Parts("float32", dtype, "float32", dtype, dtype, dtype, dtype)


MODES = (
    Mode("float32", torch.float32, everything_in("float32")),
    Mode(
        "tf32",
        torch.float32,
        everything_in("float32")._replace(convolution="tf32", classifier="tf32"),
        has_tf32=True,
    ),
    Mode("bfloat16", torch.bfloat16, everything_in("bfloat16")),
    Mode("float16", torch.float16, everything_in("float16")),
    Mode("autocast bfloat16", torch.float32, everything_in("bfloat16"), torch.bfloat16),
    Mode("autocast float16", torch.float32, everything_in("float16"), torch.float16),
)


@contextmanager
def on_gpu(has_tf32: bool, autocast: AbstractContextManager[Any]) -> Iterator[None]:
    """Let convolutions and products have tf32 or not; torch allows it to convolutions unless it is told."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = has_tf32
        with autocast:
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


# ---- the models ---------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "R50x1, preactivation": ("BitForImageClassification", {"num_labels": 1000}),
    "DPT-hybrid, bottleneck": (
        "BitBackbone",
        {
            "layer_type": "bottleneck",
            "global_padding": "same",
            "embedding_dynamic_padding": True,
            "depths": [3, 4, 9],
            "out_features": ["stage1", "stage2", "stage3"],
        },
    ),
}
"""Class and configuration."""

IMAGES = (2, 3, 96, 96)
DRAWS = 3
"""Models, with weights and images of their own, whose errors are put together."""


def pair(kind: str, settings: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Return a float32 model of bitfast and one of transformers, with equal weights that look trained."""
    import_torchvision()
    import transformers

    theirs = getattr(transformers, kind)(transformers.BitConfig(**copy.deepcopy(settings)))
    ours = getattr(bitfast, kind)(bitfast.BitConfig(**settings))
    look_trained(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@torch.no_grad()
def look_trained(model: nn.Module) -> None:
    """Give norms scales and shifts, and some filters of each convolution what training gives to some."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.bias.copy_(0.2 * torch.randn_like(module.bias))
        elif isinstance(module, nn.Conv2d):
            far_from_zero(module.weight[::8])
            tiny(module.weight[1::8])


def far_from_zero(filters: Tensor) -> None:
    """Shift filters in place so that their mean is 100 times their deviation."""
    filters += 100 * deviation(filters)


def tiny(filters: Tensor) -> None:
    """Scale filters in place to deviations from 1e-5 to 1e-4, whose squares float16 has no numbers for."""
    count = filters.shape[0]
    wanted = 10 ** -(4 + torch.rand(count, 1, 1, 1, device=filters.device))
    filters *= wanted / deviation(filters)


def deviation(filters: Tensor) -> Tensor:
    """Return the deviation of each filter: (out, 1, 1, 1)."""
    return filters.flatten(1).std(1, unbiased=False)[:, None, None, None]


def outputs_of(model: Any, images: Tensor) -> list[Tensor]:
    """Return the logits, or the feature maps."""
    with torch.no_grad():
        result = model(images)
    return [result.logits] if "logits" in result else list(result.feature_maps)


# ---- errors -------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One model in one mode: the errors of both, or why there are none."""

    model: str
    mode: str
    ours: float | None = None
    transformers: float | None = None
    allowed: float | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the error is not finite or more than is allowed."""
        return self.ours is not None and not self.ours <= (self.allowed or 0.0)


def measured(name: str, mode: Mode, device: str, draws: int = DRAWS) -> Row:
    """Measure one model in one mode: the root mean square of the errors of all outputs of all draws."""
    note = mode.why_not(device)
    if note is not None:
        return Row(name, mode.name, note=note)
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(draws):
        squares += torch.tensor(errors_of_a_draw(name, mode, device)).square()
    ours, theirs = (squares / draws).sqrt().tolist()
    rounding = torch.finfo(mode.result).eps / 2
    return Row(name, mode.name, ours, theirs, OURS * theirs + rounding)


def errors_of_a_draw(name: str, mode: Mode, device: str) -> tuple[float, float]:
    """Return the errors of bitfast and of transformers on fresh weights and images."""
    models = [model.to(device, mode.dtype) for model in pair(*MODELS[name])]
    images = torch.randn(IMAGES).to(device, mode.dtype)
    with mode.entered(device):
        results = [flat(outputs_of(model, images)) for model in models]
    with bitfast.use_backend("reference"):
        oracle = outputs_of(models[0].double(), images.double())
    ours, theirs = (overall_error([result], [o.flatten() for o in oracle])[0] for result in results)
    return ours, theirs


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all numbers of several tensors, one after the other, in float64."""
    return torch.cat([tensor.flatten().double() for tensor in tensors])


# ---- standardization alone ----------------------------------------------------------------------

FILTERS = {
    "ordinary": lambda filters: None,
    "mean 100 times the deviation": far_from_zero,
    "deviation 1e-5 to 1e-4": tiny,
}


class StandardizationRow(NamedTuple):
    """The errors of standardizing filters of one kind, stored in a dtype."""

    filters: str
    dtype: str
    ours: float
    transformers: float


def standardization_rows(device: str) -> list[StandardizationRow]:
    """Standardize filters of each kind in each dtype, by bitfast and as transformers does."""
    rows = []
    for kind, change in FILTERS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            filters = torch.randn(64, 64, 3, 3, device=device)
            change(filters)
            filters = filters.to(dtype)
            oracle = weight_standardization(filters.double())
            ours = relative_error(weight_standardization(filters), oracle)
            theirs = relative_error(as_transformers(filters), oracle)
            rows.append(StandardizationRow(kind, name_of(dtype), ours, theirs))
    return rows


def as_transformers(filters: Tensor) -> Tensor:
    """Standardize as transformers 4.56 does, in the dtype at hand."""
    flat = filters.reshape(1, filters.shape[0], -1)
    return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8).view_as(filters)


# ---- float16 on the CPU -------------------------------------------------------------------------


class Convolution(NamedTuple):
    """How torch convolves in a dtype: seconds, and whether it adds up in something wider."""

    dtype: str
    seconds: float
    has_wide_sums: bool


def convolutions(device: str) -> list[Convolution]:
    """Time one 3x3 convolution (8x256x14x14 to 256 channels) in each dtype, and add up 4096 ones."""
    return [convolution(dtype, device) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def convolution(dtype: torch.dtype, device: str) -> Convolution:
    """Time a convolution, the best of three, and see whether it counts to 4096, beyond float16's integers."""
    x, weight = torch.randn(8, 256, 14, 14), torch.randn(256, 256, 3, 3)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float(F.conv2d(x, weight, padding=1).sum())
        times.append(time.perf_counter() - start)
    ones = torch.ones(1, 4096, 1, 1, dtype=dtype, device=device)
    return Convolution(name_of(dtype), min(times[1:]), float(F.conv2d(ones, ones)) == 4096)


# ---- the report ---------------------------------------------------------------------------------


class Report(NamedTuple):
    """Everything that was measured, and on what."""

    machine: dict[str, Any]
    device: str
    command: str
    images: Sequence[int]
    draws: int
    rows: list[Row]
    standardization: list[StandardizationRow]
    convolutions: list[Convolution]

    def as_json(self) -> str:
        """Return the report as JSON."""
        content = self._asdict()
        for key in ("rows", "standardization", "convolutions"):
            content[key] = [row._asdict() for row in content[key]]
        content["modes"] = {mode.name: mode.parts._asdict() for mode in MODES}
        return json.dumps(content, indent=1) + "\n"


def report(command: str, draws: int = DRAWS) -> Report:
    """Measure everything, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = [measured(name, mode, device, draws) for name in MODELS for mode in MODES]
    return Report(
        machine(),
        torch.cuda.get_device_name() if device == "cuda" else "CPU",
        command,
        IMAGES,
        draws,
        rows,
        standardization_rows(device),
        convolutions(device),
    )


HEADS = {
    "standardization": "weight standardization",
    "convolution": "convolution",
    "statistics": "GroupNorm statistics",
    "residual": "residual addition",
    "pooling": "pooling",
    "classifier": "classifier",
    "output": "output",
}


def markdown(found: Report) -> str:
    """Return the page."""
    versions = found.machine["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "triton"))
    batch, _, height, width = found.images
    sections = [
        "# Precision",
        f"Written by `{found.command}`: {found.machine['cpu']} ({found.machine['capability']}), models on "
        f"{found.device}, {found.machine['date']}, commit {found.machine['commit'] or 'unknown'}, {used}.",
        "## What computes in what",
        parts_table(),
        "Parameters have the dtype of the mode, under autocast float32. Standardized filters are rounded once, "
        "to the dtype of the convolution; the results of norms, sums and convolutions once, to that of the "
        "feature maps. Products are added up in float32. `pytest tests/test_precision.py` holds the models to "
        "this table.",
        "## Errors",
        "Of the outputs against float64 on the same, rounded, weights and images: norm of the difference over "
        f"norm, root mean square over the outputs of {found.draws} models with random weights and {batch} "
        f"images of {height}x{width}. Scales of norms are random; of eight filters one has a mean of 100 times "
        "its deviation, and one a deviation of 1e-5 to 1e-4. Allowed is twice what transformers has, and a "
        "rounding.",
        errors_table(found.rows),
        "## Standardization alone",
        "transformers standardizes in the dtype that filters are stored in, bitfast in float32 always.",
        standardization_table(found.standardization),
        "## float16 on a CPU",
        convolution_text(found),
    ]
    return "\n\n".join(sections) + "\n"


def parts_table() -> str:
    """Return :data:`MODES` as a table."""
    lines = [f"| mode | {' | '.join(HEADS.values())} |", f"|---|{'---|' * len(HEADS)}"]
    lines += [
        f"| {mode.name} | {' | '.join(getattr(mode.parts, part) for part in HEADS)} |"
        for mode in MODES
    ]
    return "\n".join(lines)


def errors_table(rows: Sequence[Row]) -> str:
    """Return the errors of models, a line per model and mode."""
    lines = [
        "| model | mode | bitfast | transformers | bitfast / transformers |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        if row.ours is None or row.transformers is None:
            lines.append(f"| {row.model} | {row.mode} | {row.note} | | |")
            continue
        cells = f"{scientific(row.ours)} | {scientific(row.transformers)} | {row.ours / row.transformers:.2f}"
        lines.append(f"| {row.model} | {row.mode} | {cells} |")
    return "\n".join(lines)


def standardization_table(rows: Sequence[StandardizationRow]) -> str:
    """Return the errors of standardization, a line per kind of filter and dtype."""
    lines = ["| filters | dtype | bitfast | as transformers |", "|---|---|--:|--:|"]
    lines += [
        f"| {r.filters} | {r.dtype} | {scientific(r.ours)} | {scientific(r.transformers)} |"
        for r in rows
    ]
    return "\n".join(lines)


def convolution_text(found: Report) -> str:
    """Say what torch does with convolutions in each dtype."""
    if found.device != "CPU":
        return "Not measured: the models ran on a GPU."
    times = ", ".join(f"{c.seconds * 1e3:.1f} ms in {c.dtype}" for c in found.convolutions)
    narrow = [c.dtype for c in found.convolutions if not c.has_wide_sums]
    sums = f"sums are as narrow in {', '.join(narrow)}" if narrow else "sums are wider than float16"
    return (
        f"torch has everything that BiT needs. A 3x3 convolution of 8x256x14x14 to 256 channels takes {times}; "
        f"{sums} (4096 ones were added up). oneDNN convolves in float16 only on CPUs that have instructions "
        "for it, and torch's own loops serve elsewhere: there float16 is for checking numbers, not for speed."
    )


def scientific(error: float) -> str:
    """Return an error in two digits."""
    return f"{error:.1e}" if math.isfinite(error) else str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write what is asked for; status 1 if an error is more than is allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=DRAWS, help="models per row")
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    found = report(" ".join(["python -m bench.precision", *given]), options.draws)
    page = markdown(found)
    print(page)
    if options.output is not None:
        options.output.write_text(found.as_json(), encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(page, encoding="utf-8")
    return int(any(row.is_wrong for row in found.rows))


if __name__ == "__main__":
    sys.exit(main())
