"""What the image processors have in common: their configuration, its files and the Hub."""

from __future__ import annotations

import copy
import inspect
import json
import os
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bitfast.checkpoints.files import CONFIG_NAME as MODEL_CONFIG_NAME
from bitfast.checkpoints.files import (
    CheckpointError,
    is_weight_file,
    locate_file,
    read_json,
    write_text_atomically,
)
from bitfast.checkpoints.hub import PushToHubMixin

OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
"""Mean of the channels of CLIP's training images, in [0, 1]."""

OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
"""Standard deviation of the channels of CLIP's training images."""

CONFIG_NAME = "preprocessor_config.json"
PROCESSOR_CONFIG_NAME = "processor_config.json"


class ImageProcessor(PushToHubMixin):
    """A processor whose parameters are attributes, can be overridden in each call, and make up its file."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def _keep_unknown(self, parameters: dict[str, Any]) -> None:
        self._processor_class = parameters.pop("processor_class", None)
        # Files name the class that wrote them; the one that is saved next is this one.
        for name in ("image_processor_type", "feature_extractor_type"):
            parameters.pop(name, None)
        for name, value in parameters.items():
            if callable(getattr(type(self), name, None)):
                raise ValueError(
                    f"{type(self).__name__}: {name} is a method and cannot be a parameter, got {value!r}"
                )
            setattr(self, name, value)

    @classmethod
    def _parameter_names(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return every attribute, and the class's name under "image_processor_type"."""
        return {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}

    def to_json_string(self) -> str:
        """Return what ``preprocessor_config.json`` holds."""
        content = self.to_dict()
        processor_class = content.pop("_processor_class")
        if processor_class is not None:
            content["processor_class"] = processor_class
        return json.dumps(content, indent=2, sort_keys=True, default=_to_json) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json_string` to a file; on any failure the file keeps its content."""
        write_text_atomically(json_file_path, self.to_json_string())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor from its configuration.

        Args:
            image_processor_dict: As :meth:`to_dict` returns it or a file holds it.
            **kwargs: Replace parameters and attributes of the configuration; others are ignored.
                ``return_unused_kwargs=True`` returns (processor, the ignored ones).
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        parameters = cls._parameter_names() | set(image_processor_dict)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in parameters}
        processor = cls(**{**image_processor_dict, **overrides})
        return (processor, kwargs) if return_unused_kwargs else processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Make a processor from a configuration file."""
        return cls(**read_json(Path(json_file)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        **kwargs: Any,
    ) -> Any:
        """Load a processor from a local folder or the Hub.

        Args:
            pretrained_model_name_or_path: A folder with ``preprocessor_config.json`` (or, failing that,
                ``processor_config.json``, or timm's ``config.json`` with a "pretrained_cfg"), one of the
                former files, or the id of a Hub repository.
            cache_dir: Where downloads are kept.
            force_download: Download again what the cache holds already.
            local_files_only: Look into the cache only.
            token: Hub access token, or True for the stored one.
            revision: Branch, tag or commit of the Hub repository.
            subfolder: Folder inside the repository or the folder.
            **kwargs: See :meth:`from_dict`.

        Raises:
            CheckpointError: the file cannot be found or read.
            ValueError: a parameter in it is not as the class describes.
        """
        options = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        path, parameters = _load_config(pretrained_model_name_or_path, options)
        try:
            return cls.from_dict(parameters, **kwargs)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"no image processor can be made of {path}: {error}") from error

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write ``preprocessor_config.json`` into a folder, which is made if need be.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            **kwargs: For :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.

        Returns:
            The paths of the files written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / CONFIG_NAME)]


def _to_json(value: Any) -> Any:
    """Return what stands in JSON for arrays, numpy's numbers, devices and members of enumerations."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} {value!r} has no form in JSON")


def processor_type(name_or_path: str | os.PathLike[str]) -> Any:
    """Return what a checkpoint's configuration names as the class of its image processor, or None.

    Raises:
        CheckpointError: the file cannot be found or read.
    """
    _, parameters = _load_config(name_or_path, {})
    return parameters.get("image_processor_type")


def _load_config(
    name_or_path: str | os.PathLike[str], options: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Return the file that describes a checkpoint's images, and the parameters it gives."""
    if is_weight_file(name_or_path):
        raise CheckpointError(
            f"{os.fspath(name_or_path)} is a file of weights, which says nothing about images; "
            "bitfast convert makes a folder of it that does"
        )
    if os.path.isfile(name_or_path):
        return Path(name_or_path), _read_config(Path(name_or_path))
    for name in (CONFIG_NAME, PROCESSOR_CONFIG_NAME):
        path = locate_file(name_or_path, name, required=False, **options)
        if path is not None:
            return path, _read_config(path)
    path = locate_file(name_or_path, MODEL_CONFIG_NAME, required=False, **options)
    parameters = None if path is None else _timm_parameters(path)
    if path is None or parameters is None:
        locate_file(name_or_path, CONFIG_NAME, **options)  # says what is missing
        raise CheckpointError(f"{CONFIG_NAME} of {name_or_path!r} appeared while it was looked for")
    return path, parameters


def _timm_parameters(path: Path) -> dict[str, Any] | None:
    from bitfast.checkpoints import timm

    content = read_json(path)
    return timm.image_parameters(content, str(path)) if timm.is_config(content) else None


def _read_config(path: Path) -> dict[str, Any]:
    content = read_json(path)
    content = content.get("image_processor", content)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: image_processor must be a JSON object, got {type(content).__name__}"
        )
    return content
