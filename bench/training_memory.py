"""``python -m bench.training_memory``: the memory of a training step on a GPU, computed without one.

A step (forward, backward, SGD with momentum) is run on the meta device, where tensors have sizes and lifetimes
and no contents. *Kept* is what autograd holds when the forward pass has ended: the storages of what was saved,
without the parameters. *Peak* is the most that lives at once: parameters, gradients, momentum and images
included; what libraries allocate for themselves (cuDNN's workspaces, CUDA's context, fragmentation) is not.

The meta device knows no autocast. Here it casts what CUDA's casts, of the functions that BiT calls. (A fake
CUDA device knows it, but autograd does not work on one in builds of torch without CUDA.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import host
from .base import ROOT, environment_of, git, worktree_of
from .models import R50X1, R101X3
from .tables import table

R152X4: dict[str, Any] = {
    "num_labels": 1000, "depths": [3, 8, 36, 3],
    "embedding_size": 256, "hidden_sizes": [1024, 2048, 4096, 8192],
}  # fmt: skip
NETWORKS = {"R50x1": R50X1, "R101x3": R101X3, "R152x4": R152X4}
DTYPES = ("autocast", "float32")
"""Of the computation; parameters, gradients and momentum are float32."""
BATCHES = {
    ("R50x1", 224): 128, ("R50x1", 480): 32, ("R101x3", 224): 32, ("R101x3", 480): 8,
    ("R152x4", 224): 16, ("R152x4", 480): 4,
}  # fmt: skip
"""By network and size of the images: big models are fine-tuned at 480."""
KERNELS = ("group_norm_act", "weight_standardization", "same_padding")
"""Whose operators a GPU computes by kernels in training."""
CARDS = (24, 40, 48, 80, 141)
"""GB, of 10^9 bytes."""
MARGIN = 0.08
"""Of a card's memory: for CUDA's context, the workspaces of libraries, and fragmentation."""

# ---- autocast ---------------------------------------------------------------------------------------------


class MetaAutocast(TorchFunctionMode):
    """Casts as autocast does on CUDA, with bfloat16: what BiT's networks call."""

    narrow = frozenset({torch.conv2d, F.conv2d, F.linear})
    wide = frozenset({F.group_norm, torch.group_norm, F.cross_entropy, F.layer_norm})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function with its arguments cast."""
        dtype = torch.bfloat16 if func in self.narrow else None
        dtype = torch.float32 if func in self.wide else dtype
        if dtype is not None:
            args, kwargs = tree_map(lambda x: cast(x, dtype), (args, kwargs))
        return func(*args, **(kwargs or {}))


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def autocast(is_on: bool) -> Iterator[None]:
    """Within the block, the meta device has autocast, for torch's functions and for bitfast's."""
    if not is_on:
        yield
        return
    asked, original = torch.get_autocast_dtype, torch.autocast

    def dtype_of(device_type: str) -> torch.dtype:
        return torch.bfloat16 if device_type == "meta" else asked(device_type)

    def switched(device_type: str, *others: Any, **options: Any) -> Any:
        # Operators of bitfast are called so, which the mode below does not see.
        is_meta = device_type == "meta"
        return nullcontext() if is_meta else original(device_type, *others, **options)

    with ExitStack() as stack:
        for name in ("bitfast.ops.common", "bitfast.network"):
            if name in sys.modules:
                stack.enter_context(
                    patch.object(sys.modules[name], "is_autocast_on", lambda kind: kind == "meta")
                )
        stack.enter_context(patch.object(torch, "get_autocast_dtype", dtype_of))
        stack.enter_context(patch.object(torch, "autocast", switched))
        stack.enter_context(MetaAutocast())
        yield


@contextmanager
def kernels() -> Iterator[None]:
    """Within the block, bitfast computes by its kernels' operators, which keep less than plain PyTorch, and in
    channels_last, as on a GPU.

    Raises:
        RuntimeError: the extension, which defines them, was not built.
    """
    from bitfast import backends
    from bitfast.execution import forward_pass

    reason = backends.why_unavailable("group_norm_act", "native", "cpu")
    if reason is not None:
        raise RuntimeError(f"memory is computed of the extension's operators: {reason}")
    dtypes = frozenset({torch.float32, torch.bfloat16})
    with (
        patch.object(backends, "_kernels", dict(backends._kernels)),
        patch.object(forward_pass, "prefers_channels_last", lambda _: True),
    ):
        for op in KERNELS:
            backends.register_kernel(op, "native", "meta", dtypes, lambda: None)
        yield


# ---- what is kept, and what lives ---------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of a training step.

    Attributes:
        kept: For the backward pass, besides the parameters and images.
        parameters: Of the model; gradients and momentum take as much each.
        peak: The most that lives at once.
    """

    kept: int
    parameters: int
    peak: int


def kept_tensors(forward: Callable[[], Any], others: Sequence[Tensor]) -> list[Tensor]:
    """Return what autograd keeps of a forward pass: a tensor of each storage, those of ``others`` left out."""
    known = {x.untyped_storage()._cdata for x in others}
    found: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        place = x.untyped_storage()._cdata
        if place not in known:
            found.setdefault(place, x)  # held, so that no storage takes another's place
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        forward()
    return list(found.values())


def kept_bytes(forward: Callable[[], Any], others: Sequence[Tensor]) -> int:
    """Return the bytes of the storages that :func:`kept_tensors` finds."""
    return sum(x.untyped_storage().nbytes() for x in kept_tensors(forward, others))


class Lifetimes(TorchDispatchMode):
    """Notes how many bytes live, in the storages of what operators return, and the most that did."""

    def __init__(self, tensors: list[Tensor]) -> None:
        """Begin with tensors that live already."""
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = self.peak = 0
        for x in tensors:
            self.see(x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator, and watch what it returns."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.see(x)
        return result

    def see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        place = storage._cdata
        if place not in self.alive:
            self.alive[place] = storage.nbytes()
            self.bytes += self.alive[place]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, place)

    def forget(self, place: int) -> None:
        self.bytes -= self.alive.pop(place)


def memory_of(
    library: str,
    settings: dict[str, Any],
    batch: int,
    size: int,
    dtype: str = "autocast",
    *,
    checkpointing: bool = False,
) -> Memory:
    """Compute the memory of a training step.

    Args:
        library: "bitfast" or "transformers".
        settings: Of the network.
        batch: The number of images.
        size: Their height and width.
        dtype: One of :data:`DTYPES`.
        checkpointing: Whether blocks are computed again in the backward pass.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    with torch.device("meta"):
        model: Any = host.model_of(library, "BitForImageClassification", **settings).train()
        images = torch.empty(batch, 3, size, size)
    if checkpointing:
        # torch knows of no autocast that it could switch on again for what is recomputed.
        model.gradient_checkpointing_enable(
            {
                "use_reentrant": False,
                "preserve_rng_state": False,
                "context_fn": lambda: (nullcontext(), autocast(dtype == "autocast")),
            }
        )
    parameters = list(model.parameters())

    def forward() -> Tensor:
        with autocast(dtype == "autocast"):
            return model(images).logits

    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # makes the momentum
    optimizer.zero_grad()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    with kernels() if library == "bitfast" else nullcontext():
        kept = kept_bytes(forward, [*parameters, images])
        with Lifetimes([*parameters, *momentum, images]) as lifetimes:
            forward().sum().backward()
            optimizer.step()
    own = sum(p.untyped_storage().nbytes() for p in parameters)
    return Memory(kept, own, lifetimes.peak)


# ---- what fits --------------------------------------------------------------------------------------------

PLACES = (1, 8, 64)
"""Batches at which the peak is computed, and one image above each."""


class Peak(NamedTuple):
    """The peak as a function of the batch: the highest of some lines, each of a moment of the step."""

    lines: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, network: str, size: int, *, checkpointing: bool) -> Peak:
        """Return the peak of bitfast's step under autocast."""

        def at(batch: int) -> int:
            settings = NETWORKS[network]
            return memory_of("bitfast", settings, batch, size, checkpointing=checkpointing).peak

        lines = []
        for batch in PLACES:
            peak = at(batch)
            slope = at(batch + 1) - peak
            lines.append((peak - batch * slope, slope))
        return cls(tuple(lines))

    def largest_batch(self, card: float) -> int:
        """Return the largest batch that fits on a card of so many GB; 0 if no image does."""
        limit = int(card * 1e9 * (1 - MARGIN))
        return max(min((limit - constant) // slope for constant, slope in self.lines), 0)


# ---- the report -------------------------------------------------------------------------------------------


def rows_of(library: str) -> list[Memory]:
    """Return the memory of a step for each network, size and dtype."""
    return [
        memory_of(library, NETWORKS[name], batch, size, dtype)
        for (name, size), batch in BATCHES.items()
        for dtype in DTYPES
    ]


# That checkout's bitfast, and this one's way to compute.
COMPUTE_BASE = """
import json, sys, bitfast
sys.path.insert(0, sys.argv[1])
from bench import training_memory
print(json.dumps(training_memory.rows_of("bitfast")))
"""


def rows_of_base(folder: Path) -> list[Memory]:
    """Return the rows of another checkout's bitfast, computed in a process of its own."""
    command = [sys.executable, "-c", COMPUTE_BASE, str(ROOT)]
    printed = subprocess.check_output(command, cwd=folder, env=environment_of(folder))
    return [Memory(*row) for row in json.loads(printed.splitlines()[-1])]


def steps_table(rows: dict[str, list[Memory]]) -> list[str]:
    """Return the table of what a step keeps, and of its peak; ratios are to the last column's."""
    heads = ["kept, GB (of the last; peak, GB)", *rows]
    cells = []
    titles = [(*key, batch, dtype) for key, batch in BATCHES.items() for dtype in DTYPES]
    for number, (name, size, batch, dtype) in enumerate(titles):
        last = list(rows.values())[-1][number]
        cells.append([f"{name} {size}x{size} batch {batch} {dtype}"])
        for each in rows.values():
            found = each[number]
            share = f"{100 * found.kept / last.kept:.0f} %"
            cells[-1].append(f"{found.kept / 1e9:.2f} ({share}; {found.peak / 1e9:.2f})")
    return table(heads, cells)


def cards_table() -> list[str]:
    """Return the table of the largest batches that fit, with gradient checkpointing behind a slash."""
    cells = []
    for name, size in BATCHES:
        plain, again = (Peak.of(name, size, checkpointing=each) for each in (False, True))
        pairs = (f"{plain.largest_batch(card)} / {again.largest_batch(card)}" for card in CARDS)
        cells.append([f"{name} {size}x{size}", *pairs])
    return table(["largest batch", *(f"{card} GB" for card in CARDS)], cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="another commit, to be computed too")
    parser.add_argument("--cards", action="store_true", help="which batch fits on which card")
    options = parser.parse_args(arguments)
    if options.cards:
        print("\n".join(cards_table()))
        return 0
    rows = {"bitfast": rows_of("bitfast")}
    if options.base is not None:
        try:
            with worktree_of(options.base) as folder:
                commit = git(folder, "rev-parse", "--short", "HEAD")
                rows = {f"bitfast {commit}": rows_of_base(folder), **rows}
        except ValueError as error:
            parser.error(str(error))
    rows = {"transformers": rows_of("transformers"), **rows}
    print("\n".join(steps_table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
