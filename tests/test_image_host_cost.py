"""What a batch of images that is on the device already costs the host: calls are counted.

No operator is called for each image, and only few Python functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import pytest
import torch

from bench import host
from bench.images import PHOTOGRAPHS
from bitfast import BitImageProcessorFast, use_backend
from bitfast.kernels import launch
from bitfast.ops import resize_filters
from tests.interpreter import DEVICE
from tests.requirements import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION

CALLS_PER_IMAGE = 8
"""Of Python functions, at most. There is about one for each thing that all images must be asked for."""
OTHER_CALLS = 700


@pytest.fixture(autouse=True)
def launches_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter a launch is thousands of calls; on a GPU it is one, of Triton's launcher."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch.Launch, "launch", lambda *_: None)


def processing(count: int, **options: Any) -> Callable[[], Any]:
    sizes = islice(cycle(PHOTOGRAPHS), count)
    images = [torch.zeros(3, h, w, dtype=torch.uint8, device=DEVICE) for w, h in sizes]
    processor = BitImageProcessorFast(**options)

    def run() -> Any:
        with use_backend(resize_normalize="triton"):
            return processor(images, return_tensors="pt")

    return run


def test_python_functions() -> None:
    found: dict[int, Counter[str]] = {}
    for count in (32, 256):
        run = processing(count)
        for _ in range(host.WARM_UPS):
            run()
        found[count] = host.python_calls_of(run)[0]
        print(f"{count} images: {found[count].total()} calls of Python functions")
    more = found[256].total() - found[32].total()
    assert more <= CALLS_PER_IMAGE * (256 - 32), (found[256] - found[32]).most_common(10)
    assert found[32].total() <= OTHER_CALLS + 32 * CALLS_PER_IMAGE, found[32].most_common(20)


def test_no_operator_is_called_for_each_image() -> None:
    few, many = (host.calls_of(processing(count)) for count in (32, 256))
    assert few["operators"] == many["operators"], many["operators_most"]
    assert many["operators_from_python"] <= 20, many["operators_most"]


def test_the_next_batch_computes_and_sends_no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    processing(18)()
    monkeypatch.setattr(resize_filters, "upload", None)
    processing(64)()
    with pytest.raises(TypeError):
        processing(1, size=123)()
