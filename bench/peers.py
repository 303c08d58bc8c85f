"""The runtimes that bitfast is compared with: which are installed, and the network as they read it."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PEERS = ("transformers", "timm", "onnxruntime", "openvino", "torchvision")
"""Distributions."""
VERSIONS = {"transformers": "==4.56.2"}
"""To ask pip for; of others any will do."""
OPSET = 18


def installed() -> dict[str, str | None]:
    """Return the version of each peer, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PEERS)
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def how_to_install(name: str) -> str:
    return f"pip install {name}{VERSIONS.get(name, '')}"


class Standardized(nn.Module):
    """A convolution of transformers whose weight has been standardized once and for all."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        flat = convolution.weight.reshape(1, convolution.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=convolution.eps)
        self.weight = nn.Parameter(weight.reshape_as(convolution.weight).clone())
        self.pad = convolution.pad or nn.Identity()
        names = ("stride", "padding", "dilation", "groups")
        self.options = {name: getattr(convolution, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.weight, **self.options)


def standardize(module: nn.Module) -> None:
    """Replace every weight-standardized convolution in the module."""
    for name, child in module.named_children():
        if type(child).__name__ == "WeightStandardizedConv2d":
            setattr(module, name, Standardized(child))
        else:
            standardize(child)


class Outputs(nn.Module):
    """A model of transformers that returns its tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.model(x)
        return (result.logits,) if "logits" in result else tuple(result.feature_maps)


@torch.no_grad()
def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a model of transformers as ONNX, in the form that serves the other runtimes best.

    The weights have been standardized, which those runtimes would do when they load it. The older of
    torch's exporters is used: of its form of GroupNorm both ONNX Runtime and OpenVINO are faster (at R50x1,
    batch 1, by 8 and 5 percent, OpenVINO in bfloat16 by 18) and ONNX Runtime more accurate.
    """
    model = copy.deepcopy(model)
    standardize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older one, and that sizes become constants
        options: dict[str, Any] = {
            "dynamo": False,
            "opset_version": OPSET,
            "do_constant_folding": True,
        }
        torch.onnx.export(Outputs(model).eval(), (x,), str(path), **options)
