"""What save_pretrained leaves in a folder, also when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitfast.checkpoints import files, weights
from bitfast.modeling import BitModel
from tests.tiny_models import (
    assert_same_weights,
    contents,
    file_names,
    ours,
)


def test_every_memory_layout_is_saved(tmp_path: Path) -> None:
    model = ours("BitModel")
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    state = dict(model.state_dict())
    shared = torch.randn(64)
    state["norm.weight"], state["norm.bias"] = shared[:32], shared[::2]
    expected["norm.weight"], expected["norm.bias"] = shared[:32].clone(), shared[::2].clone()
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe), state_dict=state, safe_serialization=safe)
        for cls in (BitModel, transformers.BitModel):
            loaded = cls.from_pretrained(tmp_path / str(safe))
            assert all(torch.equal(loaded.state_dict()[key], expected[key]) for key in expected)
    assert (tmp_path / "False" / "pytorch_model.bin").stat().st_size < 200_000


def test_shared_storages_in_a_pytorch_file_come_apart(tmp_path: Path) -> None:
    model = ours("BitModel")
    model.save_pretrained(tmp_path, safe_serialization=False)
    state = dict(model.state_dict())
    state["norm.bias"] = state["norm.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = BitModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.norm.bias.add_(1)
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_saving_replaces_an_earlier_save(tmp_path: Path) -> None:
    model = ours("BitModel")
    for saving in (
        {"max_shard_size": 5000},
        {"max_shard_size": 9000},
        {},
        {"max_shard_size": 9000},
    ):
        (tmp_path / "model-card.md").write_text("kept")
        model = ours("BitModel")
        model.save_pretrained(tmp_path, **saving)
        assert_same_weights(BitModel.from_pretrained(tmp_path), model)
        model.save_pretrained(tmp_path / "fresh", **saving)
        assert file_names(tmp_path) == {*file_names(tmp_path / "fresh"), "model-card.md", "fresh"}
        shutil.rmtree(tmp_path / "fresh")


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("before", [{}, {"max_shard_size": 5000}], ids=str)
@pytest.mark.parametrize("after", [{}, {"max_shard_size": 5000}, {"max_shard_size": 9000}], ids=str)
def test_a_failing_save_leaves_the_earlier_one(
    before: dict[str, Any],
    after: dict[str, Any],
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours("BitModel").save_pretrained(tmp_path, **before)
    kept = contents(tmp_path)
    model = ours("BitModel", num_groups=4)
    owner: Any = files.os if failing == "replace" else weights
    if failing == "fsync":
        owner, failing = files, "_flush_to_disk"
    real = getattr(owner, failing)
    failures = 0
    # Fail at the first call, then at the second, and so on, until the save is through.
    while True:
        calls_left = failures + 1

        def fail_once(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, failing, fail_once)
            try:
                model.save_pretrained(tmp_path, **after)
                break
            except OSError:
                assert contents(tmp_path) == kept
                failures += 1
    assert failures == sum(
        failing != "save_file" or name.endswith(".safetensors") for name in contents(tmp_path)
    )
    assert_same_weights(BitModel.from_pretrained(tmp_path), model)


def test_what_cannot_be_saved_changes_nothing(tmp_path: Path) -> None:
    model = ours("BitModel")
    model.save_pretrained(tmp_path)
    kept = contents(tmp_path)
    bad_state = {**model.state_dict(), "x": "text"}
    for arguments, error in (
        ({"state_dict": bad_state}, TypeError),
        ({"state_dict": {"x": torch.empty(2, device="meta")}}, ValueError),
        ({"max_shard_size": "5 apples"}, ValueError),
        ({"max_shard_size": 0}, ValueError),
        ({"max_shard_size": True}, ValueError),
        ({"variant": "../x"}, ValueError),
    ):
        with pytest.raises(error):
            model.save_pretrained(tmp_path, **arguments)
    model.config.bad = object()
    with pytest.raises(TypeError, match="bad"):
        model.save_pretrained(tmp_path)
    del model.config.bad
    assert contents(tmp_path) == kept
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(NotADirectoryError):
        model.save_pretrained(tmp_path / "config.json")


def test_saving_into_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    model = ours("BitModel")
    model.save_pretrained(tmp_path)
    loaded = BitModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path, max_shard_size=5000)
    assert_same_weights(loaded, model)
    assert_same_weights(BitModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("size", "number"), [("5GB", 5_000_000_000), ("1.5 kb", 1500), (7, 7), (" 2MB", 2_000_000)]
)
def test_parse_size(size: Any, number: int) -> None:
    assert weights.parse_size(size) == number
