"""timm's BiT checkpoints: the same logits as timm, and a clear answer to what is none."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import save_file

from bitfast import BitImageProcessor
from bitfast.checkpoints import timm as timm_format
from bitfast.checkpoints.files import CheckpointError
from bitfast.configuration import BitConfig
from bitfast.modeling import BitBackbone, BitForImageClassification, BitModel
from tests.foreign_checkpoints import (
    SMALL,
    assert_as_timm,
    edit_config,
    released_model,
    save_folder,
    timm_model,
)
from tests.model_pairs import assert_close
from tests.tiny_models import assert_same_weights

DEPTHS = {"50": [3, 4, 6, 3], "101": [3, 4, 23, 3], "152": [3, 8, 36, 3]}


def save_weights(path: Path, model: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def load(path: Path, dtype: torch.dtype) -> Any:
    return BitForImageClassification.from_pretrained(path, dtype=dtype)


# ---- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth", ".pt"])
def test_a_file(tmp_path: Path, suffix: str) -> None:
    model = timm_model()
    assert_as_timm(partial(load, save_weights(tmp_path / f"any{suffix}", model)), model)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder(tmp_path: Path, safe: bool) -> None:
    model = timm_model()
    assert_as_timm(partial(load, save_folder(tmp_path / "saved", model, safe)), model)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("resnetv2_50x3_bit", {"width_factor": 3}),
        ("resnetv2_101x1_bit", {"layers": (2, 1, 3, 1)}),
        (
            "resnetv2_152x4_bit",
            {"width_factor": 4, "layers": (1, 1, 1, 1), "channels": (32, 64, 32, 32)},
        ),
        ("resnetv2_50x1_bit", {"in_chans": 1, "num_classes": 1}),
        ("resnetv2_50x1_bit", {"in_chans": 5, "stem_chs": 96, "num_classes": 21843}),
        ("resnetv2_152x2_bit", {"layers": (1, 1), "channels": (256, 384)}),
        ("resnetv2_50x1_bit", {"layers": (1, 1, 11, 1), "drop_path_rate": 0.1, "drop_rate": 0.2}),
    ],
    ids=str,
)
def test_any_depth_and_width(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    model = timm_model(architecture, **changes)
    arguments = {"layers": model_layers(model), "drop_rate": 0.2}
    folder = save_folder(tmp_path / "saved", model, model_args=arguments)
    assert_as_timm(partial(load, folder), model)
    config = BitConfig.from_pretrained(folder)
    assert config.depths == model_layers(model)
    assert config.embedding_size == model.stem.conv.out_channels
    assert config.hidden_sizes == [info["num_chs"] for info in model.feature_info[1:]]
    assert config.num_labels == model.num_classes
    assert config.num_channels == model.in_chans


def model_layers(model: Any) -> list[int]:
    return [len(stage.blocks) for stage in model.stages]


@pytest.mark.parametrize("size", [(64, 64), (97, 41), (33, 130)])
def test_images_of_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    model = timm_model()
    path = save_weights(tmp_path / "model.safetensors", model)
    assert_as_timm(partial(load, path), model, size)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_models_without_a_head(
    tmp_path: Path, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm_model(num_classes=num_classes).double()
    path = save_weights(tmp_path / "model.safetensors", model)
    images = torch.randn(2, 3, 65, 70, dtype=torch.float64)
    with torch.no_grad():
        final, features = model.forward_intermediates(images)
        loaded = BitModel.from_pretrained(path, dtype="auto")
        assert loaded.dtype == torch.float64
        output = loaded(images)
        assert_close(output.last_hidden_state, final)
        assert_close(output.pooler_output, final.mean((2, 3), keepdim=True))
        backbone = BitBackbone.from_pretrained(path, dtype="auto", out_indices=[1, 2, 3, 4])
        assert_close(backbone(images).feature_maps, tuple(features[1:]))
    # As for transformers' checkpoints, what is left is named.
    assert ("Not used" in caplog.text) == (num_classes > 0)


def test_a_head_that_is_not_there_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_folder(tmp_path / "saved", timm_model(num_classes=0))
    model, info = BitForImageClassification.from_pretrained(
        folder, num_labels=4, output_loading_info=True
    )
    assert info["missing_keys"] == ["classifier.1.bias", "classifier.1.weight"]
    assert "Newly initialised" in caplog.text
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 4)


# ---- the arguments of from_pretrained -----------------------------------------------------------


def test_another_number_of_labels(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", timm_model())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BitForImageClassification.from_pretrained(path, num_labels=4)
    model, info = BitForImageClassification.from_pretrained(
        path, num_labels=4, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.config.num_labels == 4
    assert info["mismatched_keys"] == ["classifier.1.weight", "classifier.1.bias"]
    assert info["missing_keys"] == info["unexpected_keys"] == []


def test_overrides_and_a_configuration_of_ones_own(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", timm_model())
    model = BitForImageClassification.from_pretrained(
        path, dtype="bfloat16", output_hidden_states=True, drop_path_rate=0.5
    )
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.name_or_path == str(path)
    assert len(model(torch.randn(1, 3, 64, 64).bfloat16()).hidden_states) == 5
    assert model.config.drop_path_rate == 0.5
    config = BitConfig.from_pretrained(path, problem_type="regression")
    other = BitForImageClassification.from_pretrained(path, config=config)
    assert other.config.problem_type == "regression"
    assert_same_weights(other, BitForImageClassification.from_pretrained(path))
    with pytest.raises(TypeError, match="unknown"):
        BitForImageClassification.from_pretrained(path, unknown=1)


def test_which_kind_of_weights(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "saved", timm_model(), safe=False)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        BitModel.from_pretrained(folder, use_safetensors=True)
    BitModel.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        BitModel.from_pretrained(folder / "pytorch_model.bin", use_safetensors=True)


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    model = timm_model()
    load(save_weights(tmp_path / "model.safetensors", model), torch.float32).save_pretrained(
        tmp_path / "b"
    )
    theirs = transformers.BitForImageClassification.from_pretrained(tmp_path / "b").double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close(theirs(images).logits, model.double()(images))


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm_model()
    folder = save_folder(tmp_path / "saved", model)
    downloads = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        downloads.append((repo_id, filename, options["revision"]))
        if not (folder / filename).exists():
            raise errors.EntryNotFoundError(f"no {filename}")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = BitForImageClassification.from_pretrained("timm/any_name", revision="v1")
    assert downloads == [
        ("timm/any_name", "config.json", "v1"),
        ("timm/any_name", "model.safetensors", "v1"),
    ]
    assert loaded.name_or_path == "timm/any_name"
    assert_same_weights(loaded, load(folder, torch.float32))
    assert BitConfig.from_pretrained("timm/any_name").depths == list(SMALL["layers"])
    assert BitImageProcessor.from_pretrained("timm/any_name").crop_size["height"] == 224


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (list("abcdefg"), {0: "a", 1: "the second", 6: "g"}),
        ({"0": "a", "1": "b"}, {0: "a", 1: "the second", 6: "LABEL_6"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["config", "pretrained_cfg"])
def test_labels(tmp_path: Path, names: Any, expected: dict[int, str], place: str) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    described = {"label_names": names, "label_descriptions": {"b": "the second"}}
    if place == "config":
        edit_config(folder, **described)
    else:
        edit_config(folder, pretrained_cfg=described)
    config = BitModel.from_pretrained(folder).config
    assert {index: config.id2label[index] for index in expected} == expected
    assert config.label2id["the second"] == 1
    assert len(config.id2label) == 7


@pytest.mark.parametrize("names", [["a"], {"7": "x"}, {"-1": "x"}, {"one": "x"}, 5, [[]]], ids=str)
def test_labels_that_do_not_fit(tmp_path: Path, names: Any) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    edit_config(folder, label_names=names)
    with pytest.raises(CheckpointError, match="label_names"):
        BitModel.from_pretrained(folder)


# ---- the released models ------------------------------------------------------------------------


@pytest.mark.parametrize("name", timm.list_pretrained("resnetv2_*_bit*"))
def test_the_architecture_of_every_released_model(name: str) -> None:
    num_classes = timm.models.get_pretrained_cfg(name).num_classes
    architecture = name.partition(".")[0]
    tensors = released_model(architecture, num_classes).state_dict()
    found, renamed = timm_format.convert(tensors, name)
    layers, width = architecture.split("_")[1].split("x")
    assert found.variant == f"{layers}x{width}"
    config = BitConfig(**found.settings())
    assert config.depths == DEPTHS[layers]
    assert config.embedding_size == 64 * int(width)
    assert config.hidden_sizes == [int(width) * size for size in (256, 512, 1024, 2048)]
    assert config.width_factor == 1
    assert config.num_labels == num_classes
    with torch.device("meta"):
        ours = BitForImageClassification(config).state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in ours.items()
    }
    timm_format.check_config({"architecture": name}, name)
    timm_format.check_config({"architecture": architecture}, name)


@pytest.mark.parametrize("name", ["resnetv2_50x1_bitm", "resnetv2_152x2_bit_teacher_384"])
def test_names_of_older_releases(name: str) -> None:
    timm_format.check_config({"architecture": name}, name)


# ---- what is no BiT checkpoint ------------------------------------------------------------------


def assert_refused(path: Path, *said: str) -> None:
    for load_it in (BitForImageClassification, BitModel, BitBackbone, BitConfig):
        with pytest.raises(CheckpointError) as caught:
            load_it.from_pretrained(path)
        for part in (str(path), *said):
            assert part in str(caught.value)


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50d_gn", "resnetv2_77x1_bit", "", 5, None])
def test_other_architectures_by_name(tmp_path: Path, name: Any) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    edit_config(folder, architecture=name)
    (folder / "model.safetensors").unlink()  # it is not even looked at
    assert_refused(folder, "config.json", repr(name), "resnetv2_152x4_bit")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "bn1.running_mean is of BatchNorm"),
        ("resnetv2_50d_gn", "stem of three convolutions"),
        ("resnetv2_18", "BatchNorm"),
        ("vit_tiny_patch16_224", "it has no stages.0.blocks.0.conv1.weight; it has blocks.0"),
        ("convnext_atto", "stages.0.blocks.0"),
    ],
)
def test_other_architectures_by_their_tensors(tmp_path: Path, name: str, said: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=3).state_dict()
    path = tmp_path / "model.safetensors"
    save_file(
        {key: torch.zeros(value.shape, dtype=torch.uint8) for key, value in state.items()}, path
    )
    with pytest.raises(CheckpointError, match=said) as caught:
        BitModel.from_pretrained(path)
    assert str(path) in str(caught.value)


def remove(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def change(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def drop_block(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("stages.3.blocks.1.")]:
        del tensors[name]


def drop_stage(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("stages.1.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove("stem.conv.weight"), "lacks stem.conv.weight"),
        (remove("norm.bias"), "lacks norm.bias"),
        (remove("head.fc.bias"), "lacks head.fc.bias"),
        (remove("head.fc.weight"), "lacks head.fc.weight"),
        (remove("stages.1.blocks.0.downsample.conv.weight"), "lacks stages.1.blocks.0.downsample"),
        (remove("stages.1.blocks.1.norm2.weight"), "lacks stages.1.blocks.1.norm2.weight"),
        (drop_block, "blocks in stage 3 are numbered 0, 2"),
        (drop_stage, "stages are numbered 0, 2, 3"),
        (change("extra.weight", 3), "extra.weight, for which there is no place"),
        (change("stages.0.blocks.0.conv1.bias", 3), "stages.0.blocks.0.conv1.bias, for which"),
        (change("stages.9999999.blocks.0.conv1.weight", 3), "for which there is no place"),
        (change("stages.99999.blocks.0.conv1.weight", 3), "stages are numbered 0, 1, 2, 3, 99999"),
        (
            change("stages.0.blocks.0.conv2.weight", 32, 32, 1, 1),
            "(32, 32, 1, 1) and should be (32, 32, 3, 3)",
        ),
        (change("stages.0.blocks.0.conv3.weight", 128), "must have four dimensions"),
        (change("stages.0.blocks.0.conv3.weight", 0, 32, 1, 1), "none of size 0"),
        (change("stages.0.blocks.0.conv3.weight", 96, 32, 1, 1), "multiples of 128"),
        (change("stem.conv.weight", 24, 3, 7, 7), "a multiple of 32"),
        (change("stem.conv.weight", 32, 3, 3, 3), "(32, 3, 3, 3) and should be (32, 3, 7, 7)"),
        (change("head.fc.weight", 7, 255, 1, 1), "head.fc.weight is (7, 255, 1, 1)"),
        (change("head.fc.weight", 7, 256), "head.fc.weight must have four dimensions"),
        (change("norm.bias", 256, dtype=torch.int64), "norm.bias is torch.int64"),
        (change("norm.running_mean", 256), "BatchNorm"),
        (change("stem.norm.weight", 32), "post-activation"),
        (dict.clear, "it has nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_a_checkpoint(tmp_path: Path, damage: Any, said: str) -> None:
    tensors = dict(timm_model().state_dict())
    damage(tensors)
    path = tmp_path / "model.pth"
    torch.save(tensors, path)
    assert_refused(path, said)


def test_a_message_lists_a_few_names_only(tmp_path: Path) -> None:
    tensors = timm_model().state_dict()
    tensors.update({f"module.{number}": torch.zeros(1) for number in range(1000)})
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert_refused(path, "module.0, module.1, module.10, module.100, module.101 and 995 more")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"output_stride": 16}, "output_stride=16; bitfast has only 32"),
        ({"act_layer": "gelu"}, "act_layer='gelu'"),
        ({"global_pool": "max"}, "global_pool='max'; bitfast has only 'avg'"),
        ({"stem_type": "same"}, "stem_type='same'"),
        ({"norm_layer": "groupnorm1"}, "norm_layer='groupnorm1'; bitfast has no such argument"),
        ([], "model_args must be a JSON object"),
    ],
    ids=str,
)
def test_models_changed_in_ways_that_no_tensor_shows(
    tmp_path: Path, arguments: Any, said: str
) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    edit_config(folder, model_args=arguments)
    assert_refused(folder, "config.json", said)


def test_a_head_of_another_size_than_the_configuration_says(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    edit_config(folder, num_classes=8)
    assert_refused(folder, "num_classes=8, and the tensors have 7")
    folder = save_folder(tmp_path / "other", timm_model(num_classes=0))
    edit_config(folder, num_classes=8)
    assert_refused(folder, "num_classes=8, and the tensors have no head")


def test_a_file_in_transformers_format_needs_its_folder(tmp_path: Path) -> None:
    load(save_weights(tmp_path / "timm.pt", timm_model()), torch.float32).save_pretrained(tmp_path)
    assert_refused(tmp_path / "model.safetensors", "expected a folder")


def test_broken_files(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", timm_model())
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(path, "not a valid safetensors file")
    for name, content in (("a.pth", b""), ("b.pt", b"\x80\x04junk"), ("c.bin", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, "not a PyTorch file")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        BitModel.from_pretrained(tmp_path / "d.txt")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": SimpleNamespace()}, tmp_path / "model.pth")
    assert_refused(tmp_path / "model.pth", "not a PyTorch file of plain tensors")


def test_a_configuration_file_alone_does_not_describe_the_model(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "saved", timm_model())
    with pytest.raises(CheckpointError, match="load the folder"):
        BitConfig.from_json_file(folder / "config.json")


def test_a_folder_of_transformers_is_loaded_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(save_weights(tmp_path / "timm.pt", timm_model()), torch.float32).save_pretrained(
        tmp_path / "a"
    )
    # A key of timm's in it changes nothing.
    edit_config(tmp_path / "a", architecture="resnet50")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "a", torch.float32)
    assert not caplog.records
    assert model.config.architecture == "resnet50"
