"""Kernels on demand, norm_convolution on a GPU above all: demanded, enabled for the process, or left alone."""

from __future__ import annotations

import pytest
import torch

from bitfast import backends
from bitfast.backends import (
    BackendUnavailableError,
    backend_table,
    disable_kernel,
    enable_kernel,
    enabled_kernels,
    select_backend,
    use_backend,
)
from bitfast.execution.setting import planned_setting
from bitfast.ops.norm_convolution import OP
from bitfast.ops.norm_convolution_cuda import uses_fused_convolution
from tests.interpreter import DEVICE
from tests.norm_convolution_kernels import Kernels, serve
from tests.test_execution_cuda import plans
from tests.threads import in_threads
from tests.tiny_models import ours

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernels serve for CPU tensors here")

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@pytest.fixture
def on_demand(monkeypatch) -> Kernels:
    """The kernels serve for CPU tensors, where they are demanded."""
    monkeypatch.setattr(backends, "_enabled", frozenset())
    return serve(monkeypatch, is_enabled=False)


def uses(dtype: torch.dtype = BFLOAT16) -> bool:
    return uses_fused_convolution("cpu", dtype)


def test_nothing_is_used_by_default(on_demand) -> None:
    assert not uses()
    assert not uses_fused_convolution("cuda", BFLOAT16)
    with use_backend("native", group_norm_act="triton"):
        assert not uses(), "a general demand does not concern it"


def test_a_demand_is_met_or_refused(on_demand) -> None:
    with use_backend(norm_convolution="native"):
        for dtype in (BFLOAT16, FLOAT16):
            assert uses(dtype)
        with pytest.raises(BackendUnavailableError, match=r"supports .*, not torch.float32"):
            uses(torch.float32)
        with use_backend(group_norm_act="triton"):
            assert uses()
        for op in ("group_norm_act", "same_padding", "norm_convolution"):
            with use_backend(**{op: "reference"}):
                assert not uses()


def test_an_enabled_kernel_is_used_by_default(on_demand) -> None:
    enable_kernel(OP, "native", "cpu")
    assert enabled_kernels() == {(OP, "native", "cpu")}
    assert uses()
    assert not uses(torch.float32), "nothing was demanded"
    for demand in ("reference", "triton"):
        with use_backend(demand):
            assert not uses()
    in_threads(lambda _: pytest.fail("not in all threads") if not uses() else None, 2)
    disable_kernel(OP, "native", "cpu")
    disable_kernel(OP, "native", "cpu")
    assert not uses()


def test_many_threads_enable_kernels(on_demand, monkeypatch) -> None:
    names = [("same_padding", "native", f"device {number}") for number in range(8)]
    for name in names:
        backends.register_kernel(*name, torch.float32, lambda: None, on_demand=lambda: True)  # type: ignore[arg-type]
    for _ in range(20):
        in_threads(lambda number: enable_kernel(*names[number]), 8)
        assert enabled_kernels() == set(names)
        in_threads(lambda number: disable_kernel(*names[number]), 8)
        assert enabled_kernels() == set()


@pytest.mark.parametrize("change", [enable_kernel, disable_kernel])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pooling", "native", "cuda"), "unknown op 'pooling'; choose from"),
        ((OP, "fast", "cuda"), "unknown backend 'fast'; choose from"),
        ((OP, "native", "tpu"), f"no native kernel of {OP} for tpu .*such are .*{OP}/native/cuda"),
        (
            ("stem", "native", "cuda"),
            "no native kernel of stem for cuda tensors that is used on dem",
        ),
        ((OP, "reference", "cuda"), "no reference kernel"),
    ],
)
def test_only_kernels_on_demand_are_enabled(change, names, message) -> None:
    before = enabled_kernels()
    with pytest.raises(ValueError, match=message):
        change(*names)
    assert enabled_kernels() == before


def test_the_table_tells_the_state(on_demand) -> None:
    def state(op: str, device: str) -> tuple[bool, str]:
        (row,) = (
            r for r in backend_table() if (r.op, r.device, r.backend) == (op, device, "native")
        )
        return row.default, row.on_demand

    assert state(OP, "cuda") == (False, "on demand")
    assert state(OP, "cpu") == (False, "on demand")
    assert state("stem", "cuda")[1] == ""
    enable_kernel(OP, "native", "cpu")
    assert state(OP, "cpu") == (True, "enabled")
    assert select_backend(OP, "cpu", BFLOAT16) == "native"


# ---- plans --------------------------------------------------------------------------------


def test_a_network_is_planned_anew(on_demand) -> None:
    model, images = ours("BitModel").eval().bfloat16(), torch.randn(1, 3, 32, 32).bfloat16()
    with torch.no_grad():
        for count in (1, 2, 2):
            model(images)
            assert len(plans(model)) == count
            enable_kernel(OP, "native", "cpu")
        settings = [planned_setting(images)]
        disable_kernel(OP, "native", "cpu")
        settings.append(planned_setting(images))
        assert settings[0] != settings[1]
        model(images)
        assert len(plans(model)) == 2


def test_a_plan_does_not_pass_over_a_demand(on_demand) -> None:
    model, images = ours("BitModel").eval(), torch.randn(1, 3, 32, 32)
    with (
        torch.no_grad(),
        use_backend(norm_convolution="native"),
        pytest.raises(BackendUnavailableError, match=r"norm_convolution: .* not torch.float32"),
    ):
        model(images)
