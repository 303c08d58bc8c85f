"""``python -m tests.visible_kernels``: what compilers see of the Triton kernels, as JSON.

Runs without a GPU and without the interpreter: CPU tensors pass for GPU ones until something would be
launched, which nothing is. (Triton's interpreter has no kernels that a compiler could look into.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from bench.torchvision_import import import_torchvision
from bitfast.backends import register_kernel, use_backend
from bitfast.ops.common import TRITON_DTYPES
from bitfast.ops.group_norm_act import add_group_norm_act, group_norm_act
from bitfast.ops.weight_standardization import weight_standardization


class PretendedDriver:
    """What Triton asks of a GPU's driver before it launches something."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def norms(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    total, result = add_group_norm_act(x, residual, weight, bias, 8)
    return group_norm_act(total * result, weight, bias, 8, activation="gelu")


def inputs() -> list[Tensor]:
    x, residual = (
        torch.randn(2, 64, 128, 128).to(memory_format=torch.channels_last) for _ in range(2)
    )
    return [t.requires_grad_() for t in (x, residual, torch.rand(64), torch.rand(64))]


def traced(function: Callable[..., Tensor], *tensors: Tensor, dynamic: bool = False) -> list[str]:
    """Return the names of what the forward and the backward graph call; if dynamic, the forward alone."""
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        if dynamic:
            raise StopHereError
        return lambda *args: [  # nothing runs: plausible outputs are enough
            torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype).as_strided(
                node.meta["val"].shape, node.meta["val"].stride()
            )
            if isinstance(node, torch.fx.Node) and isinstance(node.meta["val"], Tensor)
            else None
            for node in graph.graph.find_nodes(op="output")[0].args[0]
        ]

    torch._dynamo.reset()
    compiled = torch.compile(
        function,
        fullgraph=True,
        dynamic=dynamic,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
    )
    if dynamic:
        with suppress_stop():
            compiled(*tensors)
    else:
        compiled(*tensors).sum().backward()
    return [
        str(node.target) if "triton_kernel" not in str(node.target) else kernel_of(node)
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "call_function"
    ]


def kernel_of(node: torch.fx.Node) -> str:
    """Return the name of the kernel that a node launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return "launch " + getattr(kernel, "fn", kernel).__name__


def inductor_code(function: Callable[..., Tensor], *tensors: Tensor) -> str:
    """Return the program that Inductor writes; it is not run."""
    from torch._inductor import codecache

    programs: list[str] = []
    load = codecache.PyCodeCache.load_by_key_path

    def keep(key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        with open(path) as file:
            programs.append(file.read())
        raise StopHereError

    codecache.PyCodeCache.load_by_key_path = keep
    torch._dynamo.reset()
    try:
        with torch.no_grad(), suppress_stop():
            torch.compile(function, fullgraph=True)(*tensors)
    finally:
        codecache.PyCodeCache.load_by_key_path = load
    return "\n".join(programs)


class StopHereError(Exception):
    """What was to be seen has been seen."""


@contextmanager
def suppress_stop() -> Iterator[None]:
    """Catch StopHereError, also where a compiler has wrapped it."""
    try:
        yield
    except Exception as error:
        if "StopHereError" not in repr(error) and not isinstance(error.__cause__, StopHereError):
            raise


def main() -> None:
    """Print what was seen."""
    import_torchvision()
    triton.runtime.driver.set_active(PretendedDriver())
    for op in ("group_norm_act", "weight_standardization"):
        register_kernel(op, "triton", "cpu", TRITON_DTYPES, lambda: None)
    with use_backend(group_norm_act="triton", weight_standardization="triton"):
        print(json.dumps(seen()))


def seen() -> dict[str, list[str]]:
    """Return the calls in each graph, and where Inductor's program names kernels."""
    from tests.tiny_models import ours

    model = ours("BitModel", num_groups=4).train()
    images = torch.randn(1, 3, 32, 32)
    weight = torch.randn(32, 16, 3, 3, requires_grad=True)
    program = inductor_code(norms, *inputs())
    return {
        "op": traced(norms, *inputs()),
        "dynamic": traced(norms, *inputs(), dynamic=True),
        "weight": traced(lambda w: weight_standardization(w), weight),
        "model": traced(lambda x: model(x).last_hidden_state, images),
        "inductor": [line for line in program.splitlines() if "_kernel" in line],
    }


if __name__ == "__main__":
    main()
