"""Settings and command-line options of the benchmarks."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import FULL, QUICK, Effort


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        device: device of the tensors.
        folder: folder for temporary files; the caller removes it.
        quick: whether to do small work and few repetitions.
        size: (height, width) of images in pixels; None: each benchmark's own.
        images: folder of pictures for data loading; None: synthetic ones.
        compile: also measure models compiled by `torch.compile` (takes minutes to start).
    """

    device: torch.device
    folder: Path
    quick: bool = False
    size: tuple[int, int] | None = None
    images: Path | None = None
    compile: bool = False

    @property
    def effort(self) -> Effort:
        """How much time to spend on a case."""
        return QUICK if self.quick else FULL

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def image_size(self, full: tuple[int, int] = (800, 1088)) -> tuple[int, int]:
        """(height, width) of the images in pixels; `full` applies without `size` and `quick`."""
        return self.size or ((128, 160) if self.quick else full)


def add_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """Add the options that all measuring tools share; `quick` is the help of --quick."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", metavar="FILE", help="write all measurements to this file")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )


def set_threads(parser: argparse.ArgumentParser, threads: int | None) -> None:
    """Apply the --threads option; exit with the parser's error unless it is positive."""
    if threads is None:
        return
    if threads < 1:
        parser.error("--threads must be positive")
    torch.set_num_threads(threads)


def require_writable(
    parser: argparse.ArgumentParser, option: str, path: str | None, is_folder: bool = False
) -> None:
    """Exit with the parser's error if the file (or files in the folder) cannot be written.

    To be called before anything is measured. Missing folders are created.
    """
    if not path:
        return
    if not is_folder and Path(path).is_dir():
        parser.error(f"{option}: {path} is a folder")
    folder = Path(path) if is_folder else Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"{option}: nothing can be written in {folder}: {error.strerror}")
