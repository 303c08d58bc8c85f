"""What a pass depends on besides the network: the images' metadata, and the global state of torch and bitfast.

For a whole network that state is read only here, once a pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitfast.backends import KernelKey, enabled_kernels, requested_backends, select_backend
from bitfast.ops.common import autocast_dtype
from bitfast.ops.packed_convolution import uses_packed_weights
from bitfast.torch_state import is_concrete, is_dispatch_watched
from bitfast.watching import is_every_module_watched


class Setting(NamedTuple):
    """What a plan is made for.

    Attributes:
        device, dtype, shape, strides: Those of the images.
        autocast: The dtype that autocast asks for, or None.
        demands: The backends that :func:`~bitfast.use_backend` demands, by op.
        enabled: The kernels that :func:`~bitfast.backends.enable_kernel` has enabled.
        switches: torch's switches: whether oneDNN is on, or for cuDNN: on, benchmark, deterministic, TF32.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    autocast: torch.dtype | None
    demands: tuple[tuple[str, str], ...]
    enabled: frozenset[KernelKey]
    switches: tuple[bool, ...]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of all feature maps."""
        return self.autocast or self.dtype


def planned_setting(images: Tensor) -> Setting | None:
    """Return the setting of a pass over these images; None if it must not be planned.

    Passes are not planned where gradients are recorded, or where somebody must see each operator: a tracer, a
    transform, a compiler, a mode, a subclass of tensors.
    """
    if (
        torch.is_grad_enabled()
        or type(images) is not Tensor
        or torch.compiler.is_compiling()
        or not is_concrete(images)
        or is_dispatch_watched()
        or is_every_module_watched()
    ):
        return None
    device = images.device
    switches = _cudnn_switches() if device.type == "cuda" else (torch._C._get_mkldnn_enabled(),)
    return Setting(
        device,
        images.dtype,
        images.shape,
        images.stride(),
        autocast_dtype(images),
        tuple(requested_backends().items()),
        enabled_kernels(),
        switches,
    )


def _cudnn_switches() -> tuple[bool, ...]:
    return (
        torch._C._get_cudnn_enabled(),
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic() or torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_allow_tf32(),
    )


def prefers_channels_last(x: Tensor) -> bool:
    """Whether a network should compute such images in channels_last, whatever their own layout.

    It should where norms are kernels of a GPU, and on the CPU where norms are C++ kernels and convolutions
    oneDNN's: these are fastest in channels_last.
    """
    if not is_concrete(x) or x.dim() != 4:
        return False
    backend = select_backend("group_norm_act", x.device.type, x.dtype)
    if backend != "native":
        return backend == "triton"
    return x.device.type == "cuda" or uses_packed_weights(
        x.device.type, autocast_dtype(x) or x.dtype
    )


__all__ = ["Setting", "planned_setting", "prefers_channels_last"]
