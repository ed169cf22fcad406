"""COCO annotation files (detection: images, annotations, categories)."""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .images import find_size
from .records import Annotations, DataError, Record, beyond, clip_and_count, side
from .remarks import Oddity, Remarks


def load_coco(path: Path) -> dict:
    """Load a COCO file: a JSON object with at least the list `images`.

    Raises:
        DataError: not a COCO file.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows editors write a byte order mark
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 text file ({error})") from error
    except RecursionError as error:
        raise DataError(f"{path}: not a COCO annotation file: nested too deeply") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(
            f"{path}: not a COCO annotation file (an object with the list 'images'; a list of "
            "detections, for one, is a results file)"
        )
    if not isinstance(content.get("annotations"), (list, type(None))):
        raise DataError(f"{path}: 'annotations' must be a list")
    return content


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number (text and booleans are not)."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def find_fault(annotation: object) -> Oddity | None:
    """Why an annotation is used neither in training nor in testing; None for a usable one.

    A usable annotation has numbers as `image_id` and `category_id`, four finite numbers as `bbox`,
    and 0, 1, false, true or nothing as `iscrowd`.
    """
    if not isinstance(annotation, dict):
        return Oddity.MALFORMED
    if not (is_number(annotation.get("image_id")) and is_number(annotation.get("category_id"))):
        return Oddity.BAD_ID
    if annotation.get("iscrowd") not in (None, 0, 1):
        return Oddity.BAD_CROWD
    box = annotation.get("bbox")
    if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_number, box))):
        return Oddity.BAD_BBOX
    return None


def _whole(value: object) -> object:
    """Convert a float with an integer value to int: some tools export ids as 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _categories(content: dict, path: Path) -> dict[int, str]:
    """Category id -> name, sorted by id."""
    names: dict = {}
    try:
        for category in content.get("categories") or []:
            i, name = _whole(category["id"]), category["name"]
            if names.setdefault(i, name) != name:
                raise DataError(
                    f"{path}: the categories {names[i]!r} and {name!r} have the same id, {i!r}, "
                    "so their boxes cannot be told apart; give one of them another id"
                )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: every category needs an 'id' and a 'name'") from error
    if not all(isinstance(i, int) and isinstance(name, str) for i, name in names.items()):
        raise DataError(f"{path}: category ids must be integers and their names text")
    return dict(sorted(names.items()))


def _refuse_namesakes(names: dict[int, str], chosen: Iterable[str], path: Path) -> None:
    """Raise a `DataError` if a chosen class is the name of several categories."""
    counts = Counter(names.values())
    if twice := [name for name in dict.fromkeys(chosen) if counts[name] > 1]:
        raise DataError(
            f"{path}: several categories are called {', '.join(map(repr, twice))}; rename them, "
            "merge them into one, or list other names as CLASSES"
        )


def read_coco_classes(path: Path) -> tuple[str, ...]:
    """Class names of a COCO file, sorted by category id.

    Raises:
        DataError: not COCO JSON, no categories, or two categories of the same name.
    """
    names = _categories(load_coco(path), path)
    if not names:
        raise DataError(f"{path}: has no 'categories', so the classes must be given as CLASSES")
    _refuse_namesakes(names, names.values(), path)
    return tuple(names.values())


def _choose_categories(
    names: dict[int, str], classes: tuple[str, ...] | None, path: Path
) -> dict[int, int]:
    """Category id -> label in 1..N, sorted by label."""
    _refuse_namesakes(names, names.values() if classes is None else classes, path)
    if classes is None or tuple(names.values()) == classes:
        return {i: label for label, i in enumerate(names, 1)}
    ids = {name: i for i, name in names.items()}
    missing = [name for name in classes if name not in ids]
    if missing:
        raise DataError(
            f"{path}: has no category called {', '.join(map(repr, missing))} (it has "
            f"{', '.join(map(repr, ids))}); choose CLASSES from these, or add the category to the "
            "file"
        )
    return {ids[name]: label for label, name in enumerate(classes, 1)}


def _add_absent(
    names: dict[int, str], classes: tuple[str, ...], content: dict, remarks: Remarks
) -> dict[int, str]:
    """Add the `classes` without a category to `names` (by id), under ids that are not in use."""
    absent = [name for name in classes if name not in names.values()]
    if not absent or len(absent) == len(classes):  # all absent: these are other data
        return names
    taken = set(names)
    for annotation in content.get("annotations") or []:
        if not find_fault(annotation):
            taken.add(annotation["category_id"])
    unused = (i for i in itertools.count(1) if i not in taken)
    remarks.add(Oddity.MISSING_CATEGORY, len(absent), ", ".join(map(repr, absent)))
    return names | dict(zip(unused, absent, strict=False))


def _read_images(content: dict, path: Path, folder: Path, remarks: Remarks) -> dict[int, Record]:
    """Image id -> record without boxes."""
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    records = {}
    for image in content["images"]:
        try:
            image_id, file_name = _whole(image["id"]), image["file_name"]
            height, width = side(image.get("height")), side(image.get("width"))
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: image entry without 'id' or 'file_name': {image}") from error
        if not isinstance(image_id, int):
            raise DataError(f"{path}: the id of an image must be an integer, not {image_id!r}")
        if not isinstance(file_name, str):
            raise DataError(f"{path}: the file_name of image {image_id} is not text: {file_name!r}")
        if image_id in records:
            remarks.add(Oddity.REPEATED_IMAGE)
        if height == 0 or width == 0:
            height, width = find_size(folder / file_name, (0, 0))
        records[image_id] = Record(file_name, image_id, height, width, *empty)
    return records


def read_coco(
    path: Path, images: Path, classes: tuple[str, ...] | None = None, adopted: bool = False
) -> Annotations:
    """Read a COCO file.

    A box (x, y, w, h) becomes (x, y, x + w - 1, y + h - 1), clipped to the image. If a box extends
    beyond the annotated size of its image, the size is read from the image file. Boxes that are not
    finite, have no area, or belong to an unknown image or category are dropped and counted, as are
    annotations with a fault (`find_fault`). Records are sorted by image id.

    Args:
        path: annotation file; without `annotations` the set counts as not annotated.
        images: images folder, read only for images whose size is not annotated or doubtful.
        classes: names of the categories to use, by label. None: all, sorted by id.
        adopted: whether the classes come from other data. Then the file needs to have only one of
            them; the others get category ids that it does not use, and have no objects.

    Raises:
        DataError: not COCO JSON (names the line), a class that the file does not have, or one that
            is the name of two of its categories.
    """
    content = load_coco(path)
    remarks = Remarks()
    records = _read_images(content, path, images, remarks)
    names = _categories(content, path)
    has_annotations = content.get("annotations") is not None
    if not names and classes is not None and not has_annotations:
        names = dict(enumerate(classes, 1))
        remarks.add(Oddity.INVENTED_ID, len(names))
    if not names:
        raise DataError(f"{path}: has no 'categories'")
    if classes is not None and adopted:
        names = _add_absent(names, classes, content, remarks)
    labels = _choose_categories(names, classes, path)

    annotations = []
    for annotation in content.get("annotations") or []:
        if fault := find_fault(annotation):
            remarks.add(fault)
        elif annotation["image_id"] not in records:
            remarks.add(Oddity.UNLISTED_IMAGE)
        elif annotation["category_id"] not in names:
            remarks.add(Oddity.UNKNOWN_CATEGORY)
        elif annotation["category_id"] in labels:
            annotations.append(annotation)
    if annotations:
        _attach(annotations, records, labels, images, remarks)
    return Annotations(
        records=[records[i] for i in sorted(records)],
        classes=tuple(names[i] for i in labels),
        category_ids=tuple(labels),
        has_annotations=has_annotations,
        remarks=remarks,
    )


def _sizes(owners: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Heights [N] and widths [N] of N images."""
    return np.array([record.height for record in owners]), np.array([r.width for r in owners])


def _attach(
    annotations: list[dict],
    records: dict[int, Record],
    labels: dict[int, int],
    folder: Path,
    remarks: Remarks,
) -> None:
    """Convert all boxes at once and distribute them to the records."""
    owners = [records[annotation["image_id"]] for annotation in annotations]
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    with np.errstate(over="ignore"):  # boxes that are not finite are dropped below
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:] - 1, 0)
    doubtful = {owners[i].image_id for i in np.flatnonzero(beyond(boxes, *_sizes(owners)))}
    for record in map(records.get, doubtful):
        annotated = record.height, record.width
        record.height, record.width = find_size(folder / record.file_name, annotated)
        if (record.height, record.width) != annotated:
            remarks.add(Oddity.OTHER_SIZE)
    boxes, keep = clip_and_count(boxes, *_sizes(owners), remarks)
    kept = np.flatnonzero(keep)
    classes = np.array([labels[annotations[i]["category_id"]] for i in kept], dtype=np.int64)
    crowd = np.array([bool(annotations[i].get("iscrowd", 0)) for i in kept], dtype=bool)
    rows: dict[int, list[int]] = {}
    for row, i in enumerate(kept):
        rows.setdefault(owners[i].image_id, []).append(row)
    for image_id, chosen in rows.items():
        record = records[image_id]
        record.boxes = boxes[kept[chosen]]
        record.labels = classes[chosen]
        record.ignored = crowd[chosen]


def coco_content(records: Sequence[Record], classes: Sequence[str]) -> dict:
    """The content of a COCO file that `read_coco` reads back as these records.

    Boxes become (x0, y0, x1 - x0 + 1, y1 - y0 + 1), `area` is the area of the box, `category_id`
    the label, and `iscrowd` the `ignored` flag.
    """
    annotations = []
    for record in records:
        for (x0, y0, x1, y1), label, ignored in zip(
            record.boxes.tolist(), record.labels.tolist(), record.ignored.tolist(), strict=True
        ):
            width, height = x1 - x0 + 1, y1 - y0 + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": label,
                    "bbox": [x0, y0, width, height],
                    "area": width * height,
                    "iscrowd": int(ignored),
                }
            )
    return {
        "images": [
            {
                "id": record.image_id,
                "file_name": record.file_name,
                "height": record.height,
                "width": record.width,
            }
            for record in records
        ],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, 1)],
    }
