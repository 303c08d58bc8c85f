"""Paths, addresses and base64 text are read as transformers 4.56.2 reads them, or refused by name."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_bit import BitImageProcessor as TheirSlow
from transformers.models.bit.image_processing_bit_fast import BitImageProcessorFast as TheirFast

from bitfast import BitImageProcessor, BitImageProcessorFast
from bitfast.images import sources
from tests.test_image_processing import photograph

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BOTH = [(BitImageProcessor, TheirSlow), (BitImageProcessorFast, TheirFast)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several modes, one turned by its EXIF data, and files that are none."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    photograph("rocket.jpg").resize((60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    glass = photograph("coffee.png").resize((64, 50)).convert("RGBA")
    glass.putalpha(99)
    glass.save(tmp_path / "glass.png")
    photograph("camera.png").resize((50, 50)).save(tmp_path / "gray.png")
    photograph("no_time_for_that_tiny.gif").save(tmp_path / "moving.gif")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    content = (tmp_path / "glass.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    return tmp_path


GOOD = ("turned.jpg", "glass.png", "gray.png", "moving.gif")


@pytest.fixture
def site(folder: Path) -> Iterator[str]:
    """The address at which a server gives what is in the folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def do_GET(self) -> None:
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/gray.png")
                self.end_headers()
            elif self.path == "/astray.png":
                self.send_response(302)
                self.send_header("Location", f"file://{folder / 'gray.png'}")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def assert_same_images(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_images(a, b)
    elif isinstance(ours, Image.Image):
        assert ours.mode == theirs.mode == "RGB"
        assert np.array_equal(np.array(ours), np.array(theirs))
    else:
        assert ours is theirs


@pytest.mark.parametrize(("ours", "theirs"), BOTH)
def test_fetch_images(ours: Any, theirs: Any, folder: Path, site: str) -> None:
    array = np.zeros((4, 5, 3), np.uint8)
    picture = photograph("coins.png")  # stays as it is, not in RGB
    for images in (
        *(str(folder / name) for name in GOOD),
        *(f"{site}/{name}" for name in (*GOOD, "moved.png")),
        encoded(folder / "gray.png"),
        f"data:image/gif;base64,{encoded(folder / 'moving.gif')}",
        [str(folder / "gray.png"), f"{site}/glass.png", encoded(folder / "turned.jpg")],
        [[str(folder / "gray.png")], [f"{site}/glass.png", array]],
        array,
    ):
        assert_same_images(ours().fetch_images(images), theirs().fetch_images(images))
    assert ours().fetch_images(picture) is picture
    assert_same_images(
        ours().fetch_images(folder / "gray.png"), theirs().fetch_images(str(folder / "gray.png"))
    )


def test_the_fast_one_reads_what_stands_for_images(folder: Path, site: str) -> None:
    call = {"size": 40, "crop_size": 33, "return_tensors": "pt", "do_resize": False}
    paths = [str(folder / name) for name in GOOD]
    for images in (
        paths[0],
        paths,
        [paths[:2], paths[2:]],
        f"{site}/turned.jpg",
        [f"{site}/moved.png", np.array(Image.open(paths[2]).convert("RGB"))],
        encoded(folder / "glass.png"),
    ):
        a, b = (p()(images, **call).pixel_values for p in (BitImageProcessorFast, TheirFast))
        assert torch.equal(a, b)


@pytest.mark.parametrize("as_list", [True, False])
def test_the_slow_processor_takes_images_only(as_list: bool, folder: Path) -> None:
    """As in transformers; the error names the method that reads paths."""
    path = str(folder / "gray.png")
    for processor in (BitImageProcessor(), TheirSlow()):
        with pytest.raises(ValueError, match=r"(?i)must be|invalid image type") as caught:
            processor([path] if as_list else path)
        if isinstance(processor, BitImageProcessor):
            assert "fetch_images" in str(caught.value)
    BitImageProcessor()(BitImageProcessor().fetch_images([path]))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("{site}/none.png", OSError, r"images\[1\] 'http.*none.png' cannot be fetched: HTTP Error 404"),
        ("{site}/text.png", OSError, r"images\[1\] 'http.*text.png' cannot be decoded: cannot identify"),
        ("{site}/half.png", OSError, r"images\[1\] 'http.*half.png' cannot be decoded"),
        ("{site}/astray.png", OSError, r"images\[1\] 'http.*astray.png' cannot be fetched"),
        ("http://127.0.0.1:9/x.png", OSError, r"images\[1\] 'http.*x.png' cannot be fetched: .*refused"),
        ("http://:nowhere", OSError, r"images\[1\] 'http://:nowhere' cannot be fetched"),
        ("{folder}/text.png", OSError, r"images\[1\] '.*text.png' cannot be decoded: cannot identify"),
        ("{folder}/empty.png", OSError, r"images\[1\] '.*empty.png' cannot be decoded"),
        ("{folder}/half.png", OSError, r"images\[1\] '.*half.png' cannot be decoded"),
        ("{folder}/none.png", ValueError, r"images\[1\] must be the path of a file, .* got '.*none.png'"),
        ("{folder}", ValueError, r"images\[1\] must be the path of a file"),
        ("ftp://127.0.0.1/x.png", ValueError, r"images\[1\] must be the path of a file, an http"),
        ("file://{folder}/gray.png", ValueError, r"images\[1\] must be the path of a file, an http"),
        ("", ValueError, r"images\[1\] must be the path of a file, .* got ''"),
        ("\0", ValueError, r"images\[1\] must be the path of a file"),
        ("ä", ValueError, r"images\[1\] must be the path of a file"),
        ("AAAA" * 10**5, ValueError, r"got '(AAAA){25}\.\.\.'$"),
        ("data:image/png;base64,AAAA", ValueError, r"images\[1\] must be the path of a file"),
        (None, TypeError, r"images\[1\] must be a path, an address, a PIL.* got NoneType"),
        (7, TypeError, r"images\[1\] must be a path, .* got int"),
        (["", 7], ValueError, r"images\[1\]\[0\] must be the path"),
    ],
)  # fmt: skip
def test_what_stands_for_no_image_is_named(
    image: Any, error: Any, message: str, folder: Path, site: str
) -> None:
    if isinstance(image, str) and len(image) < 1000:
        image = image.format(site=site, folder=folder)
    good = np.zeros((20, 30, 3), np.uint8)
    for read in (BitImageProcessor().fetch_images, BitImageProcessorFast()):
        with pytest.raises(error, match=message):
            read([good, image])


def test_a_silent_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and says nothing
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        with pytest.raises(OSError, match=r"image 'http.*x\.png' cannot be fetched: timed out"):
            BitImageProcessorFast().fetch_images(address)


def test_a_decompression_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    content = io.BytesIO((folder / "gray.png").read_bytes())
    with pytest.raises(Image.DecompressionBombError):
        Image.open(content)
    with pytest.raises(OSError, match=r"cannot be decoded: .*decompression bomb"):
        BitImageProcessorFast().fetch_images(str(folder / "gray.png"))
