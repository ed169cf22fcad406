"""File locks, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .config import ConfigError

logger = logging.getLogger(__name__)

# Errors of file systems without locks (ENOLCK: network folders without their lock service).
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock within the block.

    A file system without locks is logged, and the block runs without one. (filelock's fallback, a
    marker file, would outlive a killed process and keep the next one out.)

    Args:
        path: lock file, in an existing folder.
        timeout: seconds to wait for another process that holds the lock; negative: no limit.

    Raises:
        filelock.Timeout: another process still holds the lock.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; see that no other job uses it", path)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_one(path: Path, busy: str, timeout: float = 1.0) -> Iterator[None]:
    """Hold a lock within the block, so that one job at a time uses a folder (see `locked`).

    Args:
        path: lock file; its folder is created if necessary.
        busy: error message if another process holds the lock.
        timeout: seconds to wait for the other process.

    Raises:
        ConfigError: another process still holds the lock; with the text `busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout))
        except Timeout:
            raise ConfigError(busy) from None
        yield


@contextmanager
def unless_held(path: Path) -> Iterator[bool | None]:
    """Hold a lock within the block if no other process holds it.

    Args:
        path: lock file.

    Yields:
        Whether the lock is held here; None if that is unknown (another user's file, a file system
        without locks).
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, fallback_to_soft=False).acquire(timeout=0))
            held = True
        except Timeout:
            held = False
        except OSError:
            held = None
        yield held
