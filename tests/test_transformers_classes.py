"""bitfast.transformers: subclasses of transformers' own, with its numbers, outputs, loading and saving."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.models.bit import modeling_bit

import bitfast
import bitfast.transformers as classes
from bitfast.ops.kept_weights import kept_weights
from tests.model_pairs import DPT_HYBRID, SMALL, assert_as_transformers, assert_close, move_weights
from tests.tiny_models import CLASSES, TINY, assert_same_weights, our_class, theirs


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model of bitfast.transformers and one of transformers with equal weights."""
    config = transformers.BitConfig(**{**SMALL, **settings})
    ours, expected = getattr(classes, name)(config), getattr(transformers, name)(config)
    move_weights(expected)
    ours.load_state_dict(expected.state_dict())
    return ours, expected


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 40, 48))


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_are_subclasses_of_transformers_own(name):
    cls = getattr(classes, name)
    assert issubclass(cls, transformers.PreTrainedModel)
    assert issubclass(cls, modeling_bit.BitPreTrainedModel)
    assert issubclass(cls, modeling_bit.BackboneMixin) is (name == "BitBackbone")
    assert cls.config_class is classes.BitConfig is transformers.BitConfig
    assert issubclass(classes.BitImageProcessor, (BaseImageProcessor, bitfast.BitImageProcessor))
    fast = transformers.BitImageProcessorFast
    assert issubclass(classes.BitImageProcessorFast, fast.__mro__[1])


SETTINGS = [(name, {}) for name in CLASSES] + [
    ("BitForImageClassification", {"layer_type": "bottleneck"}),
    ("BitModel", DPT_HYBRID),
    ("BitBackbone", DPT_HYBRID),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_outputs_are_transformers(name, settings):
    ours, expected = (model.eval() for model in pair(name, **settings))

    def run(model: Any) -> Any:
        x = pixels.to(next(model.parameters()).dtype)
        return [model(x), model(x, output_hidden_states=True), model(x, return_dict=False)]

    pixels = images()
    assert_as_transformers(ours, expected, run)
    with torch.no_grad():
        assert_as_transformers(ours, expected, run)
    for a, b in zip(run(ours), run(expected), strict=True):
        assert type(a) is type(b)
    a, b = (
        m.base_model.encoder(torch.rand(1, SMALL["embedding_size"], 8, 8)) for m in (ours, expected)
    )
    assert type(a) is type(b)


def test_names_of_modules_and_initial_weights_are_transformers():
    made = []
    for source in (classes, transformers):
        torch.manual_seed(3)
        made.append(source.BitForImageClassification(transformers.BitConfig(**TINY)))
    assert [n for n, _ in made[0].named_modules()] == [n for n, _ in made[1].named_modules()]
    assert_same_weights(*made)


@pytest.mark.parametrize("config", [None, 3, transformers.ViTConfig()], ids=["None", "3", "ViT"])
def test_other_configurations_are_refused(config):
    with pytest.raises((TypeError, AttributeError)):
        classes.BitModel(config)


def test_a_configuration_is_checked_and_bitfasts_own_converted():
    config = transformers.BitConfig(**TINY, hidden_act="silu")
    with pytest.raises(ValueError, match=r"hidden_act.*silu"):
        classes.BitModel(config)
    model = classes.BitModel(bitfast.BitConfig(**TINY, global_padding="same"))
    assert type(model.config) is transformers.BitConfig
    assert model.config.global_padding == "SAME"


# ---- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_go_every_way(name, tmp_path):
    sources = {"transformers": transformers, "here": classes, "bitfast": bitfast}
    first = theirs(name)
    move_weights(first)
    first.save_pretrained(tmp_path / "transformers")
    for key in ("here", "bitfast"):
        model = getattr(sources[key], name).from_pretrained(tmp_path / "transformers")
        assert not model.training
        model.save_pretrained(tmp_path / key)
    for folder in sources:
        for source in sources.values():
            loaded = getattr(source, name).from_pretrained(tmp_path / folder)
            assert_same_weights(loaded, first)
            assert loaded.config.architectures == [name]


@pytest.mark.parametrize("dtype", ["auto", torch.float64, "bfloat16"], ids=str)
def test_dtypes(dtype, tmp_path):
    theirs("BitModel").half().save_pretrained(tmp_path)
    loaded = classes.BitModel.from_pretrained(tmp_path, dtype=dtype)
    expected = transformers.BitModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == expected.dtype
    assert loaded.config.dtype == expected.config.dtype
    assert_same_weights(loaded, expected)


def test_a_new_head_on_a_base_model(tmp_path):
    theirs("BitModel").save_pretrained(tmp_path)
    loaded, info = classes.BitForImageClassification.from_pretrained(
        tmp_path, num_labels=7, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.1.weight", "classifier.1.bias"}
    assert loaded.classifier[1].weight.abs().max() > 0
    assert loaded(images()).logits.shape == (2, 7)


DEVICE_MAPS = [None, "auto", "cpu", {"": "cpu"}, "sequential"]


def load(accelerated: bool, folder: Path, **settings: Any) -> Any:
    """A classifier of bitfast.transformers, or one of transformers after ``accelerate``."""
    if not accelerated:
        return classes.BitForImageClassification.from_pretrained(folder, **settings)
    model = transformers.BitForImageClassification.from_pretrained(folder, **settings)
    bitfast.accelerate(model)
    return model


@pytest.mark.parametrize("accelerated", [False, True], ids=["own", "accelerated"])
@pytest.mark.parametrize("device_map", DEVICE_MAPS, ids=str)
def test_device_maps_and_weights_kept_for_inference(device_map, accelerated, tmp_path):
    expected = theirs("BitForImageClassification")
    expected.save_pretrained(tmp_path)
    loaded = load(accelerated, tmp_path, device_map=device_map)
    reference = transformers.BitForImageClassification.from_pretrained(
        tmp_path, device_map=device_map
    )
    assert getattr(loaded, "hf_device_map", None) == getattr(reference, "hf_device_map", None)
    pixels = images()
    with torch.no_grad():
        assert_close(loaded(pixels).logits, reference(pixels).logits, 1e-5)
        # Whatever way they were loaded, weights are standardized in the first pass and then no more.
        before = kept(loaded)
        loaded(pixels)
        assert kept(loaded) == before
        assert before


def kept(model: Any) -> set[int]:
    """What is kept of a model's weights, by address of the objects."""
    entries = [kept_weights._kept.get(id(p)) for p in model.parameters()]
    return {id(made) for kept in entries if kept for made in kept.by_form.values()}


@pytest.mark.parametrize("source", [classes, transformers], ids=["bitfast", "transformers"])
def test_parts_on_disk(source, tmp_path):
    model = theirs("BitForImageClassification").eval()
    model.save_pretrained(tmp_path / "checkpoint")
    device_map = {"bit.embedder": "cpu", "bit.encoder": "disk", "bit.norm": "cpu",
                  "bit.pooler": "cpu", "classifier": "cpu"}  # fmt: skip
    loaded = source.BitForImageClassification.from_pretrained(
        tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    if source is transformers:
        with pytest.raises(ValueError, match="its forward was replaced"):
            bitfast.accelerate(loaded)  # by what fetches the weights
    pixels = images()
    with torch.no_grad():
        for _ in range(2):
            assert_close(loaded(pixels).logits, model(pixels).logits, 1e-5)


# ---- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [classes, bitfast], ids=["bitfast.transformers", "bitfast"])
@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(3, torch.tensor([0, 2])), (3, torch.rand(2, 3)), (1, torch.rand(2))],
    ids=["single", "multi", "regression"],
)
def test_losses(source, num_labels, labels):
    expected = theirs("BitForImageClassification", num_labels=num_labels)
    ours = source.BitForImageClassification(
        transformers.BitConfig(**{**TINY, "num_labels": num_labels})
    )
    ours.load_state_dict(expected.state_dict())
    pixels = images()
    assert_close(ours(pixels, labels=labels).loss, expected(pixels, labels=labels).loss, 1e-5)
    ours.loss_function = lambda labels, logits, config: logits.sum() * config.num_labels
    output = ours(pixels, labels=labels)
    assert_close(output.loss, output.logits.sum() * num_labels, 1e-5)


def test_a_subclass_of_any_name_has_the_loss_of_a_classifier():
    class Cats(classes.BitForImageClassification):
        pass

    model = Cats(transformers.BitConfig(**TINY))
    assert model(images(), labels=torch.tensor([0, 1])).loss.isfinite()


def test_a_backbones_choice():
    ours, expected = pair("BitBackbone", out_features=["stem", "stage2"])
    for model in (ours, expected):
        model.eval()
        model.out_indices = (1, 3)
    pixels = images()
    for attribute in ("out_features", "out_indices", "channels", "num_features", "stage_names"):
        assert getattr(ours, attribute) == getattr(expected, attribute)
    assert ours.backbone_type == expected.backbone_type
    assert_close(
        ours.forward_with_filtered_kwargs(pixels, output_attentions=True).feature_maps,
        expected(pixels).feature_maps,
        1e-5,
    )


# ---- processors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BitImageProcessor", "BitImageProcessorFast"])
def test_processors(name, tmp_path):
    photograph = Image.fromarray(np.random.randint(0, 256, (61, 50, 3), dtype=np.uint8))
    plain = getattr(bitfast, name)(crop_size=32)
    plain.save_pretrained(tmp_path)
    ours = getattr(classes, name).from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    again = getattr(classes, name).from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()
    output = again(photograph, return_tensors="pt")
    assert isinstance(output, BatchFeature)
    assert torch.equal(output.pixel_values, plain(photograph, return_tensors="pt").pixel_values)
    assert isinstance(transformers.AutoImageProcessor.from_pretrained(tmp_path), BaseImageProcessor)


def test_bitfast_alone_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import bitfast\n"
        "try: import bitfast.transformers\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "bitfast.transformers needs transformers (pip install transformers)" in done.stdout


# ---- bitfast's own classes ------------------------------------------------------------------------

MEMBERS = [
    "_can_set_attn_implementation", "_is_stateful", "_keep_in_fp32_modules", "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_save", "_supports_sdpa", "_tied_weights_keys", "can_generate", "framework",
    "get_output_embeddings", "is_backend_compatible", "is_parallelizable", "tie_weights",
]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_members_of_bitfasts_own_classes(name):
    ours, expected = our_class(name)(transformers.BitConfig(**TINY)), theirs(name)
    for member in filter(partial(hasattr, expected), MEMBERS):  # version 5 dropped some
        actual, wanted = (getattr(model, member) for model in (ours, expected))
        if callable(wanted):
            actual, wanted = actual(), wanted()
        assert actual == wanted or not (
            actual or wanted
        )  # version 5 dropped some, and has empty sets
    assert "BitEmbeddings" in ours._no_split_modules
    with pytest.raises(NotImplementedError):
        ours.get_input_embeddings()
    batch = {"pixel_values": images()}
    values = batch["pixel_values"].numel()
    operations = 6 * values * sum(parameter.numel() for parameter in expected.parameters())
    assert (ours.estimate_tokens(batch), ours.floating_point_ops(batch)) == (values, operations)
    if hasattr(expected, "estimate_tokens"):  # until version 5
        assert expected.estimate_tokens(batch) == values
        assert expected.floating_point_ops(batch) == operations
    key = next(iter(ours.state_dict()))
    assert ours.get_parameter_or_buffer(key) is ours.get_parameter(key)
    with pytest.raises(AttributeError):
        ours.get_parameter_or_buffer("nothing")
    assert ours.config.get_text_config() is ours.config
    assert ours.config.has_no_defaults_at_init is False
    with pytest.raises(NotImplementedError, match=r"bitfast\.transformers"):
        ours.register_for_auto_class()


def test_weights_are_initialised_once():
    class Mine(bitfast.BitModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.extra = torch.nn.Conv2d(3, 4, 5)
            with torch.no_grad():
                self.extra.weight.zero_()
            self.init_weights()

    model = Mine(bitfast.BitConfig(**TINY))
    assert model.extra.weight.abs().max() > 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_hf_device_map_of_bitfasts_own(tmp_path):
    theirs("BitModel").save_pretrained(tmp_path)
    loaded = bitfast.BitModel.from_pretrained(tmp_path, device_map="auto")
    assert loaded.hf_device_map == {"": loaded.device}
    assert not hasattr(bitfast.BitModel.from_pretrained(tmp_path), "hf_device_map")


def test_a_backbones_dictionary():
    ours = bitfast.BitBackbone(bitfast.BitConfig(**TINY))
    ours.out_features = ["stem", "stage1"]
    content = ours.to_dict()
    assert content["out_features"] == ["stem", "stage1"]
    assert content["out_indices"] == [0, 1]
    assert content["hidden_sizes"] == TINY["hidden_sizes"]
    assert (
        ours.backbone_type
        == transformers.BitBackbone(transformers.BitConfig(**TINY)).backbone_type.value
    )


@pytest.mark.parametrize("exists", [False, True])
def test_tags_are_pushed_in_the_model_card(exists, monkeypatch):
    class Missing(huggingface_hub.errors.EntryNotFoundError):
        def __init__(self) -> None:
            pass

    def load(*_: Any, **__: Any) -> Any:
        if exists:
            return huggingface_hub.ModelCard("---\ntags: [cats, owls]\n---\nAll about owls")
        raise Missing

    def upload_folder(folder_path: str, **_: Any) -> None:
        cards.append(huggingface_hub.ModelCard((Path(folder_path) / "README.md").read_text()))

    def create_repo(name: str, **_: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", load)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    model, cards = bitfast.BitModel(bitfast.BitConfig(**TINY)), []
    model.add_model_tags("cats")
    model.add_model_tags(["dogs", "cats"])
    assert model.model_tags == ["cats", "dogs"]
    model.push_to_hub("someone/cats")
    assert cards[0].data.tags == (["cats", "owls", "dogs"] if exists else ["cats", "dogs"])
    assert ("All about owls" in cards[0].text) is exists
