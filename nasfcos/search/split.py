"""Splits the training data: decoders are trained on meta-train and rewarded on meta-val.

The paper splits once at random (section 4). Here the split is also stratified, so that the reward
takes in every class even if the data are few or unbalanced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from ..config.tree import with_settings
from ..data import DataError, DetectionDataset, Record, build_dataset, class_names
from ..data.coco import coco_content
from ..files import replacing

logger = logging.getLogger(__name__)

_TRAIN, _VAL = 0, 1
_HASH_DIGITS = 12
# Largest number of single images, per class, that are moved to get every class on both sides.
_MOVES_PER_CLASS = 200


@dataclass(frozen=True)
class Split:
    """A split into meta-train and meta-val.

    Attributes:
        name: hash of the files and name of their directory, so that files made from another split
            are never mistaken for those of this one.
        cfg: config with the new data sets as DATASETS.TRAIN and DATASETS.TEST, frozen.
        files: contents of the annotation files, by path.
    """

    name: str
    cfg: CfgNode
    files: Mapping[Path, str]

    def write(self) -> None:
        """Write the files; existing ones are left alone if they are intact."""
        for path, content in self.files.items():
            _write_unless_there(path, content)


def split_training_data(cfg: CfgNode, folder: str | Path, seed: int) -> CfgNode:
    """Make the split of `plan_split`, write its files and return its config."""
    split = plan_split(cfg, folder, seed)
    split.write()
    return split.cfg


def plan_split(cfg: CfgNode, folder: str | Path, seed: int) -> Split:
    """Split the data sets of DATASETS.TRAIN into meta-train and meta-val, without writing files.

    The files are COCO annotations, ``<name>_train.json`` and ``<name>_val.json`` for each data set.
    Their category ids are the labels of the training data, crowd and difficult boxes are marked as
    `iscrowd`, and the image files stay where they are. All data sets are stratified together
    (`stratified_split`). The files depend only on the data, SEARCH.META_VAL and the seed. Images
    without boxes are left out if DATALOADER.SKIP_EMPTY is set.

    Args:
        cfg: config of the search.
        folder: directory that holds all splits.
        seed: seed of the split.

    Raises:
        ConfigError: a data set is unknown, or the classes of the data sets disagree.
        DataError: a data set has no annotations, or there are too few images to split.
    """
    folder = Path(folder).resolve()
    classes = class_names(cfg)
    datasets = [build_dataset(cfg, name) for name in cfg.DATASETS.TRAIN]
    for dataset in datasets:
        if not dataset.has_annotations:
            raise DataError(f"data set {dataset.name} cannot be split: it has no annotations")
    chosen = [
        [r for r in dataset.records if not (cfg.DATALOADER.SKIP_EMPTY and r.ignored.all())]
        for dataset in datasets
    ]
    presence = _presence([record for records in chosen for record in records], len(classes))
    in_val = _split(presence, cfg, classes, seed)

    parts: list[tuple[int, str, DetectionDataset, str]] = []  # side, name, set, file's content
    first = 0
    for dataset, records in zip(datasets, chosen, strict=True):
        sides = in_val[first : first + len(records)]
        first += len(records)
        for side, suffix in ((_TRAIN, "train"), (_VAL, "val")):
            part = [record for record, of in zip(records, sides, strict=True) if of == side]
            if not part:
                continue  # a small data set beside a large one may be on one side only
            content = json.dumps(coco_content(part, classes))
            parts.append((side, f"{dataset.name}_{suffix}", dataset, content))

    contents = [(name, content) for _, name, _, content in parts]
    hashed = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:_HASH_DIGITS]
    names: tuple[list[str], list[str]] = ([], [])
    files, settings = {}, {}
    for side, name, dataset, content in parts:
        path = folder / hashed / f"{name}.json"
        files[path] = content
        settings[f"DATASETS.CUSTOM.{name}"] = _entry(dataset, path, classes)
        names[side].append(name)
    settings["DATASETS.TRAIN"], settings["DATASETS.TEST"] = map(tuple, names)
    return Split(hashed, with_settings(cfg, settings), files)


def without_paths(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """A DATASETS section to be compared with another one.

    Data sets made by a split are reduced to the hash in their path, so that moved files make no
    difference.
    """
    used = {*datasets["TRAIN"], *datasets["TEST"]}
    paths = [Path(entry["ANNOTATIONS"]) for name, entry in datasets["CUSTOM"].items()
             if name in used]  # fmt: skip
    if len(paths) < len(used) or not all(_is_of_split(path) for path in paths):
        return dict(datasets)
    rest = {key: value for key, value in datasets.items() if key not in ("ROOT", "CUSTOM")}
    return rest | {"SPLIT": sorted({path.parent.name for path in paths})}


def _is_of_split(path: Path) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{_HASH_DIGITS}}}", path.parent.name) is not None


def _presence(records: Sequence[Record], num_classes: int) -> np.ndarray:
    """[N, K] bool: whether each image has a box of each class that counts in training."""
    presence = np.zeros((len(records), num_classes), dtype=bool)
    for row, record in zip(presence, records, strict=True):
        row[record.labels[~record.ignored] - 1] = True
    return presence


def _split(presence: np.ndarray, cfg: CfgNode, classes: Sequence[str], seed: int) -> np.ndarray:
    """The result of `stratified_split`, with messages about missing classes and images."""
    sets = ", ".join(cfg.DATASETS.TRAIN)
    if not presence.any():
        raise DataError(f"no image of {sets} has a box to train on, so there is nothing to search")
    if len(presence) < 2:
        raise DataError(
            f"{sets}: a search needs at least two images with boxes (one for meta-train, one for "
            "meta-val); annotate more, or add sets to DATASETS.TRAIN"
        )
    in_val = stratified_split(presence, cfg.SEARCH.META_VAL, np.random.default_rng([seed, 3]))
    if not in_val.any():
        raise DataError(
            f"{sets}: no image can be spared for meta-val, since each has the only boxes of some "
            "class; annotate more images, or leave such classes out of DATASETS.CUSTOM.<name>."
            "CLASSES"
        )
    images = presence.sum(0)
    for index in np.flatnonzero(images == 1):
        logger.warning(
            "class %s has boxes in one image only, which goes to meta-train: meta-val does not "
            "judge it", classes[index],
        )  # fmt: skip
    if absent := [classes[index] for index in np.flatnonzero(images == 0)]:
        logger.warning("no boxes of these classes in %s: %s", sets, ", ".join(absent))
    for where, side in (("meta-train", ~in_val), ("meta-val", in_val)):
        for index in np.flatnonzero(_missing(presence, side) & (images > 1)):
            logger.warning(
                "class %s is not in %s: no split that has it there was found",
                classes[index], where,
            )  # fmt: skip
    logger.info(
        "%d training images split: %d meta-train, %d meta-val",
        len(in_val), (~in_val).sum(), in_val.sum(),
    )  # fmt: skip
    return in_val


def _write_unless_there(path: Path, content: str) -> None:
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == content:
            return
        logger.warning("%s is damaged and written anew", path)
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _entry(dataset: DetectionDataset, path: Path, classes: Sequence[str]) -> CfgNode:
    entry = CfgNode(new_allowed=True)
    entry.FORMAT = "coco"
    entry.IMAGES = str(dataset.spec.images.resolve())
    entry.ANNOTATIONS = str(path)
    entry.CLASSES = list(classes)
    return entry


# --------------------------------------------------------------------------------- stratification
def stratified_split(presence: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Split images into two parts so that each class is in both, in about the wanted proportion.

    Iterative stratification (Sechidis et al., 2011): the images of the class that is rarest among
    the images not yet assigned go, one by one, to the part that lacks most of that class. Classes
    that share all their images may still end up in one part. Then single images are moved until no
    class is missing, as in local search for satisfiability. The number of moves is limited, because
    a split with every class in both parts need not exist.

    Args:
        presence: [N, K] bool, whether image i has a box of class k.
        fraction: wanted share of the images in the second part, within 0..1.
        rng: generator of the random choices.

    Returns:
        [N] bool, whether each image is in the second part. An image with the only boxes of a class
        is in the first.

    Raises:
        ValueError: the fraction is out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie within 0..1, not {fraction}")
    images = presence.sum(0)
    pinned = presence[:, images == 1].any(1)
    classes = presence[:, images > 1]
    in_second = _stratify(classes, fraction, pinned, rng)
    return _complete(classes, in_second, pinned, rng)


def _stratify(
    presence: np.ndarray, fraction: float, pinned: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    # Images without any class count as a class of their own.
    presence = np.column_stack((presence, ~presence.any(1)))
    shares = np.array([1 - fraction, fraction])
    wanted = shares[:, None] * presence.sum(0)  # [2, K] images of each class
    room = shares * len(presence)
    remaining = presence.sum(0)
    side = np.full(len(presence), -1)

    def place(image: int, where: int) -> None:
        side[image] = where
        wanted[where] -= presence[image]
        room[where] -= 1
        remaining[:] -= presence[image]

    for image in np.flatnonzero(pinned):
        place(image, _TRAIN)
    order = rng.permutation(len(presence))
    while remaining.any():
        rarest = np.where(remaining > 0, remaining, len(presence) + 1).argmin()
        for image in order[presence[order, rarest] & (side[order] < 0)]:
            lacks = [(wanted[where, rarest], room[where]) for where in (_TRAIN, _VAL)]
            place(image, _VAL if lacks[_VAL] > lacks[_TRAIN] else _TRAIN)
    return side == _VAL


def _missing(presence: np.ndarray, part: np.ndarray) -> np.ndarray:
    """[K] bool: whether each class has no image in a part, which is given as [N] bool."""
    return ~presence[part].any(0)


def _complete(
    presence: np.ndarray, in_second: np.ndarray, pinned: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Move images that are not pinned until as many classes as possible are on both sides."""
    in_second = in_second.copy()
    # Images of each class in the first and in the second part.
    counts = np.stack((presence[~in_second].sum(0), presence[in_second].sum(0)))
    best, fewest = in_second.copy(), (counts == 0).sum()
    for _ in range(_MOVES_PER_CLASS * presence.shape[1]):
        if fewest == 0:
            break
        sides, classes = np.nonzero(counts == 0)
        pick = rng.integers(len(classes))
        images = np.flatnonzero(presence[:, classes[pick]] & ~pinned)
        if not len(images):
            continue
        lacking = sides[pick]
        # Number of classes that vanish from an image's side if that image moves.
        lost = (presence[images] & (counts[1 - lacking] == 1)).sum(1)
        # Usually move an image that does the least harm, but sometimes any: a better split may be
        # reachable only by way of a worse one.
        least = images[lost == lost.min()]
        image = rng.choice(least if rng.random() < 0.8 else images)
        in_second[image] = lacking == _VAL
        counts[lacking] += presence[image]
        counts[1 - lacking] -= presence[image]
        if (count := (counts == 0).sum()) < fewest:
            best, fewest = in_second.copy(), count
    return best
