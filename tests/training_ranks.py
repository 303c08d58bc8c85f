"""What other processes do in the tests of training: ``python -m tests.training_ranks WHAT ARGUMENTS...``.

They import as little as they can, and compute with one thread.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfast import BitConfig, BitForImageClassification

TINY: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [16, 32, 32],
    "depths": [1, 2, 1],
    "num_groups": 4,
    "num_labels": 10,
    "num_channels": 1,
}
STEPS = 12
"""Of the run that is killed in the middle."""


def model_of(**settings: Any) -> BitForImageClassification:
    """Return the same model each time."""
    torch.manual_seed(5)
    model = BitForImageClassification(BitConfig(**{**TINY, **settings}))
    nn.init.normal_(model.classifier[1].weight, std=0.1)
    return model


def batch(seed: int, count: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 24, 24, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (count,), generator=generator)


# ---- two processes -----------------------------------------------------------------------------------


def start_group(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )


def train_in_parallel(rank: int, rendezvous: str, result: str) -> None:
    """Take gradients of half a batch with DDP, noting what happens when; then train with FSDP."""
    start_group(rank, rendezvous)
    found: dict[str, Any] = {}
    for layer_type in ("preactivation", "bottleneck"):
        found[f"DDP {layer_type}"] = _distributed(rank, layer_type)
        for each in (True, False):
            found[f"FSDP {layer_type} {each}"] = _sharded(rank, layer_type, each)
    torch.save(found, f"{result}-{rank}")
    torch.distributed.destroy_process_group()


def _half(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    x, labels = batch(seed, dtype=torch.float64)
    return x[rank::2], labels[rank::2]


def _distributed(rank: int, layer_type: str) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = model_of(layer_type=layer_type).double()
    events: list[str] = []
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.005)

    def reduce(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations as strings
        events.append("bucket")
        total = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return total.then(lambda future: future.value()[0] / 2)

    parallel.register_comm_hook(None, reduce)
    model.bit.embedder.convolution.weight.register_hook(lambda _: events.append("stem"))
    for seed in (0, 1):  # in the first step there is one bucket
        x, labels = _half(rank, seed)
        events.clear()
        model.zero_grad()
        parallel(x, labels).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"order": events, "gradients": gradients}


def _sharded(rank: int, layer_type: str, each_block: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = model_of(layer_type=layer_type).double()
    if each_block:
        for stage in model.bit.encoder.stages:
            for block in stage.layers:
                fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in (0, 1, 2):
        x, labels = _half(rank, seed)
        optimizer.zero_grad()
        model(x, labels).loss.backward()
        optimizer.step()
    return {n: p.full_tensor().detach() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


# ---- a run that is killed --------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, labels = batch(step)
        optimizer.zero_grad()
        model(x, labels).loss.backward()
        optimizer.step()


def new_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that drops branches at random, and its optimizer."""
    model = model_of(drop_path_rate=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    torch.manual_seed(9)
    return model, optimizer


def run_and_die(checkpoint: str) -> None:
    """Train to the middle, write a checkpoint, train on and be killed."""
    from safetensors.torch import save_file

    model, optimizer = new_run()
    train(model, optimizer, range(STEPS // 2))
    save_file(model.state_dict(), f"{checkpoint}.safetensors")
    state = {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(state, checkpoint)
    train(model, optimizer, range(STEPS // 2, STEPS - 2))
    os.kill(os.getpid(), signal.SIGKILL)


def resume(checkpoint: str, result: str) -> None:
    from safetensors.torch import load_file, save_file

    model, optimizer = new_run()
    model.load_state_dict(load_file(f"{checkpoint}.safetensors"))
    state = torch.load(checkpoint)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    train(model, optimizer, range(STEPS // 2, STEPS))
    save_file(model.state_dict(), result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    if what == "parallel":
        train_in_parallel(int(arguments[0]), arguments[1], arguments[2])
    elif what == "die":
        run_and_die(arguments[0])
    elif what == "resume":
        resume(arguments[0], arguments[1])
    else:
        sys.exit(f"unknown: {Path(what).name}")
