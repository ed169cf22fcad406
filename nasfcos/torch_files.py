"""Files of `torch.save`, read without executing anything."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# How a zip begins, which is what torch has written since version 1.6.
ZIP_START = b"PK\x03\x04"


class TorchFileError(ValueError):
    """A file that is damaged, or holds more than tensors and plain containers; the message names
    it."""


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, on the CPU.

    torch itself verifies no checksums: they are verified here, in files that have some. That this
    reads the file before torch does costs no second reading from the disk.

    Raises:
        TorchFileError: the file is damaged, or not of this kind.
        OSError: it could not be read, which says nothing about what is in it.
    """
    try:
        damaged = None
        with open(path, "rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zipfile and torch.load raise many kinds
        # Damaged files send zipfile to places before their start (EINVAL), and its unpackers have
        # no number for what they find.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = str(path)
            raise
        raise TorchFileError(f"{path} cannot be read as weights: {reason(error)}") from error
    raise TorchFileError(
        f"{path} is damaged: wrong checksum of {damaged} (or it has none, being saved under "
        "torch.serialization.set_crc32_options(False): save it without that)"
    )


def read_saved(path: Path) -> dict:
    """A dict saved by torch; empty where the file is missing or, with a warning, damaged."""
    if not path.exists():
        return {}
    try:
        return dict(read_torch_file(path))
    except (TypeError, ValueError) as error:
        logger.warning("%s is damaged: %s", path, error)
        return {}


def reason(error: Exception) -> str:
    """What an error of reading a file says, in a line that suits whoever has the file."""
    text = str(error) or type(error).__name__
    if "weights_only" in text:  # torch advises to execute what the file says
        return (
            "torch.save did not write it, or it holds more than tensors, numbers and text in plain "
            "containers (save the model's state dict alone)"
        )
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut off or damaged ({text})"
    return text.splitlines()[0].rstrip(".")
