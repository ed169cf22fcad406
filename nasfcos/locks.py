"""Locks of files: they end with their process, however that ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .config import ConfigError

logger = logging.getLogger(__name__)

# What file systems without locks answer (ENOLCK: network folders that lack their lock service).
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`, in a folder that is there, within the block.

    On a file system without locks there is none, which is logged. (What filelock would take instead
    is a mark that outlives a killed process, and would keep the next one out.)

    Args:
        path: the file.
        timeout: seconds to wait for another process that holds it; negative: without end.

    Raises:
        filelock.Timeout: another process still holds it.
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
    """Hold the lock file `path` within the block, for one job at a time in a folder (see `locked`).

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


@contextmanager
def unless_held(path: Path) -> Iterator[bool | None]:
    """Hold the lock file `path` within the block if nobody else does.

    Yields:
        whether it is held here; None where that cannot be told (another user's file, a file system
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
