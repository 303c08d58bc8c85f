"""The Open Inference Protocol in this process: metadata, tensors in JSON and in bytes, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from bitfast import BitForImageClassification
from bitfast.serving.inference_protocol import HEADER_LENGTH
from tests.cli.common import LABELS, save_model
from tests.serving.in_process import InProcess

INFER = "/v2/models/tiny/infer"
WIDTH = 32
MOST_IMAGES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("protocol") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[InProcess]:
    server = InProcess(model, max_images=MOST_IMAGES, max_image_pixels=40 * 40, batch_wait=0)
    yield server
    server.close()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 26, 24)


@pytest.fixture(scope="module")
def network(model: Path) -> BitForImageClassification:
    return BitForImageClassification.from_pretrained(model)


def tensor(images: Tensor, **changes: Any) -> dict[str, Any]:
    """Return a tensor as the protocol describes it; a change to None leaves a field out."""
    described = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": list(images.shape),
        "data": images.flatten().tolist(),
        **changes,
    }
    return {name: value for name, value in described.items() if value is not None}


def outputs_of(content: dict[str, Any]) -> dict[str, Tensor]:
    return {
        output["name"]: torch.tensor(output["data"]).reshape(output["shape"])
        for output in content["outputs"]
    }


def expected(network: BitForImageClassification, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        pooled = network.bit(images).pooler_output
        return {"logits": network.classifier(pooled), "embedding": pooled.flatten(1)}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], *names: str) -> None:
    assert list(found) == list(names)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4)


# ---- metadata and health ------------------------------------------------------------------------------


def test_server(server: InProcess) -> None:
    answer = server.request("GET", "/v2").json()
    assert answer["name"] == "bitfast"
    assert answer["extensions"] == ["binary_tensor_data"]
    assert server.request("GET", "/v2/health/live").json() == {"live": True}
    assert server.request("GET", "/v2/health/ready").json() == {"ready": True}


def test_model(server: InProcess) -> None:
    answer = server.request("GET", "/v2/models/tiny").json()
    assert answer == {
        "name": "tiny",
        "versions": [],
        "platform": "bitfast",
        "inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, -1, -1]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, len(LABELS)]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, WIDTH]},
        ],
    }
    answer = server.request("GET", "/v2/models/tiny/ready").json()
    assert answer == {"name": "tiny", "ready": True}


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/ready"), ("POST", "/infer")])
def test_another_model(server: InProcess, method: str, path: str) -> None:
    answer = server.request(method, f"/v2/models/other{path}")
    assert answer.status_code == 404
    assert answer.json() == {"error": "there is no model 'other'; it is 'tiny'"}


# ---- tensors in JSON ----------------------------------------------------------------------------------


def test_logits(server: InProcess, network: BitForImageClassification, images: Tensor) -> None:
    body = {"id": "my id", "inputs": [tensor(images)], "parameters": {"anything": 1}}
    answer = server.post(INFER, json=body)
    assert answer.status_code == 200
    content = answer.json()
    assert set(content) == {"model_name", "id", "outputs"}
    assert content["model_name"] == "tiny"
    assert content["id"] == "my id"
    assert content["outputs"][0]["datatype"] == "FP32"
    assert_close(outputs_of(content), expected(network, images), "logits")


def test_the_bits_of_a_single_image(
    server: InProcess, network: BitForImageClassification, images: Tensor
) -> None:
    answer = server.post(INFER, json={"inputs": [tensor(images[:1])]}).json()
    with torch.no_grad():
        logits = network(images[:1]).logits
    assert torch.equal(outputs_of(answer)["logits"], logits)
    assert "id" not in answer


def test_chosen_outputs(
    server: InProcess, network: BitForImageClassification, images: Tensor
) -> None:
    outputs = [{"name": "embedding"}, {"name": "logits"}]
    answer = server.post(INFER, json={"inputs": [tensor(images)], "outputs": outputs}).json()
    assert_close(outputs_of(answer), expected(network, images), "embedding", "logits")


def test_nested_data(server: InProcess, network: BitForImageClassification, images: Tensor) -> None:
    body = {"inputs": [tensor(images, data=images.tolist())]}
    assert_close(
        outputs_of(server.post(INFER, json=body).json()), expected(network, images), "logits"
    )


# ---- tensors in bytes ---------------------------------------------------------------------------------


def post_binary(server: InProcess, content: dict[str, Any], binary: bytes) -> httpx.Response:
    header = json.dumps(content).encode()
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    return server.post(INFER, content=header + binary, headers=headers)


def binary_of(images: Tensor) -> tuple[dict[str, Any], bytes]:
    binary = images.numpy().astype("<f4").tobytes()
    return tensor(images, data=None, parameters={"binary_data_size": len(binary)}), binary


def test_binary_tensors(
    server: InProcess, network: BitForImageClassification, images: Tensor
) -> None:
    described, binary = binary_of(images)
    outputs = [
        {"name": "logits", "parameters": {"binary_data": True}},
        {"name": "embedding", "parameters": {"binary_data": True}},
    ]
    answer = post_binary(server, {"inputs": [described], "outputs": outputs}, binary)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[HEADER_LENGTH])
    rest = answer.content[length:]
    found = {}
    for output in json.loads(answer.content[:length])["outputs"]:
        assert "data" not in output
        size = output["parameters"]["binary_data_size"]
        assert size == 4 * math.prod(output["shape"])
        values = np.frombuffer(rest[:size], "<f4").reshape(output["shape"])
        found[output["name"]], rest = torch.from_numpy(values.copy()), rest[size:]
    assert rest == b""
    assert_close(found, expected(network, images), "logits", "embedding")


def test_bytes_in_and_json_out_and_the_reverse(
    server: InProcess, network: BitForImageClassification, images: Tensor
) -> None:
    described, binary = binary_of(images)
    answer = post_binary(server, {"inputs": [described]}, binary)
    assert HEADER_LENGTH not in answer.headers
    assert_close(outputs_of(answer.json()), expected(network, images), "logits")
    body = {"inputs": [tensor(images)], "parameters": {"binary_data_output": True}}
    answer = server.post(INFER, json=body)
    rest = answer.content[int(answer.headers[HEADER_LENGTH]) :]
    values = torch.from_numpy(np.frombuffer(rest, "<f4").reshape(3, -1).copy())
    assert_close({"logits": values}, expected(network, images), "logits")


@pytest.mark.parametrize("length", ["x", "-1", "999999", "1" * 5000, ""])
def test_a_bad_header_length(server: InProcess, length: str) -> None:
    answer = server.post(INFER, content=b"{}", headers={HEADER_LENGTH: length})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{HEADER_LENGTH} must be an integer from 0 to")


@pytest.mark.parametrize("change", ["short", "long", "size", "data", "unexplained"])
def test_bytes_that_do_not_fit(server: InProcess, images: Tensor, change: str) -> None:
    described, binary = binary_of(images)
    if change == "short":
        binary = binary[:-4]
    elif change == "long":
        binary += b"abcd"
    elif change == "size":
        described["parameters"]["binary_data_size"] = "1"
    elif change == "data":
        described["data"] = [1.0]
    else:
        del described["parameters"]
    answer = post_binary(server, {"inputs": [described]}, binary)
    assert answer.status_code == 400
    assert "binary_data_size" in answer.json()["error"]


# ---- errors -------------------------------------------------------------------------------------------

ONE = torch.zeros(1, 3, 24, 24)
BAD = {
    "no inputs": ({}, "inputs must be a list of one tensor"),
    "two inputs": ({"inputs": [tensor(ONE)] * 2}, "inputs must be a list of one tensor"),
    "name": ({"inputs": [tensor(ONE, name="x")]}, "the input must be 'pixel_values', got 'x'"),
    "datatype": ({"inputs": [tensor(ONE, datatype="FP16")]}, "must be FP32, got 'FP16'"),
    "channels": ({"inputs": [tensor(ONE, shape=[3, 1, 24, 24])]}, "must be [N, 3, H, W]"),
    "empty": ({"inputs": [tensor(ONE, shape=[0, 3, 24, 24])]}, "must be [N, 3, H, W]"),
    "negative": ({"inputs": [tensor(ONE, shape=[-1, 3, 24, -24])]}, "must be [N, 3, H, W]"),
    "floats": ({"inputs": [tensor(ONE, shape=[1.0, 3, 24, 24])]}, "must be [N, 3, H, W]"),
    "no shape": ({"inputs": [tensor(ONE, shape=None)]}, "must be [N, 3, H, W]"),
    "too little": ({"inputs": [tensor(ONE, shape=[1, 3, 24, 25])]}, "must be 1800 numbers, got 1728"),
    "no data": ({"inputs": [tensor(ONE, data=None)]}, "must be"),
    "text": ({"inputs": [tensor(ONE, data=["x"] * 1728)]}, "must be numbers, flat or nested"),
    "ragged": ({"inputs": [tensor(ONE, data=[[1], [1, 2]])]}, "must be numbers, flat or nested"),
    "strings": ({"inputs": [tensor(ONE, data=["1"] * 1728)]}, "must be numbers, flat or nested"),
    "booleans": ({"inputs": [tensor(ONE, data=[True] * 1728)]}, "must be numbers, flat or nested"),
    "nulls": ({"inputs": [tensor(ONE, data=[None] * 1728)]}, "must be numbers, flat or nested"),
    "integers": ({"inputs": [tensor(ONE, data=[10**30] * 1728)]}, "must be numbers"),
    "object": ({"inputs": [tensor(ONE, data={})]}, "must be numbers, flat or nested"),
    "huge": ({"inputs": [tensor(ONE, data=[1e300] * 1728)]}, "must be finite"),
    "output": ({"inputs": [tensor(ONE)], "outputs": [{"name": "y"}]}, "logits and embedding, got 'y'"),
    "outputs": ({"inputs": [tensor(ONE)], "outputs": ["logits"]}, "a list of objects"),
    "id": ({"inputs": [tensor(ONE)], "id": 3}, "id must be a string"),
    "parameters": ({"inputs": [tensor(ONE)], "parameters": 3}, "must be an object"),
    "tensor parameters": ({"inputs": [tensor(ONE, parameters=[1])]}, "must be an object"),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD)
def test_a_malformed_request(server: InProcess, name: str) -> None:
    body, message = BAD[name]
    answer = server.post(INFER, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert len(answer.content) < 500


def test_an_id_that_no_answer_can_hold(server: InProcess) -> None:
    body = json.dumps({"inputs": [tensor(ONE)], "id": "half of a character: \ud83d"})
    answer = server.post(INFER, content=body)
    assert answer.status_code == 400
    assert answer.json() == {"error": "id must be a string of Unicode characters"}


def test_too_many_or_too_large_images(server: InProcess) -> None:
    answer = server.post(INFER, json={"inputs": [tensor(torch.zeros(MOST_IMAGES + 1, 3, 2, 2))]})
    assert answer.status_code == 413
    assert answer.json()["error"] == f"the request has more than {MOST_IMAGES} images"
    # Refused by its shape, before its data are looked at.
    answer = server.post(INFER, json={"inputs": [tensor(ONE, shape=[1, 3, 41, 40])]})
    assert answer.status_code == 413
    assert answer.json()["error"] == "the images have 40 x 41 pixels, more than 1600"


def test_images_that_the_model_cannot_take(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(batch: Tensor) -> Any:
        raise ValueError("too small")

    monkeypatch.setattr(server.service._batcher, "_run", refuse)
    answer = server.post(INFER, json={"inputs": [tensor(ONE)]})
    assert answer.status_code == 422
    assert answer.json() == {"error": "the model cannot take the image: too small"}
