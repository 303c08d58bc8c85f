"""Triton's interpreter, which runs the kernels on the CPU, one program after the other.

Where there is no GPU, ``use_backend("triton")`` on CPU tensors runs the kernels in it. It must be chosen
before triton is imported, so ``conftest.py`` calls :func:`enable` first of all. With a GPU the same tests
run the compiled kernels there: they take their tensors from :data:`DEVICE`.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests of Triton kernels put their tensors."""


def enable() -> None:
    """Interpret kernels in this process, unless there is a GPU to run them."""
    if DEVICE == "cuda":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    _round_bfloat16_to_nearest()
    _sum_as_a_tree()
    _spare_unneeded_work()


def _round_bfloat16_to_nearest() -> None:
    """Let the interpreter round float32 to bfloat16 as GPUs do; by itself it cuts the digits off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, source, target, mode):  # type: ignore[no-untyped-def]
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(values.shape)

    interpreter._convert_float = convert_float


def _sum_as_a_tree() -> None:
    """Let the interpreter sum as threads do, halves onto halves; by itself it adds one after the other.

    The digits that this loses are not lost on a GPU, and would count against the kernels.
    """
    import numpy as np
    from triton.runtime import interpreter

    def tree_sum(self, value):  # type: ignore[no-untyped-def]
        data = value.handle.data
        while data.shape[self.axis] > 1:
            first, second = np.split(data, 2, axis=self.axis)
            data = first + second
        data = data if self.keep_dims else data.squeeze(self.axis)
        return self.to_tensor(data if data.ndim else data.item(), value.dtype)

    interpreter.ReduceOps.sum = tree_sum


def _spare_unneeded_work() -> None:
    """Leave out two thirds of the work of the interpreter, which changes nothing.

    By itself it prepares Triton's language again for each function that a kernel calls, and looks whether
    integers overflow only to forget what it saw (it would tell in its debug mode).
    """
    import triton.language as tl
    from triton.runtime import interpreter

    prepare_language = interpreter._patch_lang

    def prepare_language_once(function):  # type: ignore[no-untyped-def]
        modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return prepare_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_language_once
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
