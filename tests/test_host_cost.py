"""What a planned pass costs the host: calls are counted, and the guard is timed.

The requirement: a warm inference pass of a network as deep as R50x1 makes at most 800 calls of Python functions
(transformers' makes some 1,500), and knows in at most 60 microseconds that its plan still holds. The bounds of
the lowerings are below that, so that the cost cannot creep back. ``python -m bench.host`` prints all of it.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch

from bench import host
from bitfast import use_backend
from bitfast.execution import cpu, cuda, plan
from bitfast.kernels import launch
from tests.interpreter import DEVICE

REQUIRED = 800
"""Calls of Python functions in one pass, at most."""

GUARD_MICROSECONDS = 60.0


class Bound(NamedTuple):
    """What a pass may cost where one lowering serves.

    Attributes:
        lowering: The module.
        calls: Of Python functions, at most.
        entries: Into torch's dispatcher from Python, at most.
        device: Of the network.
        backends: What has to be demanded for it to serve there, by op.
        settings: Of the network.
    """

    lowering: Any
    calls: int
    entries: int
    device: str
    backends: dict[str, str]
    settings: dict[str, Any]

    @contextmanager
    def applies(self) -> Iterator[None]:
        """Within the block, the lowering serves, in inference."""
        demand = use_backend(**self.backends) if self.backends else nullcontext()
        with torch.no_grad(), demand:
            yield

    def calls_of(self, model: Any, images: torch.Tensor) -> Counter[str]:
        """Return the calls of Python functions in a warm pass."""
        with self.applies():
            for _ in range(host.WARM_UPS):
                model(images)
            return host.python_calls_of(model, images)[0]


TRITON = {"group_norm_act": "triton", "weight_standardization": "triton"}

LOWERINGS = [
    pytest.param(Bound(cpu, 300, 80, "cpu", {}, {}), id="cpu"),
    pytest.param(Bound(cuda, 600, 70, DEVICE, TRITON, host.NARROW), id="cuda"),
]
"""Every lowering has its bound."""


@pytest.fixture(params=LOWERINGS)
def bound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bound:
    bound: Bound = request.param
    if bound.lowering is cuda and bound.device == "cpu":
        # In Triton's interpreter a launch is thousands of calls; on a GPU it is one, of Triton's launcher. What
        # is computed makes no difference to what is called.
        monkeypatch.setattr(launch.Launch, "launch", lambda *_: None)
        monkeypatch.setattr(launch._PublicLaunch, "__call__", lambda *_: None)
    with bound.applies():
        if plan.lowering_for(bound.device, torch.float32) is not bound.lowering:
            pytest.skip("this lowering serves no network here: the extension was not built")
    return bound


@pytest.fixture
def model(bound: Bound) -> Any:
    return host.model_of("bitfast", **bound.settings).to(bound.device)


@pytest.fixture
def images(bound: Bound) -> torch.Tensor:
    return torch.randn(host.IMAGES, device=bound.device)


def test_every_lowering_has_a_bound() -> None:
    bounds: list[Bound] = [case.values[0] for case in LOWERINGS]  # type: ignore[misc]
    assert {bound.lowering for bound in bounds} == set(plan.LOWERINGS)
    assert all(bound.calls <= REQUIRED for bound in bounds)


def test_a_pass_makes_few_calls(bound: Bound, model: Any, images: torch.Tensor) -> None:
    calls = bound.calls_of(model, images)
    print(f"{calls.total()} calls of Python functions")
    assert calls.total() <= bound.calls, calls.most_common(20)


def test_a_pass_enters_the_dispatcher_a_few_times(
    bound: Bound, model: Any, images: torch.Tensor
) -> None:
    """Once for each operator that a step is, and now and then for memory: transformers' does it 329 times."""
    with bound.applies():
        calls = host.calls_of(model, images)
    entries = calls["operators_from_python"]
    print(f"{entries} entries from Python, {calls['operators']} in all")
    assert entries <= bound.entries, calls["operators_most"]


def test_each_pass_makes_the_same_calls(bound: Bound, model: Any, images: torch.Tensor) -> None:
    first, second = (bound.calls_of(model, images) for _ in range(2))
    assert first == second


def test_steps_call_operators_without_pythons_wrapper(
    bound: Bound, model: Any, images: torch.Tensor
) -> None:
    """``OpOverload.__call__`` is a frame more for each operator."""
    calls = bound.calls_of(model, images)
    assert not calls["torch/_ops.py __call__"]
    assert not [name for name in calls if "_library" in name or "custom_ops" in name]


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer slows each function down")
def test_the_guard_is_quick(bound: Bound, model: Any, images: torch.Tensor) -> None:
    fastest = float("inf")
    with bound.applies():
        model(images)
        for _ in range(10):  # other processes may have been at work all the while
            fastest = min(fastest, host.decisions_of(model, images)["guard"])
            if fastest <= GUARD_MICROSECONDS:
                return
    pytest.fail(f"the guard took {fastest:.0f} us")


# ---- how it is measured ---------------------------------------------------------------------------------


def test_what_is_timed_is_the_plan_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "REPETITIONS", 1)
    model, images = host.model_of("bitfast", **host.NARROW), torch.randn(host.IMAGES)
    with torch.no_grad():
        before = model(images).last_hidden_state
        if plan.lowering_for("cpu", torch.float32) is None:
            pytest.skip("no plan serves here: the extension was not built")
        costs = host.step_costs(model, images)
        after = model(images).last_hidden_state
    names = [name for part in host.latest_plan(model).parts for name in part.program.names]
    assert torch.equal(before, after)
    assert {cost["kind"]: cost["times"] for cost in costs} == Counter(names)
    alone = [cost["python"] for cost in costs if cost["python"] is not None]
    assert alone
    assert min(alone) > 0


def test_calls_of_python_and_of_c_are_counted_and_none_of_the_counting() -> None:
    def outer() -> int:
        return inner(2) + len("ab")

    def inner(depth: int) -> int:
        return inner(depth - 1) if depth else 0

    python, builtin = host.python_calls_of(outer)
    assert {name.split()[-1]: n for name, n in python.items()} == {"outer": 1, "inner": 3}
    assert builtin == 1
    assert sys.getprofile() is None


def test_a_collection_of_garbage_is_not_counted() -> None:
    """Hypothesis, for one, is called back before and after each."""

    def called_back(_: str, __: dict[str, int]) -> None:
        pass

    def allocate() -> list[list[int]]:
        return [[i] for i in range(100_000)]

    gc.callbacks.append(called_back)
    try:
        python, _ = host.python_calls_of(allocate)
    finally:
        gc.callbacks.remove(called_back)
    assert {name.split()[-1] for name in python} <= {"allocate", "<listcomp>"}
    assert gc.isenabled()


def test_another_checkout_is_measured_as_this_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "worktree_of", lambda _: nullcontext(host.ROOT))
    monkeypatch.setattr(host, "git", lambda *_: "this one")
    found = host.measure_base("HEAD")
    assert found["commit"] == "this one"
    assert found["pass_us"] > 0
    with torch.no_grad():
        here = host.calls_of(host.model_of("bitfast"), torch.randn(host.IMAGES))
    assert found["python_calls"] == here["python_calls"]


def test_a_base_that_is_no_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--base", "no such commit"])
    assert "error: " in capsys.readouterr().err
