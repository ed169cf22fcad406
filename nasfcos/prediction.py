"""Detection in files: writes pictures and videos with boxes, and JSON."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import video
from .data import DataError
from .data.images import find_size, image_suffixes
from .data.records import UnreadableImage
from .engine.logging import on_terminal
from .files import replacing
from .models.heads.post_process import Detections
from .predictor import Predictor, open_picture
from .signals import signals_deferred
from .visualize import image_grid

logger = logging.getLogger(__name__)

# Pictures with these suffixes keep their format; all others are written as JPEG.
OUTPUT_SUFFIXES = {".jpg", ".jpeg", ".png"}
# The longest side of a JPEG file, in pixels; larger pictures are written as PNG.
JPEG_LIMIT = 65500
JPEG_QUALITY = 92
# Number of pictures, the first ones of a run, on its sheet.
SHEET_PICTURES = 12


@dataclass
class Summary:
    """Numbers of inputs that `predict_files` processed and skipped."""

    images: int = 0
    videos: int = 0
    skipped: int = 0


def find_inputs(pattern: str) -> tuple[Path, list[Path]]:
    """The images and videos that a path names.

    Args:
        pattern: a file, a folder (the images and videos directly inside it), or a glob pattern
            (``**`` for any depth).

    Returns:
        The folder that contains all files, and the sorted files.

    Raises:
        DataError: there are none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        suffixes = video.SUFFIXES | image_suffixes()
        files = [
            file
            for file in path.iterdir()
            # macOS leaves ._street.jpg beside street.jpg on foreign file systems.
            if file.suffix.lower() in suffixes and not file.name.startswith(".")
        ]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
    # Broken links are kept: opening them is reported as an error.
    files = sorted(file for file in files if file.is_file() or not file.exists())
    if not files:
        reason = "holds no images or videos" if path.is_dir() else "does not exist"
        raise DataError(f"{pattern} {reason}: name an image, a folder, a glob pattern or a video")
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    return root, files


def predict_files(
    predictor: Predictor, pattern: str, output_dir: str | Path, score_threshold: float = 0.3
) -> Summary:
    """Detect objects in files and write the results to a folder:

    - for each image a picture with its boxes;
    - for all images `detections.json`, a list with the `file` (relative to the common folder),
      `width`, `height` and `detections` of each image. A detection has a `box` (legacy xyxy in
      pixels), `score`, `label` and `class`;
    - for several images `sheet.jpg`, the first of them on one page;
    - for each video an MP4 file with boxes, and a JSON-lines file with an entry per frame, which
      has `frame` and `time` (seconds) in place of `file`.

    Every file is written completely or not at all. Unreadable images and videos are logged and
    skipped. If the run ends early, what was found in images until then is still written.

    Args:
        predictor: the detector.
        pattern: see `find_inputs`.
        output_dir: folder to write to; created if it does not exist.
        score_threshold: detections with lower scores are neither drawn nor written.

    Raises:
        DataError: there is no input, an output would replace an input or another output, or
            `output_dir` is a file or cannot be created.
    """
    root, files = find_inputs(pattern)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"the output folder {output_dir} is a file; name a folder")
    outputs = [
        [
            output_dir / name
            for name in _output_names(file.relative_to(root), max(find_size(file, (0, 0))))
        ]
        for file in files
    ]
    sheet_file, json_file = output_dir / "sheet.jpg", output_dir / "detections.json"
    count = sum(not _is_video(file) for file in files)
    _check_outputs(files, [*itertools.chain(*outputs), json_file, *[sheet_file] * (count > 1)])
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the output folder {output_dir} cannot be made ({error}); name another one"
        ) from error

    summary = Summary()
    pictures = _Pictures(predictor, root, score_threshold)
    progress = tqdm(files, unit="file", disable=len(files) == 1 or not on_terminal())
    try:
        for file, names in zip(progress, outputs, strict=True):
            with _skipping(file, summary):
                if _is_video(file):
                    _predict_video(predictor, file, *names, score_threshold)
                    summary.videos += 1
                else:
                    pictures.predict(file, *names)
                    summary.images += 1
    finally:
        pictures.write_list(json_file)
    pictures.write_sheet(sheet_file)
    return summary


class _Pictures:
    """The pictures of a run and the detections in them."""

    def __init__(self, predictor: Predictor, root: Path, score_threshold: float) -> None:
        self._predictor = predictor
        self._root = root
        self._threshold = score_threshold
        self._entries: list[dict[str, Any]] = []
        self._first: list[tuple[Image.Image, Detections]] = []

    def predict(self, file: Path, output: Path) -> None:
        """Write a file's picture with boxes, and record the detections."""
        picture = open_picture(file)
        found = self._predictor(picture)
        entry = {
            "file": _printable(file.relative_to(self._root).as_posix()),
            "width": picture.width,
            "height": picture.height,
            "detections": _describe(found, self._predictor.class_names, self._threshold),
        }
        drawn = self._predictor.draw(picture, found, self._threshold)
        with signals_deferred():  # so that every picture has its entry
            with replacing(output) as temporary:
                drawn.save(temporary, quality=JPEG_QUALITY)
            self._entries.append(entry)
        if len(self._first) < SHEET_PICTURES:
            self._first.append((picture, found))

    def write_list(self, file: Path) -> None:
        """Write the recorded detections, if there were pictures."""
        if not self._entries:
            return
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in self._entries)
        with replacing(file) as temporary:
            temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")

    def write_sheet(self, file: Path) -> None:
        """Write the first pictures on one page, if there were several."""
        if len(self._first) < 2:
            return
        pictures, found = zip(*self._first, strict=True)
        sheet = image_grid(pictures, found, self._predictor.class_names, self._threshold)
        with replacing(file) as temporary:
            Image.fromarray(sheet).save(temporary, quality=JPEG_QUALITY)


def _predict_video(
    predictor: Predictor, file: Path, output: Path, lines_file: Path, score_threshold: float
) -> None:
    with (
        video.VideoReader(file) as reader,
        replacing(output) as temporary,
        replacing(lines_file) as temporary_lines,
        open(temporary_lines, "w", encoding="utf-8") as lines,
        video.VideoWriter(temporary, reader.rate, output) as writer,
    ):
        frames = tqdm(
            reader, total=reader.count or None, desc=file.name, unit="frame", leave=False,
            disable=not on_terminal(),
        )  # fmt: skip
        for index, frame in enumerate(frames):
            found = predictor(frame)
            writer.write(np.asarray(predictor.draw(frame, found, score_threshold)))
            entry = {
                "frame": index,
                "time": round(index / reader.rate, 4),
                "width": frame.shape[1],
                "height": frame.shape[0],
                "detections": _describe(found, predictor.class_names, score_threshold),
            }
            lines.write(json.dumps(entry) + "\n")
    if index + 1 < reader.count:
        logger.warning(
            "%s: only %d of about %d frames that it announces could be read",
            file, index + 1, reader.count,
        )  # fmt: skip


@contextmanager
def _skipping(file: Path, summary: Summary) -> Iterator[None]:
    """Log and count an input that cannot be read, or whose output has too long a name."""
    try:
        yield
        return
    except UnreadableImage as error:
        reason = str(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        reason = f"{file}: what is written for it has too long a name"
    summary.skipped += 1
    logger.warning("skipped: %s", _printable(reason))


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in video.SUFFIXES


def _output_names(name: Path, longest: int) -> list[Path]:
    """The output names of an input: the video and its JSON lines, or the picture.

    Args:
        name: the input's path relative to the common folder.
        longest: longest side of a picture in pixels; unused for videos.
    """

    def added(suffix: str) -> Path:
        return name.with_name(name.name + suffix)

    suffix = name.suffix.lower()
    if suffix in video.SUFFIXES:
        output = name if suffix == ".mp4" else added(".mp4")
        return [output, output.with_suffix(".jsonl")]
    output = name if suffix in OUTPUT_SUFFIXES else added(".jpg")
    if longest > JPEG_LIMIT and output.suffix.lower() != ".png":
        output = output.with_name(output.name + ".png")
    return [output]


def _check_outputs(inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse outputs that would replace an input or each other."""
    taken = {file.resolve() for file in inputs}
    written: set[Path] = set()
    for output in outputs:
        path = output.resolve()
        if path in taken:
            raise DataError(f"{output} would replace an input: choose another output folder")
        if path in written:
            raise DataError(
                f"{output} would be written twice, for two of the inputs or for an input and the "
                "summary of all: rename one of the inputs"
            )
        written.add(path)


def _describe(
    found: Detections, names: Sequence[str], score_threshold: float
) -> list[dict[str, Any]]:
    return [
        {
            "box": [round(side, 2) for side in box],
            "score": round(score, 5),
            "label": label,
            "class": names[label - 1],
        }
        for box, score, label in zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        )
        if score >= score_threshold
    ]


def _printable(text: str) -> str:
    """Text in which bytes of file names that are not UTF-8 are escaped (``\\xe9``): logs and JSON
    cannot hold them otherwise."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
