"""Reading and writing videos frame by frame."""

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
    """Iterates over the frames of a video, RGB arrays [H, W, 3] of uint8; there is at least one.

    Use it in a ``with`` statement.

    Args:
        file: path of the video.

    Attributes:
        rate: frames per second; 25 if the file states no plausible rate.
        count: number of frames that the file announces; 0 if it does not.

    Raises:
        UnreadableImage: OpenCV does not accept the file's name; or, when the first frame is read,
            the file is not a readable video.
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

    Use it in a ``with`` statement; the file is complete at its end.

    Args:
        file: path to write to.
        rate: frames per second.
        name: path of the video in messages, as `file` may be temporary.

    Raises:
        UnreadableImage: OpenCV does not accept the file's name.
        OSError: the video cannot be written.
    """

    def __init__(self, file: Path, rate: float, name: Path) -> None:
        _check_name(name, "rename the video or choose another output folder")
        self._file, self._rate, self._name = file, rate, name
        self._writer = None

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, an RGB array [H, W, 3] of uint8."""
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
        # OpenCV does not report a failed write, but the index at the file's end is missing then.
        written = cv2.VideoCapture(str(self._file))
        try:
            if not written.isOpened():
                raise OSError(f"the video {self._name} could not be written; is the disk full?")
        finally:
            written.release()


def _check_name(file: Path, remedy: str) -> None:
    """Refuse names that are not UTF-8, on which OpenCV would end the process."""
    try:
        os.fsencode(file.resolve()).decode("utf-8")
    except UnicodeDecodeError:
        text = os.fsencode(file).decode("utf-8", "backslashreplace")
        raise UnreadableImage(f"{text}: OpenCV takes only names in UTF-8; {remedy}") from None
