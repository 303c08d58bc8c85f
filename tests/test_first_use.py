"""Before the first use in a process CUDA kernels check themselves, and entries report what goes wrong."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch

from bitfast import extension
from bitfast.extension import SharedLibrary
from bitfast.ops import first_use, native_cuda
from tests.emulated import at_page_end, library

OP = "an op"


@pytest.fixture
def card(monkeypatch) -> None:
    """Pretend that there is a GPU."""
    monkeypatch.setattr(extension, "CUDA", SharedLibrary("library", None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(first_use, "_problems", {})


def count_checks(monkeypatch, problem: str | Exception | None) -> list[torch.device]:
    devices: list[torch.device] = []

    def check(device: torch.device) -> str | None:
        devices.append(device)
        if isinstance(problem, Exception):
            raise problem
        return problem

    monkeypatch.setattr(first_use, "_checks", {OP: check})
    return devices


def test_a_kernel_is_checked_once(card, monkeypatch) -> None:
    devices = count_checks(monkeypatch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [first_use.why_unusable(OP) for _ in range(3)] == [None] * 3
    assert devices == [torch.device("cuda:0")]
    assert first_use.failures() == {}


@pytest.mark.parametrize("problem", ["it differs", RuntimeError("it differs")])
def test_a_kernel_that_differs_is_not_used(card, monkeypatch, problem) -> None:
    devices = count_checks(monkeypatch, problem)
    with pytest.warns(UserWarning, match="does not use its CUDA kernels of an op: .*it differs"):
        found = first_use.why_unusable(OP)
    assert found == "its check on a card failed: it differs"
    assert first_use.why_unusable(OP) == found, "without a second warning"
    assert first_use.failures() == {OP: found}
    assert len(devices) == 1


def test_nothing_is_checked_while_a_graph_is_captured(card, monkeypatch) -> None:
    devices = count_checks(monkeypatch, None)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "being captured" in str(first_use.why_unusable(OP))
    assert devices == []
    assert first_use.why_unusable(OP) is None


def test_without_cuda_the_reason_is_that_of_the_extension() -> None:
    if extension.CUDA.problem is not None:
        assert first_use.why_unusable(OP) == extension.CUDA.problem
        with pytest.raises(RuntimeError, match="there are no CUDA kernels"):
            native_cuda.library.__wrapped__()


@pytest.mark.parametrize("dtype", list(first_use.ROUNDINGS))
def test_what_counts_as_a_difference(dtype: torch.dtype) -> None:
    right = torch.linspace(1, 2, 100, dtype=torch.float64)
    assert first_use.difference("y", right.to(dtype), right) is None
    far = first_use.difference(
        "y", (right * (1 + 20 * first_use.ROUNDINGS[dtype])).to(dtype), right
    )
    assert "the error of y" in str(far)
    holes = right.to(dtype)
    holes[3] = float("nan")
    assert "nan" in str(first_use.difference("y", holes, right))
    assert "shape" in str(first_use.difference("y", right[1:].to(dtype), right))


def test_an_entry_raises_what_it_returns(monkeypatch) -> None:
    kernels = library("tests/host/gpu_emulation_faults.cpp")
    monkeypatch.setattr(native_cuda, "library", lambda: kernels)
    reverse = native_cuda.entry("reverse", native_cuda.ADDRESS, native_cuda.ADDRESS, ctypes.c_int)
    x = at_page_end(torch.arange(256.0))
    y = torch.empty_like(x)
    reverse(x.data_ptr(), y.data_ptr(), 0)
    assert torch.equal(y.view(4, 64), 2 * x.view(4, 64).flip(1))
    with pytest.raises(RuntimeError, match="reverse: an access outside of memory"):
        reverse(x.data_ptr(), y.data_ptr(), 5)
