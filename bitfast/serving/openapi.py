"""What ``/openapi.json`` says of bodies and answers beyond what FastAPI sees in the routes."""

from __future__ import annotations

from typing import Any

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "string", "description": "What is wrong, and what is allowed."}
    },
}

LABELS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "description": "Most probable first.",
    "items": {
        "type": "object",
        "required": ["label", "score"],
        "properties": {
            "label": {"type": "string"},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
}

VECTOR_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "number"}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _error(description: str) -> dict[str, Any]:
    return _json(description, ERROR_SCHEMA)


def _overload() -> dict[str, Any]:
    retry = {"description": "Seconds.", "schema": {"type": "integer"}}
    return {
        **_error("The queue is full, or the server shuts down."),
        "headers": {"Retry-After": retry},
    }


COMMON_ERRORS: dict[int | str, dict[str, Any]] = {
    400: _error("The request is malformed."),
    408: _error("The body did not arrive in time."),
    413: _error("The body, an image, or the number of images is too large."),
    500: _error("The server fails."),
    503: _overload(),
    504: _error("The request was not answered in time."),
}


def _images_answers(of_one: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    of_several = {
        "type": "array",
        "description": "In the request's order; an image that cannot be used has an error in its place.",
        "items": {"anyOf": [of_one, ERROR_SCHEMA]},
    }
    failed = {"anyOf": [ERROR_SCHEMA, {"type": "array", "items": ERROR_SCHEMA}]}
    return {
        200: _json("Of one image, or of each of several.", {"anyOf": [of_one, of_several]}),
        415: _error("The body's Content-Type is not supported."),
        422: _json("The image cannot be used, or none of several can.", failed),
        **COMMON_ERRORS,
    }


CLASSIFY = _images_answers(LABELS_SCHEMA)
EMBED = _images_answers(VECTOR_SCHEMA)


def images(*, with_top_k: bool) -> dict[str, Any]:
    """Return what the operation of a route that takes images has besides its answers."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    base64 = {
        "type": "string",
        "contentEncoding": "base64",
        "description": "Base64, or a data: URI. URLs and paths are not read.",
    }
    body: dict[str, Any] = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {"anyOf": [base64, {"type": "array", "items": base64, "minItems": 1}]}
        },
    }
    top_k = {"type": "integer", "minimum": 1, "default": 5, "description": "Labels of an image."}
    if with_top_k:
        body["properties"]["parameters"] = {"type": "object", "properties": {"top_k": top_k}}
    files = {
        "type": "object",
        "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        "description": "One file or several, under any names.",
    }
    operation: dict[str, Any] = {
        "requestBody": {
            "required": True,
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {"schema": files},
                "application/json": {"schema": body},
            },
        }
    }
    if with_top_k:
        operation["parameters"] = [{"name": "top_k", "in": "query", "schema": top_k}]
    return operation


METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Each series has the label replica.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}

# ---- Open Inference Protocol ------------------------------------------------------------------------


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_PARAMETERS = {"type": "object"}
_SHAPE = {"type": "array", "items": {"type": "integer"}}


def _tensors(*required: str, **more: dict[str, Any]) -> dict[str, Any]:
    tensor = _object(name=_STRING, **more)
    tensor["required"] = ["name", *required]
    return {"type": "array", "items": tensor}


_DESCRIBED = _tensors("datatype", "shape", datatype=_STRING, shape=_SHAPE)
_VALUES: dict[str, dict[str, Any]] = {
    "datatype": {"type": "string", "const": "FP32"},
    "shape": _SHAPE,
    "data": {"type": "array", "description": "Row-major, flat or nested.", "items": {}},
    "parameters": _PARAMETERS,
}

_UNKNOWN_MODEL = _error("There is no such model.")

PROTOCOL: dict[str, dict[int | str, dict[str, Any]]] = {
    "/v2": {
        200: _json(
            "The server.",
            _object(name=_STRING, version=_STRING, extensions={"type": "array", "items": _STRING}),
        )
    },
    "/v2/health/live": {200: _json("It runs.", _object(live=_BOOLEAN))},
    "/v2/health/ready": {
        200: _json("It accepts requests.", _object(ready=_BOOLEAN)),
        503: _json("It shuts down.", _object(ready=_BOOLEAN)),
    },
    "/v2/models/{name}": {
        200: _json(
            "The model.",
            _object(
                name=_STRING,
                versions={"type": "array", "items": _STRING},
                platform=_STRING,
                inputs=_DESCRIBED,
                outputs=_DESCRIBED,
            ),
        ),
        404: _UNKNOWN_MODEL,
    },
    "/v2/models/{name}/ready": {
        200: _json("It accepts requests.", _object(name=_STRING, ready=_BOOLEAN)),
        404: _UNKNOWN_MODEL,
        503: _json("It shuts down.", _object(name=_STRING, ready=_BOOLEAN)),
    },
}

_INFER_SCHEMA = _object(
    id=_STRING,
    parameters=_PARAMETERS,
    inputs={
        **_tensors("datatype", "shape", **_VALUES),
        "description": "One: pixel_values, FP32, [N, C, H, W].",
    },
    outputs={
        **_tensors(parameters=_PARAMETERS),
        "description": "Of logits and embedding; default: logits.",
    },
)
_INFER_SCHEMA["required"] = ["inputs"]

INFER_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _INFER_SCHEMA},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of the JSON, where binary tensors follow it.",
            "schema": {"type": "integer"},
        }
    ],
}

INFER: dict[int | str, dict[str, Any]] = {
    200: _json(
        "The outputs.",
        _object(
            model_name=_STRING,
            id=_STRING,
            outputs=_tensors("datatype", "shape", **_VALUES),
        ),
    ),
    404: _UNKNOWN_MODEL,
    422: _error("The model cannot take such images."),
    **COMMON_ERRORS,
}
