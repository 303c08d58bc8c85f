"""What Inductor makes of the Triton kernels compiles for every chip. No GPU needed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernel_variants import ARCHITECTURES
from bitfast.kernels import group_norm_act_backward, group_norm_act_forward
from tests.other_process import printed_by

VISIBLE = {
    name
    for module in (group_norm_act_forward, group_norm_act_backward)
    for name in vars(module)
    if name.endswith("_kernel")
}


@pytest.fixture(scope="module")
def builds() -> list[dict[str, Any]]:
    return printed_by("tests.inductor_kernels")


def test_every_visible_kernel_is_built_for_every_chip(builds):
    norms = {(b["kernel"], b["chip"]) for b in builds if "KIND" not in b["title"]}
    weights = {(b["kernel"], b["chip"]) for b in builds if "KIND" in b["title"]}
    assert norms == {(kernel, chip) for kernel in VISIBLE for chip in ARCHITECTURES}
    assert weights == {
        (kernel, chip) for kernel in ("forward_kernel", "backward_kernel") for chip in ARCHITECTURES
    }


def test_all_kernels_compile(builds):
    problems = [b for b in builds if b["problem"] is not None]
    assert not problems, problems[0]
