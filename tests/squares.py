"""A job small enough to run many times: a tiny detector and two tiny data sets of squares."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

TINY = {
    "MODEL": {
        "DEVICE": "cpu",
        "GENOTYPE": [[[1, 2, 4, 3, 1]], [[2, 3, 0, 3, 0]], [[3, 3, 0, 0, 0]]],
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNET": {
            "BLOCKS": [1, 1, 1, 1],
            "STEM_CHANNELS": 8,
            "WIDTH_PER_GROUP": 8,
            "NORM": "bn",
        },
        "NECK": {"NAME": "nas_fpn", "CHANNELS": 64},
        "HEAD": {"NUM_CONVS": 1},
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": [64, 96],
        "MAX_SIZE_TRAIN": 128,
        "MIN_SIZE_TEST": 96,
        "MAX_SIZE_TEST": 128,
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {
        "BASE_LR": 0.005,
        "MAX_ITER": 8,
        "STEPS": [6],
        "WARMUP_ITERS": 3,
        "IMS_PER_BATCH": 4,
        "CHECKPOINT_PERIOD": 3,
        "LOG_PERIOD": 2,
    },
    # Scores of an untrained model lie about 0.01: all of them are to be seen.
    "TEST": {"IMS_PER_BATCH": 2, "SCORE_THRESHOLD": 0.001},
}


def write_squares(folder, count, seed):
    """Dark pictures with one or two bright or reddish squares, as a COCO data set."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(1, count + 1):
        height, width = ((72, 96), (96, 72), (80, 100))[i % 3]
        picture = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for _ in range(1 + i % 2):
            label, side = int(rng.integers(1, 3)), int(rng.integers(20, 45))
            x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            picture[y : y + side, x : x + side] = (240, 240, 240) if label == 1 else (220, 60, 40)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 10 * label,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(picture).save(folder / "images" / f"{i:03d}.png")
        images.append({"id": i, "file_name": f"{i:03d}.png", "height": height, "width": width})
    categories = [{"id": 10, "name": "white"}, {"id": 20, "name": "red"}]
    (folder / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Folder of the data sets "train" (20 images) and "val" (7). All tests share it: one that
    changes data must do so in a copy."""
    root = tmp_path_factory.mktemp("data")
    write_squares(root / "train", 20, seed=0)
    write_squares(root / "val", 7, seed=1)
    before = _contents(root)
    yield root
    assert _contents(root) == before, "a test has changed the data that all share"


def _contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def config_file(data_root, tmp_path):
    """Config of the tiny job; its output goes to the test's `tmp_path`/out."""
    entry = {"FORMAT": "coco"}
    custom = {
        name: {**entry, "IMAGES": f"{name}/images", "ANNOTATIONS": f"{name}/annotations.json"}
        for name in ("train", "val")
    }
    tree = TINY | {
        "OUTPUT_DIR": str(tmp_path / "out"),
        "DATASETS": {
            "ROOT": str(data_root),
            "TRAIN": ["train"],
            "TEST": ["val"],
            "CUSTOM": custom,
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
