"""Weights: safetensors and PyTorch files, whole or in shards, to and from state dictionaries.

Nothing in a file is ever executed: PyTorch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitfast.checkpoints.files import (
    CheckpointError,
    locate_file,
    read_json,
    resolve_relative,
    text_writer,
)

logger = logging.getLogger("bitfast")

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class WeightFormat(NamedTuple):
    """The file names of one kind of weight file."""

    stem: str
    extension: str

    def file_name(self, variant: str | None = None, shard: str = "") -> str:
        """Return the name of the only file, or of one shard."""
        return f"{self.stem}{_dotted(variant)}{shard}{self.extension}"

    def index_name(self, variant: str | None = None) -> str:
        """Return the name of the file that says which shard holds which tensor."""
        return f"{self.stem}{self.extension}.index{_dotted(variant)}.json"


SAFETENSORS = WeightFormat("model", ".safetensors")
PYTORCH = WeightFormat("pytorch_model", ".bin")


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def read_weights(
    name_or_path: str,
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **where: Any,
) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint into CPU memory.

    Args:
        name_or_path: A local folder or the id of a Hub repository.
        use_safetensors: True: only safetensors; False: only PyTorch files; None: safetensors if there
            are any.
        variant: Read ``model.VARIANT.safetensors`` and so on.
        **where: Passed to :func:`bitfast.checkpoints.files.locate_file`.

    Raises:
        CheckpointError: there are no weights, or a file is broken or not to be trusted.
    """
    formats = {None: (SAFETENSORS, PYTORCH), True: (SAFETENSORS,), False: (PYTORCH,)}
    if use_safetensors not in formats:
        raise ValueError(f"use_safetensors must be True, False or None, got {use_safetensors!r}")
    tried = []
    for weight_format in formats[use_safetensors]:
        name = weight_format.file_name(variant)
        path = locate_file(name_or_path, name, required=False, **where)
        if path is not None:
            return read_file(path)
        index_name = weight_format.index_name(variant)
        index = locate_file(name_or_path, index_name, required=False, **where)
        if index is not None:
            return _read_shards(name_or_path, index, weight_format, where)
        tried += [name, index_name]
    try:
        # Says why: no such file, or no connection to the Hub.
        locate_file(name_or_path, tried[0], **where)
    except CheckpointError as error:
        raise CheckpointError(
            f"found no weights for {name_or_path!r}: none of {', '.join(tried)} ({error})"
        ) from error
    raise CheckpointError(f"{tried[0]} of {name_or_path!r} appeared while its weights were read")


def _read_shards(
    name_or_path: str, index: Path, weight_format: WeightFormat, where: Mapping[str, Any]
) -> dict[str, Tensor]:
    weight_map = _read_weight_map(index, weight_format)
    shards = {
        name: _locate_shard(name_or_path, index, name, where)
        for name in dict.fromkeys(weight_map.values())
    }
    tensors: dict[str, Tensor] = {}
    for name, path in shards.items():
        content = read_file(path)
        for key in [key for key, shard in weight_map.items() if shard == name]:
            if key not in content:
                raise CheckpointError(
                    f"{path} lacks the tensor {key!r}, which {index} says it holds"
                )
            tensors[key] = content[key]
    return tensors


def _read_weight_map(index: Path, weight_format: WeightFormat) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to files')
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(weight_format.extension):
            raise CheckpointError(
                f"{index} maps {key!r} to {name!r}, which is not a {weight_format.extension} file"
            )
    return weight_map


def _locate_shard(name_or_path: str, index: Path, shard: str, where: Mapping[str, Any]) -> Path:
    # Checked before the name goes into a Hub address; where the file really lies, once it is here.
    resolve_relative(index.parent, shard, follow_links=False)
    try:
        path = locate_file(name_or_path, shard, **where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{index} names the shard {shard!r}, which is missing: {error}"
        ) from error
    assert path is not None
    if Path(name_or_path).is_dir():
        return resolve_relative(index.parent, shard)
    return path


def read_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one safetensors or PyTorch file.

    Raises:
        CheckpointError: the file is broken, or holds anything but tensors.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            made_for = (file.metadata() or {}).get("format", "pt")
            if made_for not in ("pt", "mlx"):
                raise CheckpointError(f"{path} holds weights for {made_for!r}, not for PyTorch")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler meets whatever the file holds; it fails with almost any type of exception.
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a PyTorch file of plain tensors, and nothing else is loaded: "
            f"{_why_not_loaded(error)}"
        ) from None  # torch's own text advises to load the file regardless
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path} has the key {key!r}, which is no tensor name")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path} has {key!r}, which is not a plain tensor")
    return _own_storages(content)


def _why_not_loaded(error: Exception) -> str:
    """Return why torch refused a file, without its advice on how to run what is in it."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code"
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it holds Python objects ({refused[1]}), which may run code when they are loaded"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return "it is broken, or holds Python objects, which may run code when they are loaded"
    return text.strip().split("\n")[0] or type(error).__name__


def _own_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy every tensor that is a view of larger memory, or of another tensor's."""
    owned = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        address = storage.data_ptr()
        owned[key] = tensor.detach() if whole and address not in seen else tensor.detach().clone()
        seen.add(address)
    return owned


def weight_writers(
    state_dict: Mapping[str, Tensor],
    *,
    safe_serialization: bool = True,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> dict[str, Callable[[Path], None]]:
    """Return the files of a checkpoint, each with the function that writes it to a path.

    Args:
        state_dict: The tensors, on any device, in any memory layout.
        safe_serialization: True: safetensors; False: PyTorch's own format.
        max_shard_size: Largest size of a file, in bytes or like "500MB". A single tensor above it gets
            a file of its own.
        variant: Write ``model.VARIANT.safetensors`` and so on.

    Raises:
        TypeError: an entry is not a tensor.
        ValueError: ``max_shard_size`` or ``variant`` is not understood, or a tensor has no data.
    """
    _require_tensors(state_dict)
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant must consist of letters, digits, - and _, got {variant!r}")
    weight_format = SAFETENSORS if safe_serialization else PYTORCH
    shards = list(_split(state_dict, parse_size(max_shard_size)))
    if len(shards) == 1:
        return {weight_format.file_name(variant): _tensor_writer(shards[0], safe_serialization)}
    writers = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = weight_format.file_name(variant, f"-{number:05d}-of-{len(shards):05d}")
        writers[name] = _tensor_writer(shard, safe_serialization)
        weight_map.update(dict.fromkeys(shard, name))
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in state_dict.values()),
        "total_size": sum(map(_nbytes, state_dict.values())),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    writers[weight_format.index_name(variant)] = text_writer(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )
    return writers


def stale_weights(folder: Path, new_names: set[str], variant: str | None = None) -> list[str]:
    """Return the weight files of an earlier save that files named ``new_names`` replace.

    Files of the other format are left alone, as transformers does: a folder may hold both.
    """
    stale = []
    for weight_format in (SAFETENSORS, PYTORCH):
        if not any(name.endswith(weight_format.extension) for name in new_names):
            continue
        shard_name = re.escape(weight_format.stem + _dotted(variant)) + r"-\d{5}-of-\d{5}"
        pattern = re.compile(shard_name + re.escape(weight_format.extension))
        whole = {weight_format.file_name(variant), weight_format.index_name(variant)}
        stale += [
            path.name
            for path in sorted(folder.iterdir())
            if (path.name in whole or pattern.fullmatch(path.name)) and path.name not in new_names
        ]
    return stale


def warn_if_shadowed(folder: Path, safe_serialization: bool, variant: str | None) -> None:
    """Warn if older safetensors in the folder will be preferred to the files just written."""
    if safe_serialization:
        return
    for name in (SAFETENSORS.file_name(variant), SAFETENSORS.index_name(variant)):
        if (folder / name).exists():
            logger.warning(
                "%s holds %s from an earlier save, which from_pretrained prefers to the PyTorch "
                "files just written; remove it, or load with use_safetensors=False",
                folder,
                name,
            )


def _require_tensors(state_dict: Mapping[str, Tensor]) -> None:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"state_dict[{key!r}] is on the meta device and has no data to save")


def _split(state_dict: Mapping[str, Tensor], max_size: int) -> Iterator[dict[str, Tensor]]:
    """Fill shards in the order of the tensors; without tensors there is one empty shard."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in state_dict.items():
        if shard and size + _nbytes(tensor) > max_size:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += _nbytes(tensor)
    yield shard


def _tensor_writer(
    tensors: Mapping[str, Tensor], safe_serialization: bool
) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        # Copied to the CPU, contiguous and apart from each other here, one shard at a time.
        plain = _own_storages({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        if safe_serialization:
            write_safetensors(plain, path, {"format": "pt"})
        else:
            torch.save(plain, path)

    return write


def write_safetensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors of the CPU, none of which share memory, into a file.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # which is no OSError
        raise OSError(f"cannot write {path}: {error}") from error


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as a number or like "500MB" (a million bytes each).

    Raises:
        ValueError: it is not understood, or not positive.
    """
    value: float = 0
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size, flags=re.IGNORECASE)
        if match is not None:
            value = float(match[1]) * SIZE_UNITS[match[2].upper()]
    elif isinstance(size, int) and not isinstance(size, bool):
        value = size
    if value < 1:
        raise ValueError(f'max_shard_size must be a number of bytes or like "500MB", got {size!r}')
    return int(value)
