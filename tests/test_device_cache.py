"""Nothing that outlives a call is allocated where a CUDA graph would have its memory. No GPU needed.

torch.compile's graphs serve every allocation of the calling thread from their own memory, in the recorded call
and in the one before; what is still there afterwards and is no output is an error. So the allocations of the
calling thread are noted here, and looked for after the call.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitfast import extension, use_backend
from bitfast.kernels.device_cache import DeviceCache
from bitfast.ops.kept_weights import kept_weights
from bitfast.ops.resize_normalize import resize_normalize
from bitfast.ops.weight_standardization import weight_standardization_all
from tests.interpreter import DEVICE
from tests.tiny_models import ours


def storages_of(values: Any) -> list[StorageWeakRef]:
    return [
        StorageWeakRef(t.untyped_storage()) for t in tree_leaves(values) if isinstance(t, Tensor)
    ]


class Allocations(TorchDispatchMode):
    """Notes what this thread allocates, also within our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "bitfast" and function._overloadname == "triton":
            with self:
                return function._op_dk(
                    torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {})
                )
        result = function(*args, **(kwargs or {}))
        # What torch.tensor has made is only shown, as what it is given.
        is_new = function is torch.ops.aten.lift_fresh.default
        given = [] if is_new else storages_of((args, kwargs))
        self.storages += [s for s in storages_of(result) if s not in given]
        return result


def left_over(call: Callable[[], Any]) -> list[StorageWeakRef]:
    """Return what a call has allocated in this thread, not returned, and not freed."""
    allocations = Allocations()
    with allocations:
        result = call()
    assert allocations.storages
    gc.collect()
    returned = storages_of(result)
    return [s for s in allocations.storages if not s.expired() and s not in returned]


# ---- every operator -------------------------------------------------------------------------------


def norm_inputs() -> tuple[Any, ...]:
    return torch.randn(2, 8, 5, 5, device=DEVICE), *torch.rand(2, 8, device=DEVICE).unbind()


def weights() -> list[Tensor]:
    return [
        torch.randn(shape, device=DEVICE) for shape in ((4, 3, 3, 3), (8, 4, 1, 1), (4, 4, 3, 3))
    ]


def add_norm(ops: Any) -> Any:
    x, weight, bias = norm_inputs()
    return ops.add_group_norm_act.triton(x, x, weight, bias, 2, 1e-5, "relu")


def norm_backward(name: str, ops: Any) -> Any:
    x, weight, bias = norm_inputs()
    result, *statistics = ops.group_norm_act.triton(x, weight, bias, 2, 1e-5, "relu")
    return getattr(ops, name).triton(result, None, x, weight, bias, *statistics, 2, "relu")


def weight_backward(ops: Any) -> Any:
    weight = weights()[0]
    result, mean, rstd = ops.weight_standardization.triton(weight, 1e-8, None)
    return ops.weight_standardization_backward.triton(result, weight, mean, rstd)


def all_weights_backward(ops: Any) -> Any:
    given = weights()
    packed, mean, rstd = ops.weight_standardization_all.triton(given, 1e-8, None, False)
    return ops.weight_standardization_all_backward.triton(packed, given, mean, rstd, False), given


CALLS: dict[str, Callable[[Any], Any]] = {
    "group_norm_act": lambda ops: ops.group_norm_act.triton(*norm_inputs(), 2, 1e-5, "relu"),
    "add_group_norm_act": add_norm,
    **{
        name: partial(norm_backward, name)
        for name in ("group_norm_act_backward", "group_norm_act_recompute")
    },
    "weight_standardization": lambda ops: ops.weight_standardization.triton(weights()[0], 1e-8, None),
    "weight_standardization_backward": weight_backward,
    "weight_standardization_all": lambda ops: (
        given := weights(), ops.weight_standardization_all.triton(given, 1e-8, None, True)
    ),
    "weight_standardization_all_backward": all_weights_backward,
}  # fmt: skip
"""Each gives its inputs back where they lie in a table."""


def triton_operators() -> dict[str, Any]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitfast::")]
    names = [name.removeprefix("bitfast::") for name in names if name.endswith(".triton")]
    return {
        name.removesuffix(".triton"): getattr(
            torch.ops.bitfast, name.removesuffix(".triton")
        ).triton
        for name in names
    }


def test_every_operator_is_called_or_stays_out_of_graphs() -> None:
    apart = {
        name for name, op in triton_operators().items() if torch.Tag.cudagraph_unsafe in op.tags
    }
    assert apart == {"resize_normalize"}
    assert set(CALLS) == set(triton_operators()) - apart


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_leaves_nothing_in_the_memory_of_a_graph(name: str) -> None:
    assert not left_over(lambda: CALLS[name](torch.ops.bitfast))


def test_what_is_left_over_is_seen() -> None:
    kept = []
    for make in (
        lambda: torch.ones(3),
        lambda: torch.tensor([1, 2]),
        lambda: torch.ones(3).double(),
    ):
        assert not left_over(make)
        assert len(left_over(lambda make=make: kept.append(make()))) == 1


# ---- while a graph is recorded --------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("name", CALLS)
def test_a_recorded_call_leaves_nothing(name: str, capturing: None) -> None:
    assert not left_over(lambda: CALLS[name](torch.ops.bitfast))


def test_all_weights_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the first call of all, if that is recorded: a launch for each weight gives the same."""

    def run() -> list[Tensor]:
        given = [w.clone().requires_grad_() for w in originals]
        with use_backend("triton"):
            results = weight_standardization_all(given, dtype=torch.bfloat16, channels_last=True)
        grads = [torch.full_like(r, 0.5).cumsum(0) for r in results]
        return [*results, *torch.autograd.grad(results, given, grads)]

    originals = [*weights(), weights()[0].contiguous(memory_format=torch.channels_last)]
    expected = run()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for result, wanted in zip(run(), expected, strict=True):
        assert result.is_contiguous(memory_format=torch.channels_last) == wanted.is_contiguous(
            memory_format=torch.channels_last
        )
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)


def test_a_model_keeps_no_weights_of_a_recorded_call(capturing: None) -> None:
    model = ours("BitModel").eval().to(DEVICE)
    x = torch.randn(1, 3, 32, 32, device=DEVICE)
    with torch.no_grad(), use_backend(weight_standardization="triton"):
        model(x)
    assert not any(id(parameter) in kept_weights._kept for parameter in model.parameters())


def test_images_are_refused(capturing: None) -> None:
    if extension.CPU.problem is not None:
        pytest.skip(f"its tables are made by the extension: {extension.CPU.problem}")
    image = torch.zeros(5, 5, 3, dtype=torch.uint8, device=DEVICE)
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot be captured"):
        resize_normalize([image], sizes=[(4, 4)], crop=(4, 4))


# ---- DeviceCache -----------------------------------------------------------------------------------------


@pytest.fixture
def made() -> tuple[DeviceCache[Any], list[Any]]:
    calls: list[Any] = []

    def make(name: str) -> tuple[str, int]:
        calls.append(name)
        return name, threading.get_ident()

    return DeviceCache(make, most=2), calls


def test_what_is_kept_is_made_once_in_another_thread(made: Any) -> None:
    kept, calls = made
    name, thread = kept.get("a")
    assert name == "a"
    assert thread != threading.get_ident()
    assert kept.get("a") is kept.get("a")
    assert calls == ["a"]


def test_the_oldest_is_forgotten(made: Any) -> None:
    kept, calls = made
    for name in ("a", "b", "a", "c", "a", "b"):
        kept.get(name)
    assert calls == ["a", "b", "c", "b"]


def test_a_graph_is_given_what_there_is_and_it_stays(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, calls = made
    first = kept.get("a")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kept.get("a") is first
    assert kept.get("b") is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("b", "c", "d"):
        kept.get(name)
    assert kept.get("a") is first
    assert calls == ["a", "b", "c", "d"]


def test_an_error_of_what_makes_it_is_raised_and_nothing_kept() -> None:
    calls = []

    def make() -> None:
        calls.append(1)
        raise ValueError("no")

    kept = DeviceCache(make, most=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept.get()
    assert len(calls) == 2
