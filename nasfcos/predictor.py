"""Detection on any image: a file, a picture in memory, a folder of them, a video."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from .config import ConfigError
from .data import DataError, class_names, num_classes, resized_shape
from .data.images import find_size, image_suffixes, load_image
from .data.records import UnreadableImage
from .data.transforms import resize, to_uint8_tensor
from .engine.checkpoint import NEEDS_DETECTOR, find_weights
from .engine.distributed import resolve_device
from .engine.logging import on_terminal
from .engine.test import inference_form, to_original_size
from .files import replacing
from .models.build import build_detector
from .models.weights import Weights, WeightsError, load_weights, read_weights
from .signals import signals_deferred
from .transfer import to_cpu
from .visualize import AnyImage, draw_detections, image_grid, to_picture

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
# Pictures of these are written in their own format, all others as JPEG.
OUTPUT_SUFFIXES = {".jpg", ".jpeg", ".png"}

# Pictures on the sheet of a prediction run: its first ones.
SHEET_PICTURES = 12
# Frames a second that no camera is above and an MP4 file can have.
FASTEST_VIDEO = 10_000
# The longest side that a JPEG file can have; longer pictures become PNG files.
JPEG_LIMIT = 65500

Detections = dict[str, Tensor]


class Predictor:
    """A trained detector that takes images as they are.

    Example:
        >>> predictor = Predictor(load_config("configs/search/R_50_NAS_head.yaml"), "model.pth")
        >>> found = predictor("street.jpg")
        >>> [predictor.class_names[label - 1] for label in found["labels"]]
        >>> predictor.draw("street.jpg", found).save("found.jpg")

    Attributes:
        model: the detector, in its form for inference in TEST.DTYPE.
        class_names: the name of label n at n - 1: as the weights record them, else those of the
            training data of the config, else "1", "2", ...
    """

    def __init__(
        self,
        cfg: CfgNode,
        weights: str | os.PathLike[str] | Mapping[str, Any] | Weights | None = None,
    ):
        """
        Args:
            cfg: the config tree. It need not find its data: where MODEL.NUM_CLASSES is 0, the
                weights may say how many classes there are.
            weights: what `load_weights` takes. None, as in the tools: MODEL.WEIGHT where the
                overrides of `load_config` (or the caller) set it, else the newest checkpoint in
                OUTPUT_DIR, else MODEL.WEIGHT of the config file.

        Raises:
            ConfigError: there are no weights of a detector, or TEST.DTYPE is not for the device.
            WeightsError: the weights cannot be read or are those of another model.
        """
        recorded = find_weights(cfg) if weights is None else weights
        if not isinstance(recorded, Weights):
            recorded = read_weights(recorded)
        if recorded.kind != "detector":
            raise WeightsError(f"{recorded.name} is a {recorded.description}: {NEEDS_DETECTOR}")
        classes = cfg.MODEL.NUM_CLASSES or len(recorded.classes or ()) or num_classes(cfg)
        self.class_names = _choose_names(cfg, recorded.classes, classes)
        self.device = resolve_device(cfg.MODEL.DEVICE)
        model = build_detector(cfg, classes)
        load_weights(model, recorded)
        self.model = inference_form(cfg, model.to(self.device))
        self.min_size = cfg.INPUT.MIN_SIZE_TEST
        self.max_size = cfg.INPUT.MAX_SIZE_TEST

    def __call__(
        self, image: str | os.PathLike[str] | AnyImage | Sequence[str | os.PathLike[str] | AnyImage]
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            image: a file's path, a PIL image, an RGB array [H, W, 3] of uint8, an RGB tensor
                [3, H, W] of uint8 or of floats in 0..1; or a list of those, taken one after the
                other. A file is turned upright as its EXIF orientation says.

        Returns:
            `boxes` [N, 4] (xyxy in the image's own pixels, both corners inside, within
            [0, w - 1] x [0, h - 1]), `scores` [N], falling, and `labels` [N] from 1, on the CPU.
            For a list, a list of those.

        Raises:
            UnreadableImage: a file that is missing or does not decode.
            ValueError: an array or tensor that is no image.
        """
        if isinstance(image, (list, tuple)):
            return [self(one) for one in image]
        return self._detect(_to_picture(image))

    def draw(
        self,
        image: str | os.PathLike[str] | AnyImage,
        found: Detections,
        score_threshold: float = 0.3,
    ) -> Image.Image:
        """A copy of an image with what was found in it: boxes, names of classes, scores.

        Args:
            image: as for detection.
            found: its detections.
            score_threshold: those below it are not drawn.

        Raises:
            UnreadableImage, ValueError: as for detection.
        """
        drawn = draw_detections(_to_picture(image), found, self.class_names, score_threshold)
        return Image.fromarray(drawn)

    @torch.no_grad()
    def _detect(self, picture: Image.Image) -> Detections:
        original = (picture.height, picture.width)
        size = resized_shape(*original, self.min_size, self.max_size)
        pixels = to_uint8_tensor(resize(picture, size))
        (found,) = to_cpu(self.model([pixels]))
        return found | {"boxes": to_original_size(found["boxes"], size, original)}


def _choose_names(cfg: CfgNode, recorded: list[str] | None, count: int) -> list[str]:
    if recorded and len(recorded) == count:
        return recorded
    try:
        names = class_names(cfg)
    except (ConfigError, DataError) as error:
        logger.warning("the names of the classes are not known, numbers stand for them: %s", error)
    else:
        if len(names) == count:
            return names
    return [str(label) for label in range(1, count + 1)]


def _to_picture(image: str | os.PathLike[str] | AnyImage) -> Image.Image:
    return _open(image) if isinstance(image, (str, os.PathLike)) else to_picture(image)


def _open(path: str | os.PathLike[str]) -> Image.Image:
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UnreadableImage(f"the image {os.fspath(path)} {state}")
    try:
        return load_image(path)
    except Exception as error:
        raise UnreadableImage(f"{os.fspath(path)} cannot be read as an image: {error}") from error


# ----------------------------------------------------------------------------- files to files


@dataclass
class Summary:
    """What `predict_files` did."""

    images: int = 0
    videos: int = 0
    skipped: int = 0


def find_inputs(pattern: str) -> tuple[Path, list[Path]]:
    """The images and videos that a path names.

    Args:
        pattern: a file, a folder (the images and videos right inside it), or a glob pattern
            (`**` for any depth).

    Returns:
        The folder that all of them lie under, and the files in order.

    Raises:
        DataError: there are none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        suffixes = VIDEO_SUFFIXES | image_suffixes()
        files = [
            file
            for file in path.iterdir()
            # A Mac leaves ._street.jpg beside street.jpg on disks of other systems.
            if file.suffix.lower() in suffixes and not file.name.startswith(".")
        ]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
    # A link to nothing is told of when it is opened.
    files = sorted(file for file in files if file.is_file() or not file.exists())
    if not files:
        reason = "holds no images or videos" if path.is_dir() else "does not exist"
        raise DataError(f"{pattern} {reason}: name an image, a folder, a glob pattern or a video")
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    return root, files


def predict_files(
    predictor: Predictor, pattern: str, output_dir: str | Path, score_threshold: float = 0.3
) -> Summary:
    """Detect in files and write what is found.

    For each image a picture with its boxes, and one `detections.json`: a list with, per image,
    `file` (below the common folder), `width`, `height` and `detections`, each with `box` (xyxy in
    pixels, both corners inside), `score`, `label` and `class`; for several images also `sheet.jpg`,
    the first of them on one page. For each video an MP4 with boxes,
    and JSON lines of the same kind, one per frame, with `frame` and `time` in seconds. Every file
    appears whole or not at all. Images and videos that cannot be read are logged and skipped.

    However it ends, what was found in the images until then is written.

    Args:
        predictor: the detector.
        pattern: see `find_inputs`.
        output_dir: folder to write to; made if it is not there.
        score_threshold: detections below it are neither drawn nor written.

    Raises:
        DataError: there is no input, an output would replace an input or another output, or
            `output_dir` is a file or cannot be made.
    """
    root, files = find_inputs(pattern)
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise DataError(f"the output folder {output_dir} is a file; name a folder")
    outputs = [
        [
            Path(output_dir) / name
            for name in _output_names(file.relative_to(root), max(find_size(file, (0, 0))))
        ]
        for file in files
    ]
    sheet_file, json_file = (Path(output_dir) / name for name in ("sheet.jpg", "detections.json"))
    pictures = [file for file in files if file.suffix.lower() not in VIDEO_SUFFIXES]
    summaries = [json_file] + [sheet_file] * (len(pictures) > 1)
    _check_outputs(files, [*itertools.chain(*outputs), *summaries])
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the output folder {output_dir} cannot be made ({error}); name another one"
        ) from error

    summary = Summary()
    entries = []
    sheet: list[tuple[Image.Image, Detections]] = []
    progress = tqdm(files, unit="file", disable=len(files) == 1 or not on_terminal())
    try:
        for file, names in zip(progress, outputs, strict=True):
            try:
                if file.suffix.lower() in VIDEO_SUFFIXES:
                    _predict_video(predictor, file, *names, score_threshold)
                    summary.videos += 1
                else:
                    picture = _open(file)
                    found = predictor(picture)
                    name = _spelt(file.relative_to(root).as_posix())
                    with signals_deferred():  # so that no picture is without its entry
                        entry = _write_picture(predictor, picture, found, *names, score_threshold)
                        entries.append({"file": name, **entry})
                    if len(sheet) < SHEET_PICTURES:
                        sheet.append((picture, found))
                    summary.images += 1
            except UnreadableImage as error:
                summary.skipped += 1
                logger.warning("skipped: %s", _spelt(str(error)))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                summary.skipped += 1
                logger.warning(
                    "skipped: %s: what is written for it has too long a name", _spelt(str(file))
                )
    finally:
        if entries:
            with replacing(json_file) as temporary:
                lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
                temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if len(sheet) > 1:
        images, detections = zip(*sheet, strict=True)
        drawn = image_grid(images, detections, predictor.class_names, score_threshold)
        with replacing(sheet_file) as temporary:
            Image.fromarray(drawn).save(temporary, quality=92)
    return summary


def _spelt(text: str) -> str:
    """Of file names in another encoding than UTF-8, the bytes that are none are spelt (``\\xe9``):
    neither logs nor JSON take them otherwise."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _check_outputs(inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse outputs that would take the place of an input or of each other."""
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


def _output_names(name: Path, longest: int) -> list[Path]:
    """What is written for an input: of a video the video and its lines, of a picture (whose longest
    side is given) one file."""

    def added(suffix: str) -> Path:
        return name.with_name(name.name + suffix)

    suffix = name.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        video = name if suffix == ".mp4" else added(".mp4")
        return [video, video.with_suffix(".jsonl")]
    output = name if suffix in OUTPUT_SUFFIXES else added(".jpg")
    if longest > JPEG_LIMIT and output.suffix.lower() != ".png":
        output = output.with_name(output.name + ".png")
    return [output]


def _write_picture(
    predictor: Predictor,
    picture: Image.Image,
    found: Detections,
    output: Path,
    score_threshold: float,
) -> dict[str, Any]:
    """Write the picture with its boxes; gives the image's entry of detections.json."""
    with replacing(output) as temporary:
        predictor.draw(picture, found, score_threshold).save(temporary, quality=92)
    return {
        "width": picture.width,
        "height": picture.height,
        "detections": _describe(found, predictor.class_names, score_threshold),
    }


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


def _predict_video(
    predictor: Predictor, file: Path, output: Path, lines_file: Path, score_threshold: float
) -> None:
    import cv2

    if any(_lacks_utf8(path) for path in (file, output)):  # OpenCV would end the process
        raise UnreadableImage(f"{file}: OpenCV takes only names in UTF-8; rename the video")
    capture = cv2.VideoCapture(str(file))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate <= FASTEST_VIDEO else 25.0  # what files say may be nonsense
        count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        frames = tqdm(
            _frames(capture, file), total=count or None, desc=file.name, unit="frame", leave=False,
            disable=not on_terminal(),
        )  # fmt: skip
        with (
            replacing(output) as temporary,
            replacing(lines_file) as temporary_lines,
            open(temporary_lines, "w", encoding="utf-8") as lines,
        ):
            writer = None
            try:
                for index, frame in enumerate(frames):
                    height, width = frame.shape[:2]
                    if writer is None:
                        codec = cv2.VideoWriter_fourcc(*"mp4v")
                        writer = cv2.VideoWriter(str(temporary), codec, rate, (width, height))
                        if not writer.isOpened():
                            raise OSError(f"this OpenCV cannot write the video {output}")
                    found = predictor(frame)
                    drawn = predictor.draw(frame, found, score_threshold)
                    writer.write(np.ascontiguousarray(np.asarray(drawn)[..., ::-1]))
                    entry = {
                        "frame": index,
                        "time": round(index / rate, 4),
                        "width": width,
                        "height": height,
                        "detections": _describe(found, predictor.class_names, score_threshold),
                    }
                    lines.write(json.dumps(entry) + "\n")
            finally:
                if writer is not None:
                    writer.release()
            _check_video(temporary, output)
            if index + 1 < count:
                logger.warning(
                    "%s: only %d of about %d frames that it announces could be read",
                    file, index + 1, count,
                )  # fmt: skip
    finally:
        capture.release()


def _check_video(file: Path, output: Path) -> None:
    """OpenCV does not say that it could not write: the index at a video's end is missing then."""
    import cv2

    written = cv2.VideoCapture(str(file))
    try:
        if not written.isOpened():
            raise OSError(f"the video {output} could not be written; is the disk full?")
    finally:
        written.release()


def _lacks_utf8(path: Path) -> bool:
    text = str(path.resolve())
    return _spelt(text) != text


def _frames(capture, file: Path) -> Iterator[np.ndarray]:
    """RGB arrays [H, W, 3]; at least one."""
    good, frame = capture.read()
    if not good:
        raise UnreadableImage(f"{file} cannot be read as a video")
    while good:
        yield np.ascontiguousarray(frame[..., ::-1])
        good, frame = capture.read()
