"""``/classify`` and ``/embed`` in this process: what bodies they take, what they answer, what they refuse."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bitfast import BitForImageClassification, BitImageProcessor
from tests.cli.common import LABELS, save_model, scores_from_api
from tests.serving.in_process import (
    MOST_PIXELS,
    InProcess,
    base64_of,
    image_file,
    several,
)

# ---- answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_the_bits_of_bitfast_classify(
    server: InProcess, model: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(image_file(kind))
    expected = scores_from_api(model, path)
    order = sorted(range(len(LABELS)), key=lambda index: -expected[index])
    answer = server.post("/classify", content=path.read_bytes())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == [{"label": LABELS[i], "score": expected[i]} for i in order]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(model: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(image_file())
    server = InProcess(model, dtype=dtype, batch_wait=0, batch_size=1)
    scores = {
        p["label"]: p["score"] for p in server.post("/classify", content=path.read_bytes()).json()
    }
    assert [scores[label] for label in LABELS] == scores_from_api(model, path, dtype)
    server.close()


def test_embeddings_are_the_pooled_features(server: InProcess, model: Path) -> None:
    content = image_file()
    network = BitForImageClassification.from_pretrained(model)
    with Image.open(io.BytesIO(content)) as image:
        pixels = BitImageProcessor.from_pretrained(model)(image, return_tensors="pt")
    with torch.no_grad():
        expected = network.bit(**pixels).pooler_output.flatten().tolist()
    assert server.post("/embed", content=content).json() == pytest.approx(expected, abs=1e-6)


def test_independent_labels_get_independent_scores(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "multi", problem_type="multi_label_classification")
    path = tmp_path / "image.png"
    path.write_bytes(image_file())
    network = BitForImageClassification.from_pretrained(folder)
    pixels = BitImageProcessor.from_pretrained(folder)(Image.open(path), return_tensors="pt")
    expected = network(**pixels).logits.sigmoid()[0].tolist()
    server = InProcess(folder, batch_size=1)
    scores = {
        p["label"]: p["score"] for p in server.post("/classify", content=path.read_bytes()).json()
    }
    assert [scores[label] for label in LABELS] == pytest.approx(expected, abs=1e-6)
    server.close()


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/x-what", "application/octet-stream", None]
)
def test_raw_bytes(server: InProcess, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = server.post("/classify", content=image_file(), headers=headers)
    assert [set(label) for label in answer.json()] == [{"label", "score"}] * 3


@pytest.mark.parametrize("path", ["/classify", "/embed"])
def test_all_ways_give_the_same(server: InProcess, path: str) -> None:
    contents = [image_file(), image_file("JPEG")]
    texts = [base64_of(contents[0]), f"data:image/jpeg;base64,{base64_of(contents[1])}"]
    raw = [server.post(path, content=content).json() for content in contents]
    form = [server.post(path, files=several(content)).json() for content in contents]
    in_json = [server.post(path, json={"inputs": text}).json() for text in texts]
    assert raw == form == in_json
    form_of_both = server.post(path, files=several(*contents)).json()
    json_of_both = server.post(path, json={"inputs": texts}).json()
    # In one batch, sums may be rounded in another way.
    for answers in (form_of_both, json_of_both):
        assert len(answers) == 2
        for answer, single in zip(answers, raw, strict=True):
            assert numbers(answer) == pytest.approx(numbers(single), abs=1e-5)
    assert len(server.post(path, json={"inputs": texts[:1]}).json()) == 1  # a list stays a list


def numbers(answer: list[Any]) -> list[float]:
    return [one["score"] if isinstance(one, dict) else one for one in answer]


def test_top_k(server: InProcess) -> None:
    content = image_file()
    all_labels = server.post("/classify", content=content).json()
    assert server.post("/classify?top_k=2", content=content).json() == all_labels[:2]
    assert server.post("/classify?top_k=99", content=content).json() == all_labels
    body = {"inputs": base64_of(content), "parameters": {"top_k": 1}}
    assert server.post("/classify", json=body).json() == all_labels[:1]
    assert server.post("/classify?top_k=2", json=body).json() == all_labels[:2]  # the URL decides
    body["parameters"] = {"top_k": None}
    assert server.post("/classify", json=body).json() == all_labels


def test_the_answer_says_how_long_it_took(server: InProcess) -> None:
    header = server.post("/classify", content=image_file()).headers["server-timing"]
    parts = dict(part.split(";dur=") for part in header.split(", "))
    assert set(parts) == {"decode", "model"}
    assert all(float(milliseconds) >= 0 for milliseconds in parts.values())


# ---- bad images -------------------------------------------------------------------------------------


def bomb(side: int = 40_000) -> bytes:
    """Return a small PNG file that says it has 1.6 billion pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"

BAD_IMAGES = {
    "text": (b"no image at all", 422, "not an image in a format that is accepted"),
    "truncated": (image_file("JPEG")[:-200], 422, "truncated"),
    "bomb": (bomb(), 413, "exceeds limit"),
    "large": (bomb(100), 413, f"the image has 100 x 100 pixels, more than {MOST_PIXELS}"),
    "eps": (EPS, 422, "not an image in a format that is accepted"),  # never given to Ghostscript
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image(server: InProcess, name: str) -> None:
    content, status, message = BAD_IMAGES[name]
    for answer in (
        server.post("/classify", content=content),
        server.post("/embed", files=several(content)),
        server.post("/classify", json={"inputs": base64_of(content)}),
    ):
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert message in answer.json()["error"]


def test_a_bad_image_fails_alone(server: InProcess) -> None:
    good, bad = image_file(), BAD_IMAGES["truncated"][0]
    answer = server.post("/classify", files=several(good, bad, b"", good))
    assert answer.status_code == 200
    first, failed, empty, last = answer.json()
    assert numbers(first) == pytest.approx(numbers(last))
    assert "truncated" in failed["error"]
    assert empty == {"error": "the file is empty"}
    inputs = [base64_of(bad), "/etc/passwd", 7, base64_of(good)]
    answer = server.post("/embed", json={"inputs": inputs})
    assert answer.status_code == 200
    errors = [one["error"] for one in answer.json()[:3]]
    assert "truncated" in errors[0]
    assert errors[1] == "the image is not base64 (URLs and paths are not read)"
    assert errors[2] == "an image must be a string in base64, got a number"
    assert len(answer.json()[3]) == 32


def test_all_images_are_bad(server: InProcess) -> None:
    answer = server.post("/classify", files=several(b"no", b"none"))
    assert answer.status_code == 422
    assert (
        answer.json()
        == [{"error": "not an image in a format that is accepted: BMP, GIF, JPEG, PNG, WEBP"}] * 2
    )


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png,abc",
        "data:image/png;base64",
        "====",
        "é",
        "",
    ],
)
def test_only_base64_is_read(server: InProcess, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a file is opened")

    monkeypatch.setattr("builtins.open", refuse)
    answer = server.post("/classify", json={"inputs": text})
    assert answer.status_code == 422
    assert "base64" in answer.json()["error"] or answer.json()["error"] == "the image is empty"


# ---- bad requests -----------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=b"
BAD_BODIES = {
    "empty": (b"", "image/png", "no body"),
    "no json": (b"{", "application/json", "is not JSON"),
    "not utf-8": (b"\xff\xfe{", "application/json", "is not JSON"),
    "nan": (b'{"inputs": NaN}', "application/json", "NaN is no number in JSON"),
    "deep": (b"[" * 50_000, "application/json", "nested too deeply"),
    "deep inputs": (b'{"inputs":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "application/json", "nested"),
    "long number": (b'{"inputs": ' + b"1" * 50_000 + b"}", "application/json", "is not JSON"),
    "a list": (b"[]", "application/json", "must be a JSON object, got a list"),
    "no inputs": (b"{}", "application/json", "inputs must be an image in base64"),
    "null": (b'{"inputs": null}', "application/json", "got null"),
    "no images": (b'{"inputs": []}', "application/json", "at least one"),
    "unknown": (b'{"inputs": "", "urls": []}', "application/json", "unknown field 'urls'"),
    "parameters": (b'{"inputs": "", "parameters": 3}', "application/json", "got a number"),
    "parameter": (b'{"inputs": "", "parameters": {"k": 1}}', "application/json", "parameter 'k'"),
    "top_k": (b'{"inputs": "", "parameters": {"top_k": 0}}', "application/json", "got 0"),
    "top_k true": (b'{"inputs": "", "parameters": {"top_k": true}}', "application/json", "got True"),
    "no boundary": (b"x", "multipart/form-data", "is not multipart/form-data"),
    "no form": (b"x", FORM, "is not multipart/form-data"),
    "no parts": (b"--b--\r\n", FORM, "holds no file"),
    "cut form": (
        b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nabc',
        FORM,
        "ends before",
    ),
    "text": (
        b'--b\r\nContent-Disposition: form-data; name="url"\r\n\r\nhttp://x\r\n--b--\r\n',
        FORM,
        "field 'url' is text",
    ),
    "no name": (b"--b\r\nX-Y: z\r\n\r\nabc\r\n--b--\r\n", FORM, "is not multipart/form-data"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_malformed_body(server: InProcess, name: str) -> None:
    body, content_type, message = BAD_BODIES[name]
    answer = server.post("/classify", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]
    assert len(answer.content) < 500


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "", "1e3", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_a_bad_top_k(server: InProcess, top_k: str) -> None:
    answer = server.post("/classify", params={"top_k": top_k}, content=image_file())
    assert answer.status_code == 400
    assert "top_k must be an integer from 1" in answer.json()["error"]
    assert len(answer.content) < 500


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "video/mp4", "x", "imagex/png"],
)
def test_another_media_type(server: InProcess, content_type: str) -> None:
    answer = server.post("/embed", content=image_file(), headers={"Content-Type": content_type})
    assert answer.status_code == 415
    assert content_type in answer.json()["error"]
    assert "image/*" in answer.headers["accept"]


def test_another_method_or_path(server: InProcess) -> None:
    answer = server.request("GET", "/classify")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "GET is not allowed" in answer.json()["error"]
    # No redirection either: it would lead to where the header Host says.
    for path in ("/nowhere", "/static/..%2f..%2fetc/passwd", "/page.html", "/classify/x", "/docs/"):
        answer = server.request("GET", path)
        assert answer.status_code == 404
        assert set(answer.json()) == {"error"}


def test_no_other_site_may_read_answers(server: InProcess) -> None:
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = server.request("OPTIONS", "/classify", headers=headers)
    answer = server.post("/classify", content=image_file(), headers=headers)
    assert preflight.status_code == 405
    for one in (preflight, answer):
        assert not [name for name in one.headers if name.startswith("access-control")]
