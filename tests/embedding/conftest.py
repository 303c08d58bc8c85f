"""The fixtures of the command line's tests."""

from tests.cli.conftest import corpus, model, photo, run

__all__ = ["corpus", "model", "photo", "run"]
