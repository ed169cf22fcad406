"""Reading files of `torch.save` without executing anything in them."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# First bytes of a zip archive, the format of torch since version 1.6.
ZIP_START = b"PK\x03\x04"


class TorchFileError(ValueError):
    """A file is damaged, or holds more than tensors and plain containers; the message names it."""


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read a file of `torch.save` onto the CPU.

    torch does not verify the checksums of zip archives, so this is done here. The file is still
    read from the disk only once, because torch then finds it in the system's cache.

    Raises:
        TorchFileError: the file is damaged, or was not written by `torch.save`.
        OSError: the file could not be read, which says nothing about its content.
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
        # In a damaged file zipfile may seek to before the start (EINVAL), and its decompressors
        # raise an OSError without a number.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = str(path)
            raise
        raise TorchFileError(f"{path} cannot be read as weights: {reason(error)}") from error
    raise TorchFileError(
        f"{path} is damaged: wrong checksum of {damaged} (or it has none, being saved under "
        "torch.serialization.set_crc32_options(False): save it without that)"
    )


def read_saved(path: Path) -> dict:
    """Read a dict saved by torch.

    Returns:
        The dict; empty if the file is missing or, with a warning, damaged.

    Raises:
        OSError: the file could not be read.
    """
    if not path.exists():
        return {}
    try:
        return dict(read_torch_file(path))
    except (TypeError, ValueError) as error:
        logger.warning("%s is damaged: %s", path, error)
        return {}


def reason(error: Exception) -> str:
    """The message of an error of reading a file, in one line that helps the owner of the file."""
    text = str(error) or type(error).__name__
    if "weights_only" in text:  # torch's message advises to execute the file's code
        return (
            "torch.save did not write it, or it holds more than tensors, numbers and text in plain "
            "containers (save the model's state dict alone)"
        )
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut off or damaged ({text})"
    return text.splitlines()[0].rstrip(".")
