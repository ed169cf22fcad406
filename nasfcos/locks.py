"""Locks of files: they end with their process, however that ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

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
