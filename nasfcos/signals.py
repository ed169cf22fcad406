"""Ending a run on SIGTERM or SIGINT without losing its work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

# Seconds after which a second signal means that the first was not heeded. Launchers repeat a
# Ctrl-C of the terminal at once.
PATIENCE = 5.0


class Interrupted(BaseException):
    """The run ends because of a signal; not an `Exception`, so that no handler of errors eats it.

    Attributes:
        signum: the signal's number; the process should exit with 128 + signum.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Notes SIGTERM and SIGINT while in its ``with`` block, for the training loop to look at.

    Args:
        remedy: what `Interrupted` says about the work done so far.

    Attributes:
        signum: number of the signal received, 0 before.
    """

    def __init__(self, remedy: str = "--resume goes on from the last checkpoint") -> None:
        self.remedy = remedy
        self.signum = 0
        self._since = 0.0
        self._at_once = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    @contextmanager
    def heeded_at_once(self) -> Iterator[None]:
        """Within the block a signal raises `Interrupted`: there is nothing to be finished first."""
        self._at_once = True
        try:
            if self.signum:
                self._raise()
            yield
            if self.signum:  # raised where Python drops exceptions, in the destructor of an object
                self._raise()
        finally:
            self._at_once = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = self.signum and now - self._since > PATIENCE
        if not self.signum:
            self.signum, self._since = signum, now
        if self._at_once or repeated:
            self._raise()

    def _raise(self) -> None:
        name = signal.Signals(self.signum).name
        raise Interrupted(self.signum, f"stopped by {name}; {self.remedy}")


@contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGTERM and SIGINT that come within the block take effect at its end.

    For what must not be left in the middle, and for blocks that fork: Python drops what a handler
    raises while its hooks of a fork run, and what these had to do stays undone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with ExitStack() as handlers:  # all are restored, whatever the first of them raises
            for signum in (signal.SIGTERM, signal.SIGINT):
                handler = signal.signal(signum, lambda signum, frame: received.append(signum))
                handlers.callback(signal.signal, signum, handler)
            yield
    finally:
        for signum in received[:1]:
            signal.raise_signal(signum)
