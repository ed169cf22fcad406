"""Videos, frame by frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .data.records import UnreadableImage

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
# Frames per second that no camera exceeds and an MP4 file can still have.
MAX_RATE = 10_000


class VideoReader:
    """The frames of a video, RGB arrays [H, W, 3] of uint8: at least one.

    To be used in a ``with`` statement.

    Attributes:
        rate: frames a second; 25 where the file tells nonsense.
        count: how many it announces; 0: it does not say.

    Raises:
        UnreadableImage: OpenCV does not take the file's name; or, once the first frame is asked
            for, the file cannot be read as a video.
    """

    def __init__(self, file: Path) -> None:
        import cv2

        _check_name(file, "rename the video")
        self._file = file
        self._capture = cv2.VideoCapture(str(file))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= MAX_RATE else 25.0
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        good, frame = self._capture.read()
        if not good:
            raise UnreadableImage(f"{self._file} cannot be read as a video")
        while good:
            yield np.ascontiguousarray(frame[..., ::-1])
            good, frame = self._capture.read()


class VideoWriter:
    """Writes an MP4 file of frames of one size.

    To be used in a ``with`` statement, at whose end the file is complete.

    Args:
        file: to write to.
        rate: frames a second.
        name: the video's in messages, where `file` is a temporary one.

    Raises:
        UnreadableImage: OpenCV does not take the file's name.
        OSError: the video cannot be written.
    """

    def __init__(self, file: Path, rate: float, name: Path) -> None:
        _check_name(name, "rename the video or choose another output folder")
        self._file, self._rate, self._name = file, rate, name
        self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: np.ndarray) -> None:
        """Add an RGB array [H, W, 3] of uint8."""
        import cv2

        if self._writer is None:
            codec, size = cv2.VideoWriter_fourcc(*"mp4v"), frame.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self._file), codec, self._rate, size)
            if not self._writer.isOpened():
                raise OSError(f"this OpenCV cannot write the video {self._name}")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def __exit__(self, kind: object, *exception: object) -> None:
        import cv2

        if self._writer is not None:
            self._writer.release()
        if kind is not None:
            return
        # OpenCV does not say that it could not write: the index at a video's end is missing then.
        written = cv2.VideoCapture(str(self._file))
        try:
            if not written.isOpened():
                raise OSError(f"the video {self._name} could not be written; is the disk full?")
        finally:
            written.release()


def _check_name(file: Path, remedy: str) -> None:
    """OpenCV would end the process over a name in another encoding than UTF-8."""
    try:
        os.fsencode(file.resolve()).decode("utf-8")
    except UnicodeDecodeError:
        text = os.fsencode(file).decode("utf-8", "backslashreplace")
        raise UnreadableImage(f"{text}: OpenCV takes only names in UTF-8; {remedy}") from None
