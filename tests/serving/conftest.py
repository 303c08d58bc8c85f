"""A tiny model, and a server in this process that has small limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.common import save_model
from tests.serving.in_process import (
    MOST_BYTES,
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_WAITING,
    InProcess,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[InProcess]:
    server = InProcess(
        model,
        max_request_bytes=MOST_BYTES,
        max_image_pixels=MOST_PIXELS,
        max_images=MOST_IMAGES,
        max_queue=MOST_WAITING,
        batch_wait=0,
        body_timeout=0.3,
    )
    yield server
    server.close()
