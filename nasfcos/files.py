"""Atomic writing of files, and JSON."""

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which replaces `path` after the block.

    If the block raises, the temporary file is deleted and `path` is unchanged. Missing folders are
    created. The temporary path has the suffix of `path`, by which libraries choose the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only a part of the stem, so that the longest names that the file system allows can be written.
    temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _DISK_ERRORS and error.filename is None:  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


# Names of the temporary files of `replacing`.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.(csv|html|json|png|pth|yaml)")


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files in a folder and below it that killed processes have left there."""
    for path in folder.rglob(".*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of somebody else
        pass
    return True


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write `value` as strict JSON (NaN becomes null), whole or not at all.

    Raises:
        ValueError: `value` holds an infinite number.
    """
    # dumps, not dump: only dumps is implemented in C.
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # looking for NaN costs as much as writing, so only if there are some
        text = json.dumps(_without_nan(value), indent=indent, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any | None:
    """The content of a JSON file; None if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
