"""Small data sets, written to disk for each test."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode

from nasfcos.config import load_config

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
    "<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


@pytest.fixture
def make_config(tmp_path):
    """make_config(**custom sets, KEY, VALUE, ...) with the data root at tmp_path."""

    def make(*overrides, **custom):
        plain = ["MODEL.NECK.NAME", "fpn", "DATASETS.ROOT", str(tmp_path)]
        plain += ["DATALOADER.NUM_WORKERS", 0]
        cfg = load_config(None, [*plain, *overrides]).clone()
        cfg.defrost()
        for name, entry in custom.items():
            cfg.DATASETS.CUSTOM[name] = CfgNode(entry) if isinstance(entry, dict) else entry
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def write_image(tmp_path):
    """write_image(name, (height, width)): a picture that differs from file to file."""

    def write(name, size=(40, 60)):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(list(name.encode()))
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def write_coco(tmp_path, write_image):
    """write_coco(boxes, sizes): images 1.png, 2.png, ... and ann.json; -> config entry.

    A box is a dict over {"image_id": 1, "category_id": 3, "bbox": [10, 5, 20, 10]}.
    """

    def write(boxes, sizes=((40, 60), (60, 40)), categories=((7, "cat"), (3, "dog")), **top):
        images = []
        for number, (height, width) in enumerate(sizes, 1):
            write_image(f"{number}.png", (height, width))
            entry = {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            images.append(entry)
        standard = {"image_id": 1, "category_id": 3, "bbox": [10, 5, 20, 10]}
        content = {
            "images": images,
            "annotations": [{"id": i, **standard, **a} for i, a in enumerate(boxes, 1)],
            "categories": [{"id": i, "name": name} for i, name in categories],
        }
        content |= top
        content = {key: value for key, value in content.items() if value is not None}
        (tmp_path / "ann.json").write_text(json.dumps(content))
        return {"FORMAT": "coco", "IMAGES": "images", "ANNOTATIONS": "ann.json"}

    return write


@pytest.fixture
def write_voc(tmp_path, write_image):
    """write_voc({image name: [(class, box, difficult), ...]}) -> config entry with a SPLIT."""

    def write(images, size=(40, 60), tag="<size><width>60</width><height>40</height></size>"):
        folder = tmp_path / "xml"
        folder.mkdir(exist_ok=True)
        for name, objects in images.items():
            write_image(f"{name}.jpg", size)
            items = [OBJECT.format(name=n, box=box, difficult=d) for n, box, d in objects]
            (folder / f"{name}.xml").write_text(
                f"<annotation>{tag}\n{''.join(items)}\n</annotation>"
            )
        (tmp_path / "split.txt").write_text("\n".join(images) + "\n")
        return {"FORMAT": "voc", "IMAGES": "images", "ANNOTATIONS": "xml", "SPLIT": "split.txt"}

    return write


@pytest.fixture(scope="session")
def real_data():
    """The folder with real COCO and BCCD images, if this machine has it."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("NASFCOS_TEST_DATA") or beside)
    if not (folder / "coco" / "annotations").is_dir():
        pytest.skip("no real images: set NASFCOS_TEST_DATA to a folder with coco/ and bccd/")
    return folder
