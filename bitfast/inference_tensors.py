"""Parameters that were made in inference mode.

torch counts the changes of ordinary tensors, but not of inference tensors. What was computed from such a weight
cannot be kept, since nothing would tell that the weight has changed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def make_ordinary(parameter: Tensor | None) -> None:
    """Turn a parameter that was made in inference mode into an ordinary one: the same object, the same memory.

    From then on torch counts its changes, in inference mode too, and it can be trained.
    """
    if parameter is None or not parameter.is_inference():
        return
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        plain.set_(
            parameter.untyped_storage(),
            parameter.storage_offset(),
            parameter.size(),
            parameter.stride(),
        )
        twin = nn.Parameter(plain, requires_grad=parameter.requires_grad)
    try:
        torch.utils.swap_tensors(parameter, twin)
    except RuntimeError as error:  # somebody else holds the tensor in a way that forbids it
        warnings.warn(
            "a weight made in inference mode is standardized in each pass, as torch does not count its changes;"
            f" make the model outside torch.inference_mode() to have it kept ({error})",
            stacklevel=2,
        )


__all__ = ["make_ordinary"]
