"""Training runs: many steps, in several processes, killed in the middle."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bitfast.digits import held_out_images
from tests import training_ranks
from tests.model_pairs import pair
from tests.other_process import ROOT, without_interpreter
from tests.threads import torch_threads
from tests.tolerances import relative_error

PATIENCE = 120


@contextlib.contextmanager
def process(*command: Any) -> Iterator[subprocess.Popen[str]]:
    """Start ``python -m tests.training_ranks``, which does not outlive the block."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.training_ranks", *map(str, command)],
        cwd=ROOT,
        env={**without_interpreter(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


# ---- several processes ------------------------------------------------------------------------------


def test_two_processes(tmp_path):
    """Their gradients are those of one process, and are reduced while the backward pass goes on."""
    arguments = (tmp_path / "rendezvous", tmp_path / "result")
    with (
        process("parallel", 0, *arguments) as first,
        process("parallel", 1, *arguments) as second,
    ):
        outputs = [each.communicate(timeout=PATIENCE)[0] for each in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    results = [torch.load(f"{arguments[1]}-{rank}") for rank in range(2)]
    for layer_type in ("preactivation", "bottleneck"):
        for result in results:
            order = result[f"DDP {layer_type}"]["order"]
            before = order.index("stem")
            assert before >= 3, order
            assert "bucket" in order[before:], order
            assert_near(result[f"DDP {layer_type}"]["gradients"], whole_gradients(layer_type))
            for each in (True, False):
                assert_near(result[f"FSDP {layer_type} {each}"], whole_training(layer_type))


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= 1e-9 * (wanted.norm() + 1e-3), name


def whole_gradients(layer_type: str) -> dict[str, Tensor]:
    model = training_ranks.model_of(layer_type=layer_type).double()
    model(*training_ranks.batch(1, dtype=torch.float64)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}  # type: ignore[misc]


def whole_training(layer_type: str) -> dict[str, Tensor]:
    model = training_ranks.model_of(layer_type=layer_type).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in (0, 1, 2):
        optimizer.zero_grad()
        model(*training_ranks.batch(seed, dtype=torch.float64)).loss.backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


# ---- many steps -----------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """Return held-out digits, 32x32, and what they are."""
    pairs = held_out_images()
    x = torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image, _ in pairs])
    x = x[:, None].double() / x.max()
    return F.interpolate((x - x.mean()) / x.std(), scale_factor=4), torch.tensor(
        [digit for _, digit in pairs]
    )


def losses(model: nn.Module, steps: int) -> Tensor:
    """Train on digits with SGD and momentum; return the loss of each step."""
    x, labels = digits()
    x = x.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    history = []
    torch.manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (16,), generator=order)
        optimizer.zero_grad()
        loss = model(x[chosen], labels[chosen]).loss
        loss.backward()
        optimizer.step()
        history.append(loss.detach().double())
    return torch.stack(history)


@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
def test_losses_follow_those_of_transformers(layer_type):
    settings = {**training_ranks.TINY, "layer_type": layer_type, "depths": [1, 1]}
    ours, theirs = pair("BitForImageClassification", **{**settings, "hidden_sizes": [16, 32]})
    exact = losses(copy.deepcopy(theirs).double(), 200)
    assert exact[-20:].mean() < 0.5 * exact[:20].mean()
    difference = (losses(copy.deepcopy(ours).double(), 200) - exact).abs() / exact
    errors = [relative_error(losses(model, 200), exact) for model in (ours, theirs)]
    print(f"float64: {difference.max():.1e}; float32: {errors[0]:.1e}, theirs {errors[1]:.1e}")
    assert difference[:20].max() < 1e-13
    assert difference.max() < 1e-11
    # A step multiplies roundings, which are others in float32.
    assert errors[0] <= 3 * errors[1] + 1e-3


def test_a_long_run_leaks_no_memory():
    """500 steps, some of them with checkpoints, second derivatives and hidden states."""
    model = training_ranks.model_of(drop_path_rate=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(8, 1, 32, 32)

    def step(number: int) -> None:
        optimizer.zero_grad()
        if number % 5 == 1:
            leaf = x.clone().requires_grad_()
            total = model(leaf).logits.sum()
            (first,) = torch.autograd.grad(total, leaf, create_graph=True)
            first.square().mean().backward()
        elif number % 5 == 2:
            model.gradient_checkpointing_enable()
            model(x).logits.square().mean().backward()
            model.gradient_checkpointing_disable()
        else:
            output = model(x, output_hidden_states=True)
            states = sum(state.square().mean() for state in output.hidden_states)
            (output.logits.square().mean() + states).backward()  # type: ignore[union-attr]
        optimizer.step()

    for number in range(100):
        step(number)
    gc.collect()
    tensors, resident = live_tensors(), resident_bytes()
    for number in range(200):  # in which caches of Python fill up
        step(number)
    gc.collect()
    blocks = sys.getallocatedblocks()
    for number in range(200):
        step(number)
    gc.collect()
    more_blocks, more_bytes = sys.getallocatedblocks() - blocks, resident_bytes() - resident
    assert live_tensors() <= tensors
    print(f"{more_blocks} more objects of Python in 200 steps, {more_bytes} more bytes in 400")
    assert more_blocks < 600  # one for each node would be 800
    assert more_bytes < 8e6  # a single feature map in each step would be 13 MB


def live_tensors() -> int:
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no resident size")


def test_killed_and_resumed(tmp_path):
    """A run that was killed goes on from its checkpoint to the same bits."""
    checkpoint, result = tmp_path / "checkpoint", tmp_path / "result"
    with process("die", checkpoint) as killed:
        output, _ = killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL, output
    with process("resume", checkpoint, result) as resumed:
        output, _ = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0, output
    model, optimizer = training_ranks.new_run()
    training_ranks.train(model, optimizer, range(training_ranks.STEPS))
    found = load_file(result)
    for name, wanted in model.state_dict().items():
        assert torch.equal(found[name], wanted), name
