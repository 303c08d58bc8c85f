"""Training steps captured as CUDA graphs compute what eager steps compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.configuration import BitConfig
from bitfast.modeling import BitForImageClassification

SETTINGS: dict[str, Any] = {
    "embedding_size": 32, "hidden_sizes": [64, 128], "depths": [2, 2], "num_groups": 8, "num_labels": 7,
}  # fmt: skip
BATCH, SIZE, STEPS = 4, 64, 10
LAYER_TYPES = ["preactivation", "bottleneck"]
Step = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """cuDNN's quickest gradients add up in any order: then no two runs are equal."""
    previous = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = previous


class Training:
    """A model that trains on a static batch, by a step that may be captured."""

    def __init__(
        self, model: Any, optimizer: str, rate: Tensor | float, dtype: torch.dtype | None
    ) -> None:
        self.model, self.dtype, self.rate = model, dtype, rate
        self.images = torch.zeros(BATCH, 3, SIZE, SIZE, device="cuda")
        self.labels = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SGD":
            self.optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=rate, capturable=True, fused=True)
        self.scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            "cuda", self.dtype, enabled=self.dtype is not None, cache_enabled=False
        ):
            loss = self.model(pixel_values=self.images, labels=self.labels).loss
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def load(self, number: int) -> None:
        random = torch.Generator().manual_seed(number)
        self.images.copy_(torch.randn(self.images.shape, generator=random))
        self.labels.copy_(torch.randint(7, (BATCH,), generator=random))

    def run(self, step: Step, steps: range) -> list[Tensor]:
        """Return the losses of steps, each of another batch and at another learning rate."""
        losses = []
        for number in steps:
            self.load(number)
            if isinstance(self.rate, Tensor):
                self.rate.fill_(0.002 / (1 + number))
            losses.append(step().clone())
        return losses


def captured(training: Training) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def warm_up(training: Training) -> None:
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        training.run(training.step, range(3))
    current.wait_stream(side)


def make(layer_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = BitConfig(**SETTINGS, layer_type=layer_type, **settings)
    return BitForImageClassification(config).cuda().train()


def pair(model: Any, *arguments: Any) -> tuple[Training, Training]:
    """Return two trainings that begin alike, and have been warmed up."""
    optimizer, has_rate, dtype = arguments
    trainings = []
    for each in (model, copy.deepcopy(model)):
        rate = torch.tensor(0.002, device="cuda") if has_rate else 0.002
        trainings.append(Training(each, optimizer, rate, dtype))
        warm_up(trainings[-1])
    return trainings[0], trainings[1]


def assert_same(actual: Any, expected: Any) -> None:
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_captured_steps_equal_eager_steps(optimizer, dtype, layer_type):
    ours, eager = pair(make(layer_type), optimizer, True, dtype)
    losses = ours.run(captured(ours), range(3, 3 + STEPS))
    expected = eager.run(eager.step, range(3, 3 + STEPS))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert len(set(map(float, losses))) == STEPS
    assert_same(ours.model, eager.model)


def test_a_frozen_stage_stays_and_the_others_train():
    model = make("preactivation")
    model.bit.embedder.requires_grad_(False)
    model.bit.encoder.stages[0].requires_grad_(False)
    ours, eager = pair(model, "SGD", False, torch.bfloat16)
    before = copy.deepcopy(model)
    ours.run(captured(ours), range(3, 6))
    eager.run(eager.step, range(3, 6))
    assert_same(ours.model, eager.model)
    assert_same(ours.model.bit.encoder.stages[0], before.bit.encoder.stages[0])
    assert not torch.equal(ours.model.classifier[1].weight, before.classifier[1].weight)


def test_stochastic_depth_is_drawn_anew_in_each_replay():
    training = Training(make("preactivation", drop_path_rate=0.5), "SGD", 0.0, None)
    warm_up(training)
    step = captured(training)
    losses = {float(training.run(step, range(1))[0]) for _ in range(STEPS)}
    assert len(losses) > 1


def test_evaluation_after_replays_sees_the_weights_as_they_are():
    ours, _ = pair(make("preactivation"), "SGD", False, None)
    step = captured(ours)
    for number in range(2):
        ours.model.train()
        ours.run(step, range(number, number + 1))
        ours.model.eval()
        with torch.no_grad():
            logits = ours.model(ours.images).logits
            assert torch.equal(logits, copy.deepcopy(ours.model)(ours.images).logits)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_graphed_model_trains_as_an_eager_one(dtype, layer_type):
    ours, eager = pair(make(layer_type), "SGD", False, dtype)
    with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(ours.model, (torch.randn_like(ours.images),))
    losses: list[list[Tensor]] = [[], []]
    for number in range(3, 3 + STEPS):
        for training, model, found in zip(
            (ours, eager), (graphed, eager.model), losses, strict=True
        ):
            training.load(number)
            training.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                logits = model(training.images).logits
                loss = torch.nn.functional.cross_entropy(logits, training.labels)
            loss.backward()
            training.optimizer.step()
            found.append(loss.detach())
    assert torch.equal(*map(torch.stack, losses))
    assert_same(ours.model, eager.model)
