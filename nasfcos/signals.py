"""Stopping a run on SIGTERM or SIGINT without losing its work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

# Seconds after which a second signal stops the run at once. An earlier one is ignored, because
# launchers immediately repeat the Ctrl-C of a terminal.
PATIENCE = 5.0


class Interrupted(BaseException):
    """A signal stops the run. Not an `Exception`, so that no handler of errors swallows it.

    Attributes:
        signum: number of the signal; the process should exit with 128 + signum.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Records SIGTERM and SIGINT within its ``with`` block, for the training loop to check.

    Args:
        remedy: what the message of `Interrupted` says about the work done so far.

    Attributes:
        signum: number of the signal received; 0 if none was.
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
        """Within this block a signal raises `Interrupted` at once: no work would be lost."""
        self._at_once = True
        try:
            if self.signum:
                self._raise()
            yield
            if self.signum:  # raised in a destructor, where Python ignores exceptions
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
    """Defer SIGTERM and SIGINT that arrive within the block to its end.

    For work that must not be interrupted, and for blocks that fork: an exception that a handler
    raises while Python's fork hooks run is ignored, and the hooks are left unfinished.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with ExitStack() as handlers:  # all handlers are restored, even if one raises
            for signum in (signal.SIGTERM, signal.SIGINT):
                handler = signal.signal(signum, lambda signum, frame: received.append(signum))
                handlers.callback(signal.signal, signum, handler)
            yield
    finally:
        for signum in received[:1]:
            signal.raise_signal(signum)
