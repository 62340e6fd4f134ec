"""The time that a run may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType


class OutOfTime(BaseException):
    """The deadline passed inside a measurement; not an Exception, so that no gate swallows it."""


class Budget:
    """Seconds from now on; None: no end."""

    def __init__(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline, never negative; infinite where there is none."""
        if self.deadline is None:
            return float("inf")
        return max(0.0, self.deadline - monotonic())

    def fits(self, seconds: float) -> bool:
        """Whether something predicted to take `seconds` may still be started."""
        return seconds <= self.left()

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Raises OutOfTime in the body at the deadline: the net under wrong predictions."""
        if self.deadline is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(signum: int, frame: FrameType | None) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
