"""Files that are there whole or not at all."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes `path`'s place when the block ends well.

    If the block raises, nothing of it stays and a file already at `path` is untouched. Missing
    folders are made. The name keeps its suffix, so libraries that go by it write the right format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the whole stem, or the longest names that file systems take could not be written.
    temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _OF_THE_DISK and error.filename is None:  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write `value` as strict JSON (a nan becomes null), whole or not at all."""
    # dumps, not dump: only the former is compiled code.
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # to look for them costs as much as to write, so only where there are some
        text = json.dumps(_without_nan(value), indent=indent, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any | None:
    """The content of a JSON file; None where it is missing or broken."""
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
