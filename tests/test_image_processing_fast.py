"""BitImageProcessorFast beside transformers 4.56.2's: equal but for what torchvision's resampling rounds.

torchvision quantizes the weights of bytes to 16 bits, Pillow to 22. So each of the two passes may round to
another level, in a few bytes per thousand.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width
from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as Theirs

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.images.inputs import size_with_aspect_ratio, size_within
from bitfast.images.parameters import PARAMETERS
from tests.test_image_processing import PHOTOGRAPHS, crops, edges, photograph, statistics

transformers.logging.set_verbosity_error()
# Their sizes and values speak for themselves; what they warn of has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU_FILTERS = (0, 2, 3)
"""Those that torchvision 0.28 has for tensors and transformers maps to them: nearest, bilinear, bicubic."""


def pixel_values(processor: Any, images: Any, **call: Any) -> list[torch.Tensor]:
    result = processor(images, **call)
    assert list(result) == ["pixel_values"]
    values = result["pixel_values"]
    assert isinstance(values, list) == (call.get("return_tensors") is None)
    return list(values)


def level(processor: Any, **call: Any) -> float:
    """Return what one level of a byte makes of ``pixel_values``."""
    value = 1.0
    values = {name: call.get(name, getattr(processor, name)) for name in PARAMETERS}
    if values["do_rescale"]:
        value *= abs(values["rescale_factor"])
    if values["do_normalize"]:
        value /= np.abs(values["image_std"]).min()
    return float(value)


def assert_close(
    images: Any, init: dict[str, Any] | None = None, exact: bool = False, **call: Any
) -> None:
    """Both processors, made and called alike, return alike: equal, or to a level of a byte per pass."""
    ours, theirs = BitImageProcessorFast(**(init or {})), Theirs(**(init or {}))
    allowed = 0.0 if exact else 2 * level(ours, **call)
    a, b = pixel_values(ours, images, **call), pixel_values(theirs, images, **call)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        rounding = (
            0.0 if exact else 4 * torch.finfo(torch.float32).eps * float(y.double().abs().max())
        )
        assert (x.double() - y.double()).abs().max() <= allowed + rounding


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", ["PIL", "numpy", "torch"])
def test_photographs(name: str, kind: str) -> None:
    image = photograph(name, kind)
    assert_close(image, return_tensors="pt")
    if kind == "PIL":
        assert_close([image], size=256, default_to_square=False, crop_size=(192, 257), resample=2)


def test_a_batch_of_photographs_of_different_sizes_and_modes() -> None:
    batch = [photograph(name) for name in PHOTOGRAPHS]
    assert_close(batch, {"size": {"height": 60, "width": 80}, "crop_size": 64}, return_tensors="pt")
    assert_close(batch, do_center_crop=False, size={"shortest_edge": 50})
    mixed = [batch[0], np.array(batch[2]), torch.from_numpy(np.array(batch[4])).permute(2, 0, 1)]
    assert_close(mixed, return_tensors="pt")
    assert_close([mixed[:1], mixed[1:]], return_tensors="pt")
    stack = np.stack([np.array(image.convert("RGB").resize((70, 60))) for image in batch])
    for images in (stack, torch.from_numpy(stack).permute(0, 3, 1, 2), [stack[:2], stack[2:]]):
        assert_close(images, size=40, crop_size=33, return_tensors="pt")


@pytest.mark.parametrize("resample", [2, 3])
def test_hardly_any_byte_differs(resample: int) -> None:
    plain = {
        "do_normalize": False,
        "do_rescale": False,
        "return_tensors": "pt",
        "resample": resample,
    }
    counts = np.zeros(4)
    for name in PHOTOGRAPHS:
        a, b = (
            p()(photograph(name), **plain).pixel_values for p in (BitImageProcessorFast, Theirs)
        )
        counts += np.bincount((a.int() - b.int()).abs().flatten().numpy(), minlength=4)
    shares = counts / counts.sum()
    print(f"resample {resample}: shares of bytes that differ by 0, 1, 2, 3 levels: {shares}")
    assert shares[0] > 0.99
    assert shares[2] < 1e-4
    assert shares[3] == 0


# ---- crops and rounding: exact ------------------------------------------------------------------


@settings(max_examples=200)
@given(edges, edges, crops, st.data())
def test_without_resizing_everything_is_equal(
    height: int, width: int, crop: Any, data: st.DataObject
) -> None:
    random = np.random.default_rng(height * width)
    dtype = data.draw(st.sampled_from(["uint8", "int64", "int32", "float16", "float32", "float64"]))
    image = torch.from_numpy(random.integers(0, 256, (3, height, width)).astype(dtype))
    call = {
        "do_resize": False,
        "crop_size": crop,
        "do_center_crop": data.draw(st.booleans()),
        "do_rescale": data.draw(st.booleans()),
        "rescale_factor": data.draw(st.floats(1e-3, 10)),
        "do_normalize": data.draw(st.booleans()),
        "image_mean": data.draw(statistics),
        "image_std": data.draw(statistics),
        "input_data_format": "channels_first",
        "return_tensors": data.draw(st.sampled_from([None, "pt"])),
    }
    assert_close(image, exact=True, **call)


@settings(max_examples=100)
@given(edges, edges, edges, edges, crops)
def test_nearest_is_equal(height: int, width: int, h: int, w: int, crop: Any) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for resample in (0, InterpolationMode.NEAREST_EXACT, InterpolationMode.NEAREST):
        call = {"size": (h, w), "crop_size": crop, "resample": resample}
        layout = {"input_data_format": "channels_last"}
        assert_close(pixels, exact=True, return_tensors="pt", **layout, **call)


# ---- everything else: to a level per pass --------------------------------------------------------------

new_edges = st.integers(2, 60)  # torch 2.13 fails to make one pixel of some images
sizes = (
    new_edges
    | st.tuples(new_edges, new_edges)
    | st.builds(lambda h, w: {"height": h, "width": w}, new_edges, new_edges)
    | st.builds(lambda s: {"shortest_edge": s}, new_edges)
    | st.builds(lambda s, t: {"shortest_edge": s, "longest_edge": t}, new_edges, st.integers(200, 300))
    | st.builds(lambda h, w: {"max_height": h, "max_width": w}, st.integers(250, 300), st.integers(250, 300))
)  # fmt: skip


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Any of the documented parameters."""
    values = {
        "do_resize": st.booleans(),
        "size": sizes,
        "default_to_square": st.booleans(),
        "resample": st.sampled_from([*CPU_FILTERS, InterpolationMode.BILINEAR, Image.Resampling.BICUBIC]),
        "do_center_crop": st.booleans(),
        "crop_size": crops,
        "do_rescale": st.booleans(),
        "rescale_factor": st.floats(1e-3, 10),
        "do_normalize": st.booleans(),
        "image_mean": statistics,
        "image_std": statistics,
        "do_convert_rgb": st.booleans(),
        "data_format": st.sampled_from(["channels_first", None]),
        "device": st.sampled_from([None, "cpu", torch.device("cpu")]),
        "disable_grouping": st.sampled_from([None, True, False]),
    }  # fmt: skip
    names = draw(st.sets(st.sampled_from(sorted(values))))
    return {name: draw(values[name]) for name in sorted(names)}


@settings(max_examples=400)
@given(edges, edges, st.data())
def test_drawn_images_and_parameters(height: int, width: int, data: st.DataObject) -> None:
    pixels = np.random.default_rng(height * width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    # Smooth, so that where a position is rounded otherwise the pixels hardly differ.
    pixels = np.array(
        Image.fromarray(pixels[:3, :3]).resize((width, height), Image.Resampling.BICUBIC)
    )
    kind = data.draw(st.sampled_from(["PIL", "HWC", "CHW", "tensor"]))
    image: Any = {
        "PIL": Image.fromarray(pixels),
        "HWC": pixels,
        "CHW": pixels.transpose(2, 0, 1),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
    }[kind]
    layout = {} if kind == "PIL" else {
        "input_data_format": "channels_last" if kind == "HWC" else "channels_first"
    }  # fmt: skip
    init = {"size": {"shortest_edge": 24}, "crop_size": 20, **data.draw(parameters())}
    call = {**data.draw(parameters()), "return_tensors": data.draw(st.sampled_from([None, "pt"]))}
    assert_close(image, init, **layout, **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 255.0])
@pytest.mark.parametrize("resample", [2, 3])
def test_floating_images(dtype: torch.dtype, scale: float, resample: int, seed: int) -> None:
    image = torch.rand(3, 90, 131).mul(scale).to(dtype)
    call = {
        "size": {"shortest_edge": 40},
        "crop_size": 33,
        "resample": resample,
        "do_rescale": scale > 1,
    }
    (a,) = pixel_values(BitImageProcessorFast(), image, **call)
    (b,) = pixel_values(Theirs(), image, **call)
    assert a.dtype == b.dtype == torch.float32
    # float16 images are rounded to float16 there, after they have been resized.
    allowed = 1e-5 if dtype != torch.float16 else 2 * torch.finfo(torch.float16).eps
    assert (a - b).norm() <= allowed * b.norm()


@pytest.mark.parametrize("resample", [1, 4, 5])
def test_filters_of_pillow_that_they_refuse(resample: int) -> None:
    image = photograph("chelsea.png")
    ours = BitImageProcessorFast(
        size=(60, 80), do_center_crop=False, do_normalize=False, do_rescale=False
    )
    (result,) = pixel_values(ours, image, resample=resample)
    expected = np.array(image.resize((80, 60), resample)).transpose(2, 0, 1)
    assert np.array_equal(result.numpy(), expected)


def test_sizes() -> None:
    for height in range(1, 50, 3):
        for width in range(1, 50, 2):
            for shortest, longest in ((7, 9), (13, 100), (20, 20), (40, 45)):
                theirs: Any = get_size_with_aspect_ratio((height, width), shortest, longest)
                assert size_with_aspect_ratio(height, width, shortest, longest) == theirs
                theirs = get_image_size_for_max_height_width((height, width), shortest, longest)
                assert size_within(height, width, shortest, longest) == theirs


# ---- configurations -----------------------------------------------------------------------------

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
STEPS = {"do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True}
COMMON = {**STEPS, "do_resize": True, "rescale_factor": 0.00392156862745098}
SQUARE = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
PRESETS: dict[str, dict[str, Any]] = {
    "google/bit-50": {
        **COMMON, **HALF, "crop_size": {"height": 448, "width": 448}, "size": {"shortest_edge": 448},
        "resample": 2, "image_processor_type": "BitImageProcessor",
    },
    "DINOv2": {**COMMON, **IMAGENET, **SQUARE, "resample": 3, "image_processor_type": "BitImageProcessor"},
    "FocalNet": {**COMMON, **IMAGENET, **SQUARE, "resample": 3, "image_processor_type": "BitImageProcessor"},
    "Hiera": {**COMMON, **IMAGENET, **SQUARE, "resample": 3, "image_processor_type": "BitImageProcessor"},
    "an older file": {**COMMON, **HALF, "crop_size": 224, "size": 256, "resample": 2,
                      "feature_extractor_type": "BitFeatureExtractor"},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_of_checkpoints(name: str, tmp_path: Path) -> None:
    from transformers.models.bit.image_processing_bit import BitImageProcessor as TheirSlow

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PRESETS[name]))
    batch = [photograph(n) for n in ("rocket.jpg", "retina.jpg", "coins.png")]
    slow = BitImageProcessor.from_pretrained(tmp_path)(batch, return_tensors="pt").pixel_values
    assert torch.equal(
        slow, TheirSlow.from_pretrained(tmp_path)(batch, return_tensors="pt").pixel_values
    )
    ours, theirs = (c.from_pretrained(tmp_path) for c in (BitImageProcessorFast, Theirs))
    fast, expected = (p(batch, return_tensors="pt").pixel_values for p in (ours, theirs))
    assert fast.shape == expected.shape
    assert (fast - expected).abs().max() <= 2.001 * level(ours)


@settings(max_examples=60)
@given(parameters())
def test_files_are_theirs(init: dict[str, Any]) -> None:
    init = {name: value for name, value in init.items() if name not in ("resample", "device")}
    ours, theirs = BitImageProcessorFast(**init), Theirs(**init)
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())


def test_saving_and_loading(tmp_path: Path) -> None:
    processor = BitImageProcessorFast(
        size=77, resample=InterpolationMode.BILINEAR, device="cpu", extra=[1]
    )
    processor.save_pretrained(tmp_path)
    again = BitImageProcessorFast.from_pretrained(tmp_path)
    assert again.size == {"shortest_edge": 77}
    assert again.extra == [1]
    image = photograph("coffee.png")
    a, b = (p(image, return_tensors="pt").pixel_values for p in (processor, again))
    assert torch.equal(a, b)
    changed = BitImageProcessorFast.from_pretrained(tmp_path, crop_size=32, unknown=1)
    assert changed(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


# ---- arguments ----------------------------------------------------------------------------------

GOOD = np.zeros((20, 30, 3), np.uint8)


def test_none_in_a_call_means_none() -> None:
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        assert_close(GOOD + 9, **{name: None})
    for name in ("size", "crop_size", "rescale_factor", "image_mean", "resample"):
        with pytest.raises(ValueError, match=f"{name} must be given, got None"):
            BitImageProcessorFast()(GOOD, **{name: None})


def test_unknown_arguments_are_told() -> None:
    with pytest.warns(UserWarning, match="preprocess ignores the arguments 'sise'"):
        BitImageProcessorFast()(GOOD, sise=3)


@pytest.mark.parametrize("kind", ["bool", "int8", "int16", "uint16", "int32", "int64"])
@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_integers_of_other_types(kind: str, resample: int, do_normalize: bool) -> None:
    """They are resized as floating numbers and then rounded, not clamped to 0 and 255."""
    random = np.random.default_rng(resample)
    size = {"size": (21, 50), "crop_size": 33, "resample": resample, "do_normalize": do_normalize}
    # Far enough from the ends of int8 and uint16 for cubes not to overshoot into numbers that wrap around.
    low, high = {"bool": (0, 2), "int8": (0, 90), "uint16": (60, 256)}.get(kind, (0, 256))
    array = random.integers(low, high, (30, 40, 3)).astype(kind)
    assert_close(array, return_tensors="pt", **size)
    assert_close(array, do_rescale=False, **size)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert_close(tensor, do_rescale=False, **size)
    if kind in ("uint16", "int32", "int64"):
        deep = {"rescale_factor": 1 / 65535, "return_tensors": "pt", **size}
        assert_close(array * 200, **deep)
        assert_close(torch.from_numpy(array * 200), input_data_format="channels_last", **deep)


def test_integers_and_floating_numbers_of_one_batch_are_rescaled_each_in_its_way() -> None:
    """They are computed in one dtype, but the factor is rounded for integers alone."""
    plain = {"do_resize": False, "do_center_crop": False, "do_normalize": False}
    image = torch.arange(3 * 40 * 50).view(3, 40, 50) % 256
    images = [image, image.double(), image.int(), image.float(), image.to(torch.uint8)]
    for batch in (images, images[::-1]):
        for one, result in zip(
            batch, pixel_values(BitImageProcessorFast(), batch, **plain), strict=True
        ):
            assert_close(one, exact=True, **plain)
            (alone,) = pixel_values(BitImageProcessorFast(), one, **plain)
            assert result.dtype == alone.dtype
            assert torch.equal(result, alone)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint16])
def test_cubes_do_not_wrap_integers_around(dtype: torch.dtype) -> None:
    high = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    edge = torch.zeros(3, 8, 8).index_fill_(2, torch.arange(4), 1).double().mul(high).to(dtype)
    plain = {"do_center_crop": False, "do_rescale": False, "do_normalize": False, "size": 32}
    (result,) = pixel_values(BitImageProcessorFast(), edge, return_tensors="pt", **plain)
    assert result.dtype == dtype
    result = result.double()
    assert result[..., :12].min() >= 0.9 * high  # where it overshoots on either side of the edge
    assert result[..., 20:].abs().max() <= 0.1 * high


@pytest.mark.parametrize("resample", [0, 3])
def test_one_channel_gets_those_of_the_statistics(resample: int) -> None:
    image = photograph("camera.png").resize((60, 50))
    assert image.mode == "L"
    call = {"size": 40, "crop_size": 37, "resample": resample, "return_tensors": "pt"}
    tensor = torch.from_numpy(np.array(image))[None]
    one_for_all = {"image_mean": 0.3, "image_std": 0.2}
    for images in (image, tensor, [tensor, tensor], tensor.float(), tensor.int()):
        for normalization in ({}, one_for_all, {"do_normalize": False}):
            assert_close(images, do_convert_rgb=False, **normalization, **call)
    (flat,) = pixel_values(BitImageProcessorFast(), np.array(image), **call)
    assert torch.equal(flat, pixel_values(BitImageProcessorFast(), tensor, **call)[0])


def test_a_subclass_may_have_other_defaults() -> None:
    attributes = {"size": {"shortest_edge": 30}, "crop_size": {"height": 25, "width": 20},
                  "image_mean": [0.1, 0.2, 0.3], "do_convert_rgb": False}  # fmt: skip
    ours = type("Processor", (BitImageProcessorFast,), attributes)()
    theirs = type("Processor", (Theirs,), attributes)()
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    image = photograph("chelsea.png")
    a, b = (p(image, return_tensors="pt").pixel_values for p in (ours, theirs))
    assert (a - b).abs().max() <= 2.001 * level(ours)
    assert BitImageProcessorFast.size == Theirs.size == {"shortest_edge": 224}


def test_arrays_however_they_lie_in_memory() -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    locked = array[::-1, ::2]
    locked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for processor in (BitImageProcessor(), BitImageProcessorFast()):
            a, b = (processor(x, return_tensors="pt").pixel_values for x in (locked, locked.copy()))
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("images", "call", "message"),
    [
        ([], {}, "images must hold at least one image"),
        ([GOOD, "x.jpg"], {}, r"images\[1\] must be the path of a file.* got 'x.jpg'"),
        ([GOOD, GOOD[:0]], {}, r"images\[1\] must have pixels"),
        ([GOOD, GOOD[:, :, 0].astype(complex)], {}, r"images\[1\] must hold real numbers"),
        ([GOOD, torch.zeros(2, 2, 2, 2, 2)], {}, r"images\[1\] must be real and have shape"),
        ([GOOD, GOOD * np.nan], {}, r"images\[1\] must hold finite numbers, got nan"),
        ([GOOD, GOOD + np.inf], {"do_rescale": False}, r"images\[1\] must hold finite numbers"),
        ([GOOD, GOOD - 1e10], {}, r"images\[1\] must hold numbers of at most 4.29497e\+09 .* got -1e\+10"),
        ([GOOD, GOOD.astype(int) + 2**40], {}, r"images\[1\] must hold numbers of at most"),
        ([GOOD], {"rescale_factor": 0}, "rescale_factor must not be 0"),
        ([GOOD], {"crop_size": 10**6}, "crop_size: 1000000x1000000 pixels are more than the limit"),
        ([GOOD, GOOD[..., :2]], {"input_data_format": "channels_last"}, r"images\[1\]: image_mean must"),
        ([GOOD, GOOD[..., :2]], {}, r"images\[1\] must have 1 or 3 channels"),
        ([GOOD], {"image_std": [1, 0, 1]}, r"images\[0\]: image_std must hold numbers other than 0"),
        ([GOOD], {"image_mean": np.nan}, r"images\[0\]: image_mean must hold finite numbers"),
        ([GOOD], {"rescale_factor": np.inf}, "rescale_factor must be a finite number, got inf"),
        ([GOOD], {"rescale_factor": "1/255"}, "rescale_factor must be a finite number, got '1/255'"),
        ([GOOD], {"size": 0}, "size: shortest_edge must be an integer of at least 1, got 0"),
        ([GOOD], {"size": {"longest_edge": 3}}, "size must hold shortest_edge"),
        ([GOOD], {"size": (-3, 4)}, "size: height must be an integer of at least 1, got -3"),
        ([GOOD], {"size": (10**9, 10**9)}, r"images\[0\]: 30x20 pixels would be resized to 1000000000x"),
        ([GOOD[:1]] * 2, {"size": {"max_height": 1, "max_width": 3}, "input_data_format": "channels_last"},
         r"images\[0\]: 30x1 pixels would be resized to 3x0"),
        ([GOOD], {"crop_size": {"shortest_edge": 3}}, "crop_size must hold height and width"),
        ([GOOD], {"resample": "sharp"}, "resample must be one of"),
        ([GOOD], {"resample": 6}, "resample must be one of"),
        ([GOOD], {"return_tensors": "np"}, "return_tensors must be 'pt' or None, got 'np'"),
        ([GOOD], {"data_format": "channels_last"}, "data_format must be 'channels_first'"),
        ([GOOD, GOOD[:5]], {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"},
         "pixel_values cannot be one tensor"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_the_image(
    images: Any, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BitImageProcessorFast()(images, **call)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    photograph("rocket.jpg").save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    for processor in (BitImageProcessor(), BitImageProcessorFast()):
        with pytest.raises(OSError, match=r"images\[1\] cannot be decoded"):
            processor([GOOD, Image.open(tmp_path / "half.png")])


def test_a_decompression_bomb_is_pillows_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    line = np.zeros((1, 500, 3), np.uint8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for processor in (BitImageProcessor(), BitImageProcessorFast()):
        with pytest.raises(
            ValueError, match=r"images\[0\]: 500x1 pixels would be resized to 112000x224"
        ):
            processor(Image.fromarray(line))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for processor in (BitImageProcessor(), BitImageProcessorFast()):
        assert processor(Image.fromarray(line), return_tensors="pt").pixel_values.shape == (
            1,
            3,
            224,
            224,
        )
