"""Writing the demo data set to a folder."""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...files import read_json
from ..records import DataError
from .objects import CLASSES
from .scene import draw_scene

logger = logging.getLogger(__name__)

_SETTINGS_FILE = "settings.json"
_VERSION = 2  # of the drawings; raise it whenever pictures change


@dataclass(frozen=True)
class DemoSettings:
    """What determines the data set: numbers of pictures, their sides in pixels, and the seed."""

    train: int = 400
    val: int = 100
    long_side: int = 320
    short_side: int = 256
    seed: int = 0


def _write_split(folder: Path, split: str, count: int, settings: DemoSettings) -> None:
    """Write `count` pictures to `folder`/`split`, and their annotations."""
    images, annotations = [], []
    (folder / split).mkdir()
    for number in range(count):
        rng = np.random.default_rng([settings.seed, ("train", "val").index(split), number])
        height, width = settings.short_side, settings.long_side
        if rng.random() < 0.25:
            height, width = width, height
        picture, objects = draw_scene(rng, height, width)
        name = f"{number + 1:06d}.jpg"
        Image.fromarray(picture).save(folder / split / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, box, area in objects:
            annotation = {"id": len(annotations) + 1, "image_id": number + 1, "iscrowd": 0}
            annotation |= {"category_id": label, "bbox": list(box), "area": area}
            annotations.append(annotation)
    content = {
        "info": {"description": "Generated demo scenes of NAS-FCOS", **asdict(settings)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def make_demo_data(output: str | Path, settings: DemoSettings | None = None) -> bool:
    """Write the data set: `train/`, `val/`, `annotations/{train,val}.json`, `settings.json`.

    The folder appears complete or not at all. A demo set made with other settings is replaced; one
    made with the same settings is left alone.

    Args:
        output: folder to write.
        settings: None for the defaults.

    Returns:
        Whether anything was written.

    Raises:
        DataError: the settings allow no pictures.
        FileExistsError: `output` exists and is neither empty nor a demo set.
    """
    settings = settings or DemoSettings()
    if min(settings.train, settings.val) < 1 or settings.seed < 0:
        raise DataError("the demo set needs at least one picture per split and a seed from 0")
    if not 64 <= settings.short_side <= settings.long_side:
        raise DataError("the sides of demo pictures must be at least 64 pixels, the long one last")
    output = Path(output)
    wanted = {"version": _VERSION, **asdict(settings)}
    if output.exists():
        found = read_json(output / _SETTINGS_FILE)
        if found == wanted:
            logger.info("%s is there already", output)
            return False
        if found is None and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(
                f"{output} exists and is no demo data set; name another folder or remove it"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        fresh = scratch / "new"
        (fresh / "annotations").mkdir(parents=True)
        _write_split(fresh, "train", settings.train, settings)
        _write_split(fresh, "val", settings.val, settings)
        (fresh / _SETTINGS_FILE).write_text(json.dumps(wanted, indent=1) + "\n")
        if output.exists():
            os.rename(output, scratch / "old")
        os.rename(fresh, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("wrote %d + %d pictures to %s", settings.train, settings.val, output)
    return True
