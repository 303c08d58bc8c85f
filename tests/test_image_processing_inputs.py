"""What BitImageProcessor accepts beyond transformers, what it refuses, its files and its result object."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import ChannelDimension as TheirChannelDimension
from transformers.models.bit.image_processing_bit import BitImageProcessor as Theirs
from transformers.utils import TensorType

from bitfast.checkpoints.files import CheckpointError
from bitfast.images.batch_feature import BatchFeature
from bitfast.images.inputs import ChannelDimension
from bitfast.images.processing import BitImageProcessor

SMALL = {"size": 12, "crop_size": 10}


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def process(images: Any, **options: Any) -> np.ndarray:
    return BitImageProcessor(**SMALL)(images, return_tensors="np", **options).pixel_values


# ---- sensible input that transformers refuses or takes for something else -------------------------


@pytest.mark.parametrize("height", [1, 3])
def test_a_pil_image_has_its_channels_last_however_low(height: int) -> None:
    array = pixels(height, 8, 3)
    expected = Theirs(**SMALL)(array, input_data_format="channels_last", return_tensors="np")
    assert np.array_equal(process(Image.fromarray(array)), expected.pixel_values)
    # Nor does a format given for the arrays of a batch change it.
    both = process(
        [Image.fromarray(array), array.transpose(2, 0, 1)], input_data_format="channels_first"
    )
    assert np.array_equal(both[0], expected.pixel_values[0])
    assert np.array_equal(both[1], expected.pixel_values[0])


def test_data_format_none_keeps_each_layout() -> None:
    array = pixels(20, 30, 3)
    processor = BitImageProcessor(size=12, crop_size={"height": 10, "width": 11})
    assert processor(array, data_format=None).pixel_values[0].shape == (10, 11, 3)
    assert processor(array.transpose(2, 0, 1), data_format=None).pixel_values[0].shape == (
        3,
        10,
        11,
    )
    images = [Image.fromarray(array), array.transpose(2, 0, 1)]
    shapes = [a.shape for a in processor(images, data_format=None).pixel_values]
    assert shapes == [(10, 11, 3), (3, 10, 11)]


@pytest.mark.parametrize("input_data_format", [None, "none", "channels_last"])
def test_two_dimensional_images_have_one_channel(input_data_format: str | None) -> None:
    array = pixels(20, 30)
    options = {"image_mean": 0.5, "image_std": 0.5}
    expected = process(array[:, :, None], **options)
    result = process(array, input_data_format=input_data_format, **options)
    assert result.shape == (1, 1, 10, 10)
    assert np.array_equal(result, expected)
    gray = Image.fromarray(array)
    assert np.array_equal(process(gray, do_convert_rgb=False, **options), expected)


def test_alpha_is_kept_without_conversion() -> None:
    array = pixels(20, 30, 4)
    options = {"do_convert_rgb": False, "do_normalize": False}
    theirs = Theirs(**SMALL)(
        array, input_data_format="channels_last", return_tensors="np", **options
    )
    assert np.array_equal(process(Image.fromarray(array), **options), theirs.pixel_values)


def test_many_channels_are_resized_one_by_one() -> None:
    array = pixels(20, 30, 7)
    options = {"input_data_format": "channels_last", "image_mean": 0.5, "image_std": 0.5}
    result = process(array, **options)
    for c in range(7):
        assert np.array_equal(result[:, c : c + 1], process(array[:, :, c], **options))


def test_bfloat16_tensors() -> None:
    tensor = torch.from_numpy(pixels(20, 30, 3)).bfloat16()
    assert np.array_equal(process(tensor), process(tensor.float().numpy()))


def test_tensors_that_require_a_gradient() -> None:
    tensor = torch.from_numpy(pixels(20, 30, 3)).float()
    assert np.array_equal(process(tensor.clone().requires_grad_()), process(tensor))


def test_enumerations_of_any_library() -> None:
    array = pixels(20, 30, 3)
    expected = process(array, resample=2, data_format="channels_last")
    for layout in (ChannelDimension.LAST, TheirChannelDimension.LAST):
        for resample in (Image.Resampling.BILINEAR, "bilinear", "BILINEAR"):
            assert np.array_equal(process(array, resample=resample, data_format=layout), expected)
    result = BitImageProcessor()(array, return_tensors=TensorType.PYTORCH)
    assert isinstance(result.pixel_values, torch.Tensor)


def test_whole_numbers_of_other_types_as_sizes() -> None:
    expected = process(pixels(20, 30, 3))
    result = process(pixels(20, 30, 3), size=np.int64(12), crop_size={"height": 10.0, "width": 10})
    assert np.array_equal(result, expected)


# ---- refused input --------------------------------------------------------------------------------

GOOD = pixels(8, 9, 3)


def truncated() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(pixels(64, 64, 3)).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:500]))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "images must hold at least one image, got an empty list"),
        (pixels(0, 8, 9, 3), {}, r"images must hold at least one image, got shape \(0, 8, 9, 3\)"),
        (None, {}, r"images\[0\] must be a PIL.Image.Image.* got NoneType"),
        ([GOOD, "cat.png"], {}, r"images\[1\] must be .* got str; fetch_images opens files"),
        ([[GOOD]], {}, r"images\[0\] must be .* got list"),
        ([GOOD, pixels(2, 8, 9, 3)], {}, r"images\[1\] must have shape .* got \(2, 8, 9, 3\)"),
        (pixels(2, 2, 8, 9, 3), {}, r"images\[0\] must have shape .* got \(2, 2, 8, 9, 3\)"),
        ([GOOD, GOOD[:0]], {}, r"images\[1\] must have pixels, got shape \(0, 9, 3\)"),
        (
            [GOOD, GOOD.astype("complex64")],
            {},
            r"images\[1\] must hold real numbers, got dtype compl",
        ),
        (pixels(8, 9, 5), {}, r"images\[0\] must have 1 or 3 channels .* got shape \(8, 9, 5\)"),
        ([GOOD, GOOD.transpose(2, 0, 1)], {}, r"images\[1\] must be channels_last, .*\(3, 8, 9\)"),
        (
            [GOOD, GOOD * -300.0],
            {},
            r"images\[1\]: an image to be resized must hold .* float64 from -",
        ),
        (
            [GOOD, GOOD * np.nan],
            {},
            r"images\[1\] must hold finite numbers, got nan at",
        ),
        (GOOD, {"size": 0}, "size: shortest_edge must be an integer of at least 1, got 0"),
        (GOOD, {"size": {"height": 3}}, "size must be an integer, .* got {'height': 3}"),
        (
            GOOD,
            {"size": {"longest_edge": 3}},
            r"^size must hold shortest_edge, or height",
        ),
        (
            GOOD,
            {"crop_size": (3, 2.5)},
            "crop_size: width must be an integer of at least 1, got 2.5",
        ),
        (GOOD, {"crop_size": (3, 2, 1)}, r"crop_size must be an integer, .* got \(3, 2, 1\)"),
        (GOOD, {"crop_size": {"shortest_edge": 3}}, "crop_size must hold height and width"),
        (GOOD, {"resample": 9}, r"resample must be one of 0 \(nearest\).* got 9"),
        (GOOD, {"resample": "sharp"}, r"resample must be one of 0 \(nearest\).* got 'sharp'"),
        (GOOD, {"image_mean": [0.5]}, r"images\[0\]: image_mean must .* 3 channels, got \[0.5\]"),
        (GOOD, {"image_std": [1, 0, 1]}, r"images\[0\]: image_std must hold numbers other than 0"),
        (GOOD, {"return_tensors": "mlx"}, "return_tensors must be one of 'np', 'pt'.* got 'mlx'"),
        (GOOD, {"data_format": "NCHW"}, "data_format must be \"channels_first\".* got 'NCHW'"),
        (
            GOOD,
            {"input_data_format": "HWC"},
            "input_data_format must be \"channels_first\".* got 'HWC'",
        ),
        (GOOD, {"rescale_factor": np.nan}, "^rescale_factor must be a finite number, got nan"),
        (GOOD, {"rescale_factor": "1"}, "^rescale_factor must be a finite number, got '1'"),
        (GOOD, {"image_std": np.inf}, r"images\[0\]: image_std must hold finite numbers"),
        (
            [GOOD],
            {"crop_size": (1, 10**9)},
            "crop_size: 1000000000x1 pixels are more than the limit",
        ),
        (
            [GOOD, pixels(9, 12, 3)],
            {"do_center_crop": False, "return_tensors": "pt"},
            r"pixel_values cannot be one tensor: entry 1 has shape \(3, 224, 298\)",
        ),
    ],
)
def test_errors_name_the_argument_and_the_image(
    images: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BitImageProcessor()(images, **options)


def test_an_undecodable_image_is_named() -> None:
    with pytest.raises(OSError, match=r"images\[1\] cannot be decoded"):
        BitImageProcessor()([GOOD, truncated()])


@pytest.mark.parametrize("name", ["rescale_factor", "image_mean", "image_std"])
def test_a_missing_parameter_is_named(name: str) -> None:
    processor = BitImageProcessor()
    setattr(processor, name, None)
    with pytest.raises(ValueError, match=f"{name} must be given"):
        processor(GOOD)


def test_steps_refuse_what_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"image must be a numpy\.ndarray, got Image"):
        BitImageProcessor().resize(Image.fromarray(GOOD), 5)
    with pytest.raises(ValueError, match=r"image must have 3 dimensions, got shape \(8, 9\)"):
        BitImageProcessor().resize(GOOD[:, :, 0], 5)


def test_pixels_that_look_rescaled_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="do_rescale=False"):
        BitImageProcessor(**SMALL)(GOOD / 255.0)


def test_unknown_arguments_are_ignored_with_a_warning() -> None:
    expected = process(GOOD)
    with pytest.warns(UserWarning, match="ignores the arguments 'device', 'do_pad'"):
        assert np.array_equal(process(GOOD, device="cpu", do_pad=True), expected)


@pytest.mark.parametrize(("tensor_type", "module"), [("tf", "tensorflow"), ("jax", "jax")])
def test_other_libraries(tensor_type: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        with pytest.raises(ImportError, match=f"return_tensors='{tensor_type}' needs"):
            BitImageProcessor(**SMALL)(GOOD, return_tensors=tensor_type)
    else:
        result = BitImageProcessor(**SMALL)(GOOD, return_tensors=tensor_type).pixel_values
        assert np.array_equal(np.asarray(result), process(GOOD))


@pytest.mark.parametrize(("tensor_type", "module"), [("tf", "tensorflow"), ("jax", "jax.numpy")])
def test_other_libraries_are_called(
    tensor_type: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in shows that the batch reaches the library's own constructor."""
    stand_in = type(sys)("stand_in")
    stand_in.constant = stand_in.asarray = lambda value: ("tensor", value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.split(".")[0], stand_in)
    monkeypatch.setitem(sys.modules, module, stand_in)
    kind, value = BitImageProcessor(**SMALL)(GOOD, return_tensors=tensor_type).pixel_values
    assert kind == "tensor"
    assert np.array_equal(value, process(GOOD))


# ---- the configuration and its file ---------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every parameter": {
        "do_resize": False,
        "size": {"height": 30, "width": 40},
        "resample": 2,
        "do_center_crop": False,
        "crop_size": {"height": 5, "width": 6},
        "do_rescale": False,
        "rescale_factor": 0.5,
        "do_normalize": False,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": 0.25,
        "do_convert_rgb": False,
    },
    "dinov2": {
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"shortest_edge": 256},
    },
    "integers, as old files have": {"size": 256, "crop_size": 192},
    "unknown": {"patch_size": 14, "processor_class": "MyProcessor", "tags": {"a": [1, 2]}},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_files_of_either_library_load_in_the_other(name: str, tmp_path: Path) -> None:
    ours = BitImageProcessor(**copy.deepcopy(CONFIGURATIONS[name]))
    theirs = Theirs(**copy.deepcopy(CONFIGURATIONS[name]))
    assert ours.to_dict() == theirs.to_dict()
    assert ours.to_json_string() == theirs.to_json_string()
    assert repr(ours) == repr(theirs)
    written = ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert written == [str(tmp_path / "ours" / "preprocessor_config.json")]
    file = Path("preprocessor_config.json")
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    for folder in ("ours", "theirs"):
        loaded = Theirs.from_pretrained(tmp_path / folder)
        automatic = AutoImageProcessor.from_pretrained(tmp_path / folder, use_fast=False)
        assert type(automatic) is Theirs
        assert loaded.to_json_string() == automatic.to_json_string() == theirs.to_json_string()
        assert BitImageProcessor.from_pretrained(tmp_path / folder).to_dict() == ours.to_dict()
    assert BitImageProcessor.from_pretrained(tmp_path / "ours" / file).to_dict() == ours.to_dict()
    assert BitImageProcessor.from_json_file(tmp_path / "ours" / file).to_dict() == ours.to_dict()


@pytest.mark.parametrize(
    "written_by",
    [
        {
            "image_processor_type": "BitImageProcessorFast",
            "device": None,
            "default_to_square": False,
        },
        {"feature_extractor_type": "BitFeatureExtractor"},
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "BitImageProcessor",
        },
        {},
    ],
)
def test_files_that_name_another_class(written_by: dict[str, Any], tmp_path: Path) -> None:
    content = {**written_by, "size": 32, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = BitImageProcessor.from_pretrained(tmp_path)
    assert processor.size == {"shortest_edge": 32}
    assert processor.to_dict()["image_processor_type"] == "BitImageProcessor"
    assert "feature_extractor_type" not in processor.to_dict()
    expected = Theirs.from_pretrained(tmp_path)(GOOD, return_tensors="np").pixel_values
    assert np.array_equal(processor(GOOD, return_tensors="np").pixel_values, expected)


def test_the_image_processor_inside_a_processor_file(tmp_path: Path) -> None:
    content = {"processor_class": "CLIPProcessor", "image_processor": {"size": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert BitImageProcessor.from_pretrained(tmp_path).size == {"shortest_edge": 32}


def test_keyword_arguments_override_the_file(tmp_path: Path) -> None:
    BitImageProcessor(tag=1).save_pretrained(tmp_path / "in" / "here")
    options = {"size": 50, "crop_size": (3, 4), "do_normalize": False, "tag": 2}
    processor, unused = BitImageProcessor.from_pretrained(
        tmp_path / "in", subfolder="here", return_unused_kwargs=True, foo=False, **options
    )
    assert unused == {"foo": False}
    assert processor.size == {"shortest_edge": 50}
    assert processor.crop_size == {"height": 3, "width": 4}
    assert processor.do_normalize is False
    assert processor.tag == 2
    # Without return_unused_kwargs they are dropped, as in transformers.
    plain = BitImageProcessor.from_pretrained(tmp_path / "in" / "here", foo=False)
    assert not hasattr(plain, "foo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "preprocessor_config.json is not a readable JSON file"),
        ("[]", "preprocessor_config.json must hold a JSON object"),
        ('{"size": -3}', "preprocessor_config.json: size: shortest_edge must be .* got -3"),
        ('{"resample": "x"}', "preprocessor_config.json: resample must be one of"),
        ('{"preprocess": 1}', "preprocessor_config.json: .*preprocess is a method"),
        (
            '{"image_processor": [1]}',
            "preprocessor_config.json: image_processor must be a JSON object, got list",
        ),
    ],
)
def test_broken_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        BitImageProcessor.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains no file preprocessor_config\.json"):
        BitImageProcessor.from_pretrained(tmp_path)


def test_a_failed_save_keeps_the_file(tmp_path: Path) -> None:
    BitImageProcessor(size=50).save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_bytes()
    with pytest.raises(TypeError, match="has no form in JSON"):
        BitImageProcessor(broken={1, 2}).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert (tmp_path / "preprocessor_config.json").read_bytes() == before


def test_arrays_among_the_parameters_are_saved_as_lists(tmp_path: Path) -> None:
    mean = np.array([0.5, 0.25, 0.125])
    BitImageProcessor(image_mean=mean, image_std=np.float64(0.5)).save_pretrained(tmp_path)
    loaded = BitImageProcessor.from_pretrained(tmp_path)
    assert loaded.image_mean == mean.tolist()
    assert loaded.image_std == 0.5


def test_push_to_hub_uploads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    processor = BitImageProcessor(**SMALL)
    monkeypatch.setattr(
        BitImageProcessor, "push_to_hub", lambda self, repo_id, **kw: uploads.append((repo_id, kw))
    )
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, token="t")
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="owner/other")
    assert uploads == [("name", {"token": "t"}), ("owner/other", {})]


def test_parameters_are_not_shared_between_processors() -> None:
    first = BitImageProcessor()
    first.image_mean[0] = 9
    first.size["shortest_edge"] = 9
    assert BitImageProcessor().to_dict() == Theirs().to_dict()
    assert pickle.loads(pickle.dumps(first)).to_dict() == first.to_dict()


# ---- the result -----------------------------------------------------------------------------------


def test_batch_feature_is_a_dictionary_with_attributes() -> None:
    feature = BitImageProcessor(**SMALL)(GOOD, return_tensors="pt")
    assert feature.pixel_values is feature["pixel_values"]
    assert dict(**feature).keys() == {"pixel_values"}
    assert "pixel_values" in feature
    with pytest.raises(AttributeError, match="no entry or attribute 'pixels'"):
        _ = feature.pixels
    with pytest.raises(KeyError):
        _ = feature[0]
    for other in (pickle.loads(pickle.dumps(feature)), copy.deepcopy(feature), copy.copy(feature)):
        assert torch.equal(other.pixel_values, feature.pixel_values)


def test_batch_feature_moves_and_casts_tensors() -> None:
    data = {"pixel_values": torch.rand(2, 3), "labels": torch.tensor([1, 2]), "names": ["a", "b"]}
    feature = BatchFeature(data)
    assert feature.to(torch.bfloat16) is feature
    assert feature.pixel_values.dtype == torch.bfloat16
    assert feature.labels.dtype == torch.int64
    assert feature.names == ["a", "b"]
    feature.to("meta", dtype=torch.float16, non_blocking=True)
    assert feature.pixel_values.device.type == feature.labels.device.type == "meta"
    assert feature.pixel_values.dtype == torch.float16
    assert feature.labels.dtype == torch.int64
    with pytest.raises(TypeError):
        feature.to([1])


def test_batch_feature_converts_later() -> None:
    feature = BitImageProcessor(**SMALL)([GOOD, GOOD])
    assert isinstance(feature.pixel_values, list)
    assert feature.convert_to_tensors("pt").pixel_values.shape == (2, 3, 10, 10)
    labels = BatchFeature({"labels": [1, 2]}, "pt").labels
    assert labels.dtype == torch.int64
    assert BatchFeature({"x": [torch.zeros(2), torch.ones(2)]}, "pt").x.shape == (2, 2)


def test_the_import_is_light() -> None:
    heavy = ("transformers", "torchvision", "huggingface_hub", "triton", "skimage")
    code = f"import sys, bitfast.image_processing; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
