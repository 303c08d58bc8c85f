"""torch's state around a call: whether it is transformed or traced, or a mode watches its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_compiled(function: Function) -> Function:
    """Let ``torch.compile`` call a function while it traces, and take the result for a constant.

    It does not look into the function, nor guard on what the function reads. This sets what
    ``torch.compiler.assume_constant_result`` sets; to call that would import the compiler, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch guards on whether a function transform or forward mode is at work, as the next two ask.


@constant_when_compiled
def is_transformed() -> bool:
    """Whether a function transform (``torch.func``) or forward-mode differentiation is at work.

    They see into plain PyTorch, but not into kernels.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or is_in_forward_mode()


@constant_when_compiled
def is_in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors: within ``vmap``, or where gradients are computed in batches."""
    if torch.compiler.is_compiling():  # a compiler cannot trace the questions below
        return is_transformed()
    functorch = torch._C._functorch
    while is_transformed() and functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_legacy_batchedtensor(x) or (
        is_transformed() and functorch.is_batchedtensor(x)
    )


def must_use_plain_pytorch() -> bool:
    """Whether the call is transformed or traced by somebody who cannot handle bitfast's operators.

    ``torch.jit.trace`` could record them, but its programs are to run without bitfast.
    """
    return is_transformed() or torch.jit.is_tracing()


def is_concrete(x: object) -> bool:
    """Whether the layout and dtype of x may decide how to compute: it is a tensor, and nothing traces the call.

    ``torch.compile`` and ``torch.export`` do not count: they follow such decisions.
    """
    return not isinstance(x, Proxy) and not must_use_plain_pytorch()


@constant_when_compiled
def is_dispatch_watched() -> bool:
    """Whether a mode looks at each operator, as one that counts FLOPs does."""
    return torch._C._len_torch_dispatch_stack() > 0


@constant_when_compiled
def is_exporting() -> bool:
    """Whether ``torch.export`` traces. (When traced itself, torch 2.11's function always returns True.)"""
    return torch.compiler.is_exporting()


@contextmanager
def unseen() -> Iterator[None]:
    """Hide what the block computes from tracers, modes, transforms and autograd.

    For trying out what the machine can do, which is no part of a program.
    """
    tracing_state = torch._C._get_tracing_state()
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if tracing_state is None:  # within an operator it cannot even be set to None
            yield
            return
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(tracing_state)  # type: ignore[attr-defined]


__all__ = [
    "constant_when_compiled",
    "is_batched",
    "is_concrete",
    "is_dispatch_watched",
    "is_exporting",
    "is_in_forward_mode",
    "is_transformed",
    "must_use_plain_pytorch",
    "unseen",
]
