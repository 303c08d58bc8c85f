"""What ends a fine-tuning run before its end, other than a mistake in the code."""

from __future__ import annotations


class FinetuningError(Exception):
    """The run cannot go on; the message is one line for the user."""


class UsageError(FinetuningError):
    """The run cannot begin: wrong arguments, unusable data, or a folder that holds something else."""


class PeerLost(FinetuningError):  # noqa: N818 -- the error is another process's, which has told it
    """Another process of the run has ended."""


class Interrupted(FinetuningError):  # noqa: N818 -- nothing is wrong
    """A signal asked the run to end, which it did between two steps.

    Attributes:
        status: The exit status: 128 and the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number
