"""Checkpoints against transformers 4.56.2: both directions, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig
from bitfast.modeling import BitBackbone, BitForImageClassification, BitModel
from tests.tiny_models import (
    CLASSES,
    SAVING,
    TINY,
    assert_same_weights,
    file_names,
    our_class,
    ours,
    their_class,
    theirs,
)


@pytest.mark.parametrize("saving", SAVING, ids=str)
@pytest.mark.parametrize("layer_type", ["preactivation", "bottleneck"])
@pytest.mark.parametrize("name", CLASSES)
def test_both_directions_bit_for_bit(
    name: str, layer_type: str, saving: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"layer_type": layer_type, "kept": {"a": [1]}}

    def saved_and_loaded(model: nn.Module, by: Any, folder: Path) -> Any:
        model.save_pretrained(folder, **saving)
        loading = {key: saving[key] for key in ("variant",) if key in saving}
        loaded, info = by.from_pretrained(folder, output_loading_info=True, **loading)
        assert not any(info.values())
        assert_same_weights(model, loaded)
        assert loaded.config.kept == {"a": [1]}
        return loaded

    loaded = saved_and_loaded(ours(name, **settings), their_class(name), tmp_path / "ours")
    assert loaded.config.architectures == [name]
    loaded = saved_and_loaded(theirs(name, **settings), our_class(name), tmp_path / "theirs")
    assert loaded.name_or_path == str(tmp_path / "theirs")
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert file_names(tmp_path / "ours") == file_names(tmp_path / "theirs")
    for index in (tmp_path / "ours").glob("*.index*.json"):
        assert json.loads(index.read_text()) == json.loads(
            (tmp_path / "theirs" / index.name).read_text()
        )


def test_saved_and_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model = ours("BitForImageClassification").eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 40, 36)
    expected = model(images).logits
    assert torch.equal(BitForImageClassification.from_pretrained(tmp_path)(images).logits, expected)
    reference = transformers.BitForImageClassification.from_pretrained(tmp_path)(images).logits
    torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("into", CLASSES)
@pytest.mark.parametrize("out_of", CLASSES)
def test_every_class_loads_from_every_other(
    out_of: str, into: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = theirs(out_of)
    source.save_pretrained(tmp_path)
    expected, expected_info = their_class(into).from_pretrained(tmp_path, output_loading_info=True)
    with caplog.at_level(logging.WARNING, logger="bitfast"):
        loaded, info = our_class(into).from_pretrained(tmp_path, output_loading_info=True)
    assert info == expected_info
    assert_same_weights(loaded.base_model, expected.base_model)
    assert_same_weights(loaded.base_model, source.base_model)
    records = [record for record in caplog.records if record.name == "bitfast"]
    named = info["missing_keys"] + info["unexpected_keys"]
    assert len(records) == bool(named)
    for key in named:
        assert key in records[0].getMessage()
        assert key.startswith("classifier")


def test_missing_head_is_initialised(tmp_path: Path) -> None:
    ours("BitModel").save_pretrained(tmp_path)
    first = BitForImageClassification.from_pretrained(tmp_path, num_labels=50).classifier[1]
    second = BitForImageClassification.from_pretrained(tmp_path, num_labels=50).classifier[1]
    for head in (first, second):
        # Uniform between -1/sqrt(32) and 1/sqrt(32), like nn.Linear.
        bound = 32**-0.5
        for parameter in head.parameters():
            assert parameter.abs().max() <= bound
            assert parameter.std() > bound / 3
    assert not torch.equal(first.weight, second.weight)


def test_missing_module_parameters_are_initialised_and_others_kept(tmp_path: Path) -> None:
    model = ours("BitModel")
    nn.init.normal_(model.norm.weight)
    state = model.state_dict()
    del state["norm.bias"], state["embedder.convolution.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = BitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == ["embedder.convolution.weight", "norm.bias"]
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert torch.equal(loaded.norm.bias, torch.zeros(32))
    # Kaiming normal by fan out: 8 * 7 * 7.
    std = loaded.embedder.convolution.weight.std().item()
    assert std == pytest.approx((2 / 392) ** 0.5, rel=0.2)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    ours("BitForImageClassification").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    BitForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_mismatched_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs("BitForImageClassification").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"classifier\.1\.bias is \(3,\) in the checkpoint"):
        BitForImageClassification.from_pretrained(tmp_path, num_labels=5)
    loading = {
        "num_labels": 5,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    _, expected_info = transformers.BitForImageClassification.from_pretrained(tmp_path, **loading)
    loaded, info = BitForImageClassification.from_pretrained(tmp_path, **loading)
    assert {key: sorted(value) for key, value in info.items()} == {
        key: sorted(value) for key, value in expected_info.items()
    }
    assert loaded.classifier[1].weight.shape == (5, 32)
    assert loaded.classifier[1].weight.std() > 0.01
    assert "classifier.1.weight is (3, 32) in the checkpoint and (5, 32)" in caplog.text
    assert len([r for r in caplog.records if r.name == "bitfast"]) == 1


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "loading",
    [
        {},
        {"dtype": "auto"},
        {"torch_dtype": "auto"},
        {"dtype": "float16"},
        {"torch_dtype": torch.bfloat16},
        {"dtype": torch.float64, "torch_dtype": torch.float16},
    ],
    ids=str,
)
def test_dtype(saved: torch.dtype, loading: dict[str, Any], tmp_path: Path) -> None:
    theirs("BitForImageClassification").to(saved).save_pretrained(tmp_path)
    expected = transformers.BitForImageClassification.from_pretrained(tmp_path, **loading)
    loaded = BitForImageClassification.from_pretrained(tmp_path, **loading)
    assert_same_weights(loaded, expected)
    assert loaded.dtype == expected.dtype == loaded.config.dtype == expected.config.dtype
    assert torch.get_default_dtype() == torch.float32


def test_dtype_auto_without_one_in_the_configuration(tmp_path: Path) -> None:
    model = ours("BitModel").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    assert content.pop("dtype") == "bfloat16"
    path.write_text(json.dumps(content))
    assert BitModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float17", torch.int64, "int8", 16])
def test_wrong_dtype(dtype: Any, tmp_path: Path) -> None:
    ours("BitModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be"):
        BitModel.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be"):
        BitModel._from_config(BitConfig(**TINY), dtype=dtype)


def test_default_dtype_is_followed(tmp_path: Path) -> None:
    ours("BitModel").save_pretrained(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        expected = transformers.BitModel.from_pretrained(tmp_path)
        assert BitModel.from_pretrained(tmp_path).dtype == expected.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_from_config() -> None:
    assert BitModel._from_config(BitConfig(**TINY)).dtype == torch.float32
    assert BitModel._from_config(BitConfig(**TINY, dtype="float16")).dtype == torch.float16
    assert BitModel._from_config(BitConfig(**TINY), dtype="float64").dtype == torch.float64
    model = BitModel._from_config(BitConfig(**TINY), torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, "auto"]
)
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    ours("BitModel").save_pretrained(tmp_path)
    loaded = BitModel.from_pretrained(tmp_path, device_map=device_map, low_cpu_mem_usage=True)
    assert loaded.device.type == ("cpu" if device_map != "auto" else loaded.device.type)


@pytest.mark.parametrize(
    "device_map", ["balanced", -1, True, {"": "cpu", "norm": "cpu"}, {"norm": "cpu"}, 1.5, "cpu:x"]
)
def test_wrong_device_map(device_map: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_map"):
        BitModel.from_pretrained(tmp_path, device_map=device_map)


def test_default_device_is_followed(tmp_path: Path) -> None:
    model = ours("BitModel")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert BitModel.from_pretrained(tmp_path).device.type == "meta"
        assert_same_weights(BitModel.from_pretrained(tmp_path, device_map="cpu"), model)


def test_config_overrides_and_unknown_arguments(tmp_path: Path) -> None:
    ours("BitForImageClassification", kept=1).save_pretrained(tmp_path)
    loaded = BitForImageClassification.from_pretrained(
        tmp_path, kept=2, output_hidden_states=True, hidden_act="gelu", attn_implementation="eager"
    )
    assert (loaded.config.kept, loaded.config.hidden_act) == (2, "gelu")
    assert loaded.config.output_hidden_states
    for cls in (BitForImageClassification, transformers.BitForImageClassification):
        with pytest.raises(TypeError, match="unknown_argument"):
            cls.from_pretrained(tmp_path, unknown_argument=1)
    with pytest.raises(ValueError, match="hidden_act"):
        BitForImageClassification.from_pretrained(tmp_path, hidden_act="swoosh")


def test_config_argument(tmp_path: Path) -> None:
    ours("BitModel").save_pretrained(tmp_path / "model")
    for config in (
        BitConfig(**TINY, seen=1),
        transformers.BitConfig(**TINY, seen=1),
        tmp_path / "other",
        str(tmp_path / "other"),
    ):
        BitConfig(**TINY, seen=1).save_pretrained(tmp_path / "other")
        loaded = BitModel.from_pretrained(tmp_path / "model", config=config)
        assert loaded.config.seen == 1
        assert loaded.config is not config
        with pytest.raises(TypeError):
            BitModel.from_pretrained(tmp_path / "model", config=BitConfig(**TINY), num_labels=4)


def test_state_dict_argument(tmp_path: Path) -> None:
    model = ours("BitForImageClassification")
    state = model.state_dict()
    loaded = BitForImageClassification.from_pretrained(None, config=model.config, state_dict=state)
    assert_same_weights(loaded, model)
    with torch.no_grad():
        loaded.classifier[1].bias.add_(1)
    assert not torch.equal(loaded.classifier[1].bias, model.classifier[1].bias)
    model.save_pretrained(tmp_path)
    for arguments in (
        {"pretrained_model_name_or_path": tmp_path, "state_dict": state},
        {"pretrained_model_name_or_path": None},
        {"pretrained_model_name_or_path": None, "state_dict": state},
        {"pretrained_model_name_or_path": tmp_path, "weights_only": False},
    ):
        with pytest.raises(ValueError, match=r"state_dict|weights_only"):
            BitForImageClassification.from_pretrained(**arguments)


def test_safetensors_are_preferred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = ours("BitModel"), ours("BitModel")
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, safe_serialization=False)
    assert "model.safetensors" in caplog.text
    assert_same_weights(BitModel.from_pretrained(tmp_path), first)
    assert_same_weights(BitModel.from_pretrained(tmp_path, use_safetensors=True), first)
    assert_same_weights(BitModel.from_pretrained(tmp_path, use_safetensors=False), second)
    (tmp_path / "model.safetensors").unlink()
    assert_same_weights(BitModel.from_pretrained(tmp_path), second)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        BitModel.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(CheckpointError, match=r"model\.x\.safetensors"):
        BitModel.from_pretrained(tmp_path, variant="x")


def test_subfolder(tmp_path: Path) -> None:
    model = ours("BitModel")
    model.save_pretrained(tmp_path / "a" / "b", max_shard_size=5000)
    assert_same_weights(BitModel.from_pretrained(tmp_path, subfolder="a/b"), model)
    with pytest.raises(CheckpointError, match="outside"):
        BitModel.from_pretrained(tmp_path / "a", subfolder="../a/b")


def test_numbers_of_a_model() -> None:
    model, reference = ours("BitForImageClassification"), theirs("BitForImageClassification")
    model.classifier.requires_grad_(False)
    reference.classifier.requires_grad_(False)
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters()
    assert model.num_parameters(only_trainable=True) == reference.num_parameters(True)
    assert model.get_memory_footprint() == reference.get_memory_footprint()
    assert model.half().get_memory_footprint(False) == 2 * model.num_parameters()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float16)
    assert model.base_model is model.bit
    assert model.bit.base_model is model.bit
    assert BitBackbone(model.config).base_model.config.num_groups == 2
