"""BitConfig: the description of a BiT network, and its JSON file."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitfast.checkpoints.files import (
    CONFIG_NAME,
    WHERE,
    CheckpointError,
    is_weight_file,
    locate_file,
    read_json,
    write_text_atomically,
)
from bitfast.checkpoints.hub import PushToHubMixin
from bitfast.configuration_values import (
    CHECKS,
    align_output_stages,
    dtype_name,
    integer_from,
    parse_dtype,
)

logger = logging.getLogger("bitfast")

# What transformers' files leave out when it has this value.
COMMON_DEFAULTS: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
    "architectures": None,
    "finetuning_task": None,
    "problem_type": None,
    "task_specific_params": None,
    "dtype": None,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "transformers_version": None,
}


class BitConfig(PushToHubMixin):
    """Everything that defines a BiT network, with the names, defaults and files of transformers.

    Values are checked whenever they are set. Keys that BiT does not know are kept as attributes and
    written to the file again.

    Args:
        num_channels: Channels of the images.
        embedding_size: Channels of the stem.
        hidden_sizes: Channels of each stage. If it is longer than ``depths`` the rest is unused.
        depths: Blocks of each stage.
        layer_type: "preactivation" (ResNet-v2) or "bottleneck" (norm after each convolution).
        hidden_act: "relu", "gelu", "gelu_new" or "selu".
        global_padding: None, "same" or "valid", for all convolutions.
        num_groups: Groups of every GroupNorm.
        drop_path_rate: Stochastic depth of the last block; it rises evenly from 0. In [0, 1).
        embedding_dynamic_padding: Pad the stem's max-pooling by the size of its input.
        output_stride: Once the stages have reached this stride, they keep their resolution.
        width_factor: Multiplies the channels of the stages.
        out_features: For a backbone, the stages to return, of ``stage_names`` and in their order.
        out_indices: These stages as positions in ``stage_names``; negative ones count from the end.
        **kwargs: The settings common to all models (``num_labels`` or ``id2label``, ``label2id``,
            ``problem_type``, ``return_dict``, ``output_hidden_states``, ``dtype``, ...) and keys to keep.

    Raises:
        ValueError: a value cannot work; the message names it and what is allowed.
    """

    model_type = "bit"
    _commit_hash: str | None = None
    """Of a download; transformers' pipelines ask for it."""

    sub_configs: ClassVar[dict[str, Any]] = {}
    """Configurations inside this one; transformers' auto classes ask for them."""

    has_no_defaults_at_init = False
    """Whether ``BitConfig()`` is impossible; transformers asks for it."""

    return_dict: bool
    output_hidden_states: bool
    torchscript: bool
    architectures: list[str] | None
    problem_type: str | None
    dtype: torch.dtype | None
    id2label: dict[int, Any]
    label2id: dict[Any, Any] | None

    def __init__(
        self,
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "preactivation",
        hidden_act: str = "relu",
        global_padding: str | None = None,
        num_groups: int = 32,
        drop_path_rate: float = 0.0,
        embedding_dynamic_padding: bool = False,
        output_stride: int = 32,
        width_factor: float = 1,
        out_features: list[str] | None = None,
        out_indices: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> None:
        _require_model_type(kwargs.pop("model_type", self.model_type))
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = hidden_sizes
        self.depths = depths
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        self.global_padding = global_padding
        self.num_groups = num_groups
        self.drop_path_rate = drop_path_rate
        self.embedding_dynamic_padding = embedding_dynamic_padding
        self.output_stride = output_stride
        self.width_factor = width_factor
        self._init_common(kwargs)
        self._out_features, self._out_indices = align_output_stages(
            out_features, out_indices, self.stage_names
        )

    def _init_common(self, settings: dict[str, Any]) -> None:
        """Take the settings that all models share, then keep the ones nobody knows."""
        torch_dtype = settings.pop("torch_dtype", None)
        dtype = settings.pop("dtype", None)
        self.dtype = dtype if dtype is not None else torch_dtype
        self._name_or_path = ""
        self._init_labels(
            settings.pop("num_labels", None),
            settings.pop("id2label", None),
            settings.pop("label2id", None),
        )
        for name, default in COMMON_DEFAULTS.items():
            if name not in self.__dict__:
                setattr(self, name, settings.pop(name, copy.copy(default)))
        # stage_names follows from depths; the others say how a file was loaded, not what it holds.
        for name in ("stage_names", "attn_implementation", "_commit_hash"):
            settings.pop(name, None)
        for name, value in settings.items():
            self._require_settable(name)
            setattr(self, name, value)

    def _init_labels(self, num_labels: int | None, id2label: Any, label2id: Any) -> None:
        self.label2id = label2id
        if id2label is None:
            self._number_labels(2 if num_labels is None else num_labels)
            return
        self.id2label = id2label
        if num_labels is not None and num_labels != len(self.id2label):
            logger.warning(
                "num_labels=%s does not fit id2label, which names %d labels; id2label decides",
                num_labels,
                len(self.id2label),
            )

    def _number_labels(self, num_labels: int) -> None:
        num_labels = integer_from(0)("num_labels", num_labels)
        self.id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        check = CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(name, value))
        if name == "depths" and "_out_features" in self.__dict__:
            self._follow_depths()

    def _follow_depths(self) -> None:
        """Choose the last stage anew if the stages chosen before are gone."""
        if any(name not in self.stage_names for name in self._out_features):
            self._out_features, self._out_indices = align_output_stages(
                None, None, self.stage_names
            )

    def _require_settable(self, name: str) -> None:
        attribute = getattr(type(self), name, None)
        read_only = isinstance(attribute, property) and attribute.fset is None
        if callable(attribute) or read_only or name.startswith("__"):
            raise ValueError(f"{name!r} cannot be a configuration key: BitConfig needs the name")

    @property
    def stage_names(self) -> list[str]:
        """What ``out_features`` can name: "stem", "stage1", "stage2" and so on."""
        return ["stem", *(f"stage{index}" for index in range(1, len(self.depths) + 1))]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a backbone returns. Setting them sets ``out_indices`` too."""
        return list(self._out_features)

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self._out_features, self._out_indices = align_output_stages(names, None, self.stage_names)

    @property
    def out_indices(self) -> list[int]:
        """Positions of the stages that a backbone returns. Setting them sets ``out_features`` too."""
        return list(self._out_indices)

    @out_indices.setter
    def out_indices(self, indices: Iterable[int] | None) -> None:
        self._out_features, self._out_indices = align_output_stages(None, indices, self.stage_names)

    @property
    def num_labels(self) -> int:
        """Number of classes. Setting another one than before numbers the labels anew."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels != len(self.id2label):
            self._number_labels(num_labels)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> BitConfig:
        """Return this configuration: there is no other one of a text model inside it."""
        return self

    @property
    def use_return_dict(self) -> bool:
        """Whether models return output objects (True) or plain tuples."""
        return self.return_dict and not self.torchscript

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The older name of ``dtype``."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | str | None) -> None:
        self.dtype = parse_dtype("torch_dtype", dtype)

    @property
    def name_or_path(self) -> str:
        """The checkpoint that the model was loaded from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name_or_path: str | os.PathLike[str]) -> None:
        self._name_or_path = str(name_or_path)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a new dictionary, the dtype as a string."""
        content = copy.deepcopy(self.__dict__)
        content["out_features"] = content.pop("_out_features")
        content["out_indices"] = content.pop("_out_indices")
        content["stage_names"] = self.stage_names
        content["model_type"] = self.model_type
        if self.dtype is not None:
            content["dtype"] = dtype_name(self.dtype)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings without those common ones that have their default value."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name != "_name_or_path"
            and (name not in COMMON_DEFAULTS or value != COMMON_DEFAULTS[name])
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the settings as JSON, by default without the common ones that have their default.

        Raises:
            TypeError: a value, which is named, has no JSON form.
        """
        content = self.to_diff_dict() if use_diff else self.to_dict()
        for name, value in content.items():
            try:
                json.dumps(value, default=_json_default, sort_keys=True)
            except (TypeError, ValueError) as error:
                raise TypeError(f"cannot write the configuration key {name!r}: {error}") from error
        return json.dumps(content, indent=2, sort_keys=True, default=_json_default) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the JSON to a file; on any failure the file keeps its previous content."""
        write_text_atomically(json_file_path, self.to_json_string(use_diff))

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build a configuration from a dictionary of settings.

        Args:
            config_dict: The settings, as :meth:`to_dict` returns them.
            return_unused_kwargs: Return ``(config, unused)``: the configuration and those ``kwargs``
                that are no attributes of it (and ``dtype``, as transformers does).
            **kwargs: Override the dictionary's settings.

        Raises:
            ValueError: a value cannot work, or the settings are another model's.
        """
        config = cls(**copy.deepcopy(config_dict))
        unused = config._override(kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> BitConfig:
        """Build a configuration from a JSON file.

        Raises:
            CheckpointError: the file is not JSON, or not the configuration of a BiT model.
        """
        return cls._from_file(Path(json_file))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load ``config.json`` of a checkpoint, or infer it from the tensors of timm's and Google's.

        Args:
            pretrained_model_name_or_path: A local folder, a JSON file, the id of a Hub repository, or a
                weight file of timm or Google.
            return_unused_kwargs: As in :meth:`from_dict`.
            **kwargs: ``cache_dir``, ``force_download``, ``local_files_only``, ``token``, ``revision``
                and ``subfolder`` as in :func:`bitfast.checkpoints.files.locate_file`; the others
                override the file's settings.

        Raises:
            CheckpointError: there is no such file, or it is not the configuration of a BiT model.
            ValueError: an override cannot work.
        """
        where, overrides = _split_where(kwargs)
        config = cls._from_checkpoint(pretrained_model_name_or_path, where)
        unused = config._override(overrides)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of a checkpoint's ``config.json``, and the ``kwargs`` not used for that."""
        where, unused = _split_where(kwargs)
        return read_json(_locate_config(pretrained_model_name_or_path, where)), unused

    @classmethod
    def _from_checkpoint(
        cls, name_or_path: str | os.PathLike[str], where: dict[str, Any]
    ) -> BitConfig:
        from bitfast.checkpoints.foreign import read_foreign  # when something is loaded, not before

        path = None if is_weight_file(name_or_path) else _locate_config(name_or_path, where)
        foreign = read_foreign(name_or_path, path, **where)
        if foreign is not None:
            return cls(**foreign.settings)
        assert path is not None
        return cls._from_file(path)

    @classmethod
    def _from_file(cls, path: Path) -> BitConfig:
        from bitfast.checkpoints import timm

        content = read_json(path)
        if timm.is_config(content):
            raise CheckpointError(
                f"{path} is timm's and does not describe the whole model; load the folder, weights included"
            )
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not the configuration of a BiT model: {error}"
            ) from error

    def _override(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Set those settings that are attributes already; return the others."""
        labels = settings.get("id2label")
        num_labels = settings.get("num_labels", len(labels or ()))
        if "id2label" in settings and len(labels or ()) != num_labels:
            raise ValueError(
                f"num_labels={num_labels} does not fit id2label, which names {len(labels or ())} "
                "labels; give one of them"
            )
        if "torch_dtype" in settings:
            settings = dict(settings)
            torch_dtype = settings.pop("torch_dtype")
            settings.setdefault("dtype", torch_dtype)
        unused = {}
        for name, value in settings.items():
            if not hasattr(self, name):
                unused[name] = value
                continue
            self._require_settable(name)
            setattr(self, name, value)
            if name == "dtype":
                unused[name] = value
        return unused

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json`` into a folder, which is created if need be.

        Args:
            save_directory: The folder.
            push_to_hub: Also upload it; ``kwargs`` go to :meth:`push_to_hub`, ``repo_id`` is by default
                the folder's name.
            **kwargs: See ``push_to_hub``.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"save_directory must be a folder, {folder} is a file")
        text = self.to_json_string()
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / CONFIG_NAME, text)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": folder.resolve().name, **kwargs})

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several attributes, known or new."""
        for name, value in config_dict.items():
            self._require_settable(name)
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _require_model_type(model_type: Any) -> None:
    if model_type != BitConfig.model_type:
        raise ValueError(f"model_type must be {BitConfig.model_type!r}, got {model_type!r}")


def _split_where(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kwargs that say where to look for a file, and the others."""
    others = dict(kwargs)
    for name in ("proxies", "resume_download", "trust_remote_code", "attn_implementation"):
        others.pop(name, None)
    where: dict[str, Any] = {name: others.pop(name) for name in WHERE if name in others}
    return where, others


def _locate_config(name_or_path: str | os.PathLike[str], where: dict[str, Any]) -> Path:
    if os.path.isfile(name_or_path):
        return Path(name_or_path)
    path = locate_file(name_or_path, CONFIG_NAME, **where)
    assert path is not None
    return path


def _json_default(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
