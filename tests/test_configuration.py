"""BitConfig against transformers' BitConfig 4.56.2."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig

# Written by whichever library is at work.
VERSION = "transformers_version"

SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_channels": 1, "embedding_size": 8, "hidden_sizes": (16, 32), "depths": [1, 2]},
    {"layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True},
    {"global_padding": "Valid", "hidden_act": "gelu_new", "num_groups": 2},
    {"drop_path_rate": 0.25, "output_stride": 8, "width_factor": 3},
    {"output_stride": 64, "width_factor": 0.5},
    {"depths": [3, 4, 9], "out_features": ["stage1", "stage2", "stage3"]},
    {"out_indices": (0, -1)},
    {"out_features": ["stem", "stage4"], "out_indices": [0, 4]},
    {"num_labels": 5, "problem_type": "regression"},
    {"num_labels": 0},
    {"id2label": {"0": "cat", "1": "dog", "2": "cow"}},
    {"id2label": {0: "cat"}, "label2id": {"cat": 0}, "return_dict": False},
    {"output_hidden_states": True, "torchscript": True, "output_attentions": True},
    {"dtype": "float16"},
    {"torch_dtype": torch.bfloat16},
    {"dtype": "float16", "torch_dtype": "float64"},
    {"name_or_path": "here", "architectures": ["BitModel"], "finetuning_task": "x"},
    {"my_key": {"a": [1, {"b": None}]}, "max_length": 7, "use_bfloat16": True},
]


def shared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' values of the keys that both have, its tuples as lists."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in theirs.items()
        if key in ours and key != VERSION
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_dictionary_and_file(settings: dict[str, Any]) -> None:
    ours, theirs = BitConfig(**settings), transformers.BitConfig(**settings)
    as_json = json.loads(json.dumps(ours.to_dict(), sort_keys=True))
    assert as_json.keys() - json.loads(json.dumps(theirs.to_dict())).keys() == set()
    for ours_dict, theirs_dict in (
        (ours.to_dict(), theirs.to_dict()),
        (json.loads(ours.to_json_string()), json.loads(theirs.to_json_string())),
    ):
        ours_dict.pop(VERSION, None)
        assert json.dumps(ours_dict, sort_keys=True) == json.dumps(
            shared(ours_dict, theirs_dict), sort_keys=True
        )
    assert ours.use_return_dict == theirs.use_return_dict
    assert ours.num_labels == theirs.num_labels
    assert ours.name_or_path == theirs.name_or_path


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_files_go_both_ways(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = BitConfig(**settings), transformers.BitConfig(**settings)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours_read = BitConfig.from_pretrained(tmp_path / "theirs")
    theirs_read = transformers.BitConfig.from_pretrained(tmp_path / "ours")
    ours_dict, theirs_dict = ours.to_dict(), theirs_read.to_dict()
    for content in (ours_dict, theirs_dict):
        content.pop(VERSION)
        content.pop("_name_or_path")
    assert shared(ours_dict, theirs_dict) == ours_dict
    ours_dict = ours_read.to_dict()
    assert shared(ours_dict, theirs.to_dict()) | {"_name_or_path": ""} == {
        key: value for key, value in ours_dict.items() if key != VERSION
    }
    # The whole dictionary, as use_diff=False writes it, is understood too.
    everything = BitConfig.from_dict(theirs.to_dict())
    assert shared(everything.to_dict(), theirs.to_dict()) == shared(
        theirs.to_dict(), theirs.to_dict()
    )


OVERRIDES: list[dict[str, Any]] = [
    {"num_labels": 7},
    {"num_labels": 3},
    {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}},
    {"out_features": ["stem"]},
    {"out_indices": [-2]},
    {"dtype": torch.float16, "nobody_knows": 1},
    {"torch_dtype": "float64"},
    {"my_key": 5, "return_dict": False, "output_hidden_states": True},
    {"depths": [1, 1, 1, 2], "hidden_act": "gelu"},
    {"name_or_path": "there", "other": None},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_overrides(overrides: dict[str, Any]) -> None:
    base = transformers.BitConfig(num_labels=3, my_key=1, out_indices=[1, 2]).to_dict()
    given_before = copy.deepcopy(base)
    ours, ours_unused = BitConfig.from_dict(base, return_unused_kwargs=True, **overrides)
    assert base == given_before
    theirs, theirs_unused = transformers.BitConfig.from_dict(
        base, return_unused_kwargs=True, **overrides
    )
    assert ours_unused == theirs_unused
    ours_dict, theirs_dict = ours.to_dict(), theirs.to_dict()
    assert shared(ours_dict, theirs_dict) == shared(ours_dict, ours_dict)


def test_contradicting_override_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels=3 does not fit id2label"):
        BitConfig.from_dict({}, num_labels=3, id2label={0: "a"})


def test_overridden_depths_keep_a_valid_choice_of_stages() -> None:
    config = BitConfig.from_dict(BitConfig().to_dict(), depths=[1, 1], hidden_sizes=[32, 64])
    assert config.stage_names == ["stem", "stage1", "stage2"]
    assert config.out_features == ["stage2"]
    assert config.out_indices == [2]


NAMES = ["stem", "stage1", "stage2", "stage3", "stage9"]


@given(
    features=st.none() | st.lists(st.sampled_from(NAMES), max_size=4),
    indices=st.none() | st.lists(st.integers(-6, 5), max_size=4),
)
def test_the_same_stages_are_accepted(features: Any, indices: Any) -> None:
    settings = {"depths": [1, 1, 1], "out_features": features, "out_indices": indices}
    try:
        theirs = transformers.BitConfig(**settings)
    except (ValueError, IndexError):
        with pytest.raises(ValueError, match=r"out_features|out_indices"):
            BitConfig(**settings)
        return
    ours = BitConfig(**settings)
    assert (ours.out_features, ours.out_indices) == (theirs.out_features, theirs.out_indices)


@pytest.mark.parametrize(
    "settings",
    [{"out_features": ("stem",)}, {"out_features": "stem"}, {"out_indices": ["stem"]}],
    ids=str,
)
def test_stages_of_a_wrong_type_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        transformers.BitConfig(**settings)
    with pytest.raises(ValueError, match=r"out_features|out_indices"):
        BitConfig(**settings)


def test_setting_stages_keeps_both_forms_aligned() -> None:
    for config in (BitConfig(), transformers.BitConfig()):
        config.out_features = ["stem", "stage2"]
        assert config.out_indices == [0, 2]
        config.out_indices = (1, -1)
        assert config.out_features == ["stage1", "stage4"]
        assert config.out_indices == [1, -1]
        with pytest.raises(ValueError, match="order"):
            config.out_features = ["stage2", "stem"]
        assert config.out_features == ["stage1", "stage4"]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_channels", 0, "at least 1"),
        ("num_channels", True, "integer"),
        ("embedding_size", -64, "at least 1"),
        ("embedding_size", 64.0, "integer"),
        ("hidden_sizes", [], "list"),
        ("hidden_sizes", 64, "list"),
        ("hidden_sizes", [64, -1], "at least 1"),
        ("depths", [3, "4"], "integer"),
        ("depths", None, "list"),
        ("layer_type", "basic", "'preactivation', 'bottleneck'"),
        ("hidden_act", "swoosh", "'relu', 'gelu', 'gelu_new', 'selu'"),
        ("hidden_act", "none", "'relu'"),
        ("global_padding", "reflect", "'same' or 'valid'"),
        ("global_padding", 1, "'same' or 'valid'"),
        ("num_groups", 0, "at least 1"),
        ("drop_path_rate", 1.0, r"\[0, 1\)"),
        ("drop_path_rate", -0.1, r"\[0, 1\)"),
        ("drop_path_rate", float("nan"), r"\[0, 1\)"),
        ("drop_path_rate", "0", "number"),
        ("embedding_dynamic_padding", "yes", "True"),
        ("output_stride", -8, "at least 1"),
        ("width_factor", 0, "positive"),
        ("width_factor", float("inf"), "positive"),
        ("num_labels", -1, "at least 0"),
        ("id2label", ["a"], "dictionary"),
        ("id2label", {"a": 0}, "integers as keys"),
        ("label2id", ["a"], "dictionary"),
        ("problem_type", "detection", "'regression'"),
        ("dtype", "float17", "float32"),
        ("dtype", "nn", "float32"),
        ("torch_dtype", 16, "float32"),
        ("model_type", "dpt", "'bit'"),
        ("to_dict", 1, "needs the name"),
        ("__class__", "x", "needs the name"),
    ],
)
def test_wrong_values_are_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=name.replace("torch_", "")) as caught:
        BitConfig(**{name: value})
    caught.match(allowed)
    assert name == "__class__" or not isinstance(value, str) or value in str(caught.value)


def test_values_are_checked_when_set_later() -> None:
    config = BitConfig()
    with pytest.raises(ValueError, match="num_groups"):
        config.num_groups = -1
    with pytest.raises(ValueError, match="hidden_sizes"):
        config.update({"hidden_sizes": "big"})
    config.global_padding = "same"
    config.update({"new_key": 1, "torch_dtype": "float16"})
    assert config.global_padding == "SAME"
    assert (config.new_key, config.dtype) == (1, torch.float16)  # type: ignore[attr-defined]
    assert config.num_groups == 32


def test_label_maps_follow_their_number() -> None:
    config = BitConfig(id2label={"0": "cat", "1": "dog"})
    config.num_labels = 2
    assert config.id2label == {0: "cat", 1: "dog"}
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_label_number_that_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = BitConfig(num_labels=5, id2label={0: "cat"})
    assert config.num_labels == 1
    assert "num_labels=5" in caplog.text


def test_instances_share_nothing() -> None:
    sizes = [32, 64]
    first = BitConfig(hidden_sizes=sizes, depths=sizes)
    sizes.append(5)
    first.hidden_sizes.append(7)
    first.id2label[2] = "x"
    first.out_features.append("x")
    assert first.depths == [32, 64]
    assert first.out_features == ["stage2"]
    second = BitConfig()
    second.hidden_sizes.append(7)
    second.label2id.clear()  # type: ignore[union-attr]
    assert BitConfig() == BitConfig.from_dict({})
    assert BitConfig().hidden_sizes == [256, 512, 1024, 2048]
    assert BitConfig().label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_copies_are_equal_and_independent() -> None:
    config = BitConfig(depths=[1, 2], dtype="float16", extra=[1])
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        other.extra.append(2)
        assert other != config
    assert config != BitConfig(depths=[1, 2], dtype="float16", extra=[2])
    assert config != config.to_dict()
    assert repr(config) == f"BitConfig {config.to_json_string()}"


def test_json_names_a_value_without_a_json_form(tmp_path: Path) -> None:
    config = BitConfig(num_groups=4)
    config.to_json_file(tmp_path / "c.json", use_diff=False)
    before = (tmp_path / "c.json").read_text()
    config.bad = object()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="'bad'"):
        config.to_json_file(tmp_path / "c.json")
    assert (tmp_path / "c.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    assert BitConfig.from_json_file(tmp_path / "c.json") == BitConfig(num_groups=4)


def test_dtypes_in_unknown_keys_are_written() -> None:
    assert json.loads(BitConfig(x={"dtype": torch.float16}).to_json_string())["x"] == {
        "dtype": "float16"
    }


def test_from_pretrained_takes_folders_subfolders_and_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    BitConfig(num_groups=4, seen=True).save_pretrained(tmp_path / "sub")
    for place, where in (
        (tmp_path, {"subfolder": "sub"}),
        (tmp_path / "sub", {}),
        (str(tmp_path / "sub" / "config.json"), {}),
    ):
        config, unused = BitConfig.from_pretrained(
            place, return_unused_kwargs=True, num_groups=8, foo=1, **where
        )
        assert (config.num_groups, config.seen, unused) == (8, True, {"foo": 1})
        content, unused = BitConfig.get_config_dict(place, foo=1, **where)
        assert (content["num_groups"], unused) == (4, {"foo": 1})


def test_file_without_model_type_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_groups": 4}')
    assert BitConfig.from_pretrained(tmp_path) == BitConfig(num_groups=4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model_type": "dpt", "backbone_config": {"model_type": "bit"}}', "'dpt'"),
        (b'{"model_type": "bit", "hidden_sizes": [-256, 512]}', "hidden_sizes"),
        (b'{"model_type": "bit", "num_groups": "many"}', "num_groups"),
        (b'{"save_pretrained": 1}', "save_pretrained"),
        (b'{"self": 1}', "self"),
        (b'{"__class__": 1}', "__class__"),
        (b"[1, 2]", "object"),
        (b'{"depths": [1', "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"", "JSON"),
        (b"[" * 200_000, "JSON"),
    ],
)
def test_broken_files_are_named_with_the_reason(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for load, source in ((BitConfig.from_pretrained, tmp_path), (BitConfig.from_json_file, path)):
        with pytest.raises(CheckpointError) as caught:
            load(source)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, ValueError)


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    BitConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_groups") as caught:
        BitConfig.from_pretrained(tmp_path, num_groups=0)
    assert not isinstance(caught.value, CheckpointError)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        BitConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a local folder nor"):
        BitConfig.from_pretrained(tmp_path / "no" / "such" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        BitConfig().save_pretrained(tmp_path / "file")


def test_save_and_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def upload_folder(*, folder_path: str, **options: Any) -> str:
        content = json.loads((Path(folder_path) / "config.json").read_text())
        calls.append(("upload", {**options, "groups": content["num_groups"]}))
        return "commit"

    def create_repo(repo_id: str, **options: Any) -> SimpleNamespace:
        calls.append(("create", options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    BitConfig(num_groups=4).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert BitConfig.from_pretrained(tmp_path / "mine").num_groups == 4
    assert calls[0] == ("create", {"private": True, "token": None, "exist_ok": True})
    name, options = calls[1]
    assert name == "upload"
    assert options["repo_id"] == "me/mine"
    assert options["commit_message"] == "Upload config"
    assert options["groups"] == 4


def test_import_is_light() -> None:
    code = (
        "import sys, bitfast.configuration, bitfast.checkpoints.weights\n"
        "heavy = {'transformers', 'huggingface_hub', 'triton', 'requests'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy - START else 0)\n"
    )
    code = "import torch, sys; START = {m for m in sys.modules}\n" + code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
