"""``python -m bench.precision``: what computes in what in each mode of precision, and the errors of that.

Beside transformers in the same mode, on the same weights and images. The oracle is float64 on the weights and
images as the mode has rounded them, so an error is that of computing, not of storing.

What the first table says is in :class:`Mode`; ``tests/test_precision.py`` holds the models to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import timeit
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitfast
from bitfast.ops.weight_standardization import weight_standardization

from .accuracy import OURS, allowed_error, overall_error, relative_error
from .cases import name_of
from .rows import machine
from .tables import table
from .torchvision_import import import_torchvision

# ---- the modes ----------------------------------------------------------------------------------

PARTS = {
    # Means and deviations of filters, and the arithmetic; the result is rounded to that of convolution.
    "standardization": "weight standardization",
    "convolution": "convolution",  # what is multiplied; sums are float32 everywhere
    # Means and deviations, or something wider, and the norm's arithmetic; the result is rounded once.
    "statistics": "GroupNorm statistics",
    "residual": "residual addition", "pooling": "pooling", "classifier": "classifier", "output": "output",
}  # fmt: skip
"""The heads of the first table, by part of a network."""


class Mode(NamedTuple):
    """One way to compute a model: parameters and images have the dtype."""

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    has_tf32: bool = False

    @property
    def parts(self) -> dict[str, str]:
        """The dtype that each of :data:`PARTS` computes in."""
        parts = dict.fromkeys(PARTS, name_of(self.result))
        if self.has_tf32:
            parts |= {"convolution": "tf32", "classifier": "tf32"}
        return {**parts, "standardization": "float32", "statistics": "float32"}

    @property
    def result(self) -> torch.dtype:
        """The dtype of what a model returns."""
        return self.autocast or self.dtype

    @contextmanager
    def entered(self, device: str) -> Iterator[None]:
        """Within the block, models compute so; torch allows tf32 to convolutions unless it is told."""
        with ExitStack() as stack:
            if device != "cpu":
                backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
                for backend in backends:
                    stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                    backend.allow_tf32 = self.has_tf32
            if self.autocast:
                stack.enter_context(torch.autocast(device, self.autocast))
            yield

    def why_not(self, device: str) -> str:
        """Return the reason that the mode cannot run there; nothing if it can."""
        return "needs a GPU" if self.has_tf32 and device == "cpu" else ""


MODES = (
    Mode("float32", torch.float32),
    Mode("tf32", torch.float32, has_tf32=True),
    Mode("bfloat16", torch.bfloat16),
    Mode("float16", torch.float16),
    Mode("autocast bfloat16", torch.float32, torch.bfloat16),
    Mode("autocast float16", torch.float32, torch.float16),
)

# ---- the models ---------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "R50x1, preactivation": ("BitForImageClassification", {"num_labels": 1000}),
    "DPT-hybrid, bottleneck": (
        "BitBackbone",
        {
            "layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True,
            "depths": [3, 4, 9], "out_features": ["stage1", "stage2", "stage3"],
        },
    ),
}  # fmt: skip
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
    filters += 100 * filters.std((1, 2, 3), correction=0, keepdim=True)


def tiny(filters: Tensor) -> None:
    """Scale filters in place to deviations from 1e-5 to 1e-4, whose squares float16 has no numbers for."""
    wanted = 10 ** -(4 + torch.rand(filters.shape[0], 1, 1, 1, device=filters.device))
    filters *= wanted / filters.std((1, 2, 3), correction=0, keepdim=True)


def outputs_of(model: Any, images: Tensor) -> list[Tensor]:
    """Return the logits, or the feature maps, flat and in float64."""
    with torch.no_grad():
        result = model(images)
    outputs = [result.logits] if "logits" in result else result.feature_maps
    return [output.flatten().double() for output in outputs]


# ---- what is measured ---------------------------------------------------------------------------


def measured(name: str, mode: Mode, device: str, draws: int = DRAWS) -> dict[str, Any]:
    """Measure one model in one mode.

    Returns:
        The errors of "ours" and of "transformers": the root mean squares over all outputs of all draws; what
        is "allowed"; or, with None for these, a "note" that says why there are none.
    """
    ours = theirs = allowed = None
    note = mode.why_not(device)
    if not note:
        errors = torch.tensor([errors_of_a_draw(name, mode, device) for _ in range(draws)])
        ours, theirs = errors.square().double().mean(0).sqrt().tolist()
        allowed = allowed_error(name_of(mode.result), theirs, OURS, math.inf)
    errors_of = {"ours": ours, "transformers": theirs, "allowed": allowed}
    return {"model": name, "mode": mode.name, **errors_of, "note": note}


def errors_of_a_draw(name: str, mode: Mode, device: str) -> list[float]:
    """Return the errors of bitfast and of transformers on fresh weights and images."""
    models = [model.to(device, mode.dtype) for model in pair(*MODELS[name])]
    images = torch.randn(IMAGES).to(device, mode.dtype)
    with mode.entered(device):
        results = [torch.cat(outputs_of(model, images)) for model in models]
    with bitfast.use_backend("reference"):
        oracle = outputs_of(models[0].double(), images.double())
    return [overall_error([result], oracle)[0] for result in results]


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether there is an error that is not finite or more than is allowed."""
    return row["ours"] is not None and not row["ours"] <= row["allowed"]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILTERS = {
    "ordinary": lambda filters: None,
    "mean 100 times the deviation": far_from_zero,
    "deviation 1e-5 to 1e-4": tiny,
}


def standardization(kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the errors of standardizing filters of one kind, stored in a dtype, by bitfast and as
    transformers 4.56 does, in the dtype at hand."""
    filters = torch.randn(64, 64, 3, 3, device=device)
    FILTERS[kind](filters)
    filters = filters.to(dtype)
    flat = filters.reshape(1, filters.shape[0], -1)
    theirs = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8).view_as(filters)
    results = {"ours": weight_standardization(filters), "transformers": theirs}
    oracle = weight_standardization(filters.double())
    errors = {library: relative_error(result, oracle) for library, result in results.items()}
    return {"filters": kind, "dtype": name_of(dtype), **errors}


def convolution(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Time a 3x3 convolution (8x256x14x14 to 256 channels), the best of three, and see whether it counts to
    4096, beyond float16's integers."""
    x, weight = torch.randn(8, 256, 14, 14), torch.randn(256, 256, 3, 3)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    times = timeit.repeat(lambda: float(F.conv2d(x, weight, padding=1).sum()), number=1, repeat=4)
    ones = torch.ones(1, 4096, 1, 1, dtype=dtype, device=device)
    has_wide_sums = float(F.conv2d(ones, ones)) == 4096
    return {"dtype": name_of(dtype), "seconds": min(times[1:]), "has_wide_sums": has_wide_sums}


def report(command: str, draws: int = DRAWS) -> dict[str, Any]:
    """Measure everything, on the GPU if there is one; the result is ready for JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "command": command,
        "images": IMAGES,
        "draws": draws,
        "rows": [measured(name, mode, device, draws) for name in MODELS for mode in MODES],
        "standardization": [standardization(k, dtype, device) for k in FILTERS for dtype in DTYPES],
        "convolutions": [convolution(dtype, device) for dtype in DTYPES],
        "modes": {mode.name: mode.parts for mode in MODES},
    }


# ---- the page -----------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    machine, (batch, _, height, width) = found["machine"], found["images"]
    used = ", ".join(f"{n} {machine['versions'][n]}" for n in ("torch", "transformers", "triton"))
    heads, rows = ["filters", "dtype", "bitfast", "as transformers"], found["standardization"]
    cells = [
        (r["filters"], r["dtype"], scientific(r["ours"]), scientific(r["transformers"]))
        for r in rows
    ]
    sections = [
        "# Precision",
        f"Written by `{found['command']}`: {machine['cpu']} ({machine['capability']}), models on "
        f"{found['device']}, {machine['date']}, commit {machine['commit'] or 'unknown'}, {used}.",
        "## What computes in what",
        parts_table(),
        "Parameters have the dtype of the mode, under autocast float32. Standardized filters are rounded once, "
        "to the dtype of the convolution; the results of norms, sums and convolutions once, to that of the "
        "feature maps. Products are added up in float32. `pytest tests/test_precision.py` holds the models to "
        "this table.",
        "## Errors",
        "Of the outputs against float64 on the same, rounded, weights and images: norm of the difference over "
        f"norm, root mean square over the outputs of {found['draws']} models with random weights and {batch} "
        f"images of {height}x{width}. Scales of norms are random; of eight filters one has a mean of 100 times "
        "its deviation, and one a deviation of 1e-5 to 1e-4. Allowed is twice what transformers has, and a "
        "rounding.",
        errors_table(found["rows"]),
        "## Standardization alone",
        "transformers standardizes in the dtype that filters are stored in, bitfast in float32 always.",
        "\n".join(table(heads, cells, "llrr")),
        "## float16 on a CPU",
        convolution_text(found),
    ]
    return "\n\n".join(sections) + "\n"


def parts_table() -> str:
    """Return :data:`MODES` as a table."""
    rows = [(mode.name, *(mode.parts[part] for part in PARTS)) for mode in MODES]
    return "\n".join(table(["mode", *PARTS.values()], rows, "l" * (1 + len(PARTS))))


def errors_table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = []
    for row in rows:
        cells = (row["note"], "", "")
        if not row["note"]:
            ours, theirs = row["ours"], row["transformers"]
            cells = (scientific(ours), scientific(theirs), f"{ours / theirs:.2f}")
        lines.append((row["model"], row["mode"], *cells))
    heads = ["model", "mode", "bitfast", "transformers", "bitfast / transformers"]
    return "\n".join(table(heads, lines, "llrrr"))


def convolution_text(found: dict[str, Any]) -> str:
    if found["device"] != "CPU":
        return "Not measured: the models ran on a GPU."
    convolutions = found["convolutions"]
    times = ", ".join(f"{c['seconds'] * 1e3:.1f} ms in {c['dtype']}" for c in convolutions)
    narrow = ", ".join(c["dtype"] for c in convolutions if not c["has_wide_sums"])
    sums = f"sums are as narrow in {narrow}" if narrow else "sums are wider than float16"
    return (
        f"torch has everything that BiT needs. A 3x3 convolution of 8x256x14x14 to 256 channels takes {times}; "
        f"{sums} (4096 ones were added up). oneDNN convolves in float16 only on CPUs that have instructions "
        "for it, and torch's own loops serve elsewhere: there float16 is for checking numbers, not for speed."
    )


def scientific(error: float) -> str:
    return f"{error:.1e}" if math.isfinite(error) else str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the page, write what is asked for; status 1 if an error is more than is allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=DRAWS, help="models per row")
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    found = report(" ".join(["python -m bench.precision", *arguments]), options.draws)
    page = markdown(found)
    print(page)
    content = json.dumps(found, indent=1) + "\n"
    for path, text in ((options.output, content), (options.markdown, page)):
        if path is not None:
            path.write_text(text, encoding="utf-8")
    return int(any(map(is_wrong, found["rows"])))


if __name__ == "__main__":
    sys.exit(main())
