"""What the person who runs the benchmarks chose."""

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
        device: where tensors live.
        folder: for temporary files; the caller removes it.
        quick: small work and few repetitions.
        size: (height, width) of images in pixels instead of each benchmark's own.
        images: folder of pictures for data loading; None: they are made up.
        compile: also measure models that `torch.compile` made faster (starting takes minutes).
    """

    device: torch.device
    folder: Path
    quick: bool = False
    size: tuple[int, int] | None = None
    images: Path | None = None
    compile: bool = False

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def image_size(self, full: tuple[int, int] = (800, 1088)) -> tuple[int, int]:
        """(height, width) of the images to work on."""
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
    """As `add_arguments`' option says; ends with the parser's error where that is no number of
    threads."""
    if threads is None:
        return
    if threads < 1:
        parser.error("--threads must be positive")
    torch.set_num_threads(threads)


def require_writable(
    parser: argparse.ArgumentParser, option: str, path: str | None, is_folder: bool = False
) -> None:
    """End with the parser's error, before anything is measured, where the file that an `option`
    names, or files in that folder, could not be written afterwards. Missing folders are made."""
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
