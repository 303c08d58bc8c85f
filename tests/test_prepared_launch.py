"""Prepared launches: the numbers in Triton's interpreter, and what reaches a CUDA driver, without a GPU."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfast.kernels import group_norm_act, weight_standardization
from bitfast.kernels.launch import Launch, prepare
from tests.interpreter import DEVICE
from tests.other_process import printed_by

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter runs where no GPU is")
STREAM = 0 if DEVICE == "cpu" else torch.cuda.current_stream().cuda_stream


# ---- numbers --------------------------------------------------------------------------------------


def forward(seed: int, offset: int = 0) -> tuple[list[Launch], list[Tensor]]:
    """Return the launches of a norm of drawn numbers, and what they fill."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, 5, 3, generator=generator).to(DEVICE)
    weight, bias = (torch.randn(9, generator=generator).to(DEVICE)[offset:][:8] for _ in range(2))
    result, mean, rstd = (
        torch.full(shape, torch.nan, device=DEVICE) for shape in ((2, 8, 5, 3), (2, 4), (2, 4))
    )
    launches = group_norm_act.forward_launches(
        x, None, weight, bias, 1e-5, "gelu", False, total=None, result=result, mean=mean, rstd=rstd
    )
    return launches, [x, weight, bias, result, mean, rstd]


def addresses_of(launch: Launch) -> list[int]:
    return [value.data_ptr() for value in launch.arguments.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("offset", [0, 1])
def test_other_tensors_get_the_numbers_of_an_ordinary_launch(offset):
    (first,), _ = forward(1, offset)
    prepared = prepare(first)
    for seed in (2, 3):
        (launch,), prepared_tensors = forward(seed, offset)
        prepared(STREAM, *addresses_of(launch))
        (launch,), ordinary_tensors = forward(seed, offset)
        launch.launch()
        assert all(map(torch.equal, prepared_tensors, ordinary_tensors))


def test_meta_tensors_are_enough_to_prepare():
    weight, mean = torch.empty(4, 8, 3, 3, device="meta"), torch.empty(4, device="meta")
    prepared = prepare(
        weight_standardization.forward_launch(
            weight, 1e-8, True, result=weight, mean=mean, rstd=mean
        )
    )
    weight = torch.randn(4, 8, 3, 3, device=DEVICE)
    results = [
        torch.empty(4, 3, 3, 8, device=DEVICE).permute(0, 3, 1, 2),
        *torch.empty(2, 4, device=DEVICE),
    ]
    expected = [torch.empty_like(result) for result in results]
    prepared(STREAM, weight.data_ptr(), *(result.data_ptr() for result in results))
    weight_standardization.forward_launch(
        weight, 1e-8, True, **dict(zip(("result", "mean", "rstd"), expected, strict=True))
    ).launch()
    assert all(map(torch.equal, results, expected))


def test_alignment_is_told():
    (launch,), _ = forward(1)
    (shifted,), _ = forward(1, offset=1)
    aligned, not_aligned = prepare(launch), prepare(shifted)
    assert all(aligned.aligned)
    assert not all(not_aligned.aligned)
    ours, theirs = addresses_of(launch), addresses_of(shifted)
    assert aligned.takes(*ours)
    assert not aligned.takes(*theirs)
    assert not_aligned.takes(*ours)  # code that counts on nothing is right everywhere
    assert not_aligned.takes(*theirs)


@interpreted
def test_the_interpreter_is_named_as_the_reason():
    (launch,), _ = forward(1)
    assert prepare(launch).why_not_direct == "Triton interprets the kernel"


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_addresses_is_refused(change):
    (launch,), _ = forward(1)
    addresses = addresses_of(launch)
    given = addresses[:change] if change < 0 else [*addresses, 0]
    with pytest.raises(TypeError, match=f"takes {len(addresses)} tensors, got {len(given)}"):
        prepare(launch)(STREAM, *given)


def test_a_launch_that_lacks_a_parameter_is_refused():
    (launch,), _ = forward(1)
    arguments = {name: value for name, value in launch.arguments.items() if name != "eps"}
    with pytest.raises(ValueError, match="parameters"):
        prepare(Launch(**{**vars(launch), "arguments": arguments}))


# ---- what reaches the driver ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> dict[str, list[dict[str, Any]]]:
    if torch.version.cuda is not None:
        pytest.skip("this torch may load the real driver; tests/gpu looks at what it does")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stand-in of the driver")
    return printed_by("tests.stub_driver")["seen"]


WAYS = ("split", "whole", "misaligned", "weights")


@pytest.fixture(params=WAYS)
def launches(request: Any, seen: Any) -> list[dict[str, Any]]:
    return seen[request.param]


def without_count(launch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in launch.items() if name != "launches"}


def test_kernels_are_launched_directly(launches):
    assert [launch["why_not_direct"] for launch in launches] == [None] * len(launches)


def test_preparing_launches_nothing(launches):
    for launch in launches:
        assert launch["direct"]["launches"] == launch["launches_before"] + 1
        assert launch["ordinary"]["launches"] == launch["launches_before"] + 2


def test_the_driver_sees_what_an_ordinary_launch_lets_it_see(launches):
    for launch in launches:
        assert without_count(launch["direct"]) == without_count(launch["ordinary"])


def test_the_driver_sees_what_was_asked_for(launches):
    for launch in launches:
        numbers, parameters = launch["direct"]["numbers"], launch["direct"]["parameters"]
        assert numbers[:6] == [launch["programs"], 1, 1, 32 * launch["warps"], 1, 1]
        assert numbers[7] == 77  # the stream
        count = len(launch["addresses"])
        assert parameters[:count] == launch["addresses"]
        assert parameters[count:-2] == pytest.approx(launch["numbers"])
        assert parameters[-2:] == [0, 0]  # memory of the kernel's own


def test_other_addresses_and_another_stream_are_all_that_changes(launches):
    for launch in launches:
        count = len(launch["addresses"])
        direct, moved = launch["direct"], launch["moved"]
        assert moved["parameters"][:count] == [a + 4096 for a in launch["addresses"]]
        assert moved["parameters"][count:] == direct["parameters"][count:]
        assert moved["numbers"][7] == direct["numbers"][7] + 1
        assert [*moved["numbers"][:7], *moved["numbers"][8:]] == [
            *direct["numbers"][:7], *direct["numbers"][8:]
        ]  # fmt: skip


def test_hooks_of_profilers_are_called(launches):
    for launch in launches:
        assert launch["hook_names"] == [launch["kernel"]] * 2
        assert without_count(launch["watched"]) == without_count(launch["direct"])


def test_a_warm_launch_is_one_python_call(launches):
    assert all(len(launch["calls"]) == 1 for launch in launches)


def test_the_launcher_is_spared_a_wrong_number_of_addresses(launches):
    for launch in launches:
        count = len(launch["addresses"])
        assert launch["errors"] == [
            f"the kernel takes {count} tensors, got {n} addresses" for n in (count - 1, count + 1)
        ]


def test_an_unknown_launcher_is_left_to_triton(seen):
    for launch in seen["unknown"]:
        assert launch["why_not_direct"] == "UnknownLauncher has no function that launches"
        assert without_count(launch["direct"]) == without_count(launch["ordinary"])
        assert len(launch["errors"]) == 2


def test_unaligned_parameters_are_compiled_as_such(seen):
    assert all(all(launch["aligned"]) for launch in seen["split"])
    assert [all(launch["aligned"]) for launch in seen["misaligned"]] == [True, *4 * [False]]


def test_no_element_that_is_overwritten_is_loaded_by_two_threads(seen):
    """One of them might store its sum before the other has loaded. And no load is cached apart."""
    kernels = ["forward_kernel", "forward_kernel", "moments_kernel", "apply_kernel"]
    assert [launch["kernel"] for launch in seen["in place"]] == kernels
    for launch in seen["in place"]:
        assert launch["threads"]
        assert set(launch["threads"]) == {1}
        assert not [kind for kind in launch["loads"] if ".nc" in kind]
