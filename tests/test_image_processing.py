"""BitImageProcessor gives the numbers of transformers 4.56.2's slow processor, exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.bit.image_processing_bit import BitImageProcessor as Theirs

from bitfast.images.inputs import resized_size
from bitfast.images.processing import BitImageProcessor

PHOTOGRAPHS = (
    "astronaut.png",  # RGB
    "camera.png",  # grayscale
    "chelsea.png",
    "chessboard_GRAY.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "hubble_deep_field.jpg",
    "logo.png",  # RGBA
    "moon.png",
    "multipage.tif",
    "no_time_for_that_tiny.gif",  # palette
    "page.png",
    "phantom.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)

# Their sizes and values speak for themselves; what they warn of has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore")


def photograph(name: str, kind: str = "PIL") -> Any:
    """Return one as Pillow opens it, or in RGB as an array (H, W, 3) or a tensor (3, H, W)."""
    image = Image.open(Path(skimage.__file__).parent / "data" / name)
    if kind == "PIL":
        return image
    array = np.array(image.convert("RGB"))
    return array if kind == "numpy" else torch.from_numpy(array).permute(2, 0, 1)


def assert_same(images: Any, init: dict[str, Any] | None = None, **call: Any) -> None:
    """Both processors, made and called alike, return the same values in the same containers."""
    ours = BitImageProcessor(**(init or {}))(images, **call)
    theirs = Theirs(**(init or {}))(images, **call)
    assert list(ours) == list(theirs) == ["pixel_values"]
    ours, theirs = ours["pixel_values"], theirs["pixel_values"]
    assert type(ours) is type(theirs)
    if not isinstance(ours, list):
        ours, theirs = [ours], [theirs]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", ["PIL", "numpy", "torch"])
def test_photographs(name: str, kind: str) -> None:
    image = photograph(name, kind)
    assert_same(image, return_tensors="pt")
    if kind == "PIL":
        assert_same([image], size=256, crop_size=(192, 257), resample=2, return_tensors="np")


def test_a_batch_of_photographs_of_different_sizes_and_modes() -> None:
    batch = [photograph(name) for name in PHOTOGRAPHS]
    assert len({image.mode for image in batch}) >= 4
    assert_same(batch, {"size": {"height": 60, "width": 80}, "crop_size": 64}, return_tensors="pt")
    assert_same(batch, do_center_crop=False, size={"shortest_edge": 50})


edges = st.integers(1, 30) | st.integers(1, 200)
new_edges = st.integers(1, 60)
sizes = (
    new_edges
    | st.tuples(new_edges, new_edges)
    | st.builds(lambda h, w: {"height": h, "width": w}, new_edges, new_edges)
    | st.builds(lambda s: {"shortest_edge": s}, new_edges)
    | st.builds(lambda s, t: {"shortest_edge": s, "longest_edge": t}, new_edges, new_edges)
)
crops = (
    new_edges
    | st.tuples(new_edges, new_edges)
    | st.builds(lambda h, w: {"height": h, "width": w}, new_edges, new_edges)
)
statistics = st.floats(0.01, 3) | st.lists(st.floats(0.01, 3), min_size=3, max_size=3)


@st.composite
def images(draw: st.DrawFn, height: int, width: int) -> tuple[Any, str]:
    """One image of 3 channels in any container, dtype and layout, and the name of its layout."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = draw(st.sampled_from(["PIL", "numpy", "torch"]))
    if kind == "PIL":
        return Image.fromarray(pixels), "channels_last"
    dtype = draw(st.sampled_from(["uint8", "int64", "float16", "float32", "float64", "fractions"]))
    if dtype == "fractions":
        array = generator.random(pixels.shape).astype(
            draw(st.sampled_from([np.float32, np.float64]))
        )
    else:
        array = pixels.astype(dtype)
    layout = draw(st.sampled_from(["channels_first", "channels_last"]))
    array = array.transpose(2, 0, 1) if layout == "channels_first" else array
    return (array if kind == "numpy" else torch.from_numpy(array)), layout


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Any of the documented parameters."""
    values = {
        "do_resize": st.booleans(),
        "size": sizes,
        "resample": st.integers(0, 5) | st.sampled_from(list(Image.Resampling)),
        "do_center_crop": st.booleans(),
        "crop_size": crops,
        "do_rescale": st.booleans(),
        "rescale_factor": st.floats(1e-3, 10) | st.integers(1, 3),
        "do_normalize": st.booleans(),
        "image_mean": statistics,
        "image_std": statistics,
        "do_convert_rgb": st.booleans(),
    }
    names = draw(st.sets(st.sampled_from(sorted(values))))
    return {name: draw(values[name]) for name in sorted(names)}


@settings(max_examples=400)
@given(st.data())
def test_drawn_images_and_parameters(data: st.DataObject) -> None:
    image, layout = data.draw(images(data.draw(edges), data.draw(edges)))
    # Small by default: two processors at 224x224 would take most of the time.
    init = {"size": {"shortest_edge": 24}, "crop_size": 20, **data.draw(parameters())}
    assert_same(
        image,
        init,
        **data.draw(parameters()),
        data_format=data.draw(st.sampled_from(["channels_first", "channels_last"])),
        input_data_format=layout,
        return_tensors=data.draw(st.sampled_from([None, "np", "pt"])),
    )


@settings(max_examples=100)
@given(st.lists(st.tuples(edges, edges), min_size=1, max_size=4), st.data())
def test_drawn_batches(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    batch, layouts = zip(*(data.draw(images(*shape)) for shape in shapes), strict=True)
    layout = layouts[0]
    batch = [image for image, own in zip(batch, layouts, strict=True) if own == layout]
    init = {"size": data.draw(sizes), "crop_size": data.draw(crops)}
    assert_same(tuple(batch), init, input_data_format=layout, return_tensors="pt")


@settings(max_examples=100)
@given(
    st.integers(4, 60), st.integers(4, 60), st.sampled_from([1, 3]), st.booleans(), st.booleans()
)
def test_the_layout_is_inferred(
    height: int, width: int, channels: int, first: bool, batched: bool
) -> None:
    shape = (channels, height, width) if first else (height, width, channels)
    array = np.random.default_rng(height).integers(0, 256, (2, *shape), dtype=np.uint8)
    init = {"size": 12, "crop_size": 10, "image_mean": 0.4, "image_std": 0.3}
    assert_same(array if batched else array[0], init, return_tensors="np")


@pytest.mark.parametrize("shape", [(3, 8, 3), (1, 9, 3), (3, 7, 1), (1, 5, 1)])
def test_an_ambiguous_array_is_channels_first(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    init = {"size": 12, "crop_size": 10, "image_mean": 0.4, "image_std": 0.3}
    assert_same(array, init)
    with pytest.warns(UserWarning, match="may be channels_first or channels_last"):
        BitImageProcessor(**init)(array)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    rgb = photograph("chelsea.png").resize((45, 30))
    if mode in ("PA", "LAB"):
        image = Image.new(mode, (45, 30))
        image.putdata([(i * 7 % 256,) * len(image.getbands()) for i in range(45 * 30)])
    else:
        image = rgb.convert(mode)
    assert_same(image, size=20, crop_size=18, return_tensors="pt")


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_deep_grayscale_is_converted_to_rgb(mode: str) -> None:
    values = np.linspace(0, 60000 if mode.startswith("I") else 255, 30 * 45).reshape(30, 45)
    dtype = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2", "F": "<f4"}[mode]
    image = Image.frombytes(mode, (45, 30), values.astype(dtype).tobytes())
    assert_same(image, size=20, crop_size=18, return_tensors="pt")


def test_exif_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    photograph("rocket.jpg").save(tmp_path / "rotated.jpg", exif=exif)
    assert_same(Image.open(tmp_path / "rotated.jpg"), return_tensors="pt")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("resample", range(6))
def test_channels_kept_with_an_explicit_layout(channels: int, resample: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (30, 21, channels), dtype=np.uint8)
    call = {"input_data_format": "channels_last", "resample": resample, "do_normalize": False}
    assert_same(array, {"size": 15, "crop_size": 12}, return_tensors="np", **call)


@pytest.mark.parametrize("low", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64, np.uint16])
def test_integers_that_only_an_unresized_image_may_hold(low: int, dtype: Any) -> None:
    array = (np.arange(5 * 6 * 3).reshape(5, 6, 3) * 11 + low).astype(dtype)
    assert_same(array, do_resize=False, crop_size=(4, 9), return_tensors="pt")
    for processor in (BitImageProcessor(), Theirs()):
        with pytest.raises(ValueError, match="255"):
            processor(array)


def test_bool_pixels() -> None:
    array = np.random.default_rng(0).random((8, 9, 3)) > 0.5
    assert_same(array, {"size": 15, "crop_size": 12}, return_tensors="np")


@settings(max_examples=100)
@given(edges, edges, sizes, crops, st.integers(0, 5), st.data())
def test_single_steps(
    height: int, width: int, size: Any, crop: Any, resample: int, data: st.DataObject
) -> None:
    first, last = "channels_first", "channels_last"
    ours, theirs = BitImageProcessor(), Theirs()
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    layout = data.draw(st.sampled_from([first, last]))
    image = image.transpose(2, 0, 1) if layout == first else image
    formats = {
        "data_format": data.draw(st.sampled_from([None, first, last])),
        "input_data_format": layout,
    }
    size = BitImageProcessor(size=size).size
    for name, arguments in (
        ("resize", {"size": size, "resample": resample}),
        ("center_crop", {"size": crop}),
        ("rescale", {"scale": 1 / 127.5}),
        ("rescale", {"scale": 2, "dtype": np.float16}),
        ("normalize", {"mean": [1.5, 2, 3], "std": 7}),
    ):
        a = getattr(ours, name)(image, **arguments, **formats)
        b = getattr(theirs, name)(image, **arguments, **formats)
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name


@pytest.mark.parametrize("edge", [1, 7, 49, 224, 256])
def test_resized_size(edge: int) -> None:
    """Where the exact length is an integer, the order of the two operations decides."""
    for height in range(1, 60):
        for width in range(1, 60):
            ours = resized_size(height, width, {"shortest_edge": edge})
            theirs = get_resize_output_image_size(
                np.empty((height, width, 3)), edge, False, input_data_format="channels_last"
            )
            assert ours == theirs, (height, width)


def test_steps_take_batches() -> None:
    batch = np.random.default_rng(0).random((2, 3, 8, 9)).astype(np.float32)
    ours, theirs = BitImageProcessor(), Theirs()
    a, b = (p.center_crop(batch, {"height": 5, "width": 12}) for p in (ours, theirs))
    assert np.array_equal(a, b)
    batch = np.moveaxis(batch, 1, -1)
    a, b = (p.normalize(batch, 0.5, [1, 2, 3]) for p in (ours, theirs))
    assert np.array_equal(a, b)


def test_a_subclass_may_replace_a_step() -> None:
    class Inverted(BitImageProcessor):
        def rescale(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            return 1 - super().rescale(image, *args, **kwargs)

    image = photograph("chelsea.png")
    plain = BitImageProcessor(do_normalize=False)(image, return_tensors="np").pixel_values
    inverted = Inverted(do_normalize=False)(image, return_tensors="np").pixel_values
    assert np.array_equal(inverted, 1 - plain)


def test_no_warning_about_ordinary_images() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BitImageProcessor()([photograph("coffee.png"), photograph("camera.png")])
