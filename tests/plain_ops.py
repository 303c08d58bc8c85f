"""What transformers runs for the ops, in plain PyTorch; in float64 they are the oracles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfast.activations import ACTIVATIONS


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str) -> Tensor:
    """GroupNorm, then the activation, in the dtype of x."""
    # NCHW: torch's own channels_last kernel cancels where the mean is large.
    # Not F.group_norm, which refuses to normalize a single pixel; both call this.
    normalized = torch.group_norm(
        x.contiguous(), groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5
    )
    return ACTIVATIONS[activation](normalized)


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str) -> Tensor:
    return plain_norm(x.double(), weight.double(), bias.double(), groups, activation)


def plain_standardization(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """batch_norm over the filters, in the dtype of the weight."""
    flat = weight.reshape(1, weight.shape[0], -1)
    result = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=eps)
    return result.reshape(weight.shape)


def exact_standardization(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """The definition, written out in float64."""
    flat = weight.double().flatten(1)
    centered = flat - flat.mean(1, keepdim=True)
    return (centered / (centered.square().mean(1, keepdim=True) + eps).sqrt()).view(weight.shape)


def channel_moments(x: Tensor) -> Tensor:
    """The mean and the variance of each image's channels, of shape (2, N, C), in float64."""
    exact = x.double()
    mean = exact.mean((2, 3), keepdim=True)
    return torch.stack([mean[..., 0, 0], (exact - mean).square().mean((2, 3))])
