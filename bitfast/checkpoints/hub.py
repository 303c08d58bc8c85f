"""What models, configurations and processors share: from_pretrained, save_pretrained, push_to_hub."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bitfast.checkpoints import weights
from bitfast.checkpoints.files import (
    CONFIG_NAME,
    CheckpointError,
    is_weight_file,
    locate_file,
    replace_files,
    text_writer,
)
from bitfast.checkpoints.loading import SkipRandomInitialization, load_weights
from bitfast.configuration_values import parse_dtype

if TYPE_CHECKING:
    from bitfast.checkpoints.foreign import ForeignCheckpoint

logger = logging.getLogger("bitfast")

Model = TypeVar("Model", bound="PretrainedModelMixin")

# Arguments of transformers that change nothing about how a BiT model is loaded here.
WITHOUT_EFFECT = frozenset(
    {
        "adapter_kwargs",
        "attn_implementation",
        "low_cpu_mem_usage",
        "max_memory",
        "mirror",
        "offload_buffers",
        "offload_folder",
        "offload_state_dict",
        "proxies",
        "resume_download",
        "trust_remote_code",
        "use_kernels",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "_commit_hash",
    }
)


class PushToHubMixin:
    """Uploading for classes that have a ``save_pretrained`` method."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        use_temp_dir: bool | None = None,
        **save_options: Any,
    ) -> Any:
        """Upload to a repository of the Hugging Face Hub, which is created if need be.

        Args:
            repo_id: "name" or "owner/name".
            commit_message: By default "Upload model", "Upload config" or "Upload processor".
            commit_description: A longer text for the commit.
            private: Whether a repository that is created here is private.
            token: Hub access token, or True for the one that ``hf auth login`` stored.
            revision: Branch to commit to; created if need be.
            create_pr: Open a pull request instead of committing.
            use_temp_dir: Has no effect; a temporary folder is always used.
            **save_options: Passed to ``save_pretrained``, for instance ``max_shard_size``.

        Returns:
            huggingface_hub's description of the commit.
        """
        # Imported here: it costs a third of a second, and only uploads need it.
        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            # Saved first: what cannot be saved must not leave an empty repository behind.
            self.save_pretrained(folder, **save_options)  # type: ignore[attr-defined]
            repo_id = huggingface_hub.create_repo(
                repo_id, private=private, token=token, exist_ok=True
            ).repo_id
            tags = getattr(self, "model_tags", None)
            if tags:
                _tagged_card(repo_id, tags, token).save(Path(folder) / "README.md")
            if revision is not None and not revision.startswith("refs/pr"):
                huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            return huggingface_hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {self._kind()}",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _kind(self) -> str:
        name = type(self).__name__
        if isinstance(self, nn.Module):
            return "model"
        return next((kind for kind in ("config", "processor") if kind in name.lower()), name)


def _tagged_card(repo_id: str, tags: list[str], token: Any) -> Any:
    """Return a repository's model card, or a new one, with these tags added."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        card = ModelCard.load(repo_id, token=token)
    except LocalEntryNotFoundError:  # the card could not be reached: there may be one
        raise
    except EntryNotFoundError:
        card = ModelCard("---\nlibrary_name: transformers\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
    return card


class PretrainedModelMixin(PushToHubMixin, nn.Module):
    """Loading and saving for models that are built as ``cls(config)``.

    Subclasses set ``config_class`` and ``base_model_prefix``, the attribute under which a model with a
    head has its base model, and define ``_init_weights(module)``.
    """

    config_class: ClassVar[type]
    base_model_prefix: ClassVar[str]
    config: Any
    hf_device_map: dict[str, torch.device]
    """After ``from_pretrained(device_map=...)``: the device of the whole model, under ""."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = "main",
        subfolder: str = "",
        use_safetensors: bool | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        output_loading_info: bool = False,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a local folder or from the Hub; it is in evaluation mode.

        A model without a head loads from the checkpoint of one with a head, and the other way round.
        What is missing, not used or of another shape is named in one warning of the logger "bitfast".

        BiT checkpoints of timm (a folder, a Hub repository or a weight file) and of Google (an ``.npz``
        file) are loaded too; their tensors say how large the model is. They must hold a whole network.

        Args:
            pretrained_model_name_or_path: A folder, the id of a Hub repository, or a weight file of timm
                or Google. None if both ``config`` and ``state_dict`` are given.
            *model_args: Passed to the model's constructor after the configuration.
            config: A configuration, or the name or path of one, instead of the checkpoint's own.
            cache_dir: Where downloads are kept; by default huggingface_hub's cache.
            ignore_mismatched_sizes: Initialise parameters anew whose shape differs, instead of failing.
            force_download: Download again what the cache holds already.
            local_files_only: Look into the cache only.
            token: Hub access token, or True for the one that ``hf auth login`` stored.
            revision: Branch, tag or commit of the Hub repository.
            subfolder: Folder inside the checkpoint.
            use_safetensors: True: only safetensors; False: only PyTorch files; None: either.
            variant: Load ``model.VARIANT.safetensors`` and so on.
            dtype: The parameters' type, or its name; "auto": the configuration's, else the checkpoint's;
                None: torch's default type, whatever the checkpoint has.
            torch_dtype: The older name of ``dtype``.
            device_map: One device: its name, its index, a ``torch.device``, ``{"": device}``, or "auto"
                for the accelerator if there is one.
            state_dict: Use these tensors instead of a checkpoint's.
            output_loading_info: Return ``(model, info)``; ``info`` lists ``missing_keys``,
                ``unexpected_keys``, ``mismatched_keys`` and ``error_msgs``.
            weights_only: Must be True: code in a checkpoint is never executed.
            **kwargs: Attributes of the configuration to override. Others go to the model's constructor.

        Raises:
            CheckpointError: the checkpoint is missing, broken or another model's.
            RuntimeError: shapes differ.
            TypeError: an argument is neither known nor an attribute of the configuration.
            ValueError: an argument's value is not possible.
        """
        if weights_only is not True:
            raise ValueError("weights_only must be True: bitfast never unpickles code")
        if (pretrained_model_name_or_path is None) == (state_dict is None):
            raise ValueError("give either pretrained_model_name_or_path or state_dict")
        if state_dict is not None and config is None:
            raise ValueError("state_dict needs config: the description of the model it belongs to")
        name = os.fspath(pretrained_model_name_or_path or "")
        device = _single_device(device_map)
        kwargs = {key: value for key, value in kwargs.items() if key not in WITHOUT_EFFECT}
        where: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        formats: dict[str, Any] = {"use_safetensors": use_safetensors, "variant": variant}
        config_file, foreign = None, None
        if state_dict is None:
            from bitfast.checkpoints.foreign import read_foreign  # not before something is loaded

            config_file = _find_config_file(name, where)
            foreign = read_foreign(name, config_file, **formats, **where)
        if config is None:
            config, model_kwargs = cls._own_config(config_file or name, foreign, where, kwargs)
        else:
            config, model_kwargs = cls._given_config(config, where, kwargs)
        requested = _requested_dtype(dtype if dtype is not None else torch_dtype)
        # The checkpoint is read to the CPU, whatever the default device is.
        with torch.device("cpu"), SkipRandomInitialization():
            model = cls(config, *model_args, **model_kwargs)
        if state_dict is not None:
            tensors = {key: tensor.detach().clone() for key, tensor in state_dict.items()}
        elif foreign is not None:
            tensors = foreign.tensors
        else:
            tensors = weights.read_weights(name, **formats, **where)
        model.config.dtype = _resolve_dtype(requested, model.config.dtype, tensors)
        model.config.name_or_path = name
        source = repr(name) if name else "the given state_dict"
        with torch.device("cpu"):
            report = load_weights(
                model,
                tensors,
                base_prefix=cls.base_model_prefix,
                source=source,
                dtype=model.config.dtype,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
        model = model.to(device).eval()
        if device_map is not None:
            model.hf_device_map = {"": model.device}
        report.warn(cls.__name__, source)
        return (model, report.as_dict()) if output_loading_info else model

    @classmethod
    def _own_config(
        cls,
        name_or_file: str | Path,
        foreign: ForeignCheckpoint | None,
        where: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        """Return a checkpoint's configuration, and the kwargs that are not attributes of it."""
        if foreign is None:
            return cls._given_config(name_or_file, where, kwargs)
        return cls.config_class.from_dict(  # type: ignore[attr-defined]
            foreign.settings, return_unused_kwargs=True, **kwargs
        )

    @classmethod
    def _given_config(
        cls, config: Any, where: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return a configuration (given, or named), and the kwargs that are not attributes of it."""
        if not isinstance(config, (str, os.PathLike)):
            return copy.deepcopy(config), kwargs
        return cls.config_class.from_pretrained(  # type: ignore[attr-defined]
            config, return_unused_kwargs=True, **where, **kwargs
        )

    @classmethod
    def _from_config(cls: type[Model], config: Any, **kwargs: Any) -> Model:
        """Build a newly initialised model of ``dtype``, by default the configuration's."""
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", torch_dtype)
        kwargs.pop("attn_implementation", None)
        dtype = _requested_dtype(dtype if dtype is not None else config.dtype)
        model = cls(config, **kwargs)
        return model if dtype is None else model.to(_floating(dtype))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write configuration and weights into a folder, for ``from_pretrained`` of bitfast and transformers.

        The files of an earlier save are replaced when all new ones are complete. If anything fails
        before that, the folder stays as it was.

        Args:
            save_directory: The folder; created if need be.
            is_main_process: False: write nothing, because another process does.
            state_dict: Save these tensors instead of the model's own.
            save_function: Has no effect; accepted for compatibility.
            push_to_hub: Also upload; ``kwargs`` go to :meth:`push_to_hub`, ``repo_id`` is by default the
                folder's name.
            max_shard_size: Largest size of a weight file, in bytes or like "500MB".
            safe_serialization: True: safetensors; False: PyTorch's own format.
            variant: Write ``model.VARIANT.safetensors`` and so on.
            token: Hub access token, for ``push_to_hub``.
            **kwargs: See ``push_to_hub``.

        Raises:
            OSError: a file cannot be written.
            TypeError: ``state_dict`` holds something else than tensors, or the configuration a value
                that has no JSON form.
            ValueError: ``max_shard_size`` or ``variant`` is not understood.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"save_directory must be a folder, {folder} is a file")
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        writers = weights.weight_writers(
            self.state_dict() if state_dict is None else state_dict,
            safe_serialization=safe_serialization,
            max_shard_size=max_shard_size,
            variant=variant,
        )
        writers[CONFIG_NAME] = text_writer(self.config.to_json_string())
        folder.mkdir(parents=True, exist_ok=True)
        stale = weights.stale_weights(folder, set(writers), variant)
        replace_files(folder, writers, stale)
        weights.warn_if_shadowed(folder, safe_serialization, variant)
        if push_to_hub:
            self.push_to_hub(
                **{"repo_id": folder.resolve().name, **kwargs},
                token=token,
                state_dict=state_dict,
                max_shard_size=max_shard_size,
                safe_serialization=safe_serialization,
                variant=variant,
            )

    @property
    def name_or_path(self) -> str:
        """The checkpoint that the model was loaded from, or the empty string."""
        return self.config.name_or_path

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; the model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters.

        Args:
            only_trainable: Count those that require gradients.
            exclude_embeddings: Leave out the weights of ``torch.nn.Embedding`` modules.
        """
        embeddings = {
            module.weight for module in self.modules() if isinstance(module, nn.Embedding)
        }
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and parameter in embeddings)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters and, unless told otherwise, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _find_config_file(name: str, where: Mapping[str, Any]) -> Path | None:
    """Return a checkpoint's ``config.json``; None if it has none, as for a file of weights."""
    return None if is_weight_file(name) else locate_file(name, CONFIG_NAME, required=False, **where)


def _requested_dtype(dtype: Any) -> torch.dtype | str | None:
    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    parsed = parse_dtype("dtype", dtype)
    return None if parsed is None else _floating(parsed)


def _floating(dtype: Any) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type for a model, got {dtype}")
    return dtype


def _resolve_dtype(
    requested: torch.dtype | str | None,
    configured: torch.dtype | None,
    tensors: Mapping[str, Tensor],
) -> torch.dtype:
    if isinstance(requested, torch.dtype):
        return requested
    if requested is None:
        return torch.get_default_dtype()
    if configured is not None:
        return _floating(configured)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            return tensor.dtype
    raise CheckpointError('dtype="auto": the checkpoint holds no floating-point tensor')


def _single_device(device_map: Any) -> torch.device:
    """Return the one device that a ``device_map`` names; without one torch's default device.

    Raises:
        ValueError: it names no device, several, or one that this machine does not have.
    """
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    is_index = isinstance(device_map, int) and not isinstance(device_map, bool) and device_map >= 0
    if not is_index and not isinstance(device_map, (str, torch.device)):
        raise ValueError(
            'device_map must be one device (such as "cuda:0", 0, torch.device("cpu") or '
            f'{{"": "cpu"}}) or "auto", got {device_map!r}'
        )
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device_map: the device {device_map!r} is not there: {error}") from error
    return device


__all__ = ["PretrainedModelMixin", "PushToHubMixin"]
