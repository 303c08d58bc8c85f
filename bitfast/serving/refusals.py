"""Why a request, or one of its images, is not answered: an HTTP status and a message."""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):  # noqa: N818 - it is as much an answer as an error
    """An answer other than success.

    Args:
        status: Of HTTP.
        message: For the client; names what is wrong and what is allowed.
        headers: Of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def bad_request(message: str) -> Refusal:
    """Return the refusal of a request that is malformed."""
    return Refusal(400, message)


def bad_image(message: str) -> Refusal:
    """Return the refusal of an image that cannot be used."""
    return Refusal(422, message)


def overloaded(message: str) -> Refusal:
    """Return the refusal of a request that may succeed a second later."""
    return Refusal(503, message, {"Retry-After": "1"})


def shutting_down() -> Refusal:
    """Return the refusal of a server that drains. The client's next connection may lead to another one."""
    return Refusal(503, "the server shuts down", {"Retry-After": "1", "Connection": "close"})
