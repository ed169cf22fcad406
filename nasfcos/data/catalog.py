"""The known data sets, the location of their files, and their classes.

Built in are `coco_2017_{train,val,test_dev}` under coco/ and `voc_{2007,2012}_{train,val,trainval,
test}` under voc/ in the data root. Other data sets are entries of DATASETS.CUSTOM.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from ..config import ConfigError
from ..config.checks import check_dataset
from ..config.errors import nearest
from .coco import read_coco_classes
from .records import DataError
from .voc import read_voc_classes

logger = logging.getLogger(__name__)

# In the order of the sorted category ids.
COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush".split(",")
)
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

_COCO_SPLITS = {
    "train": ("train2017", "instances_train2017.json"),
    "val": ("val2017", "instances_val2017.json"),
    "test_dev": ("test2017", "image_info_test-dev2017.json"),
}
_BUILT_IN = tuple(f"coco_2017_{split}" for split in _COCO_SPLITS) + tuple(
    f"voc_{year}_{split}" for year in (2007, 2012) for split in ("train", "val", "trainval", "test")
)


@dataclass(frozen=True)
class DatasetSpec:
    """The description of a data set, before any file is read."""

    name: str
    format: str  # "coco" or "voc"
    images: Path  # folder
    annotations: Path  # JSON file (coco) or folder of XML files (voc)
    split: Path | None = None  # voc: text file of image names; None: all XML files
    classes: tuple[str, ...] | None = None  # names by label; None: those in the annotations
    adopted: bool = False  # the classes are those of the training data; some may be absent here
    has_annotations: bool = True  # False: images only (a test split)
    key: str = "DATASETS.ROOT"  # config key to name in error messages


def data_root(cfg: CfgNode) -> Path:
    """The folder that holds the data: DATASETS.ROOT, else $NASFCOS_DATA, else "datasets"."""
    return Path(cfg.DATASETS.ROOT or os.environ.get("NASFCOS_DATA") or "datasets").expanduser()


def _built_in(name: str, root: Path) -> DatasetSpec:
    if name.startswith("coco_2017_"):
        split = name.removeprefix("coco_2017_")
        images, annotations = _COCO_SPLITS[split]
        return DatasetSpec(
            name=name,
            format="coco",
            images=root / "coco" / images,
            annotations=root / "coco" / "annotations" / annotations,
            classes=COCO_CLASSES,
            has_annotations=split != "test_dev",
        )
    _, year, split = name.split("_")
    folder = root / "voc" / f"VOC{year}"
    return DatasetSpec(
        name=name,
        format="voc",
        images=folder / "JPEGImages",
        annotations=folder / "Annotations",
        split=folder / "ImageSets" / "Main" / f"{split}.txt",
        classes=VOC_CLASSES,
        has_annotations=(year, split) != ("2012", "test"),
    )


def _custom(name: str, entry: Mapping[str, Any], root: Path) -> DatasetSpec:
    key = f"DATASETS.CUSTOM.{name}"
    check_dataset(name, entry, _fail)
    entry = {part: value for part, value in entry.items() if value is not None}
    for part in ("FORMAT", "IMAGES", "ANNOTATIONS"):
        if part not in entry:
            _fail(f"{key}.{part}", "is missing")

    def path(part: str) -> Path:
        return root / Path(entry[part]).expanduser()

    return DatasetSpec(
        name=name,
        format=entry["FORMAT"],
        images=path("IMAGES"),
        annotations=path("ANNOTATIONS"),
        split=path("SPLIT") if "SPLIT" in entry else None,
        classes=tuple(entry["CLASSES"]) if "CLASSES" in entry else None,
        key=key,
    )


def _fail(name: str, why: str, *_: str) -> NoReturn:
    raise ConfigError(f"{name} {why}")


def _lookup(cfg: CfgNode, name: str) -> DatasetSpec:
    root = data_root(cfg)
    if name in cfg.DATASETS.CUSTOM:
        return _custom(name, cfg.DATASETS.CUSTOM[name], root)
    if name in _BUILT_IN:
        return _built_in(name, root)
    raise ConfigError(
        f"there is no data set {name!r}.{nearest(name, [*_BUILT_IN, *cfg.DATASETS.CUSTOM])} Built "
        f"in are {', '.join(_BUILT_IN)}; define your own as DATASETS.CUSTOM.{name}: "
        "{FORMAT: coco, IMAGES: folder, ANNOTATIONS: file.json}"
    )


def _check_files(spec: DatasetSpec) -> None:
    own = spec.key != "DATASETS.ROOT"
    needed = [("IMAGES", spec.images, "folder")]
    if spec.format == "coco":
        needed.append(("ANNOTATIONS", spec.annotations, "file"))
    elif spec.has_annotations:
        needed.append(("ANNOTATIONS", spec.annotations, "folder"))
    if spec.split is not None:
        needed.append(("SPLIT", spec.split, "file"))
    for part, path, kind in needed:
        if path.is_dir() if kind == "folder" else path.is_file():
            continue
        state = f"is not a {kind}" if path.exists() else "does not exist"
        remedy = (
            f"correct {spec.key}.{part} (relative paths start at DATASETS.ROOT, else the "
            "environment variable NASFCOS_DATA, else 'datasets')"
            if own
            else "set DATASETS.ROOT (or the environment variable NASFCOS_DATA) to the folder that "
            f"holds {spec.format}/, or put the data there"
        )
        raise DataError(f"data set {spec.name}: the {part.lower()} {kind} {path} {state}; {remedy}")


def find_dataset(cfg: CfgNode, name: str) -> DatasetSpec:
    """Look up the description of a data set and check that its files exist.

    Raises:
        ConfigError: unknown name, or faulty entry of DATASETS.CUSTOM.
        DataError: a file or folder does not exist.
    """
    spec = _lookup(cfg, name)
    _check_files(spec)
    return spec


@functools.lru_cache(maxsize=32)
def _read_classes(spec: DatasetSpec, stamp: tuple[int, ...]) -> tuple[str, ...]:
    """Cached by `stamp`, the modification times of the files."""
    if spec.format == "coco":
        return read_coco_classes(spec.annotations)
    return read_voc_classes(spec.annotations, spec.split)


def _classes_of(spec: DatasetSpec) -> tuple[str, ...]:
    if spec.classes is not None:
        return spec.classes
    _check_files(spec)
    paths = [path for path in (spec.annotations, spec.split) if path is not None]
    return _read_classes(spec, tuple(path.stat().st_mtime_ns for path in paths))


def class_names(cfg: CfgNode) -> list[str]:
    """Class names of the training data; the first has label 1.

    Files are read only for custom sets without CLASSES.

    Raises:
        ConfigError: DATASETS.TRAIN is empty, or its sets have different classes.
        DataError: files that have to be read are missing or malformed.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty, so the classes are not known")
    found = {name: _classes_of(_lookup(cfg, name)) for name in cfg.DATASETS.TRAIN}
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise ConfigError(
                f"the sets of DATASETS.TRAIN have different classes: {first} has "
                f"{list(found[first])}, {other} has {list(found[other])}; give both the same "
                f"CLASSES (DATASETS.CUSTOM.{other}.CLASSES)"
            )
    return list(found[first])


def num_classes(cfg: CfgNode) -> int:
    """MODEL.NUM_CLASSES or, if that is 0, the number of classes of the training data."""
    return cfg.MODEL.NUM_CLASSES or len(class_names(cfg))


def with_training_classes(
    cfg: CfgNode, spec: DatasetSpec, classes: Sequence[str] | None = None
) -> DatasetSpec:
    """Give `spec` the classes of the training data, so that labels mean the same in both.

    If the training data is not available, the set keeps its own classes. `classes`, if given,
    stand for those of the training data.

    Raises:
        ConfigError: the set's own classes do not fit those of the training data.
        DataError: neither the training data's classes nor the set's own are available.
    """
    unreadable = None
    try:
        own = _classes_of(spec)
    except DataError as error:  # not annotated, or malformed, which the reader will report
        own, unreadable = (), error
    trained = own
    if classes is not None:
        trained = tuple(classes)
    elif spec.name not in cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN:
        try:
            trained = tuple(class_names(cfg))
        except DataError as error:
            logger.info("classes of %s are its own, not the training data's: %s", spec.name, error)
    if spec.classes is not None and spec.classes != trained:
        raise ConfigError(
            f"data set {spec.name} has the classes {list(spec.classes)}, but the training data "
            f"{tuple(cfg.DATASETS.TRAIN)} has {list(trained)}; labels must mean the same in both"
        )
    unknown = [name for name in own if name not in trained]
    if unknown:
        raise ConfigError(
            f"data set {spec.name} has classes that the training data does not have: "
            f"{', '.join(map(repr, unknown))}; list those to use in {spec.key}.CLASSES"
        )
    if unreadable and not trained:
        raise unreadable
    return replace(spec, classes=trained, adopted=spec.classes is None)
