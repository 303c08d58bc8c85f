"""The state of an unfinished run, in one file that is replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitfast.checkpoints.files import CheckpointError, replace_files
from bitfast.checkpoints.weights import write_safetensors

CHECKPOINT_NAME = "checkpoint.safetensors"
FORMAT = "1"
MODEL, MOMENTUM = "model.", "momentum."
"""What the names of the tensors begin with; the rest is the parameter's name."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps that are done.
        metrics_size: Bytes of ``metrics.jsonl`` that tell of them.
        settings: What the run does, and with which data: it must be the same when the run goes on.
    """

    step: int
    metrics_size: int
    settings: dict[str, Any]


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the state of a run; on any failure the checkpoint before stays.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, buffer in _momenta(model, optimizer):
        tensors[MOMENTUM + name] = buffer
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "step": str(progress.step),
        "metrics_size": str(progress.metrics_size),
        "settings": json.dumps(progress.settings, sort_keys=True),
    }
    replace_files(
        folder, {CHECKPOINT_NAME: lambda path: write_safetensors(tensors, path, metadata)}
    )


def read_progress(folder: Path) -> Progress | None:
    """Return how far the run has come whose checkpoint a folder holds; None if it holds none.

    Raises:
        CheckpointError: the file is not a checkpoint of this version.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']}, not {FORMAT}")
        return Progress(
            int(metadata["step"]), int(metadata["metrics_size"]), json.loads(metadata["settings"])
        )
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of bitfast finetune: {error}") from error


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of a run into a model and its optimizer, which are as at the beginning of the run.

    Raises:
        CheckpointError: the file does not hold the tensors of this model.
    """
    path = folder / CHECKPOINT_NAME
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            names = set(file.keys())
            for name, tensor in model.state_dict().items():
                tensor.copy_(file.get_tensor(MODEL + name))
            for name, parameter in model.named_parameters():
                if MOMENTUM + name in names:
                    buffer = torch.empty_like(parameter, memory_format=torch.preserve_format)
                    buffer.copy_(file.get_tensor(MOMENTUM + name))
                    optimizer.state[parameter]["momentum_buffer"] = buffer
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold the state of this network: {error}") from error


def _momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            yield name, buffer
