"""Signals that ask a run to end: noted, so that it ends between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Inside the ``with`` block, SIGINT and SIGTERM are noted instead of ending the process.

    Args:
        once: Whether a second SIGINT ends the process at once, as somebody at a terminal expects. Not among
            several processes: who starts them sends on what the terminal has sent to each already.

    Attributes:
        signal: The number of the first signal that came; None: none did.
    """

    def __init__(self, once: bool = True) -> None:
        self.once = once
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if self.once and number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = number
        if self.once:
            # Not through sys.stderr: the signal may have come while that was writing.
            with contextlib.suppress(OSError):
                os.write(2, b"\nbitfast: stopping after this step; again to stop at once\n")
