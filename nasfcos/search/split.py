"""The training data in two: meta-train trains the decoders, meta-val rewards them.

The paper splits once at random (section 4); here the split is also stratified, so that no class is
left out of the reward on small or uneven data.
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
# Moves of single images in search of a split in which no class is missing, for each class.
_MOVES_PER_CLASS = 200


@dataclass(frozen=True)
class Split:
    """Meta-train and meta-val.

    Attributes:
        name: a hash over the files, and the name of their folder: what was made of another split
            cannot be taken for what belongs to this one.
        cfg: the config with the new sets as DATASETS.TRAIN and DATASETS.TEST, frozen.
        files: contents of the annotation files by their paths.
    """

    name: str
    cfg: CfgNode
    files: Mapping[Path, str]

    def write(self) -> None:
        """Write the files; one that is there is not touched."""
        for path, content in self.files.items():
            _write_unless_there(path, content)


def split_training_data(cfg: CfgNode, folder: str | Path, seed: int) -> CfgNode:
    """The config of `plan_split`, with the files written."""
    split = plan_split(cfg, folder, seed)
    split.write()
    return split.cfg


def plan_split(cfg: CfgNode, folder: str | Path, seed: int) -> Split:
    """Split the sets of DATASETS.TRAIN into meta-train and meta-val; writes nothing yet.

    The files are COCO files ``<name>_train.json`` and ``<name>_val.json`` of each set.
    Their category ids are the labels of the training data, crowd and difficult boxes are marked
    `iscrowd`, and the image files stay where they are. All sets are stratified together
    (`stratified_split`); the files depend on the data, SEARCH.META_VAL and the seed alone. Images
    without boxes are left out where DATALOADER.SKIP_EMPTY says so.

    Args:
        cfg: the config tree.
        folder: of all splits.
        seed: of the split.

    Raises:
        ConfigError: an unknown data set, or sets whose classes disagree.
        DataError: data without annotations, or too few images to split.
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
                continue  # a small set beside a large one
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


def without_places(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """A DATASETS section, and where it has the sets of a split, without what else it says of data:
    these are known by the hash in their path, wherever they and their images lie."""
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
    """[images, classes] bool: the image has a box of the class that counts in training."""
    presence = np.zeros((len(records), num_classes), dtype=bool)
    for row, record in zip(presence, records, strict=True):
        row[record.labels[~record.ignored] - 1] = True
    return presence


def _split(presence: np.ndarray, cfg: CfgNode, classes: Sequence[str], seed: int) -> np.ndarray:
    """`stratified_split` with its oddities named."""
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
    """Split images so that each class is in both parts, in about the proportion wanted.

    Iterative stratification (Sechidis et al., 2011): the images of the class that is rarest among
    those not yet placed go, one by one, to the part that lacks most of that class. Classes that
    share all their images may end up on one side nevertheless; then single images are moved until
    no class is missing, as in local search for satisfiability (a split with every class on both
    sides need not exist, so the moves are limited).

    Args:
        presence: [N, K] bool, image i has a box of class k.
        fraction: of the images, wanted in the second part; within 0..1.
        rng: of the random choices.

    Returns:
        [N] bool: in the second part. An image with the only boxes of a class is in the first.
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
    # Images without any class are a class of their own.
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
    """[K] bool: no image of the class is in this part [N] bool."""
    return ~presence[part].any(0)


def _complete(
    presence: np.ndarray, in_second: np.ndarray, pinned: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Move images, other than pinned ones, until each class is on both sides, or nearly."""
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
        # Classes that moving each of the images would take from the side that it is on.
        lost = (presence[images] & (counts[1 - lacking] == 1)).sum(1)
        # The least harm, but at times any of them: the way out may lead uphill.
        least = images[lost == lost.min()]
        image = rng.choice(least if rng.random() < 0.8 else images)
        in_second[image] = lacking == _VAL
        counts[lacking] += presence[image]
        counts[1 - lacking] -= presence[image]
        if (count := (counts == 0).sum()) < fewest:
            best, fewest = in_second.copy(), count
    return best
