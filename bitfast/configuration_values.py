"""What each value of a BitConfig may be: checks that return the value in its standard form."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bitfast.activations import ACTIVATIONS

LAYER_TYPES = ("preactivation", "bottleneck")
PADDINGS = ("SAME", "VALID")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
HIDDEN_ACTS = tuple(name for name in ACTIVATIONS if name != "none")


def align_output_stages(
    features: list[str] | None, indices: Iterable[int] | None, stage_names: list[str]
) -> tuple[list[str], list[int]]:
    """Return the chosen stages by name and by position; by default the last one.

    Raises:
        ValueError: they do not exist, repeat, are out of order, or contradict each other.
    """
    last = len(stage_names)
    if features is None and indices is None:
        return stage_names[-1:], [last - 1]
    if features is not None:
        if not isinstance(features, list):
            raise ValueError(f"out_features must be a list, got {type(features).__name__}")
        _require_stage_order(
            "out_features", features, [_position(n, stage_names) for n in features]
        )
    if indices is None:
        assert features is not None
        return list(features), [stage_names.index(name) for name in features]
    chosen = [_index(index, last) for index in indices]
    positions = [index % last for index in chosen]
    _require_stage_order("out_indices", chosen, positions)
    names = [stage_names[position] for position in positions]
    if features is not None and features != names:
        raise ValueError(
            f"out_features and out_indices must choose the same stages, got {features} and {chosen}"
        )
    return names, chosen


def _position(name: Any, stage_names: list[str]) -> int:
    if name not in stage_names:
        raise ValueError(f"out_features must be among {stage_names}, got {name!r}")
    return stage_names.index(name)


def _index(index: Any, count: int) -> int:
    try:
        number = int(operator.index(index))
    except TypeError as error:
        raise ValueError(f"out_indices must be integers, got {index!r}") from error
    if not -count <= number < count:
        raise ValueError(f"out_indices must be in [-{count}, {count - 1}], got {number}")
    return number


def _require_stage_order(name: str, given: list[Any], positions: list[int]) -> None:
    if len(set(positions)) != len(positions):
        raise ValueError(f"{name} must not contain duplicates, got {given}")
    if positions != sorted(positions):
        raise ValueError(f"{name} must be in the order of stage_names, got {given}")


def integer_from(minimum: int) -> Callable[[str, Any], int]:
    """Return a check for integers of at least ``minimum``."""

    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool) or number < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        return number

    return check


def _integers_from(minimum: int) -> Callable[[str, Any], list[int]]:
    check_item = integer_from(minimum)

    def check(name: str, value: Any) -> list[int]:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(f"{name} must be a list with one integer per stage, got {value!r}")
        return [check_item(f"every one of {name}", item) for item in value]

    return check


def _one_of(allowed: Sequence[Any]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
            )
        return value

    return check


def _padding(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value.upper() not in PADDINGS:
        raise ValueError(f"{name} must be None, 'same' or 'valid', got {value!r}")
    return value.upper()


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


def _drop_path_rate(name: str, value: Any) -> float:
    if not 0 <= _number(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return value


def _width_factor(name: str, value: Any) -> float:
    if not 0 < _number(name, value) < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return value


def _id2label(name: str, value: Any) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dictionary, got {value!r}")
    try:
        return {int(key): label for key, label in value.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must have integers as keys, got {list(value)!r}") from error


def _label2id(name: str, value: Any) -> dict[Any, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a dictionary, got {value!r}")
    return copy.copy(value)


def parse_dtype(name: str, value: Any) -> torch.dtype | None:
    """Return the torch dtype that is given itself or by its name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if value is not None and not isinstance(value, torch.dtype):
        raise ValueError(
            f"{name} must be a torch dtype or its name, such as 'float32', got {value!r}"
        )
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that configuration files use, such as "float32"."""
    return str(dtype).removeprefix("torch.")


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_channels": integer_from(1),
    "embedding_size": integer_from(1),
    "hidden_sizes": _integers_from(1),
    # transformers runs a stage without blocks, as long as the channels fit.
    "depths": _integers_from(0),
    "layer_type": _one_of(LAYER_TYPES),
    "hidden_act": _one_of(HIDDEN_ACTS),
    "global_padding": _padding,
    "num_groups": integer_from(1),
    "drop_path_rate": _drop_path_rate,
    "embedding_dynamic_padding": _one_of((False, True)),
    "output_stride": integer_from(1),
    "width_factor": _width_factor,
    "id2label": _id2label,
    "label2id": _label2id,
    "problem_type": _one_of((None, *PROBLEM_TYPES)),
    "dtype": parse_dtype,
}
