"""The cases that are about whole models, and who takes part in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import peers
from .torchvision_import import import_torchvision
from .workers import Work


class Contestant(NamedTuple):
    """Who computes, in which dtype and form; see ``Work``."""

    name: str
    package: str
    dtype: str = "float32"
    form: str = "eager"

    @property
    def is_ours(self) -> bool:
        """Whether bitfast computes, be it in somebody else's model."""
        return self.package == "bitfast" or self.form == "accelerated"


BASELINE = Contestant("transformers", "transformers")
"""Every ratio is to its time, whatever the dtype."""
YARDSTICKS = {
    "float32": BASELINE,
    "bfloat16": Contestant("transformers bfloat16", "transformers", "bfloat16"),
}
"""Whose error the others' are measured by."""

EVERYBODY = (
    BASELINE,
    Contestant("transformers compiled", "transformers", "float32", "compiled"),
    Contestant("ONNX Runtime", "onnxruntime"),
    Contestant("OpenVINO", "openvino"),
    Contestant("bitfast", "bitfast"),
    Contestant("bitfast compiled", "bitfast", "float32", "compiled"),
    YARDSTICKS["bfloat16"],
    Contestant("transformers bfloat16 compiled", "transformers", "bfloat16", "compiled"),
    Contestant("OpenVINO bfloat16", "openvino", "bfloat16"),
    Contestant("bitfast bfloat16", "bitfast", "bfloat16"),
    Contestant("bitfast bfloat16 compiled", "bitfast", "bfloat16", "compiled"),
    Contestant("bitfast autocast", "bitfast", "bfloat16", "autocast"),
)
"""By dtype, each beginning with its yardstick. ONNX Runtime has no bfloat16 on the CPU."""
EAGER = tuple(contestant for contestant in EVERYBODY if contestant.form != "compiled")
IN_PLACE = (
    BASELINE,
    Contestant("timm", "timm"),
    Contestant("bitfast", "bitfast"),
    Contestant("bitfast in transformers", "transformers", "float32", "accelerated"),
    Contestant("bitfast in timm", "timm", "float32", "accelerated"),
    YARDSTICKS["bfloat16"],
    Contestant("timm bfloat16", "timm", "bfloat16"),
    Contestant("bitfast bfloat16", "bitfast", "bfloat16"),
    Contestant("bitfast in transformers bfloat16", "transformers", "bfloat16", "accelerated"),
    Contestant("bitfast in timm bfloat16", "timm", "bfloat16", "accelerated"),
)
"""What ``bitfast.accelerate`` makes of a model, beside bitfast's own."""
IN_TRANSFORMERS = tuple(c for c in IN_PLACE if c.package == "transformers" and c.dtype == "float32")
"""In bfloat16 a DPT of random weights magnifies roundings to a tenth of the result, whoever computes it."""
TRAINING = (BASELINE, Contestant("bitfast", "bitfast"))


@dataclass(frozen=True)
class ModelCase:
    """One network on one input, in evaluation or in training.

    Attributes:
        name: Network and shape, for people.
        settings: What differs from the default configuration.
        shape: Of the images, (N, 3, height, width).
        threads: Of the CPU.
        contestants: Who takes part.
        architecture: The class of the model.
        is_training: Forward and backward pass instead of the forward pass alone.
        is_quick: Whether it is part of ``--quick``.
    """

    name: str
    settings: dict[str, Any] = field(hash=False)
    shape: tuple[int, int, int, int]
    threads: int
    contestants: Sequence[Contestant]
    architecture: str = "BitForImageClassification"
    is_training: bool = False
    is_quick: bool = False

    def quick(self) -> ModelCase:
        """Return the case without what must be compiled."""
        eager = [c for c in self.contestants if c.form != "compiled"]
        return dataclasses.replace(self, contestants=eager)

    @property
    def op(self) -> str:
        """The word that groups the cases."""
        return "training" if self.is_training else "inference"

    @property
    def title(self) -> str:
        """The case in one line."""
        return f"{self.op}: {self.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


R50X1: dict[str, Any] = {"num_labels": 1000}
R101X1: dict[str, Any] = {"num_labels": 1000, "depths": [3, 4, 23, 3]}
HYBRID: dict[str, Any] = {
    "layer_type": "bottleneck",
    "global_padding": "same",
    "embedding_dynamic_padding": True,
    "depths": [3, 4, 9],
    "hidden_sizes": [256, 512, 1024, 2048],
    "out_features": ["stage1", "stage2", "stage3"],
}
"""The backbone of DPT-hybrid."""


def cases(thread_counts: Sequence[int]) -> Iterator[ModelCase]:
    """Yield every case, for each thread count."""
    for threads in thread_counts:
        for batch in (1, 8):
            yield ModelCase(
                f"R50x1 224x224 batch {batch}",
                R50X1,
                (batch, 3, 224, 224),
                threads,
                EVERYBODY,
                is_quick=batch == 1,
            )
        yield ModelCase("R101x1 448x448 batch 1", R101X1, (1, 3, 448, 448), threads, EAGER)
        yield ModelCase(
            'R50x1 480x640 batch 1, "same" padding',
            {**R50X1, "global_padding": "same"},
            (1, 3, 480, 640),
            threads,
            EAGER,
        )
        yield ModelCase(
            "DPT-hybrid backbone 384x384 batch 1",
            HYBRID,
            (1, 3, 384, 384),
            threads,
            EAGER,
            "BitBackbone",
        )
        yield ModelCase(
            "R50x1 224x224 batch 8", R50X1, (8, 3, 224, 224), threads, TRAINING, is_training=True
        )
        for batch in (1, 8):
            yield ModelCase(
                f"in place, R50x1 224x224 batch {batch}",
                R50X1,
                (batch, 3, 224, 224),
                threads,
                IN_PLACE,
            )
        yield ModelCase(
            "in place, DPT-hybrid 384x384 batch 1",
            HYBRID,
            (1, 3, 384, 384),
            threads,
            IN_TRANSFORMERS,
            "DPTForDepthEstimation",
        )


# ---- what a case's contestants are given --------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A case's files, and what is to come out.

    Attributes:
        case: The case.
        folder: Of the files.
        oracle: The results in float64, flat: logits, feature maps, or the gradient of each parameter.
        flops: Of the convolutions and matrix products; a multiplication and an addition are two.
        onnx_problem: Why there is no ONNX file, or None.
    """

    case: ModelCase
    folder: Path
    oracle: list[Tensor]
    flops: int
    onnx_problem: str | None

    def work(self, contestant: Contestant, output: Path) -> Work:
        """Return what a contestant is to do."""
        return {
            "package": contestant.package,
            "dtype": contestant.dtype,
            "form": contestant.form,
            "architecture": self.case.architecture,
            "threads": self.case.threads,
            "is_training": self.case.is_training,
            "folder": str(self.folder / "checkpoint"),
            "onnx": str(self.folder / "model.onnx"),
            "input": str(self.folder / "input.npy"),
            "grad": str(self.folder / "grad.npy"),
            "output": str(output),
        }


def prepare(case: ModelCase, folder: Path) -> Prepared:
    """Draw a case's weights and images, write them, and compute the results in float64.

    Raises:
        ImportError: transformers is not installed.
    """
    import_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.BitConfig(**case.settings)
    if case.architecture == "DPTForDepthEstimation":
        config = transformers.DPTConfig(
            is_hybrid=True,
            backbone_config=config,
            backbone_featmap_shape=[1, 1024, 24, 24],
            readout_type="project",
            neck_hidden_sizes=[256, 512, 768, 768],
            neck_ignore_stages=[0, 1],
            backbone_out_indices=[2, 5, 8, 11],
        )
    model = getattr(transformers, case.architecture)(config).eval()
    randomize(model)
    model.save_pretrained(folder / "checkpoint")
    x = torch.randn(case.shape)
    np.save(folder / "input.npy", x.numpy())
    onnx_problem = None
    if any(c.package in ("onnxruntime", "openvino") for c in case.contestants):
        try:
            peers.export(model, x, folder / "model.onnx")
        except Exception as error:  # the others still run
            onnx_problem = f"no ONNX file: {type(error).__name__}: {error}"
    counter = FlopCounterMode(display=False)
    model.double()
    with counter, torch.set_grad_enabled(case.is_training):
        results = outputs_of(model(x.double()))
        if case.is_training:
            (output,) = results
            grad = torch.randn(output.shape)
            np.save(folder / "grad.npy", grad.numpy())
            output.backward(grad.double())
            results = [p.grad for p in model.parameters() if p.grad is not None]
    oracle = [result.detach().flatten() for result in results]
    return Prepared(case, folder, oracle, counter.get_total_flops(), onnx_problem)


def randomize(model: nn.Module) -> None:
    """Draw the norms' weights and biases, which begin as ones and zeros: what leaves them out shows.

    A norm that ends a block's branch gets small weights, as in trained networks: with large ones the
    roundings of bfloat16 grow to a third of the result, and no error could be told from them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            ends_branch = name.endswith("norm3") and isinstance(module.activation, nn.Identity)
            nn.init.uniform_(module.weight, *((0.1, 0.3) if ends_branch else (0.5, 1.5)))
            nn.init.normal_(module.bias, std=0.1)


def outputs_of(result: Any) -> list[Tensor]:
    """Return the logits of a classifier, a depth, or the feature maps of a backbone."""
    for name in ("logits", "predicted_depth"):
        if name in result:
            return [result[name]]
    return list(result.feature_maps)
