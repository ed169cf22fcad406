"""PASCAL VOC annotations: an XML file per image, and a text file that lists the split."""

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ..config.errors import nearest
from .images import find_size, image_suffixes
from .records import Annotations, DataError, Record, beyond, clip_and_count, side
from .remarks import Oddity, Remarks

# The second column of the split lists of one class: absent, difficult or present.
_PRESENCE = re.compile(r"\s+(-1|0|1)$")
# Values of <difficult>: VOC writes 1, some tools write words.
_YES = ("1", "true", "yes")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _parse(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, column = error.position
        raise DataError(f"{path}, line {line}, column {column}: not valid XML ({error})") from error
    except (LookupError, ValueError) as error:  # the encoding that the file declares
        raise DataError(f"{path}: cannot be decoded ({error}); save it as UTF-8") from error
    for element in root.iter():  # strip namespaces: "{namespace}name"
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != "annotation":
        raise DataError(
            f"{path}: not a VOC annotation: its root element is <{root.tag}>, not <annotation>"
        )
    return root


def voc_names(annotations: Path, split: Path | None) -> list[str]:
    """Image names (without suffix) of a split, in order.

    Args:
        annotations: folder of XML files.
        split: text file with a name per line; None: all XML files, sorted, except the ._name.xml
            files that macOS leaves on foreign disks.

    Raises:
        DataError: the split is not UTF-8 or lists no image.
    """
    if split is None:
        paths = annotations.glob("*.xml")
        names = sorted(path.stem for path in paths if not path.name.startswith("."))
    else:
        try:
            lines = split.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{split}: not a UTF-8 text file ({error})") from error
        names = [_name(line.strip(), annotations) for line in lines if line.strip()]
        names = list(dict.fromkeys(names))
    if not names:
        raise DataError(f"{split or annotations}: lists no image")
    return names


def _name(line: str, annotations: Path) -> str:
    """The image name in a line; names may contain spaces, and even end like a second column."""
    name = _PRESENCE.sub("", line)
    return line if name != line and (annotations / f"{line}.xml").exists() else name


def _image_files(folder: Path) -> dict[str, list[str]]:
    """The image files in a folder by name without suffix; other files are left out."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in image_suffixes() and path.is_file():
            files.setdefault(path.stem, []).append(path.name)
    return files


def _choose_file(
    name: str, files: list[str], annotated: str, images: Path, remarks: Remarks
) -> str:
    """The file of an image.

    Args:
        name: name of the image, without suffix.
        files: image files with this name.
        annotated: file name in the annotation, or "".
        images: images folder.
        remarks: where an ambiguous choice is noted.

    Returns:
        The annotated file if it is among `files`, or else the first of them. Without `files`, the
        annotated file if it exists, or else the missing `name`.jpg.
    """
    if not files:
        return annotated if annotated and (images / annotated).is_file() else f"{name}.jpg"
    if len(files) > 1:
        if annotated in files:
            return annotated
        remarks.add(Oddity.SEVERAL_FILES)
    return files[0]


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def read_voc_classes(annotations: Path, split: Path | None) -> tuple[str, ...]:
    """Sorted names of the classes that occur in a split.

    Raises:
        DataError: an XML file is malformed, all are missing, or there is no object in any.
    """
    found = set()
    paths = [annotations / f"{name}.xml" for name in voc_names(annotations, split)]
    present = [path for path in paths if path.exists()]
    if not present:
        raise DataError(
            f"{split or annotations}: none of the listed images has an annotation file "
            f"(for example {paths[0]}): a split lists names without folder and suffix"
        )
    for path in present:
        found.update(_text(item, "name") for item in _parse(path).iterfind("object"))
    found.discard("")
    if not found:
        raise DataError(
            f"{split or annotations}: no object in any of the XML files, so the classes must be "
            "given as CLASSES"
        )
    return tuple(sorted(found))


def read_voc(
    annotations: Path,
    images: Path,
    split: Path | None,
    classes: tuple[str, ...],
    has_annotations: bool = True,
    max_missing: int = 0,
) -> Annotations:
    """Read a split of a VOC data set.

    VOC counts pixels from 1, both corners inclusive: 1 is subtracted from each coordinate, then
    boxes are clipped to the image. If a box extends beyond the annotated size, the size is read
    from the image file. Difficult objects are kept and flagged as `ignored`. The image id is the
    position in the split, counted from 1.

    Args:
        annotations: folder of XML files, named like the images.
        images: images folder; it may hold other files too, such as the annotations.
        split: text file with an image name per line; None: all XML files, sorted.
        classes: class names by label; objects of other classes are dropped and counted.
        has_annotations: False if there are no XML files (a test split).
        max_missing: number of images that may lack an XML file (they are left out); it is always an
            error if all do.

    Raises:
        DataError: a malformed XML file (names the line), or too many missing ones.
    """
    labels = {name: label for label, name in enumerate(classes, 1)}
    files = _image_files(images)
    remarks, others = Remarks(), Counter()
    records, missing = [], []
    for image_id, name in enumerate(voc_names(annotations, split), 1):
        path = annotations / f"{name}.xml"
        if has_annotations and not path.exists():
            missing.append(path)
            continue
        root = _parse(path) if has_annotations else ElementTree.Element("annotation")
        file_name = _choose_file(
            name, files.get(name, []), _text(root, "filename"), images, remarks
        )
        content = _read_content(root, images / file_name, labels, others, remarks)
        records.append(Record(file_name, image_id, *content))
    if others:
        _note_other_classes(others, classes, records, remarks)
    if missing:
        shown = ", ".join(str(path) for path in missing[:5])
        if len(missing) > max_missing or not records:
            raise DataError(
                f"{split or annotations}: {len(missing)} of the {len(missing) + len(records)} "
                f"listed images have no annotation file ({shown}"
                f"{', ...' if len(missing) > 5 else ''}); up to DATASETS.MAX_BAD_IMAGES = "
                f"{max_missing} would be left out, but not all"
            )
        remarks.add(Oddity.MISSING_FILE, len(missing), shown)
    return Annotations(
        records=records,
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
        has_annotations=has_annotations,
        remarks=remarks,
    )


def _read_content(
    root: ElementTree.Element,
    image: Path,
    labels: dict[str, int],
    others: Counter[str],
    remarks: Remarks,
) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """The fields of a `Record` from `height` on, of one XML file and the image it describes."""
    height, width = side(_text(root, "size/height")), side(_text(root, "size/width"))
    if height == 0 or width == 0:
        height, width = find_size(image, (0, 0))
    boxes, found, ignored = _read_objects(root, labels, others)
    if beyond(boxes, height, width).any():
        annotated = height, width
        height, width = find_size(image, annotated)
        if (height, width) != annotated:
            remarks.add(Oddity.OTHER_SIZE)
    boxes, keep = clip_and_count(boxes, height, width, remarks)
    return height, width, boxes[keep], found[keep], ignored[keep]


def _note_other_classes(
    others: Counter[str], classes: tuple[str, ...], records: list[Record], remarks: Remarks
) -> None:
    """Remark on objects of classes that are not used, and on used classes without an object."""
    shown = ", ".join(f"{name!r}: {count}" for name, count in others.most_common(5))
    shown += ", ..." if len(others) > 5 else ""
    remarks.add(Oddity.OTHER_CLASS, others.total(), shown)
    present = {classes[label - 1] for record in records for label in record.labels}
    absent = [name for name in classes if name not in present]
    # Perhaps an absent class is a misspelling of one that is not used.
    hints = [(name, nearest(name, others)) for name in absent]
    shown = ", ".join(f"{name!r}{hint and '.'}{hint}" for name, hint in hints)
    remarks.add(Oddity.UNUSED_CLASS, len(absent), shown)


def _read_objects(
    root: ElementTree.Element, labels: dict[str, int], others: Counter[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The objects of one XML file whose classes are in `labels`.

    Returns:
        Boxes [N, 4] as annotated but counted from 0 (NaN where malformed), labels [N] and
        difficult flags [N]. Objects of other classes are counted by name in `others`.
    """
    boxes, found, difficult = [], [], []
    for item in root.iterfind("object"):
        name = _text(item, "name")
        if name not in labels:
            others[name] += 1
            continue
        try:
            boxes.append([float(_text(item, f"bndbox/{corner}")) - 1 for corner in _CORNERS])
        except ValueError:
            boxes.append([np.nan] * 4)
        found.append(labels[name])
        difficult.append(_text(item, "difficult").lower() in _YES)
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return array, np.array(found, np.int64), np.array(difficult, bool)
