"""How many launches and bytes the weights and norms of a model take, counted without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import traffic
from bench.shapes import MODELS, all_weights_launch, norm_launches, shapes_of
from bitfast.kernels.group_norm_act import choose_tiling
from bitfast.kernels.launch import H100
from bitfast.ops.weight_standardization import ALIGNMENT

PAGE = Path(traffic.__file__).parent / "TRAFFIC.md"
NORMS = shapes_of("R50x1", 224).norms
WEIGHTS = shapes_of("R50x1", 224).weights


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    traffic.main([])
    assert PAGE.read_text() == capsys.readouterr().out


def test_shapes_of_r50x1() -> None:
    # The paper's figure: 3, 4, 6 and 3 blocks of three norms, and the last one. Every block's sum goes into
    # the next norm; it also is the shortcut of the next block, unless that is the first of its stage.
    assert len(NORMS) == 3 * (3 + 4 + 6 + 3) + 1
    assert sum(norm.has_residual for norm in NORMS) == 16
    assert sum(norm.is_sum_used for norm in NORMS) == 16 - 4
    assert all(norm.has_residual for norm in NORMS if norm.is_sum_used)
    assert NORMS[0][:4] == (64, 56, 56, False)
    assert NORMS[-1] == (2048, 7, 7, True, False)
    assert len(WEIGHTS) == 1 + 3 * 16 + 4
    assert WEIGHTS[0] == (64, 3, 7, 7)
    assert sum(out * inner * h * w for out, inner, h, w in WEIGHTS) == 23_454_912  # as in ResNet-50


@pytest.mark.parametrize("model", MODELS)
def test_shapes_follow_the_configuration(model: str) -> None:
    depths = MODELS[model].get("depths", [3, 4, 6, 3])
    norms, weights = shapes_of(model, 224)
    assert (len(norms), len(weights)) == (3 * sum(depths) + 1, 3 * sum(depths) + 5)
    assert sum(norm.has_residual for norm in norms) == sum(depths)


@pytest.mark.parametrize("backward", [False, True])
def test_all_weights_are_one_launch(backward: bool) -> None:
    # And torch concatenates the gradients first. No weight leaves a gap in the buffer, which would cost
    # another launch each.
    cost = traffic.our_weights(backward)
    assert cost.launches == 1 + backward
    assert all(out * inner * h * w % ALIGNMENT == 0 for out, inner, h, w in WEIGHTS)
    launch = all_weights_launch(WEIGHTS, traffic.DTYPES, backward=backward)
    assert launch.reads + launch.writes < 1.01 * traffic.weight_floor(backward)


def test_weights_kept_for_inference_cost_nothing() -> None:
    assert traffic.weight_rows()[0].ours == (0, 0)


@pytest.mark.parametrize("batch", traffic.BATCHES)
@pytest.mark.parametrize("backward", [False, True])
def test_norms_take_the_planned_launches(batch: int, backward: bool) -> None:
    for norm in NORMS:
        tiling = choose_tiling(
            batch, norm.pixels, norm.channels, 32, 2, True, tensors=1 + backward, device=H100
        )
        launches = norm_launches(norm, batch, traffic.DTYPES, backward=backward)
        # Backward, one more sums up the gradients of scale and shift.
        assert len(launches) == (1 if tiling.is_whole else 2) + backward, norm


def test_one_launch_at_batch_1_where_an_image_fits_in_registers() -> None:
    small = [norm for norm in NORMS if norm.pixels <= 14 * 14]
    launches = [norm_launches(norm, 1, traffic.DTYPES, backward=False) for norm in small]
    assert small
    assert all(len(of_norm) == 1 for of_norm in launches)


@pytest.mark.parametrize("row", traffic.norm_rows(), ids=lambda row: f"{row.work}, {row.batch}")
def test_norms_move_little_more_than_they_must(row: traffic.Row) -> None:
    assert row.floor <= row.ours.bytes <= 2 * row.floor
    assert row.ours.bytes < row.plain.bytes


def test_norms_of_large_batches_are_close_to_the_floor() -> None:
    forward = next(row for row in traffic.norm_rows() if row.batch == 128)
    assert forward.ours.bytes <= 1.25 * forward.floor


@pytest.mark.parametrize("row", traffic.weight_rows()[1:], ids=lambda row: row.work)
def test_weights_move_little_more_than_they_must(row: traffic.Row) -> None:
    assert row.floor <= row.ours.bytes <= 1.3 * row.floor
    assert row.ours.bytes < row.plain.bytes


def test_floor_of_a_norm_by_hand() -> None:
    norm = next(norm for norm in NORMS if norm.is_sum_used)
    size = 8 * 256 * 56 * 56 * 2  # bytes of bfloat16 at batch 8
    assert traffic.norm_floor(norm, 8, backward=False) == 4 * size  # x, residual; sum, result
    assert traffic.norm_floor(norm, 8, backward=True) == 4 * size  # x, two gradients; one gradient
    assert traffic.norm_floor(NORMS[0], 8, backward=False) == 2 * size // 4
