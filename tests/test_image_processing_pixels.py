"""Pixels that are not from 0 to 255 are computed with as transformers does, after a warning."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as Theirs

from bitfast import BitImageProcessor, BitImageProcessorFast
from tests.test_image_processing_fast import GOOD, level

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

UNUSUAL: dict[str, np.ndarray] = {
    "float32": np.linspace(-3, 258.5, 60 * 80 * 3, dtype=np.float32),
    "float64": np.linspace(-1e-6, 255 + 1e-6, 60 * 80 * 3),
    "float16": np.linspace(-3, 300, 60 * 80 * 3).astype(np.float16),
    "int16": np.linspace(-900, 4000, 60 * 80 * 3).astype(np.int16),
    "uint16": np.linspace(100, 65000, 60 * 80 * 3).astype(np.uint16),
    "int32": np.linspace(-5, 2**24, 60 * 80 * 3).astype(np.int32),
}
UNUSUAL = {name: values.reshape(60, 80, 3) for name, values in UNUSUAL.items()}


@pytest.mark.parametrize("dtype", UNUSUAL)
@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("do_resize", [True, False])
def test_unusual_pixels_are_computed_with(
    dtype: str, resample: int, do_normalize: bool, do_resize: bool
) -> None:
    array = UNUSUAL[dtype]
    call = {"size": 40, "crop_size": 33, "resample": resample, "do_normalize": do_normalize,
            "do_resize": do_resize, "return_tensors": "pt"}  # fmt: skip
    with pytest.warns(UserWarning, match=r"images\[0\] holds numbers from -?\d.* as they are"):
        a = BitImageProcessorFast()(array, **call).pixel_values
    b = Theirs()(array, **call).pixel_values
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    difference = (a.double() - b.double()).abs().max()
    if not do_resize or resample == 0:
        assert difference == 0
        return
    # Their float32 sums against our float64 ones; float16 is rounded there once more, and integers to a level.
    rounding = 2 * torch.finfo(torch.float16 if dtype == "float16" else torch.float32).eps
    one_level = 1.001 * level(BitImageProcessorFast(), **call) if "int" in dtype else 0.0
    assert difference <= 4 * rounding * b.double().abs().max() + one_level
    if dtype in ("int16", "uint16"):  # of int32's 24 bits float32 sums lose the last
        assert ((a - b).abs() > one_level / 2).double().mean() <= 0.01


@pytest.mark.parametrize("processor_class", [BitImageProcessor, BitImageProcessorFast])
def test_a_batch_of_unusual_pixels_is_warned_of_once(processor_class: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor_class(do_resize=False)([GOOD, *[GOOD - 2.5] * 3], return_tensors="pt")
    (warning,) = [w for w in caught if "as they are" in str(w.message)]
    assert str(warning.message).startswith(
        "images[1] holds numbers from -2.5 to -2.5, not from 0 to 255"
    )
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Not to be rescaled, or rescaled by what is made for them: nothing is unusual.
        processor_class(do_resize=False, do_rescale=False)([GOOD, GOOD - 2.5])
        processor_class(do_resize=False, rescale_factor=1 / 65535)([GOOD.astype(np.uint16) + 60000])
