"""What determines a residual block, written as text: operators take strings, and no structures of Python."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn

from bitfast.activations import ACTIVATIONS
from bitfast.ops.block_links import Convolution, Link
from bitfast.ops.group_norm_act_gradients import NormSettings
from bitfast.ops.residual_block_contract import Form, Join


def text_of(form: Form) -> str:
    """Return a form as text, from which :func:`form_of` makes the same form."""
    return _text(form)


def _text(value: Any) -> str:
    """Return what ``json.dumps`` does, which compilers cannot trace. Floats are read again exactly."""
    if isinstance(value, tuple):
        return "[" + ",".join([_text(part) for part in value]) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return "null" if value is None else repr(value)


@lru_cache(maxsize=1024)
def form_of(text: str) -> Form:
    """Return the form of a text that :func:`text_of` has written.

    Raises:
        ValueError: The text is something else.
    """
    try:
        links, join = json.loads(text)
        form = Form(tuple(map(_link, links)), None if join is None else _join(join))
    except (TypeError, ValueError) as error:
        _refuse(text, error)
    if not form.links or text_of(form) != text:
        _refuse(text, None)
    return form


def _refuse(text: str, error: Exception | None) -> NoReturn:
    raise ValueError(
        f"residual_block: form must be the text of a Form, as text_of writes it, got {text!r}"
    ) from error


def _link(value: Any) -> Link:
    norm, convolutions = value
    if len(convolutions) not in (1, 2):
        raise ValueError("a link has one or two convolutions")
    return Link(None if norm is None else _norm(norm), tuple(map(_convolution, convolutions)))


def _convolution(value: Any) -> Convolution:
    geometry, window = value
    stride, padding, dilation = map(_pair, geometry)
    if window is None:
        return Convolution((stride, padding, dilation))
    kernel_size, stride_of_window, dilation_of_window = map(_pair, window)
    return Convolution(
        (stride, padding, dilation), (kernel_size, stride_of_window, dilation_of_window)
    )


def _join(value: Any) -> Join:
    norm, shortcut_norm, activation = value
    shortcut = None if shortcut_norm is None else _norm(shortcut_norm)
    return Join(_norm(norm), shortcut, _activation(activation))


def _norm(value: Any) -> NormSettings:
    num_groups, eps, activation = value
    if type(num_groups) is not int or not isinstance(eps, (int, float)):
        raise TypeError("a norm has a number of groups and an eps")
    return NormSettings(num_groups, eps, _activation(activation))


def _activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"no activation: {value!r}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    if type(first) is not int or type(second) is not int:
        raise TypeError(f"no pair of integers: {value!r}")
    return first, second


__all__ = ["form_of", "text_of"]
