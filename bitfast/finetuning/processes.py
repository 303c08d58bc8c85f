"""The processes of a run: one, or those that torchrun has started, each with its share of every batch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bitfast.commands.classify import find_device
from bitfast.finetuning.errors import PeerLost, UsageError

Result = TypeVar("Result")

LONGEST_MESSAGE = 2000
"""Bytes of an error that the other processes get to know."""


@dataclass(frozen=True)
class Processes:
    """This process and how many others there are.

    Attributes:
        device: Where this process computes.
        rank: This process's number, from 0.
        world_size: How many there are.
        local_world_size: How many of them are on this machine.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model whose gradients are the mean of those of all processes."""
        if not self.are_several:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors that the processes pass, on this process's device.

        Raises:
            PeerLost: another process has ended.
        """
        values = values.to(self.device)
        if self.are_several:
            with losing_peers():
                distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes have come here.

        Raises:
            PeerLost: another process has ended.
        """
        self.sum(torch.zeros(1)).cpu()

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something that may fail in every process; if it fails in one, it fails in all.

        Raises:
            UsageError: in the first process, with the message of one in which it failed.
            PeerLost: in the others; or another process has ended.
        """
        result, problem = None, ""
        try:
            result = work()
        except UsageError as error:
            if not self.are_several:
                raise
            problem = str(error)
        problems = self._messages(problem) if self.are_several else []
        for rank, text in enumerate(problems):
            if text and self.is_first:
                raise UsageError(text if rank == 0 else f"process {rank}: {text}")
            if text:
                raise PeerLost("the first process tells what is wrong")
        return result  # type: ignore[return-value]

    def _messages(self, message: str) -> list[str]:
        """Return the message of every process."""
        content = message.encode(errors="backslashreplace")[:LONGEST_MESSAGE]
        padded = torch.zeros(self.world_size, LONGEST_MESSAGE, dtype=torch.uint8)
        padded[self.rank, : len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        rows = self.sum(padded).cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


@contextlib.contextmanager
def losing_peers() -> Iterator[None]:
    """Inside, what torch raises because another process has ended becomes PeerLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        signs = (
            "Connection closed by peer",
            "Connection reset by peer",
            "gloo",
            "NCCL",
            "Broken pipe",
        )
        if any(sign in text for sign in signs):
            raise PeerLost("another process of this run has ended") from error
        raise


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Processes]:
    """Join the processes that torchrun has started, if it has, until the end of the block.

    Args:
        device: As ``--device`` has it; None: CUDA where there is a GPU, else the CPU.

    Raises:
        UsageError: there is no such device, or not one for each process.
    """
    if not are_there_others():
        yield Processes(_find_device(device))
        return
    world_size = int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise UsageError(
            f"argument --device: must be cuda or cpu for {world_size} processes, got {device!r}"
        )
    found = _find_device(f"cuda:{local_rank}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(found)
    options: dict[str, Any] = {"device_id": found} if kind == "cuda" else {}
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", **options)
    try:
        yield Processes(
            found,
            distributed.get_rank(),
            world_size,
            int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )
    finally:
        distributed.destroy_process_group()


def are_there_others() -> bool:
    """Whether torchrun has started other processes beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(status: int) -> NoReturn:
    """End this process, one of several, at once.

    DistributedDataParallel keeps gloo's group alive (torch 2.13), whose threads may release a tensor while the
    interpreter ends. They then wait for the interpreter, which ends them in a place where C++ aborts.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def share(count: int, processes: Processes) -> int:
    """Return the most images of ``count`` that a process gets: an even number, unless it gets all."""
    if not processes.are_several:
        return count
    pairs = -(-count // 2)
    return 2 * -(-pairs // processes.world_size)


def synchronized(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, a backward pass exchanges gradients only if it is the last one of its step."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def _find_device(name: str | None) -> torch.device:
    try:
        return find_device(name)
    except ValueError as error:
        raise UsageError(f"argument --device: {error}") from error
