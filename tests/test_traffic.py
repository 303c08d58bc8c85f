"""How many launches and bytes the weights and norms of a model take, counted without a GPU."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from bench import traffic
from bench.shapes import MODELS, norm_launches, shapes_of
from bench.traffic import DTYPES, NORMS, WEIGHTS, Cost
from bitfast.kernels.group_norm_act import choose_tiling
from bitfast.kernels.launch import H100
from bitfast.ops.weight_standardization import ALIGNMENT

BOTH_PASSES = pytest.mark.parametrize("backward", [False, True])


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    traffic.main([])
    page = Path(traffic.__file__).parent / "TRAFFIC.md"
    assert page.read_text() == capsys.readouterr().out


def test_shapes_of_r50x1() -> None:
    # The paper's figure: 3, 4, 6 and 3 blocks of three norms, and the last one. Every block's sum goes into
    # the next norm; it also is the shortcut of the next block, unless that is the first of its stage.
    assert sum(norm.is_sum_used for norm in NORMS) == 16 - 4
    assert all(norm.has_residual for norm in NORMS if norm.is_sum_used)
    assert NORMS[0][:4] == (64, 56, 56, False)
    assert NORMS[-1] == (2048, 7, 7, True, False)
    assert WEIGHTS[0] == (64, 3, 7, 7)
    assert sum(map(prod, WEIGHTS)) == 23_454_912  # as in ResNet-50


@pytest.mark.parametrize("model", MODELS)
def test_shapes_follow_the_configuration(model: str) -> None:
    blocks = sum(MODELS[model].get("depths", [3, 4, 6, 3]))
    norms, weights = shapes_of(model, 224)
    assert (len(norms), len(weights)) == (3 * blocks + 1, 3 * blocks + 5)
    assert sum(norm.has_residual for norm in norms) == blocks


@BOTH_PASSES
def test_all_weights_are_one_launch(backward: bool) -> None:
    # And torch concatenates the gradients first. No weight leaves a gap in the buffer, which would cost
    # another launch each.
    ours, floor, _ = traffic.weight_pass(backward)
    assert ours.launches == 1 + backward
    assert all(prod(shape) % ALIGNMENT == 0 for shape in WEIGHTS)
    concatenation = backward * 2 * DTYPES.compute.itemsize * sum(map(prod, WEIGHTS))
    assert ours.bytes - concatenation < 1.01 * floor


@BOTH_PASSES
@pytest.mark.parametrize("batch", traffic.BATCHES)
def test_norms_take_the_planned_launches(batch: int, backward: bool) -> None:
    for norm in NORMS:
        tiling = choose_tiling(
            batch, norm.pixels, norm.channels, 32, 2, True, tensors=1 + backward, device=H100
        )
        launches = norm_launches(norm, batch, DTYPES, backward=backward)
        # Backward, one more sums up the gradients of scale and shift.
        assert len(launches) == (1 if tiling.is_whole else 2) + backward, norm
        if batch == 1 and norm.pixels <= 14 * 14 and not backward:
            assert tiling.is_whole  # an image fits in registers


def test_little_more_is_moved_than_must_be() -> None:
    kept, *weights = traffic.weight_rows()
    assert kept.ours == Cost()  # in inference
    for rows, allowed in ((weights, 1.3), (traffic.norm_rows(), 2)):
        for row in rows:
            most = 1.25 if row.batch == 128 and "forward and" not in row.work else allowed
            assert row.floor <= row.ours.bytes <= most * row.floor, row
            assert row.ours.bytes < row.plain.bytes, row


def test_floor_of_a_norm_by_hand() -> None:
    norm = next(norm for norm in NORMS if norm.is_sum_used)
    size = 8 * 256 * 56 * 56 * 2  # bytes of bfloat16 at batch 8
    assert traffic.norm_floor(norm, 8, backward=False) == 4 * size  # x, residual; sum, result
    assert traffic.norm_floor(norm, 8, backward=True) == 4 * size  # x, two gradients; one gradient
    assert traffic.norm_floor(NORMS[0], 8, backward=False) == 2 * size // 4
