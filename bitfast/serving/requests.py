"""Bodies of ``/classify`` and ``/embed``: from bytes to image files, within limits. Nothing is decoded here."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitfast.images.files import one_line
from bitfast.serving.refusals import Refusal, bad_image, bad_request

RAW = "application/octet-stream"
MULTIPART = "multipart/form-data"
JSON = "application/json"

MOST_TOP_K = 100_000


@dataclass(frozen=True)
class Images:
    """What a request asks about.

    Attributes:
        files: The bytes of each image file, or why there are none.
        are_several: Whether the answer is a list of answers.
        top_k: Labels that the request asks for; None: it does not say.
    """

    files: list[bytes | Refusal]
    are_several: bool
    top_k: int | None = None


# ---- reading --------------------------------------------------------------------------------------


async def read_body(
    chunks: AsyncIterable[bytes], headers: Mapping[str, str], most_bytes: int
) -> bytes:
    """Return a body, as soon as it is known to be small enough.

    Raises:
        Refusal: 413 before more than the allowed bytes are read; 400 for a bad Content-Length.
    """
    announced = headers.get("content-length")
    if announced is not None:
        if not (announced.isascii() and announced.isdigit()):
            raise bad_request(f"Content-Length must be an integer, got {announced!r}")
        _check_size(int(announced[:20]), most_bytes)
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        _check_size(len(body), most_bytes)
    return bytes(body)


def _check_size(size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise Refusal(413, f"the request's body is larger than {most_bytes} bytes")


# ---- the three forms of a body ----------------------------------------------------------------------


def media_type(content_type: str | None) -> str:
    """Return which of RAW, MULTIPART and JSON a Content-Type stands for; none: RAW.

    Raises:
        Refusal: 415: none of them.
    """
    name = (content_type or RAW).partition(";")[0].strip().lower()
    if name.startswith("image/"):
        return RAW
    if name not in (RAW, MULTIPART, JSON):
        raise Refusal(
            415,
            f"Content-Type must be image/*, {RAW}, {MULTIPART} or {JSON}, got {name!r}",
            {"Accept": f"image/*, {RAW}, {MULTIPART}, {JSON}"},
        )
    return name


def parse_images(body: bytes, content_type: str | None, most_images: int) -> Images:
    """Return the image files in a body.

    Raises:
        Refusal: 400: the body is empty or malformed; 413: there are too many images; 415: see
            :func:`media_type`.
    """
    form = media_type(content_type)
    if not body:
        raise bad_request("the request has no body; send an image")
    if form == MULTIPART:
        return _parse_multipart(body, content_type or "", most_images)
    if form == JSON:
        return _parse_json(body, most_images)
    return Images([body], are_several=False)


def _parse_multipart(body: bytes, content_type: str, most_images: int) -> Images:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import Field, File, FormParser, parse_options_header

    files: list[bytes | Refusal] = []

    def on_file(file: File) -> None:
        _check_count(len(files) + 1, most_images)
        file.file_object.seek(0)
        files.append(file.file_object.read() or bad_image("the file is empty"))

    def on_field(field: Field) -> None:
        name = (field.field_name or b"").decode(errors="replace")
        raise bad_request(f"the form's field {name[:100]!r} is text; each part must be a file")

    ends: list[bool] = []
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    try:
        parser = FormParser(
            MULTIPART,
            on_field,
            on_file,
            on_end=lambda: ends.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # nothing goes to a disk
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise bad_request(f"the body is not {MULTIPART}: {one_line(error)}") from error
    if not ends:
        raise bad_request(f"the body ends before its {MULTIPART} does")
    if not files:
        raise bad_request("the form holds no file")
    return Images(files, are_several=len(files) > 1)


def _parse_json(body: bytes, most_images: int) -> Images:
    content = parse_json_object(body)
    unknown = sorted(set(content) - {"inputs", "parameters", "options"})
    if unknown:
        raise bad_request(f"unknown field {unknown[0][:100]!r}; there are inputs and parameters")
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise bad_request(f"parameters must be an object, got {_kind(parameters)}")
    given = {name for name, value in parameters.items() if value is not None}
    if given - {"top_k"}:
        raise bad_request(f"unknown parameter {min(given - {'top_k'})[:100]!r}; there is top_k")
    top_k = parameters.get("top_k")
    inputs = content.get("inputs")
    if isinstance(inputs, str):
        return Images([_decode(inputs)], are_several=False, top_k=check_top_k(top_k))
    if not isinstance(inputs, list) or not inputs:
        raise bad_request(
            f"inputs must be an image in base64, or a list of at least one, got {_kind(inputs)}"
        )
    _check_count(len(inputs), most_images)
    return Images([_decode(text) for text in inputs], True, check_top_k(top_k))


def _decode(text: Any) -> bytes | Refusal:
    """Return the bytes of base64 or of a data: URI. Nothing else is looked up: no URL, no path."""
    if not isinstance(text, str):
        return bad_image(f"an image must be a string in base64, got {_kind(text)}")
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            return bad_image("a data: URI must be in base64: data:image/png;base64,...")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return bad_image("the image is not base64 (URLs and paths are not read)")
    return content or bad_image("the image is empty")


def _check_count(count: int, most_images: int) -> None:
    if count > most_images:
        raise Refusal(413, f"the request has more than {most_images} images")


# ---- JSON and parameters ----------------------------------------------------------------------------


def parse_json_object(body: bytes | memoryview) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        Refusal: 400: it is not JSON, holds NaN or infinity, is nested too deeply, or is no object.
    """
    try:
        content = json.loads(bytes(body), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise bad_request("the JSON is nested too deeply") from error
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {one_line(error)[:200]}") from error
    if not isinstance(content, dict):
        raise bad_request(f"the body must be a JSON object, got {_kind(content)}")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def check_top_k(top_k: Any) -> int | None:
    """Return the count of labels; None stays None.

    Raises:
        Refusal: 400: it is no integer of at least 1.
    """
    if top_k is None:
        return None
    is_integer = isinstance(top_k, int) and not isinstance(top_k, bool)
    if not is_integer or not 1 <= top_k <= MOST_TOP_K:
        raise bad_request(f"top_k must be an integer from 1 to {MOST_TOP_K}, got {top_k!r:.50}")
    return top_k


def parse_top_k(text: str | None) -> int | None:
    """Return the count of labels in a URL's query; None where there is none.

    Raises:
        Refusal: 400: it is no integer of at least 1.
    """
    is_count = text is None or (text.isascii() and text.isdigit() and len(text) < 10)
    return check_top_k((None if text is None else int(text)) if is_count else text)


def _kind(value: Any) -> str:
    """Return what a value of JSON is called there."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
