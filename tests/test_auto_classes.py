"""register_with_transformers: the auto classes and pipelines of transformers give bitfast's classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import bitfast
from bitfast import auto_classes
from bitfast import transformers as classes
from tests.foreign_models import ALL, dpt_hybrid
from tests.model_pairs import assert_close, flatten, move_weights
from tests.tiny_models import TINY, theirs

AUTO = {
    "AutoModel": "BitModel",
    "AutoModelForImageClassification": "BitForImageClassification",
    "AutoBackbone": "BitBackbone",
}
PROCESSORS = (classes.BitImageProcessor, classes.BitImageProcessorFast)
MAJOR = int(transformers.__version__.split(".")[0])
PROCESSOR = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of transformers: model and processor."""
    model = theirs("BitForImageClassification", id2label={0: "cat", 1: "dog", 2: "owl"})
    move_weights(model)
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessor(**PROCESSOR).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (61, 50, 3), dtype=np.uint8))


def from_auto_class(auto_class: str, folder: Path) -> Any:
    """What an auto class makes of a checkpoint."""
    if auto_class == "AutoBackbone" and MAJOR == 5:
        # There transformers asks the Hub even for a folder, and fails without it.
        config = transformers.AutoConfig.from_pretrained(folder)
        return transformers.AutoBackbone.from_config(config)
    return getattr(transformers, auto_class).from_pretrained(folder)


@pytest.mark.parametrize("auto_class", AUTO)
def test_an_auto_class_gives_bitfasts_class_until_undone(auto_class, folder):
    before = type(from_auto_class(auto_class, folder))
    assert before.__module__.startswith("transformers.")
    registration = bitfast.register_with_transformers()
    try:
        ours = from_auto_class(auto_class, folder)
        assert type(ours) is getattr(classes, AUTO[auto_class])
        assert ours.config.hidden_sizes == TINY["hidden_sizes"]
        for config in (transformers.BitConfig(**TINY), bitfast.BitConfig(**TINY)):
            built = getattr(transformers, auto_class).from_config(config)
            assert type(built) is type(ours)
    finally:
        registration.undo()
    assert type(from_auto_class(auto_class, folder)) is before
    registration.undo()  # once more does no harm


def test_the_outputs_are_transformers(folder):
    images = torch.randn(2, 3, 33, 40)
    expected = transformers.AutoModelForImageClassification.from_pretrained(folder)(images)
    with bitfast.register_with_transformers():
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_hidden_states=True
        )
    output = model(images)
    assert_close([output.logits], [expected.logits], 1e-5)
    assert len(output.hidden_states) == 3


# ---- processors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_fast", [None, False, True])
def test_the_image_processor(folder, photograph, use_fast):
    options = {} if use_fast is None else {"use_fast": use_fast}
    plain = transformers.AutoImageProcessor.from_pretrained(folder, **options)
    with bitfast.register_with_transformers():
        ours = transformers.AutoImageProcessor.from_pretrained(folder, **options)
    is_fast = MAJOR == 5 if use_fast is None else use_fast
    assert type(ours) is (classes.BitImageProcessorFast if is_fast else classes.BitImageProcessor)
    assert not isinstance(plain, PROCESSORS)
    actual = ours(photograph, return_tensors="pt").pixel_values
    expected = plain(photograph, return_tensors="pt").pixel_values
    assert actual.shape == expected.shape == (1, 3, 32, 32)
    # Fast ones differ by a level or two of 255 (see docs/behaviour.md), slow ones in nothing.
    assert (actual - expected).abs().max() <= (2.1 / 255 / 0.26 if is_fast else 0)
    assert type(transformers.AutoImageProcessor.from_pretrained(folder, **options)) is type(plain)


def test_settings_and_unused_arguments_pass_through(folder):
    def made() -> Any:
        return transformers.AutoImageProcessor.from_pretrained(
            folder, do_center_crop=False, unknown=3, return_unused_kwargs=True
        )

    _, unused = made()
    with bitfast.register_with_transformers():
        ours, same = made()
    assert isinstance(ours, PROCESSORS)
    assert ours.do_center_crop is False
    assert ours.size == {"shortest_edge": 40}
    assert same["unknown"] == unused["unknown"] == 3


def test_a_folder_without_a_model_is_taken_for_bits(folder):
    (folder / "config.json").unlink()
    with bitfast.register_with_transformers():
        made = transformers.AutoImageProcessor.from_pretrained(folder)
    assert isinstance(made, PROCESSORS)


def test_processors_of_other_models_stay_as_they_are(folder):
    """DINOv2 names the same class."""
    transformers.Dinov2Config(hidden_size=16, num_attention_heads=2).save_pretrained(folder)
    before = type(transformers.AutoImageProcessor.from_pretrained(folder))
    with bitfast.register_with_transformers():
        assert type(transformers.AutoImageProcessor.from_pretrained(folder)) is before
        transformers.ViTImageProcessor().save_pretrained(folder)
        made = transformers.AutoImageProcessor.from_pretrained(folder)
        assert type(made).__module__.startswith("transformers.models.vit")
        assert (
            type(transformers.AutoModel.from_config(transformers.ViTConfig())).__name__
            == "ViTModel"
        )


def test_what_cannot_be_loaded_is_transformers_own_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bit"}))
    with bitfast.register_with_transformers(), pytest.raises(OSError):
        transformers.AutoImageProcessor.from_pretrained(tmp_path)


# ---- what is built on them ------------------------------------------------------------------------


def test_a_pipeline_runs_on_bitfast(folder, photograph):
    expected = transformers.pipeline("image-classification", model=str(folder))(photograph)
    with bitfast.register_with_transformers():
        pipeline = transformers.pipeline("image-classification", model=str(folder))
    assert type(pipeline.model) is classes.BitForImageClassification
    assert isinstance(pipeline.image_processor, PROCESSORS)
    actual = pipeline(photograph)
    assert {item["label"] for item in actual} == {"cat", "dog", "owl"}
    scores = {item["label"]: item["score"] for item in actual}
    for item in expected:
        assert scores[item["label"]] == pytest.approx(
            item["score"], abs=1e-5 if MAJOR == 4 else 1e-2
        )
    batched = pipeline([photograph, photograph], batch_size=2, top_k=1)
    assert [item[0]["label"] for item in batched] == [actual[0]["label"]] * 2


def test_a_model_builds_its_backbone_of_bitfast():
    theirs_ = dpt_hybrid().eval()
    move_weights(theirs_)
    with bitfast.register_with_transformers():
        ours = dpt_hybrid().eval()
    assert type(ours.dpt.embeddings.backbone) is classes.BitBackbone
    ours.load_state_dict(theirs_.state_dict())
    images = ALL["DPT-hybrid"].images()
    with torch.no_grad():
        assert_close(flatten(ours(images)), flatten(theirs_(images)), 1e-4)


# ---- registering ----------------------------------------------------------------------------------


def test_registering_twice_is_as_good_as_once(folder):
    with bitfast.register_with_transformers():
        with bitfast.register_with_transformers():
            assert isinstance(from_auto_class("AutoModel", folder), classes.BitModel)
        assert isinstance(from_auto_class("AutoModel", folder), classes.BitModel)
        made = transformers.AutoImageProcessor.from_pretrained(folder)
        assert isinstance(made, PROCESSORS)
    assert not isinstance(from_auto_class("AutoModel", folder), classes.BitModel)
    made = transformers.AutoImageProcessor.from_pretrained(folder)
    assert not isinstance(made, PROCESSORS)


def test_somebody_elses_registration_comes_back():
    class Other(transformers.BitModel):
        config_class = transformers.BitConfig

    config = transformers.BitConfig(**TINY)
    undo = auto_classes._set_item(
        transformers.AutoModel._model_mapping._extra_content, transformers.BitConfig, Other
    )
    try:
        with bitfast.register_with_transformers():
            assert type(transformers.AutoModel.from_config(config)) is classes.BitModel
        assert type(transformers.AutoModel.from_config(config)) is Other
    finally:
        undo()


def test_an_error_inside_the_block_undoes_it(folder):
    with pytest.raises(RuntimeError, match="stop"), bitfast.register_with_transformers():
        raise RuntimeError("stop")
    assert not isinstance(from_auto_class("AutoModel", folder), classes.BitModel)


@pytest.mark.parametrize("statement", ["import bitfast", "import bitfast; bitfast.accelerate"])
def test_importing_bitfast_neither_imports_nor_changes_transformers(statement):
    code = f"import sys; {statement}; assert not {{'transformers', 'timm'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers"):
        bitfast.register_with_transformers()


def test_auto_classes_of_another_kind_are_refused_before_anything_changes(monkeypatch, folder):
    mapping = transformers.AutoBackbone._model_mapping
    content = mapping._extra_content
    monkeypatch.delattr(mapping, "_extra_content")
    with pytest.raises(ImportError, match="AutoBackbone keeps no registered classes"):
        bitfast.register_with_transformers()
    mapping._extra_content = content
    assert not isinstance(from_auto_class("AutoModel", folder), classes.BitModel)
    monkeypatch.undo()
