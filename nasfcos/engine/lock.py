"""One job at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from ..config import ConfigError
from ..locks import locked


@contextmanager
def only_one(path: Path, busy: str, timeout: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path` within the block (see `locked`).

    Args:
        path: the file; its folder is made if it is not there.
        busy: what to say where another process holds it for longer than `timeout` seconds.

    Raises:
        ConfigError: with the text `busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout))
        except Timeout:
            raise ConfigError(busy) from None
        yield
