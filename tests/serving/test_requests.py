"""``/classify`` and ``/embed`` in this process: what bodies they take, what they answer, what they refuse."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from bitfast import BitForImageClassification, BitImageProcessor
from bitfast.serving.settings import Settings, places_on
from tests.cli.common import LABELS, SIZE, save_model, scores_from_api
from tests.serving.in_process import InProcess, encoded, image_file

MOST_BYTES = 60_000
MOST_PIXELS = 5_000
MOST_IMAGES = 4
MOST_WAITING = 6
SECONDS = 60


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


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def several(*contents: bytes) -> list[Any]:
    return [(f"image{n}", (f"{n}.png", content)) for n, content in enumerate(contents)]


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


# ---- limits -----------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_unread(server: InProcess) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    answer = server.post("/classify", content=endless(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 413
    assert answer.json()["error"] == f"the request's body is larger than {MOST_BYTES} bytes"
    assert sent <= MOST_BYTES + 20_000
    sent = 0
    announced = {"Content-Length": str(MOST_BYTES + 1), "Content-Type": "image/png"}
    answer = server.post("/classify", content=endless(), headers=announced)
    assert answer.status_code == 413
    assert sent <= 10_000


@pytest.mark.parametrize("length", ["x", "-1", "1" * 5000])
def test_a_bad_content_length(server: InProcess, length: str) -> None:
    answer = server.post("/classify", content=b"abc", headers={"Content-Length": length})
    assert answer.status_code in (400, 413)


def test_too_many_images(server: InProcess) -> None:
    for answer in (
        server.post("/classify", files=several(*[b"x"] * (MOST_IMAGES + 1))),
        server.post("/classify", json={"inputs": [""] * (MOST_IMAGES + 1)}),
    ):
        assert answer.status_code == 413
        assert answer.json()["error"] == f"the request has more than {MOST_IMAGES} images"


def test_a_slow_body(server: InProcess) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield image_file()
        await asyncio.sleep(SECONDS)

    answer = server.post("/classify", content=slow())
    assert answer.status_code == 408
    assert answer.json()["error"] == "the request's body did not arrive within 0.3 seconds"
    assert server.service.queue_length == 0


class Held:
    """Holds the model: batches wait until the block ends."""

    def __init__(self, server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        run = server.service._batcher._run

        def wait(batch: torch.Tensor) -> Any:
            self.batches.append(len(batch))
            assert self.gate.wait(SECONDS)
            return run(batch)

        monkeypatch.setattr(server.service._batcher, "_run", wait)


@pytest.fixture
def held(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(server, monkeypatch)
    yield held
    held.gate.set()


async def until(condition: Any) -> None:
    for _ in range(100 * SECONDS):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come to this")


def test_a_body_that_breaks_off(server: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise LookupError("what Ray Serve raises when a client hangs up")

    async def send(message: Any) -> None:
        sent.append(message)

    path = {"path": "/embed", "raw_path": b"/embed", "query_string": b"", "root_path": ""}
    scope = {"type": "http", "method": "POST", "headers": [], **path}
    asyncio.run(server.api(scope, receive, send))
    assert sent[0]["status"] == 400
    assert caplog.text == ""  # a client cannot fill the log
    assert server.service.queue_length == 0


def test_a_full_queue_refuses_and_recovers(server: InProcess, held: Held) -> None:
    content = image_file()

    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        accepted = [
            asyncio.create_task(client.post("/embed", content=content))
            for _ in range(MOST_WAITING - 1)
        ]
        await until(lambda: server.service.queue_length == MOST_WAITING - 1)
        too_many = await client.post("/embed", files=several(content, content))
        accepted.append(asyncio.create_task(client.post("/embed", content=content)))
        await until(lambda: server.service.queue_length == MOST_WAITING)
        refused = await client.post("/embed", content=content)
        alive = await client.get("/v2/health/ready")
        held.gate.set()
        answers = await asyncio.gather(*accepted)
        return [too_many, refused, alive, await client.post("/embed", content=content), *answers]

    too_many, refused, *answered = server.use(use)
    for answer in (too_many, refused):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert f"of at most {MOST_WAITING}" in answer.json()["error"]
    assert [answer.status_code for answer in answered] == [200] * (MOST_WAITING + 2)
    assert server.service.queue_length == 0


def test_more_images_than_the_queue_ever_takes(model: Path) -> None:
    server = InProcess(model, max_queue=1, batch_size=1)
    answer = server.post("/embed", files=several(image_file(), image_file()))
    assert answer.status_code == 413
    server.close()


def test_a_client_that_hangs_up_costs_nothing(server: InProcess, held: Held) -> None:
    content = image_file()

    async def use(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post("/embed", content=content))
        await until(lambda: held.batches == [1])
        gone = asyncio.create_task(client.post("/embed", files=several(content, content)))
        await until(lambda: server.service._batcher._queues)
        gone.cancel()
        await until(lambda: server.service.queue_length == 1)
        held.gate.set()
        assert (await first).status_code == 200

    server.use(use)
    assert server.post("/embed", content=content).status_code == 200
    assert held.batches == [1, 1]  # none of the two images that nobody waits for


def test_the_deadline_of_a_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = InProcess(model, request_timeout=0.2, batch_size=1, batch_wait=0)
    held = Held(server, monkeypatch)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 504
    assert answer.json()["error"] == "the request was not answered within 0.2 seconds"
    assert server.service.queue_length == 0
    held.gate.set()
    server.close()


def test_a_failure_of_the_model_is_not_the_clients(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: torch.Tensor) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(server.service._batcher, "_run", fail)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model fails: out of memory"}


def test_a_gpu_that_has_failed_ends_its_replica(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure(error: Exception) -> Any:
        def fail(batch: torch.Tensor) -> Any:
            raise error

        return fail

    server = InProcess(model)
    for error, is_ready in (
        (TypeError("a surprise"), True),
        (torch.OutOfMemoryError("too large"), True),
        (torch.AcceleratorError("an illegal memory access"), False),
    ):
        monkeypatch.setattr(server.service._batcher, "_run", failure(error))
        assert server.post("/classify", content=image_file()).status_code == 500
        assert server.service.is_alive == is_ready
        answer = server.request("GET", "/v2/health/ready")
        assert answer.status_code == (200 if is_ready else 503)
    server.close()


def test_output_that_is_not_finite(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    network = BitForImageClassification.from_pretrained(folder)
    torch.nn.init.constant_(network.classifier[1].weight, float("inf"))
    network.save_pretrained(folder)
    server = InProcess(folder, batch_size=1)
    answer = server.post("/classify", content=image_file())
    assert answer.status_code == 500
    assert answer.json() == {"error": "the model's output in float32 is not finite"}
    server.close()


def test_draining(server: InProcess, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "is_draining", False)  # put back at the end
    content = image_file()

    async def use(client: httpx.AsyncClient) -> None:
        accepted = asyncio.create_task(client.post("/embed", content=content))
        await until(lambda: held.batches == [1])
        draining = asyncio.create_task(server.service.drain())
        await until(lambda: server.service.is_draining)
        refused = await client.post("/embed", content=content)
        assert refused.status_code == 503
        assert refused.json() == {"error": "the server shuts down"}
        assert refused.headers["connection"] == "close"
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200
        assert not draining.done()
        held.gate.set()
        assert (await accepted).status_code == 200
        await draining

    server.use(use)


# ---- preprocessing apart from the event loop, threads ------------------------------------------------


def test_a_slow_decode_delays_no_health_check(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()
    preprocess = server.service.engine.preprocess

    def slow(content: bytes) -> torch.Tensor:
        entered.set()
        assert gate.wait(SECONDS)
        return preprocess(content)

    monkeypatch.setattr(server.service.engine, "preprocess", slow)

    async def use(client: httpx.AsyncClient) -> None:
        waiting = asyncio.create_task(client.post("/embed", content=image_file()))
        await until(entered.is_set)
        assert (await client.get("/v2/health/ready")).status_code == 200
        gate.set()
        assert (await waiting).status_code == 200

    server.use(use)


def test_threads(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}
    preprocess, run = server.service.engine.preprocess, server.service._batcher._run

    def seen_preprocess(content: bytes) -> torch.Tensor:
        threads["images"] = torch.get_num_threads()
        return preprocess(content)

    def seen_run(batch: torch.Tensor) -> Any:
        threads["model"] = torch.get_num_threads()
        return run(batch)

    monkeypatch.setattr(server.service.engine, "preprocess", seen_preprocess)
    monkeypatch.setattr(server.service._batcher, "_run", seen_run)
    server.post("/embed", content=image_file())
    assert threads == {"images": 1, "model": 2}


# ---- settings, metrics, openapi -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int8"),
        ("replicas", 0),
        ("replicas", (2, 1)),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("batch_wait", -1),
        ("batch_wait", float("nan")),
        ("max_queue", 0),
        ("request_timeout", 0),
        ("request_timeout", float("inf")),
        ("cpus_per_replica", 0),
        ("gpus_per_replica", -1),
        ("gpus_per_replica", 1.5),
        ("name", "a/b"),
    ],
)
def test_settings_name_what_is_wrong(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be"):
        Settings.of("model", **{option: value})


def test_replicas_follow_the_images_that_wait(model: Path) -> None:
    from types import SimpleNamespace

    from bitfast.serving.application import images_per_replica
    from bitfast.serving.scaling import ReplicasByImages

    policy = ReplicasByImages(images_per_replica(Settings.of(str(model), batch_size=8)))
    for images, replicas in (([], 0), ([0], 0), ([16], 1), ([40], 2.5), ([16, 32], 3)):
        values = {"images": {f"r{n}": count for n, count in enumerate(images)}} if images else {}
        assert policy(SimpleNamespace(aggregated_metrics=values)) == (replicas, {})
    # A full queue is too much for a replica, however short it is.
    assert images_per_replica(Settings.of(str(model), batch_size=8, max_queue=4)) == 2


@pytest.mark.parametrize(
    ("gpus", "replicas", "share"),
    [(0, 2, 0), (1, 1, 1), (4, 1, 1), (1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (8, (1, 8), 1)],
)
def test_gpus_are_shared_out(
    gpus: int, replicas: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    settings = Settings.of("model", replicas=replicas).resolved()
    assert settings.gpus_per_replica == share
    assert places_on(gpus, share) >= settings.replica_range[1]
    assert Settings.of("model", gpus_per_replica=2).resolved().gpus_per_replica == 2


def test_places_on_gpus() -> None:
    assert places_on(1, 0.75) == 1
    assert places_on(3, 2) == 1
    assert places_on(0, 0.5) == 0


def test_unknown_settings() -> None:
    with pytest.raises(TypeError, match="no such option: batchsize; there are model, "):
        Settings.of("model", batchsize=3)


def test_a_local_model_has_an_absolute_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert Settings.of(model.name).model == str(model)
    assert Settings.of("google/bit-50").model == "google/bit-50"
    assert Settings.of("google/bit-50").served_name == "bit-50"
    assert Settings.of(None).served_name == "digits"


def values_of(text: str, name: str, **labels: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    wanted = [f'{key}="{value}"' for key, value in {"replica": "r1", **labels}.items()]
    return sum(float(line.split()[-1]) for line in lines if all(part in line for part in wanted))


def test_metrics(model: Path) -> None:
    server = InProcess(model, batch_size=4, batch_wait=0)
    good = image_file()
    server.post("/classify", content=good)
    server.post("/classify", files=several(good, b"bad"))
    server.post("/embed", content=b"bad")
    server.request("GET", "/nowhere")
    answer = server.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert kinds["bitfast_requests"] == "counter"
    assert kinds["bitfast_model_seconds"] == "histogram"
    assert values_of(text, "bitfast_requests_total", route="/classify", status="200") == 2
    assert values_of(text, "bitfast_requests_total", route="/embed", status="422") == 1
    assert values_of(text, "bitfast_requests_total", route="other", status="404") == 1
    assert values_of(text, "bitfast_request_seconds_count", route="/classify") == 2
    assert values_of(text, "bitfast_images_total") == 2
    assert values_of(text, "bitfast_image_failures_total") == 2
    assert values_of(text, "bitfast_batch_images_sum") == 2
    assert values_of(text, "bitfast_queue_images") == 0
    server.close()


def test_openapi_describes_all_routes(server: InProcess) -> None:
    described = server.request("GET", "/openapi.json").json()
    assert described["openapi"].startswith("3.")
    for path in ("/classify", "/embed"):
        operation = described["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {
            "image/*",
            "application/octet-stream",
            "multipart/form-data",
            "application/json",
        }
        statuses = {"200", "400", "408", "413", "415", "422", "500", "503", "504"}
        assert set(operation["responses"]) == statuses
    for path, operations in described["paths"].items():
        assert all(operation["summary"] for operation in operations.values()), path
    assert "https://" not in json.dumps(described)


def test_pages_come_with_their_headers(server: InProcess) -> None:
    for path in ("/", "/docs"):
        answer = server.request("GET", path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "tiny" in answer.text  # the model's name


def test_the_size_of_images_is_that_of_the_processor(server: InProcess) -> None:
    pixels = server.service.engine.preprocess(encoded(Image.new("RGB", (60, 50))))
    assert pixels.shape == (3, SIZE, SIZE)


def test_an_image_that_gets_too_many_pixels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    BitImageProcessor(size={"shortest_edge": SIZE}, do_center_crop=False).save_pretrained(folder)
    server = InProcess(folder, max_image_pixels=MOST_PIXELS)
    assert server.post("/embed", content=image_file(size=(20, 10))).status_code == 200
    answer = server.post("/embed", content=image_file(size=(100, 5)))
    assert answer.status_code == 413
    assert answer.json()["error"] == (
        f"the image is resized to 480 x 24 pixels, more than {MOST_PIXELS}"
    )
    server.close()


def test_the_application_for_serve_deploy(model: Path) -> None:
    from ray import serve

    from bitfast.serving import build

    arguments = {"model": str(model), "replicas": [1, 3], "batch_size": 4, "cpus_per_replica": 2}
    application = build(arguments)
    assert isinstance(application, serve.Application)
    with pytest.raises(TypeError, match="no such option: batchsize"):
        build({"model": str(model), "batchsize": 3})
