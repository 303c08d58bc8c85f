"""The loop against a plain one, micro-batches against whole batches, and what a loop must not go on from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bitfast import BitConfig, BitForImageClassification, BitImageProcessor
from bitfast.finetuning import hardware, training
from bitfast.finetuning.batches import Step
from bitfast.finetuning.checkpoint import read_progress
from bitfast.finetuning.command import weights_digest, with_new_head
from bitfast.finetuning.hardware import bytes_per_image, choose_dtype, choose_micro_batch
from bitfast.finetuning.loading import MicroBatch
from bitfast.finetuning.processes import Processes
from bitfast.finetuning.recipe import Recipe
from bitfast.finetuning.training import Schedule, Trainer, with_last
from tests.cli.common import LABELS
from tests.finetuning.runs import rows, run

CPU = Processes(torch.device("cpu"))
SMALL: dict[str, Any] = {
    "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2,
}  # fmt: skip
RECIPE = Recipe(
    steps=8, batch_size=6, base_learning_rate=0.05, warmup_steps=2, decay_steps=(4, 6),
    momentum=0.9, weight_decay=0.01, resize=18, crop=16, flip=True, mixup_alpha=0.0,
)  # fmt: skip


def model() -> BitForImageClassification:
    torch.manual_seed(3)
    return with_new_head(BitForImageClassification(BitConfig(**SMALL)), LABELS)


def pixels_and_labels(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (6,), generator=generator)
    pixels[range(6), labels] //= 4  # something to learn
    return pixels.contiguous(memory_format=torch.channels_last), labels


def steps(size: int, mixing: float | None = None) -> Iterator[Step]:
    for number in range(RECIPE.steps):
        parts = zip(*(tensor.split(size) for tensor in pixels_and_labels(number)), strict=True)
        batches = [MicroBatch(*part, torch.arange(len(part[1])), {}) for part in parts]
        yield Step(number, 6, mixing, iter(batches))


def train(size: int, mixing: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return the losses and the right answers of each step, and the trained weights."""
    trainer = Trainer(model(), RECIPE, BitImageProcessor(), dtype, CPU)
    sums = []
    for step in steps(size, mixing):
        sums.append(trainer.gradients(step))
        trainer.update(step.number)
    return torch.stack(sums), trainer.model.state_dict()


def train_plainly(mixing: float | None = None) -> Any:
    """The same with nothing but torch: the whole batch, a loss of probabilities, SGD written out."""
    network, processor = model(), BitImageProcessor()
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    momenta = [torch.zeros_like(parameter) for parameter in network.parameters()]
    sums = []
    for number in range(RECIPE.steps):
        pixels, labels = pixels_and_labels(number)
        images, targets = (pixels / 255 - mean) / std, F.one_hot(labels, 3).float()
        if mixing is not None:
            partners = [1, 0, 3, 2, 5, 4]
            images = mixing * images + (1 - mixing) * images[partners]
            targets = mixing * targets + (1 - mixing) * targets[partners]
        logits = network(images).logits
        losses = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
        gradients = torch.autograd.grad(losses.mean(), list(network.parameters()))
        right = targets.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        sums.append(torch.stack([losses.sum().detach(), right]).double())
        rate = [0.025, 0.05, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005][number]
        with torch.no_grad():
            for parameter, gradient, momentum in zip(
                network.parameters(), gradients, momenta, strict=True
            ):
                momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter -= rate * momentum
    return torch.stack(sums), network.state_dict()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mixing", [None, 0.8])
def test_the_loop_is_that_of_the_paper(mixing: float | None) -> None:
    expected = train_plainly(mixing)
    assert expected[0][0, 0] == pytest.approx(6 * math.log(3))  # the head begins at zero
    assert expected[0][-1, 0] < expected[0][0, 0] - 0.1
    for size in (6, 4, 2):
        assert_close(train(size, mixing), expected)


def test_bfloat16_computes_the_same_but_for_its_rounding() -> None:
    exact, rounded = train(6)[0], train(6, dtype=torch.bfloat16)[0]
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded[:, 0], exact[:, 0], rtol=0.02, atol=0.05)


def test_a_network_under_a_new_head() -> None:
    base = BitForImageClassification(BitConfig(**SMALL, drop_path_rate=0.5))
    changed = with_new_head(base, ["a", "b", "c"])
    assert changed.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not any(parameter.any() for parameter in changed.classifier.parameters())
    assert weights_digest(changed.bit) == weights_digest(base.bit)
    images = torch.rand(8, 3, 16, 16)
    with torch.no_grad():
        first, second = (changed.train()(images, output_hidden_states=True) for _ in range(2))
    assert torch.equal(first.hidden_states[-1], second.hidden_states[-1])  # nothing is drawn


def test_with_last() -> None:
    assert list(with_last([])) == []
    assert list(with_last("abc")) == [("a", False), ("b", False), ("c", True)]


def test_evaluations_are_regular_and_at_the_end() -> None:
    schedule = Schedule(evaluate_every=3, checkpoint_every=None)
    assert [done for done in range(9) if schedule.evaluates_after(done, 8)] == [3, 6, 8]


# ---- what must not happen -----------------------------------------------------------------------


def test_a_loss_that_is_not_finite(images, base, tmp_path, capsys) -> None:
    options = ("--learning-rate", 1e30, "--warmup", 0, "--checkpoint-every", 1)
    assert run(images, tmp_path / "run", base, *options) == 1
    err = capsys.readouterr().err
    assert "is not finite in step" in err
    assert "Try a smaller --learning-rate" in err
    progress = read_progress(tmp_path / "run")
    assert progress is not None
    assert progress.step < 3
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))


def test_too_little_memory(images, base, tmp_path, capsys, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Trainer, "gradients", fail)
    assert run(images, tmp_path / "run", base) == 1
    assert "for 4 images at a time; try a smaller --micro-batch" in capsys.readouterr().err


# ---- choices of the machine ---------------------------------------------------------------------


def test_dtype_by_what_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, bool] = {}
    monkeypatch.setattr(hardware, "_cpu_capabilities", lambda: found)
    device = torch.device("cpu")
    assert choose_dtype(device, None)[0] == torch.float32
    found["avx512_bf16"] = True
    dtype, choice = choose_dtype(device, None)
    assert dtype == torch.bfloat16
    assert "AVX512-BF16" in choice.reason
    assert choose_dtype(device, "float32")[0] == torch.float32


@pytest.mark.parametrize("ask", [hardware._cpu_capabilities, hardware._flags_of_linux])
def test_what_the_cpu_has_is_known(ask: Any) -> None:
    assert ask().get("sse2", True)


@pytest.mark.parametrize(
    ("memory", "world_size", "expected"),
    [(2**40, 1, 32), (100 * 2**20, 1, 16), (1, 1, 2), (2**40, 50, 12), (2**40, 2, 32)],
)
def test_images_at_a_time(
    memory: int, world_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_of", lambda device: memory)
    monkeypatch.setattr(hardware, "bytes_per_image", lambda *_: 2**20)
    here = dataclasses.replace(CPU, world_size=world_size)
    number, choice = choose_micro_batch(model(), 512, 16, torch.float32, here, None)
    assert number == expected
    assert choice.value == str(expected)


def test_memory_of_an_image_is_measured() -> None:
    network = model()
    small, large = (bytes_per_image(network, crop, torch.float32) for crop in (32, 64))
    assert 3 * 32 * 32 * 4 < small < 2**20
    assert large == pytest.approx(4 * small, rel=0.2)
    assert 2**20 < hardware.memory_of(torch.device("cpu")) < 2**50
