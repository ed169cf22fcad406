"""One job at a time in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..config import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def only_one(path: Path, busy: str, timeout: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path` within the block; a lock ends with its process, however that ends.

    On a file system without locks there is none, which is logged.

    Args:
        path: the file; its folder is made if it is not there.
        busy: what to say where another process holds it for longer than `timeout` seconds.

    Raises:
        ConfigError: with the text `busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise ConfigError(busy) from None
    except NotImplementedError:
        logger.warning("%s: this file system has no locks; see that no other job uses it", path)
    try:
        yield
    finally:
        lock.release()
