"""A server's settings, its metrics and the description of its interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from bitfast import BitImageProcessor
from bitfast.serving.settings import Settings, places_on
from tests.cli.common import SIZE, save_model
from tests.serving.in_process import (
    MOST_PIXELS,
    InProcess,
    encoded,
    image_file,
    several,
)

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
