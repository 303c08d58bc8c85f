"""Loading weights into a model: which tensor goes where, what is missing, and the report about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfast.checkpoints.files import CheckpointError

logger = logging.getLogger("bitfast")


class SkipRandomInitialization(TorchFunctionMode):
    """Inside this context modules are built without drawing random values for their parameters.

    A checkpoint overwrites them, and for the largest models drawing them takes longer than loading.
    """

    SKIPPED = frozenset(
        {
            torch.Tensor.uniform_,
            torch.Tensor.normal_,
            nn.init.uniform_,
            nn.init.normal_,
            nn.init.kaiming_uniform_,
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the tensor as it is instead of filling it."""
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass
class LoadingReport:
    """Names of the tensors that a checkpoint and a model do not share.

    Attributes:
        missing_keys: In the model only; newly initialised.
        unexpected_keys: In the checkpoint only; not used.
        mismatched_shapes: In both, with other shapes: (checkpoint's, model's); newly initialised.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict
    )

    def as_dict(self) -> dict[str, list[str]]:
        """Return the report in the form of transformers' ``output_loading_info``."""
        return {
            "missing_keys": list(self.missing_keys),
            "unexpected_keys": list(self.unexpected_keys),
            "mismatched_keys": list(self.mismatched_shapes),
            "error_msgs": [],
        }

    def warn(self, model_name: str, source: str) -> None:
        """Log one warning that names all of them, if there are any."""
        sentences = []
        if self.missing_keys:
            sentences.append(
                f"Newly initialised, as the checkpoint lacks them: {self.missing_keys}."
            )
        if self.mismatched_shapes:
            sentences.append(
                f"Newly initialised, as their shapes differ: {self._shapes(self.mismatched_shapes)}."
            )
        if sentences:
            sentences.append("Train the model before you rely on what it predicts.")
        if self.unexpected_keys:
            sentences.append(
                f"Not used, as the model has no place for them: {self.unexpected_keys}."
            )
        if sentences:
            logger.warning("%s loaded from %s. %s", model_name, source, " ".join(sentences))

    def raise_for_shapes(self, model_name: str, source: str) -> None:
        """Raise an error that lists the mismatched shapes.

        Raises:
            RuntimeError: as ``torch.nn.Module.load_state_dict`` and transformers do.
        """
        raise RuntimeError(
            f"{model_name} cannot load {source}, whose shapes differ: "
            f"{self._shapes(self.mismatched_shapes)}. Pass ignore_mismatched_sizes=True to initialise "
            "these anew"
        )

    @staticmethod
    def _shapes(mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
        return "; ".join(
            f"{key} is {theirs} in the checkpoint and {ours} in the model"
            for key, (theirs, ours) in mismatched.items()
        )


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    base_prefix: str,
    source: str,
    dtype: torch.dtype,
    ignore_mismatched_sizes: bool = False,
) -> LoadingReport:
    """Put the tensors of a checkpoint into a model and initialise the parameters it lacks.

    The prefix that a model with a head gives to the names of its base model is added or removed where
    checkpoint and model differ in it.

    Args:
        model: A model with an ``_init_weights`` method; on error it is in no defined state.
        tensors: The checkpoint's tensors, which the model takes over without a copy where it can.
        base_prefix: The attribute under which a model with a head has its base model.
        source: The checkpoint's name, for messages.
        dtype: Floating-point type that the model shall have.
        ignore_mismatched_sizes: Initialise parameters anew whose shape the checkpoint has otherwise.

    Raises:
        RuntimeError: shapes differ and ``ignore_mismatched_sizes`` is False.
        CheckpointError: a tensor's dtype cannot be a parameter's, or names contradict each other.
    """
    expected = model.state_dict()
    names = _model_names(model, expected, tensors, base_prefix, source)
    loaded = {name: tensors[key] for key, name in names.items() if name in expected}
    report = LoadingReport(
        missing_keys=sorted(expected.keys() - loaded.keys()),
        unexpected_keys=sorted(
            {names.get(key, key) for key in tensors if names.get(key) not in expected}
        ),
    )
    for name in list(loaded):
        theirs, ours = loaded[name], expected[name]
        if theirs.shape != ours.shape:
            report.mismatched_shapes[name] = (tuple(theirs.shape), tuple(ours.shape))
            del loaded[name]
        elif ours.is_floating_point() and not theirs.is_floating_point():
            raise CheckpointError(f"{source}: {name} is {theirs.dtype}, not floating point")
    if report.mismatched_shapes and not ignore_mismatched_sizes:
        report.raise_for_shapes(type(model).__name__, source)
    _initialize(model, {*report.missing_keys, *report.mismatched_shapes})
    for name, tensor in loaded.items():
        if tensor.is_floating_point():
            loaded[name] = tensor.to(dtype)
    model.load_state_dict(loaded, strict=False, assign=True)
    model.to(dtype)
    return report


def _model_names(
    model: nn.Module,
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    base_prefix: str,
    source: str,
) -> dict[str, str]:
    """Map the checkpoint's names to the model's, without those of a head that the model does not have."""
    prefix = f"{base_prefix}."
    checkpoint_has_head = any(key.startswith(prefix) for key in tensors)
    model_has_head = hasattr(model, base_prefix)
    if checkpoint_has_head and not model_has_head:
        return {key: key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    if model_has_head and not checkpoint_has_head:
        of_head = [key for key in tensors if key in expected]
        if of_head:
            raise CheckpointError(
                f"{source} holds {of_head} of a model with a head, but no {prefix}* of its base model"
            )
        return {key: prefix + key for key in tensors}
    return {key: key for key in tensors}


def _initialize(model: nn.Module, names: set[str]) -> None:
    """Initialise the modules that own the named parameters, whole."""
    if not names:
        return
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" if prefix else name for name, _ in _own_tensors(module)}
        if own & names:
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            model._init_weights(module)  # type: ignore[operator]


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
