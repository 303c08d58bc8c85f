"""Subclasses replace steps as they do in transformers 4.56.2: the same calls, the same results."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers.image_processing_utils_fast import DefaultFastImageProcessorKwargs as TheirKwargs
from transformers.models.bit.image_processing_bit import BitImageProcessor as TheirSlow
from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as TheirFast

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.images import batches
from bitfast.images.parameters import DefaultFastImageProcessorKwargs, SizeDict
from tests.test_image_processing import photograph

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 36}}
TWO_LEVELS = 2.001 / 255 / 0.26
"""What two levels of a byte become; torchvision's resampling and Pillow's differ by one per pass."""

FAST_STEPS = ("resize", "center_crop", "rescale", "normalize", "rescale_and_normalize")
FAST_HOOKS = (
    "_fuse_mean_std_and_rescale_factor",
    "_further_process_kwargs",
    "_validate_preprocess_kwargs",
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "_prepare_images_structure",
    "_process_image",
    "_preprocess",
    "convert_to_rgb",
    "fetch_images",
)
SLOW_STEPS = ("resize", "center_crop", "rescale", "normalize")


def batch() -> list[Any]:
    """Images of three sizes, two of them alike, in every container."""
    photo = photograph("chelsea.png").resize((80, 60))
    array = np.array(photograph("coffee.png").resize((70, 50)))
    return [photo, array, torch.from_numpy(np.array(photo)).permute(2, 0, 1), photo.convert("L")]


def described(value: Any) -> Any:
    """Return an argument in a form that does not depend on the library."""
    if isinstance(value, torch.Tensor):
        few = value.double().round(decimals=4).tolist() if value.dim() < 2 else None
        return "tensor", value.dtype, tuple(value.shape), few
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.shape
    if isinstance(value, Image.Image):
        return "PIL", value.mode, value.size
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: described(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return getattr(value, "value", value)


def recording(base: Any, names: tuple[str, ...]) -> Any:
    """Return a subclass that notes each call of the methods of these names in ``calls``."""

    def noting(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, described(args), described(kwargs)))
            return getattr(super(subclass, self), name)(*args, **kwargs)

        return method

    calls: list[Any] = []
    subclass = type(base.__name__, (base,), {name: noting(name) for name in names})
    subclass.calls = calls
    return subclass


OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_rescale": False},
    {"do_normalize": False, "resample": 0},
    {"do_resize": False, "do_center_crop": False, "return_tensors": None},
    {"disable_grouping": True, "size": {"height": 30, "width": 50}, "do_rescale": None},
    {"do_normalize": False, "do_rescale": False, "resample": InterpolationMode.BILINEAR},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "names", [*[(n,) for n in (*FAST_STEPS, *FAST_HOOKS)], FAST_STEPS, (*FAST_STEPS, *FAST_HOOKS)]
)
def test_the_fast_one_calls_what_theirs_calls(
    names: tuple[str, ...], options: dict[str, Any]
) -> None:
    logs, results = [], []
    for base in (BitImageProcessorFast, TheirFast):
        processor = recording(base, names)(**SMALL)
        results.append(processor(batch(), **{"return_tensors": "pt", **options}).pixel_values)
        logs.append(processor.calls)
    ours, theirs = logs
    # Of a list, theirs reads entry by entry by calling itself; so does ours.
    assert [call[0] for call in ours] == [call[0] for call in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == b
    assert isinstance(results[0], list) == isinstance(results[1], list)
    normalized = options.get("do_normalize", True)
    allowed = TWO_LEVELS * (1 if options.get("do_rescale", True) else 255) if normalized else 2
    for a, b in zip(*results, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a.double() - b.double()).abs().max() <= allowed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_rescale": False},
        {"do_resize": False, "do_normalize": False},
        {"resample": 2, "data_format": "channels_last"},
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [*[(n,) for n in SLOW_STEPS], SLOW_STEPS])
@pytest.mark.parametrize("layout", ["PIL", "channels_first", "channels_last"])
def test_the_slow_one_calls_what_theirs_calls(
    names: tuple[str, ...], options: dict[str, Any], layout: str
) -> None:
    images: list[Any] = [
        photograph("chelsea.png").resize((80, 60)),
        photograph("camera.png").resize((50, 70)),
    ]
    if layout != "PIL":
        images = [np.array(image.convert("RGB")) for image in images]
        images = [i.transpose(2, 0, 1) if layout == "channels_first" else i for i in images]
    logs, results = [], []
    for base in (BitImageProcessor, TheirSlow):
        processor = recording(base, names)(**SMALL)
        results.append(processor(images, return_tensors="np", **options).pixel_values)
        logs.append(processor.calls)
    assert logs[0] == logs[1]
    assert np.array_equal(*results)


# ---- what a step of one's own computes ----------------------------------------------------------


class Fitted:
    """Resizes without keeping the ratio, and flips."""

    def resize(self, image: Any, size: Any, interpolation: Any = None, **kwargs: Any) -> Any:
        square = dataclasses.replace(size, shortest_edge=None, height=35, width=35)
        return super().resize(image, square, interpolation, **kwargs).flip(-1)  # type: ignore[misc]


class Corner:
    """Crops the upper left."""

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:
        return image[..., : size["height"], : size.width]


class Squeezed:
    """Normalizes to -1 to 1 whatever the statistics."""

    def normalize(self, image: Any, mean: Any, std: Any, **kwargs: Any) -> Any:
        return super().normalize(image, 127.5, 127.5).neg_()  # type: ignore[misc]


class Rooted:
    """Rescales by a root, in the memory it is given."""

    def rescale_and_normalize(self, images: Any, *args: Any) -> Any:
        images.bitwise_not_()
        return images.float().sqrt()


class Doubled:
    def rescale(self, image: Any, scale: float, **kwargs: Any) -> Any:
        return super().rescale(image, 2 * scale, **kwargs)  # type: ignore[misc]


class OnWhite:
    """Lays what is transparent on white."""

    def convert_to_rgb(self, image: Any) -> Any:
        if not isinstance(image, Image.Image) or image.mode != "RGBA":
            return super().convert_to_rgb(image)  # type: ignore[misc]
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")


class Masked:
    """Has a parameter more, and a result more."""

    def _preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        feature = super()._preprocess(images, *args, **kwargs)  # type: ignore[misc]
        feature["pixel_mask"] = torch.tensor([image.sum(dtype=torch.int64) for image in images])
        return feature


class Noisy:
    def _process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._process_image(image, *args, **kwargs).bitwise_xor_(9)  # type: ignore[misc]


class Every(Fitted, Corner, Squeezed, OnWhite, Masked, Noisy):
    pass


@pytest.mark.parametrize(
    "mixin", [Fitted, Corner, Squeezed, Rooted, Doubled, OnWhite, Masked, Noisy, Every]
)
@pytest.mark.parametrize("do_normalize", [True, False])
def test_steps_of_ones_own(mixin: type, do_normalize: bool) -> None:
    glass = photograph("coffee.png").resize((64, 50)).convert("RGBA")
    glass.putalpha(99)
    images = [*batch(), glass]
    results = []
    for base in (BitImageProcessorFast, TheirFast):
        processor = type("Processor", (mixin, base), {})(**SMALL, do_normalize=do_normalize)
        results.append(processor(images, return_tensors="pt"))
    ours, theirs = results
    plain = BitImageProcessorFast(**SMALL, do_normalize=do_normalize)(images, return_tensors="pt")
    assert ours.keys() == theirs.keys()
    assert ours.pixel_values.shape == theirs.pixel_values.shape
    assert ours.pixel_values.dtype == theirs.pixel_values.dtype
    difference = (ours.pixel_values - theirs.pixel_values).abs()
    # sqrt is steep near 0.
    assert difference.max() <= (2 if mixin is Rooted else TWO_LEVELS)
    assert difference.mean() <= 1e-3 * theirs.pixel_values.abs().mean()
    if (mixin, do_normalize) not in ((Squeezed, False), (Doubled, True)) and mixin is not Masked:
        assert not torch.equal(ours.pixel_values, plain.pixel_values)
    for name in ours.keys() - {"pixel_values"}:
        assert torch.equal(ours[name], theirs[name])


def test_what_a_step_writes_does_not_reach_the_image() -> None:
    image = photograph("camera.png")
    array, tensor = np.array(image), torch.from_numpy(np.array(image))[None].clone()
    for mixin in (Rooted, Noisy):
        processor = type("Processor", (mixin, BitImageProcessorFast), {})(do_resize=False)
        for given in (image, array, tensor):
            processor(
                given, do_convert_rgb=False, image_mean=0.5, image_std=0.5, disable_grouping=True
            )
    assert np.array_equal(np.array(image), np.array(photograph("camera.png")))
    assert np.array_equal(array, np.array(image))
    assert np.array_equal(tensor[0].numpy(), array)


@pytest.mark.parametrize("where", ["object", "class"])
def test_a_step_may_be_replaced_by_assignment(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        return next(v for v in values if isinstance(v, (torch.Tensor, np.ndarray))) * 0

    image = photograph("chelsea.png")
    for processor in (BitImageProcessorFast(), BitImageProcessor()):
        assert processor(image, return_tensors="pt").pixel_values.any()
        monkeypatch.setattr(processor if where == "object" else type(processor), "normalize", blank)
        assert not processor(image, return_tensors="pt").pixel_values.any()


@pytest.mark.parametrize(
    ("mixin", "batch_sizes"),
    [
        (object, [2]),
        (Squeezed, [2]),
        (Rooted, [2]),
        (OnWhite, [2]),
        (Masked, [2]),
        (Noisy, [2]),
        (Fitted, [1, 1, 2]),  # called for each size, and calling ours
        (Corner, [1, 1, 2]),  # without a crop the results differ in size
    ],
)
def test_what_is_not_replaced_is_one_op_for_the_batch(
    mixin: Any, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    op = batches.resize_normalize

    def counted(images: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(images))
        return op(images, *args, **kwargs)

    bases = (BitImageProcessorFast,) if mixin is object else (mixin, BitImageProcessorFast)
    processor = type("Processor", bases, {})(**SMALL)
    images = [photograph("chelsea.png"), photograph("coffee.png").resize((90, 99))]
    monkeypatch.setattr(batches, "resize_normalize", counted)
    processor(images, return_tensors="pt")
    assert sizes == batch_sizes


# ---- the methods, called by themselves ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    sorted(
        # Of that one ours takes everything as **kwargs.
        {*FAST_STEPS, *FAST_HOOKS, "preprocess", "filter_out_unused_kwargs"}
        - {"_validate_preprocess_kwargs"}
    ),
)
def test_signatures_are_theirs(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(c, name)).parameters for c in (BitImageProcessorFast, TheirFast)
    )
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


RESIZES: list[dict[str, Any]] = [
    {"size": {"height": 21, "width": 40}},
    {"size": {"shortest_edge": 17}, "interpolation": InterpolationMode.BICUBIC},
    {"size": {"shortest_edge": 30, "longest_edge": 33}},
    {"size": {"max_height": 20, "max_width": 90}, "interpolation": InterpolationMode.NEAREST},
    {"size": {"height": 50, "width": 70}, "interpolation": InterpolationMode.NEAREST_EXACT},
    {"size": {"height": 20, "width": 30}, "antialias": False},
    {
        "size": {"height": 20, "width": 30},
        "antialias": False,
        "interpolation": InterpolationMode.BICUBIC,
    },
    {"size": {"height": 60, "width": 80}},
]


@pytest.mark.parametrize("arguments", RESIZES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("leading", [(), (1,), (3,)])
def test_resize(arguments: dict[str, Any], dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    image = torch.randint(20, 230, (*leading, 3, 60, 80)).to(dtype)
    size = SizeDict(**arguments["size"])
    ours, theirs = (
        p().resize(image, **{**arguments, "size": size}) for p in (BitImageProcessorFast, TheirFast)
    )
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    allowed = 1e-5 * 255 if dtype.is_floating_point else 2
    assert (ours.double() - theirs.double()).abs().max() <= allowed


@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 3, 21, 31), (2, 2, 1, 5, 40)])
@pytest.mark.parametrize("crop", [(8, 9), (20, 30), (40, 7), (7, 41), (33, 44)])
def test_center_crop_rescale_and_normalize(shape: tuple[int, ...], crop: tuple[int, int]) -> None:
    ours, theirs = BitImageProcessorFast(), TheirFast()
    size = SizeDict(*crop)
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.float64):
        image = torch.randint(0, 256, shape).to(dtype)
        a, b = (p.center_crop(image, size) for p in (ours, theirs))
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        a, b = (p.rescale(image, 1 / 255) for p in (ours, theirs))
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        for do_rescale in (True, False):
            for do_normalize in (True, False):
                given = (
                    image,
                    do_rescale,
                    1 / 255,
                    do_normalize,
                    (0.5,) * shape[-3],
                    (0.3,) * shape[-3],
                )
                a, b = (p.rescale_and_normalize(*given) for p in (ours, theirs))
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
        if dtype.is_floating_point:
            for mean, std in ((0.3, 0.2), ([0.1] * shape[-3], (2.0,) * shape[-3])):
                a, b = (p.normalize(image, mean, std) for p in (ours, theirs))
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_steps_refuse_what_they_cannot_do() -> None:
    processor = BitImageProcessorFast()
    image = torch.zeros(3, 8, 9)
    with pytest.raises(TypeError, match=r"must be floating to be normalized, got torch\.uint8"):
        processor.normalize(image.byte(), 0.5, 0.5)
    with pytest.raises(ValueError, match="std must hold numbers other than 0"):
        processor.normalize(image, 0.5, [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="crop_size must hold height and width"):
        processor.center_crop(image, SizeDict(shortest_edge=3))
    with pytest.raises(ValueError, match="size must hold shortest_edge"):
        processor.resize(image, SizeDict(longest_edge=3))
    with pytest.raises(ValueError, match=r"nearest, bilinear or bicubic .* got lanczos"):
        processor.resize(image, SizeDict(4, 4), InterpolationMode.LANCZOS, antialias=False)
    with pytest.raises(KeyError, match="a size has no key 'depth'"):
        SizeDict(4, 4)["depth"]


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"do_normalize": False}], ids=str)
def test_a_gradient_reaches_the_image(resample: int, options: dict[str, Any]) -> None:
    grads, values = [], []
    image = torch.rand(3, 50, 64) * 255
    for base in (BitImageProcessorFast, TheirFast):
        given = [image.clone().requires_grad_(), image[:, :40].clone().requires_grad_()]
        result = base(**SMALL)(
            given, return_tensors="pt", resample=resample, **options
        ).pixel_values
        grads += torch.autograd.grad(result.pow(2).sum(), given)
        values.append(result.detach())
    for a, b in ((values[0], values[1]), (grads[0], grads[2]), (grads[1], grads[3])):
        assert b.any()
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    with torch.no_grad():
        given = image.clone().requires_grad_()
        assert not BitImageProcessorFast(**SMALL)(
            given, return_tensors="pt"
        ).pixel_values.requires_grad


# ---- parameters of one's own --------------------------------------------------------------------


def test_a_subclass_may_have_more_parameters() -> None:
    def define(base: Any, kwargs: Any) -> Any:
        valid = type("Kwargs", (), {"__annotations__": {**kwargs.__annotations__, "patch": int}})

        def _preprocess(self: Any, images: Any, *args: Any, patch: int, **rest: Any) -> Any:
            feature = super(subclass, self)._preprocess(images, *args, **rest)
            feature["pixel_values"] = feature["pixel_values"][..., ::patch, ::patch]
            return feature

        attributes = {"valid_kwargs": valid, "patch": 4, "_preprocess": _preprocess}
        subclass = type("Patched", (base,), attributes)
        return subclass

    ours = define(BitImageProcessorFast, DefaultFastImageProcessorKwargs)
    theirs = define(TheirFast, TheirKwargs)
    image = photograph("chelsea.png")
    for init, call in (({}, {}), ({"patch": 3}, {}), ({"patch": 3}, {"patch": 5})):
        a, b = (c(**init)(image, return_tensors="pt", **call).pixel_values for c in (ours, theirs))
        assert a.shape == b.shape
        assert ours(**init).to_json_string() == theirs(**init).to_json_string()
    assert ours.from_dict({}, patch=9).patch == 9


def test_valid_kwargs_are_theirs() -> None:
    names = list(BitImageProcessorFast.valid_kwargs.__annotations__)
    assert names == list(TheirFast.valid_kwargs.__annotations__)
    assert BitImageProcessorFast()._valid_kwargs_names == TheirFast()._valid_kwargs_names


def test_unused_parameters_are_told() -> None:
    results = []
    for base in (BitImageProcessorFast, TheirFast):
        subclass = type("Processor", (base,), {"unused_kwargs": ["crop_size"]})
        results.append(subclass(crop_size=5).to_json_string())
        assert subclass().filter_out_unused_kwargs({"crop_size": 3, "size": 4}) == {"size": 4}
        assert base().filter_out_unused_kwargs({"crop_size": 3}) == {"crop_size": 3}
    assert results[0] == results[1]
    ours = type("Processor", (BitImageProcessorFast,), {"unused_kwargs": ["crop_size"]})
    with pytest.warns(UserWarning, match="Processor does not use crop_size"):
        ours(crop_size=5)


class Pairs:
    """Takes pairs of images, whose halves it lays beside each other."""

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        return images

    def _preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        joined = [torch.cat([a[..., :30], b[..., -30:]], dim=-1) for a, b in images]
        return super()._preprocess(joined, *args, **kwargs)  # type: ignore[misc]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_subclass_may_take_lists_of_images(device: str | None) -> None:
    photo = photograph("chelsea.png").resize((80, 60))
    pairs = [[photo, photo.rotate(180)], [photo.rotate(180), photo]]
    a, b = (
        type("Processor", (Pairs, base), {})(**SMALL)(pairs, return_tensors="pt", device=device)
        for base in (BitImageProcessorFast, TheirFast)
    )
    assert (a.pixel_values - b.pixel_values).abs().max() <= TWO_LEVELS
