"""``bitfast serve``: a model behind HTTP, on Ray Serve.

:func:`app` makes the application that the command runs, for ``ray.serve.run`` and, by :func:`build`, for a
configuration of ``serve deploy``. Nothing heavy is imported before they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(model: str | None = None, **options: Any) -> Application:
    """Return the Ray Serve application that ``bitfast serve`` runs.

    Args:
        model: A checkpoint's folder, or its name on the Hub; None: the model of handwritten digits that comes
            with bitfast.
        options: The other fields of :class:`bitfast.serving.settings.Settings`: ``dtype``, ``replicas``,
            ``batch_size``, ``batch_wait``, the limits.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        TypeError: there is no such option.
        ValueError: an option has a value that is not allowed; the message names it.
    """
    from bitfast.extras import require_extra
    from bitfast.serving.settings import Settings

    require_extra("bitfast.serving", "serve")
    from bitfast.serving.application import application

    return application(Settings.of(model, **options))


def build(arguments: dict[str, Any]) -> Application:
    """Return ``app(**arguments)``: Ray Serve passes the ``args`` of a configuration as one dictionary."""
    return app(**arguments)


__all__ = ["app", "build"]
