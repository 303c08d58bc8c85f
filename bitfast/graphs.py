"""Running models as CUDA graphs, for serving: :func:`capture` and :func:`release_graphs`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bitfast.execution.forward_pass import ForwardPass


def capture(model: nn.Module, pixel_values: Tensor, **options: Any) -> Any:
    """Call a model once, and from then on execute its network as a CUDA graph for images like these.

    A graph takes the launches of some hundred kernels off the host, which is slower than the GPU at small
    batches. It is used for images of the shape, dtype, layout and device of ``pixel_values``, under the same
    autocast, for the same outputs; the model's other calls run as before. What the model returns is never
    memory of the graph. Weights and modules may be changed: the network is then recorded again, at its next
    call. Each graph keeps the memory of its feature maps. A network has at most eight; another one takes the
    place of the oldest. Within a graph that somebody else records, and in training, no graph is used.

    Args:
        model: In evaluation: one of bitfast's, or one that :func:`bitfast.accelerate` has changed, at any
            depth.
        pixel_values: Example images on a CUDA device.
        options: More arguments of the model's call.

    Returns:
        What the model returns for the images.

    Raises:
        TypeError: ``model`` is no module or ``pixel_values`` no tensor.
        ValueError: There is no network of bitfast's in the model, it is in training, or the images are
            elsewhere.
        RuntimeError: No network could be recorded; or a graph is being recorded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"capture: pixel_values must be a torch.Tensor, got {type(pixel_values).__name__}"
        )
    networks = _networks("capture", model)
    if pixel_values.device.type != "cuda":
        raise ValueError(
            f"capture: pixel_values must be on a CUDA device, got {pixel_values.device}"
        )
    if any(network.training for network in networks):
        raise ValueError(
            "capture: model must be in evaluation, it is in training; call model.eval()"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("capture: the current stream records a CUDA graph already")
    with ExitStack() as stack:
        recorded = [stack.enter_context(network.plans.recording()) for network in networks]
        with torch.no_grad():
            output = model(pixel_values, **options)
    if not any(recorded):
        raise RuntimeError(
            "capture: no network of the model runs by a plan on these images, and only plans are recorded;"
            " hooks, wrapped modules, another dtype or missing Triton kernels (see bitfast env) may be why"
        )
    return output


def release_graphs(model: nn.Module) -> None:
    """Forget the CUDA graphs of a model, and free their memory: it runs as before :func:`capture`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There is no network of bitfast's in the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"release_graphs: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    for network in _networks("release_graphs", model):
        network.plans.release_graphs()


def _networks(function: str, model: nn.Module) -> list[ForwardPass]:
    networks = [module for module in model.modules() if isinstance(module, ForwardPass)]
    if not networks:
        raise ValueError(
            f"{function}: there is no network of bitfast's in this {type(model).__name__};"
            " bitfast.accelerate(model) makes transformers' and timm's BiT one"
        )
    return networks


__all__ = ["capture", "release_graphs"]
