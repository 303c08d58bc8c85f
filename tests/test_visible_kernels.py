"""Compilers see the Triton kernels themselves where the sizes are known, one operator where they are not."""

from __future__ import annotations

import pytest

from tests.other_process import printed_by


@pytest.fixture(scope="module")
def seen() -> dict[str, list[str]]:
    return printed_by("tests.visible_kernels")


def launches(calls: list[str]) -> list[str]:
    return [call.removeprefix("launch ") for call in calls if call.startswith("launch ")]


def test_the_kernels_of_both_passes_are_in_the_graph(seen):
    forward = ["moments_kernel", "apply_kernel"]
    backward = ["backward_sums_kernel", "backward_apply_kernel", "parameter_gradients_kernel"]
    assert launches(seen["op"]) == 2 * forward + 2 * backward
    assert not [call for call in seen["op"] if "bitfast" in call]
    assert not [
        call for call in seen["op"] if "copy" in call or "clone" in call or "scatter" in call
    ]


def test_symbolic_sizes_leave_the_operator_whole(seen):
    assert launches(seen["dynamic"]) == []
    operators = [call for call in seen["dynamic"] if call.startswith("bitfast.")]
    assert operators == ["bitfast.add_group_norm_act.triton", "bitfast.group_norm_act.triton"]


def test_a_single_weight_is_seen(seen):
    assert launches(seen["weight"]) == ["forward_kernel", "backward_kernel"]


def test_a_model_is_one_graph_with_its_norms_and_a_weight_preparation_for_each_stage(seen):
    operators = [call for call in seen["model"] if call.startswith("bitfast.weight")]
    assert operators == [
        *["bitfast.weight_standardization_all.triton"] * 2,
        *["bitfast.weight_standardization_all_backward.triton"] * 2,
    ]
    assert not [call for call in seen["model"] if "group_norm" in call]
    # Two blocks of three norms and the final one, each in one launch at this size.
    assert launches(seen["model"]).count("forward_kernel") == 7
    assert launches(seen["model"]).count("backward_kernel") == 7
    assert launches(seen["model"]).count("parameter_gradients_kernel") == 7


def test_inductor_launches_the_kernels_itself(seen):
    program = "\n".join(seen["inductor"])
    assert program.count("async_compile.triton('moments_kernel'") == 2
    assert program.count("async_compile.triton('apply_kernel'") == 2
    assert program.count("moments_kernel_0.run(") == 1
