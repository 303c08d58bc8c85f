"""The Open Inference Protocol, version 2: for clients that process images themselves and send tensors.

Source: https://github.com/kserve/open-inference-protocol, and for its extension ``binary_tensor_data``
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.
Binary tensors spare both sides the decimal digits, which take longer than a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

import bitfast
from bitfast.serving import openapi
from bitfast.serving.bodies import received_body
from bitfast.serving.refusals import Refusal, bad_request
from bitfast.serving.requests import parse_json_object
from bitfast.serving.service import Service

HEADER_LENGTH = "Inference-Header-Content-Length"
INPUT = "pixel_values"
OUTPUTS = ("logits", "embedding")
DEFAULT_OUTPUTS = ("logits",)
DATATYPE = "FP32"


@dataclass(frozen=True)
class Inference:
    """A request for inference.

    Attributes:
        pixel_values: (N, C, H, W), float32.
        outputs: The outputs that are asked for, and whether each is to be binary.
        id: The client's name for the request; None: it has none.
    """

    pixel_values: Tensor
    outputs: dict[str, bool]
    id: str | None


class InferenceProtocol:
    """The protocol's routes.

    Args:
        find_service: Returns what answers. Called for each request.
    """

    def __init__(self, find_service: Callable[[], Service]) -> None:
        self._find_service = find_service

    def add_routes(self, api: FastAPI) -> None:
        """Add the routes under ``/v2`` to the application."""
        for path, endpoint, summary in (
            ("/v2", self.server_metadata, "The server's name, version and extensions"),
            ("/v2/health/live", self.live, "Whether the server runs"),
            ("/v2/health/ready", self.ready, "Whether the server accepts requests"),
            ("/v2/models/{name}", self.model_metadata, "The model's inputs and outputs"),
            ("/v2/models/{name}/ready", self.model_ready, "Whether the model accepts requests"),
        ):
            responses = openapi.PROTOCOL[path]
            api.add_api_route(path, endpoint, summary=summary, responses=responses)
        api.add_api_route(
            "/v2/models/{name}/infer",
            self.infer,
            methods=["POST"],
            summary="Logits and embeddings of a batch of pixel_values",
            openapi_extra=openapi.INFER_REQUEST,
            responses=openapi.INFER,
        )

    async def server_metadata(self) -> Response:
        """Answer GET /v2."""
        return JSONResponse(
            {
                "name": "bitfast",
                "version": bitfast.__version__,
                "extensions": ["binary_tensor_data"],
            }
        )

    async def live(self) -> Response:
        """Answer GET /v2/health/live."""
        return JSONResponse({"live": True})

    async def ready(self) -> Response:
        """Answer GET /v2/health/ready: 503 while the server drains."""
        is_ready = self._find_service().is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def model_ready(self, name: str) -> Response:
        """Answer GET /v2/models/NAME/ready."""
        is_ready = self._service(name).is_ready
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    async def model_metadata(self, name: str) -> Response:
        """Answer GET /v2/models/NAME."""
        engine = self._service(name).engine
        widths = {"logits": engine.labels, "embedding": engine.embedding_size}
        return JSONResponse(
            {
                "name": name,
                "versions": [],
                "platform": "bitfast",
                "inputs": [
                    {"name": INPUT, "datatype": DATATYPE, "shape": [-1, engine.channels, -1, -1]}
                ],
                "outputs": [
                    {"name": output, "datatype": DATATYPE, "shape": [-1, widths[output]]}
                    for output in OUTPUTS
                ],
            }
        )

    async def infer(self, name: str, request: Request) -> Response:
        """Answer POST /v2/models/NAME/infer."""
        service = self._service(name)
        with service.admitted() as admission:
            body = await received_body(request, service)
            inference = await service.in_pool(parse_inference, body, request.headers, service)
            admission.grow_to(len(inference.pixel_values))
            results = await service.features_of_tensors(list(inference.pixel_values))
        for result in results:
            if isinstance(result, Refusal):
                raise result
        values = {
            output: torch.stack([getattr(features, output) for features in results])
            for output in inference.outputs
        }
        return await service.in_pool(render, name, inference, values)

    def _service(self, name: str) -> Service:
        service = self._find_service()
        if name != service.settings.served_name:
            raise Refusal(
                404, f"there is no model {name[:100]!r}; it is {service.settings.served_name!r}"
            )
        return service


# ---- requests -------------------------------------------------------------------------------------


def parse_inference(body: bytes, headers: Mapping[str, str], service: Service) -> Inference:
    """Return the request in a body.

    Raises:
        Refusal: 400: it is malformed or asks for what the model has not; 413: its images are too many or large.
    """
    header, binary = _split(body, headers)
    content = parse_json_object(header)
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise bad_request(f"inputs must be a list of one tensor, {INPUT}")
    tensor = inputs[0]
    if tensor.get("name") != INPUT:
        raise bad_request(f"the input must be {INPUT!r}, got {tensor.get('name')!r:.100}")
    if tensor.get("datatype") != DATATYPE:
        raise bad_request(
            f"the datatype of {INPUT} must be {DATATYPE}, got {tensor.get('datatype')!r:.100}"
        )
    shape = _shape(tensor.get("shape"), service)
    pixel_values = _values(tensor, math.prod(shape), binary).reshape(shape)
    if not np.isfinite(pixel_values).all():
        raise bad_request(f"{INPUT} must be finite")
    name = content.get("id")
    # JSON can write halves of characters, which no answer can hold.
    if name is not None and not (isinstance(name, str) and _is_unicode(name)):
        raise bad_request("id must be a string of Unicode characters")
    return Inference(torch.from_numpy(pixel_values), _outputs(content), name)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _split(body: bytes, headers: Mapping[str, str]) -> tuple[memoryview, memoryview]:
    """Return the JSON and what follows it."""
    length = headers.get(HEADER_LENGTH.lower())
    view = memoryview(body)
    if length is None:
        return view, view[:0]
    is_length = length.isascii() and length.isdigit() and len(length) < 16
    if not is_length or int(length) > len(body):
        raise bad_request(
            f"{HEADER_LENGTH} must be an integer from 0 to the body's {len(body)} bytes, got {length[:50]!r}"
        )
    return view[: int(length)], view[int(length) :]


def _shape(shape: Any, service: Service) -> list[int]:
    channels = service.engine.channels
    is_shape = (
        isinstance(shape, list)
        and len(shape) == 4
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape)
    )
    if not is_shape or shape[1] != channels:
        raise bad_request(
            f"the shape of {INPUT} must be [N, {channels}, H, W], each at least 1, got {shape!r:.100}"
        )
    settings = service.settings
    if shape[0] > settings.max_images:
        raise Refusal(413, f"the request has more than {settings.max_images} images")
    if shape[2] * shape[3] > settings.max_image_pixels:
        raise Refusal(
            413,
            f"the images have {shape[3]} x {shape[2]} pixels, more than {settings.max_image_pixels}",
        )
    return shape


def _values(tensor: dict[str, Any], count: int, binary: memoryview) -> np.ndarray:
    """Return a tensor's values in row-major order, from its JSON or from the bytes after all JSON."""
    size = _parameters(tensor, INPUT).get("binary_data_size")
    if size is not None:
        if size != 4 * count or size != len(binary) or "data" in tensor:
            raise bad_request(
                f"binary_data_size must be the tensor's {4 * count} bytes, all that follow the JSON, "
                f"without data; got {size!r:.50}, and {len(binary)} bytes follow"
            )
        return np.frombuffer(binary, "<f4").astype(np.float32)
    if len(binary):
        raise bad_request(f"{len(binary)} bytes follow the JSON, and no binary_data_size says why")
    try:
        values = np.asarray(tensor.get("data"))
    except ValueError:  # lists of different lengths
        values = np.asarray(None)
    if values.dtype.kind not in "iuf":
        raise bad_request(f"the data of {INPUT} must be numbers, flat or nested")
    if values.size != count:
        raise bad_request(f"the data of {INPUT} must be {count} numbers, got {values.size}")
    with np.errstate(over="ignore"):  # to infinity, which the caller refuses
        return values.astype(np.float32)


def _outputs(content: dict[str, Any]) -> dict[str, bool]:
    default = _parameters(content, "the request").get("binary_data_output", False) is True
    outputs = content.get("outputs")
    if outputs is None:
        return dict.fromkeys(DEFAULT_OUTPUTS, default)
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise bad_request("outputs must be a list of objects with a name")
    chosen = {}
    for output in outputs:
        name = output.get("name")
        if name not in OUTPUTS:
            raise bad_request(f"outputs are {' and '.join(OUTPUTS)}, got {name!r:.100}")
        chosen[name] = _parameters(output, name).get("binary_data", default) is True
    return chosen or dict.fromkeys(DEFAULT_OUTPUTS, default)


def _parameters(owner: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = owner.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise bad_request(f"the parameters of {name} must be an object")
    return parameters


# ---- answers --------------------------------------------------------------------------------------


def render(name: str, inference: Inference, values: Mapping[str, Tensor]) -> Response:
    """Return the answer to a request for inference, binary tensors after the JSON."""
    outputs, binary = [], b""
    for output, is_binary in inference.outputs.items():
        tensor = values[output]
        described: dict[str, Any] = {
            "name": output,
            "datatype": DATATYPE,
            "shape": list(tensor.shape),
        }
        if is_binary:
            content = tensor.numpy().astype("<f4").tobytes()
            described["parameters"] = {"binary_data_size": len(content)}
            binary += content
        else:
            described["data"] = tensor.reshape(-1).tolist()
        outputs.append(described)
    answer: dict[str, Any] = {"model_name": name, "outputs": outputs}
    if inference.id is not None:
        answer["id"] = inference.id
    header = JSONResponse(answer)
    if not binary:
        return header
    return Response(
        bytes(header.body) + binary,
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header.body))},
    )
