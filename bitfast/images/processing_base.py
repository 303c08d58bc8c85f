"""What the image processors have in common: their configuration, its files and the Hub."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bitfast.checkpoints.files import CONFIG_NAME as MODEL_CONFIG_NAME
from bitfast.checkpoints.files import (
    WHERE,
    CheckpointError,
    is_weight_file,
    locate_file,
    read_json,
    write_text_atomically,
)
from bitfast.checkpoints.hub import PushToHubMixin
from bitfast.images.batch_feature import BatchFeature
from bitfast.images.inputs import is_image, raise_named
from bitfast.images.sources import load_image

OPENAI_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
"""Mean of the channels of CLIP's training images, in [0, 1]."""

OPENAI_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
"""Standard deviation of the channels of CLIP's training images."""

CONFIG_NAME = "preprocessor_config.json"
PROCESSOR_CONFIG_NAME = "processor_config.json"


class ImageProcessor(PushToHubMixin):
    """An image processor: its parameters are attributes, can be overridden in each call, and are saved."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    _auto_class: ClassVar[str | None] = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()  # a subclass may have another library's processor as its second base
        self._processor_class = kwargs.pop("processor_class", None)
        # Files name the class that wrote them; the one that is saved next is this one.
        for name in ("image_processor_type", "feature_extractor_type"):
            kwargs.pop(name, None)
        for name, value in kwargs.items():
            if callable(getattr(type(self), name, None)):
                raise ValueError(
                    f"{type(self).__name__}: {name} is a method and cannot be a parameter, got {value!r}"
                )
            setattr(self, name, value)

    def _set_processor_class(self, processor_class: str) -> None:
        # Called by transformers' processors of several modalities, whose part this one can be.
        self._processor_class = processor_class

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Call :meth:`preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess one image or a batch of images; defined by subclasses."""
        raise NotImplementedError(f"{type(self).__name__} does not say how images are preprocessed")

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load the images that paths, addresses and base64 texts stand for.

        Args:
            image_url_or_urls: The path of a file, an http:// or https:// address, an image in base64, an
                image, which stays as it is, or a list of any of these, or of such lists.

        Returns:
            A PIL image in mode "RGB", turned as its EXIF data say, for what has been read; lists for lists.

        Raises:
            OSError: an address cannot be fetched, or what is there is no image that Pillow decodes.
            TypeError: something else than text and images.
            ValueError: text that is no path, address or base64.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            images: list[Any] = []
            try:
                for image in image_url_or_urls:
                    images.append(self.fetch_images(image))
            except Exception as error:
                raise_named(len(images), error)
            return images
        if is_image(image_url_or_urls):
            return image_url_or_urls
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_image(image_url_or_urls)
        raise TypeError(
            "image must be a path, an address, a PIL.Image.Image, numpy.ndarray or torch.Tensor, "
            f"got {type(image_url_or_urls).__name__}"
        )

    @classmethod
    def _parameter_names(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return every attribute, and the class's name under "image_processor_type"."""
        return {**copy.deepcopy(self.__dict__), "image_processor_type": type(self).__name__}

    def to_json_string(self) -> str:
        """Return the content of ``preprocessor_config.json``."""
        content = self.to_dict()
        processor_class = content.pop("_processor_class", None)
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
        where = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        name = pretrained_model_name_or_path
        parameters, kwargs = cls.get_image_processor_dict(name, **where, **kwargs)
        try:
            return cls.from_dict(parameters, **kwargs)
        except (TypeError, ValueError) as error:
            path, _ = _load_config(name, where)
            raise CheckpointError(f"no image processor can be made of {path}: {error}") from error

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the image parameters of a checkpoint, for :meth:`from_dict`, and the unused arguments.

        Args:
            pretrained_model_name_or_path: See :meth:`from_pretrained`.
            **kwargs: The arguments of :meth:`from_pretrained` that say where to look, and
                ``image_processor_filename``, by default "preprocessor_config.json". Others are returned.

        Raises:
            CheckpointError: the file cannot be found or read.
        """
        where = {name: kwargs.pop(name) for name in WHERE if name in kwargs}
        filename = kwargs.pop("image_processor_filename", CONFIG_NAME)
        for name in ("resume_download", "proxies", "_from_pipeline", "_from_auto"):
            kwargs.pop(
                name, None
            )  # as huggingface_hub's environment variables have it, or for statistics
        _, parameters = _load_config(pretrained_model_name_or_path, where, filename)
        return parameters, kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoImageProcessor") -> None:
        """Let :meth:`save_pretrained` save the module of this class, for ``trust_remote_code=True``.

        It needs transformers, as does loading what is saved so. For a class of one's own: those of this
        library are known to it.

        Args:
            auto_class: The auto class that is to load it, or its name.

        Raises:
            ValueError: transformers has no such auto class.
        """
        import transformers.models.auto as auto_classes

        name = auto_class if isinstance(auto_class, str) else auto_class.__name__
        if not hasattr(auto_classes, name):
            raise ValueError(f"auto_class must be an auto class of transformers, got {name!r}")
        cls._auto_class = name

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write ``preprocessor_config.json`` into a folder, which is made if need be.

        Beside it goes the module of a class that has been :meth:`registered <register_for_auto_class>`.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            **kwargs: For :meth:`push_to_hub`; ``repo_id`` is the folder's name by default.

        Returns:
            The paths of the files written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self._auto_class is not None:
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(self, folder, config=self)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / CONFIG_NAME)]


def replaced(processor: Any, methods: Mapping[str, Any]) -> bool:
    """Whether a subclass, or an attribute of the object, replaces one of these methods.

    Args:
        processor: The object.
        methods: As they are defined, by name.
    """
    own, class_ = vars(processor), type(processor)
    # Not by any(), which takes twice as long: it is asked for each image.
    return not own.keys().isdisjoint(methods) or [
        getattr(class_, name) for name in methods
    ] != list(methods.values())


def _to_json(value: Any) -> Any:
    """Return the JSON form of arrays, numpy's numbers, devices and members of enumerations."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} {value!r} has no form in JSON")


def processor_type(name_or_path: str | os.PathLike[str]) -> Any:
    """Return the class of a checkpoint's image processor, as its configuration names it, or None.

    Raises:
        CheckpointError: the file cannot be found or read.
    """
    _, parameters = _load_config(name_or_path, {})
    return parameters.get("image_processor_type")


def _load_config(
    name_or_path: str | os.PathLike[str], options: dict[str, Any], filename: str = CONFIG_NAME
) -> tuple[Path, dict[str, Any]]:
    """Return the file that describes a checkpoint's images, and the parameters it gives."""
    if is_weight_file(name_or_path):
        raise CheckpointError(
            f"{os.fspath(name_or_path)} is a file of weights, which says nothing about images; "
            "bitfast convert makes a folder of it that does"
        )
    if os.path.isfile(name_or_path):
        return Path(name_or_path), _read_config(Path(name_or_path))
    for name in (filename, PROCESSOR_CONFIG_NAME):
        path = locate_file(name_or_path, name, required=False, **options)
        if path is not None:
            return path, _read_config(path)
    path = locate_file(name_or_path, MODEL_CONFIG_NAME, required=False, **options)
    parameters = None if path is None else _timm_parameters(path)
    if path is None or parameters is None:
        locate_file(name_or_path, filename, **options)  # raises an error that names what is missing
        raise CheckpointError(f"{filename} of {name_or_path!r} appeared while it was looked for")
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
