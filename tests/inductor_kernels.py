"""``python -m tests.inductor_kernels``: compile for GPUs what Inductor makes of the visible kernels, as JSON.

Inductor writes each kernel's source anew, and with it a signature of its own: what a launch by Triton passes as
float32, for one, is float64 there. Both are taken from the program that it writes, and compiled for each chip
as it would do it. Runs without a GPU, like :mod:`tests.visible_kernels`.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._inductor.runtime import triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernel_variants import ARCHITECTURES
from bitfast.backends import register_kernel, use_backend
from bitfast.ops.common import TRITON_DTYPES
from tests.visible_kernels import PretendedDriver, inductor_code


class Generated(NamedTuple):
    """A kernel as Inductor has written it: the function, its signature and constants, its configurations."""

    function: Any
    meta: dict[str, Any]
    configs: list[dict[str, Any]]

    @property
    def title(self) -> str:
        constants = {name: v for name, v in self.meta["constants"].items() if name.isupper()}
        return f"{self.function.__name__} {json.dumps(constants)}"

    def problem_on(self, architecture: int) -> str | None:
        """Compile for a chip; return what went wrong, or None."""
        source = ASTSource(
            self.function,
            self.meta["signature"],
            self.meta["constants"],
            self.meta["configs"][0],
        )
        options = {"num_warps": self.configs[0]["num_warps"]}
        try:
            triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[-600:]
        return None


def all_norms(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Run a norm with and without a residual, forward and backward."""
    ops = torch.ops.bitfast
    total, result, mean, rstd = ops.add_group_norm_act.triton(x, x, weight, bias, 8, 1e-5, "relu")
    plain = ops.group_norm_act.triton(x, weight, bias, 8, 1e-5, "gelu")
    saved = (result, total, total, weight, bias, mean, rstd, 8, "relu")
    gradients = ops.group_norm_act_backward.triton(*saved)
    return [total, result, *plain, *gradients, *ops.group_norm_act_recompute.triton(*saved)]


def all_of_one_weight(weight: Tensor) -> list[Tensor]:
    """Standardize a weight, forward and backward."""
    ops = torch.ops.bitfast
    result, mean, rstd = ops.weight_standardization.triton(weight, 1e-8, torch.bfloat16)
    return [result, ops.weight_standardization_backward.triton(result, weight, mean, rstd)]


def everything(
    large: Tensor, small: Tensor, scale: Tensor, shift: Tensor, filters: Tensor
) -> list[Tensor]:
    """Run every operator whose kernels compilers see: norms in one launch and in two, and a weight."""
    return [
        *all_norms(large, scale, shift),
        *all_norms(small, scale, shift),
        *all_of_one_weight(filters),
    ]


def inputs(layout: torch.memory_format, dtype: torch.dtype) -> list[Tensor]:
    """Return what :func:`everything` takes."""
    images = [torch.randn(2, 64, size, size).to(dtype, memory_format=layout) for size in (128, 6)]
    return [*images, torch.rand(64), torch.rand(64), torch.randn(32, 16, 3, 3)]


def generated_kernels(
    folder: Path, function: Callable[..., Any], *tensors: Tensor
) -> list[Generated]:
    """Return our kernels in the program that Inductor writes; their files go to the folder."""
    program = inductor_code(function, *tensors)
    return [kernel for source in triton_sources(program) for kernel in our_kernels(folder, source)]


def triton_sources(program: str) -> Iterator[str]:
    """Yield what the program hands to ``async_compile.triton``."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            yield ast.literal_eval(node.args[1])


def our_kernels(folder: Path, source: str) -> list[Generated]:
    """Execute a source up to where Inductor would compile it, for the GPU that is not there."""
    found: list[Generated] = []

    def user_autotune(
        configs: Any, inductor_meta: Any, triton_meta: Any, **_: Any
    ) -> Callable[[Any], Any]:
        return lambda function: found.append(Generated(function, triton_meta, configs)) or function

    # Triton reads the source of a function from its file.
    file = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    file.write_text(source)
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    with mock.patch.object(triton_heuristics, "user_autotune", user_autotune):
        spec.loader.exec_module(module_from_spec(spec))
    return found


def report(folder: Path) -> list[dict[str, Any]]:
    """Return the signature of each kernel, and what went wrong with it on each chip."""
    kinds = (
        (torch.channels_last, torch.bfloat16),
        (torch.contiguous_format, torch.float32),
    )
    kernels = {
        kernel.title: kernel
        for kind in kinds
        for kernel in generated_kernels(folder, everything, *inputs(*kind))
    }
    return [
        {
            "kernel": kernel.function.__name__,
            "title": kernel.title,
            "signature": kernel.meta["signature"],
            "chip": chip,
            "problem": kernel.problem_on(chip),
        }
        for kernel, chip in product(kernels.values(), ARCHITECTURES)
    ]


def main() -> None:
    """Print the report."""
    triton.runtime.driver.set_active(PretendedDriver())
    for op in ("group_norm_act", "weight_standardization"):
        register_kernel(op, "triton", "cpu", TRITON_DTYPES, lambda: None)
    triton_kernels = use_backend(group_norm_act="triton", weight_standardization="triton")
    with triton_kernels, tempfile.TemporaryDirectory() as folder:
        print(json.dumps(report(Path(folder))))


if __name__ == "__main__":
    main()
