"""The pages for people: ``page.html`` at ``/``, ``docs.html`` at ``/docs``, and the headers of both."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from importlib import resources
from typing import NamedTuple


class Page(NamedTuple):
    """A page of HTML in UTF-8, and the headers that belong to it."""

    body: bytes
    headers: dict[str, str]


def load_page(name: str, model: str) -> Page:
    """Return a page of this package.

    Args:
        name: ``"page.html"`` or ``"docs.html"``.
        model: The name of the model, which the page shows.
    """
    text = resources.files("bitfast.serving").joinpath(name).read_text(encoding="utf-8")
    text = text.replace("{{model}}", html.escape(model))
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(text.encode(), headers)


def content_security_policy(text: str) -> str:
    """Return the policy that lets a page run its own script and style, talk to its own server, and no more."""
    hashes = {tag: _hash_of_element(text, tag) for tag in ("script", "style")}
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashes['script']}",
            f"style-src {hashes['style']}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash_of_element(text: str, tag: str) -> str:
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
