"""Receiving a request's body, within its deadline and size."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from bitfast.serving.refusals import Refusal
from bitfast.serving.requests import read_body
from bitfast.serving.service import Service


async def received_body(request: Request, service: Service) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: 400: the client hung up; 408: it took too long; 413: it is too large.
    """
    settings = service.settings
    reading = read_body(request.stream(), request.headers, settings.max_request_bytes)
    try:
        return await asyncio.wait_for(reading, settings.body_timeout)
    except asyncio.TimeoutError:
        message = f"the request's body did not arrive within {settings.body_timeout:g} seconds"
        # Else the connection would stay until the rest of the body has come.
        raise Refusal(408, message, {"Connection": "close"}) from None
    except Refusal:
        raise
    except Exception:  # Starlette and Ray Serve have several for this
        raise Refusal(400, "the client hung up") from None
