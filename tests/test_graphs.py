"""Plans recorded as CUDA graphs; here with a recorder that repeats the work on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import bitfast
from bitfast.execution.graph import GraphedPlan, Results
from bitfast.execution.plans import MOST_GRAPHS, Plans
from tests.threads import in_threads
from tests.tiny_models import ours
from tests.weight_changes import CHANGES, features


class Recording:
    """Does the work again, and writes the results over those that it gave."""

    made: ClassVar[list[Recording]] = []

    def __init__(self, function: Callable[[], Results]) -> None:
        self._function = function
        self.results = function()
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        outputs, result = self._function()
        for old, new in zip([*self.results[0], self.results[1]], [*outputs, result], strict=True):
            old.copy_(new)

    @contextmanager
    def after_others(self) -> Iterator[None]:
        yield


@pytest.fixture(autouse=True)
def recordings() -> Iterator[list[Recording]]:
    Recording.made = []
    with torch.no_grad():
        yield Recording.made


@pytest.fixture
def model() -> Any:
    return with_recorder(ours("BitModel", depths=[2, 1], hidden_sizes=[16, 32]).eval())


def with_recorder(model: Any) -> Any:
    """A model that records in this way."""
    model.plans = Plans(model, recorder=Recording)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 40, 36)


def record(model: Any, x: Tensor, **options: Any) -> None:
    with model.plans.recording() as met:
        model(x, **options)
    assert met


def test_results_are_those_of_the_plan_in_memory_of_their_own(model, x, recordings):
    expected = model(x, output_hidden_states=True)
    record(model, x, output_hidden_states=True)
    first = model(x, output_hidden_states=True)
    kept = [t.clone() for t in (first[0], *first.hidden_states)]
    model(torch.randn_like(x), output_hidden_states=True)
    (recording,) = recordings
    assert recording.replays == 3
    memory = {t.data_ptr() for t in (*recording.results[0], recording.results[1])}
    wanted = (expected[0], *expected.hidden_states)
    for now, then, want in zip((first[0], *first.hidden_states), kept, wanted, strict=True):
        assert torch.equal(now, then)
        assert torch.equal(now, want)
        assert now.stride() == want.stride()
        assert now.data_ptr() not in memory


def test_only_what_was_asked_for_is_replayed(model, x, recordings):
    record(model, x)
    (recording,) = recordings
    replays = recording.replays
    model(x[:1])
    model(x, output_hidden_states=True)
    model(torch.randn(2, 3, 33, 47))
    assert recording.replays == replays
    model(torch.randn_like(x))
    assert recording.replays == replays + 1
    assert len(recordings) == 1
    with torch.enable_grad():
        model(x)
    assert recording.replays == replays + 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_recorded_anew(model, x, change, mode, recordings):
    record(model, x)
    with mode():
        before = features(model, x)
    with torch.enable_grad():
        change(model)
    with mode():
        after = features(model, x)
    assert len(recordings) == 2
    assert torch.equal(after, features(copy.deepcopy(model), x))
    assert not torch.equal(after, before)


def test_a_hook_is_called_and_what_comes_after_it_can_be_recorded_no_more(model, x, recordings):
    record(model, x)
    seen: list[Tensor] = []
    handle = model.encoder.stages[0].layers[1].register_forward_hook(lambda m, i, o: seen.append(o))
    for count in (1, 2):
        model(x)
        assert len(seen) == count
    handle.remove()
    expected = features(copy.deepcopy(model), x)
    assert torch.equal(features(model, x), expected)
    assert len(seen) == 2


def test_copies_and_released_models_have_none(model, x, recordings):
    record(model, x)
    features(copy.deepcopy(model), x)
    replays = recordings[0].replays
    bitfast.release_graphs(nn.Sequential(model))
    features(model, x)
    assert (len(recordings), recordings[0].replays) == (1, replays)


def test_the_number_of_graphs_is_bounded(model, recordings):
    batches = [torch.randn(n, 3, 17, 18) for n in range(1, MOST_GRAPHS + 3)]
    for x in batches:
        record(model, x)
    assert len(recordings) == len(batches)
    replays = [recording.replays for recording in recordings]
    for x in batches:
        assert torch.equal(features(model, x), features(copy.deepcopy(model), x))
    grown = [r.replays - before for r, before in zip(recordings, replays, strict=True)]
    assert grown == [0, 0] + [1] * MOST_GRAPHS


def test_threads_take_turns(model, x):
    record(model, x)
    batches = [torch.randn_like(x) for _ in range(4)]
    expected = [features(copy.deepcopy(model), batch) for batch in batches]
    results: list[bool] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results.append(torch.equal(features(model, batches[number]), expected[number]))

    in_threads(work, 4)
    assert results == [True] * 20


def test_during_the_capture_of_another_graph_the_plan_runs_plainly(
    model, x, recordings, monkeypatch
):
    record(model, x)
    expected, replays = features(model, x), recordings[0].replays
    # There is no device whose state could be asked.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(features(model, x), expected)
    assert recordings[0].replays == replays


def test_images_of_any_layout_are_copied_in(x, recordings):
    plan = GraphedPlan(lambda images: ([images + 1], images * 2), x, Recording)
    for images in (x, torch.randn_like(x).contiguous(memory_format=torch.channels_last)):
        (output,), result = plan.execute(images)
        assert torch.equal(output, images + 1)
        assert torch.equal(result, images * 2)


def test_what_is_both_an_output_and_the_result_stays_one(x):
    def run(images: Tensor) -> Results:
        result = images * 2
        return [result], result

    (output,), result = GraphedPlan(run, x, Recording).execute(x)
    assert output is result


@pytest.mark.parametrize(
    ("model_of", "images", "error", "message"),
    [
        (lambda: 3, torch.zeros(1, 3, 32, 32), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: ours("BitModel").eval(), [1], TypeError, "pixel_values must be a torch.Tensor, got list"),
        (lambda: nn.ReLU(), torch.zeros(1, 3, 32, 32), ValueError, "no network of bitfast's in this ReLU"),
        (lambda: ours("BitModel").eval(), torch.zeros(1, 3, 32, 32), ValueError, "CUDA device, got cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(model_of, images, error, message):
    with pytest.raises(error, match=message):
        bitfast.capture(model_of(), images)


def test_releasing_needs_a_model():
    with pytest.raises(TypeError, match="model must be"):
        bitfast.release_graphs("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no network of bitfast's"):
        bitfast.release_graphs(nn.ReLU())
