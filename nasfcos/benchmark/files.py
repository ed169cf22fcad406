"""Benchmarks of what surrounds a detector: data, evaluation, checkpoints, start-up."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from faster_coco_eval import COCO as FastCOCO
from faster_coco_eval import COCOeval_faster as FastCOCOeval
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..config import load_config
from ..data import Record, build_dataset, build_test_loader, build_train_loader
from ..data.coco import coco_content
from ..data.images import read_size
from ..engine.checkpoint import CONTENT, load_checkpoint, save_checkpoint
from ..evaluation.coco import coco_metrics
from ..models import build_detector, load_weights
from .detectors import our_config
from .inputs import NUM_CLASSES, random_target, smooth_image
from .measure import Case, Skip, Variant
from .setting import Setting

MAX_IMAGES = 64
"""Number of images that are taken from a folder, to bound the work of a call."""
IMAGE_TYPES = (".jpg", ".jpeg", ".png")


# -------------------------------------------------------------------------------------------- data
def data_loading(training: bool, setting: Setting) -> Case:
    """Loading of pictures from files to the tensors that a detector takes, on one core."""
    folder = setting.images or _make_pictures(setting)
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_TYPES)
    if not names:
        raise Skip(f"{folder} holds no {', '.join(IMAGE_TYPES)} pictures")
    names = names[:MAX_IMAGES]
    sizes = [read_size(folder / name) for name in names]
    targets = [random_target(*size, seed=seed) for seed, size in enumerate(sizes)]
    annotations = setting.folder / "annotations.json"
    annotations.write_text(json.dumps(_coco_content(names, sizes, targets)))
    short, long = (160, 266) if setting.quick else (800, 1333)
    cfg = load_config(
        None,
        [
            *("DATASETS.CUSTOM.pictures.FORMAT", "coco"),
            *("DATASETS.CUSTOM.pictures.IMAGES", str(folder.resolve())),
            *("DATASETS.CUSTOM.pictures.ANNOTATIONS", str(annotations.resolve())),
            *("DATASETS.TRAIN", ["pictures"], "DATASETS.TEST", ["pictures"]),
            *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False),
            *("SOLVER.IMS_PER_BATCH", 1, "TEST.IMS_PER_BATCH", 1, "SEED", 0),
            *("INPUT.MIN_SIZE_TRAIN", [short], "INPUT.MAX_SIZE_TRAIN", long),
            *("INPUT.MIN_SIZE_TEST", short, "INPUT.MAX_SIZE_TEST", long),
        ],
    )
    if training:
        stream = iter(build_train_loader(cfg))

        def ours() -> None:
            for _ in islice(stream, len(names)):
                pass
    else:
        loader = build_test_loader(cfg, build_dataset(cfg, "pictures"))

        def ours() -> None:
            for _ in loader:
                pass

    flips = [v2.RandomHorizontalFlip()] if training else []
    resize = v2.Resize(short, max_size=long, antialias=True)
    recipes = {
        "PIL + torchvision v2": [resize, *flips, v2.PILToTensor()],
        "PIL + torchvision v2 on tensors": [v2.PILToTensor(), resize, *flips],
    }
    pictures = [folder / name for name in names]
    runs = {name: _reference_loader(pictures, targets, recipe, training)
            for name, recipe in recipes.items()}  # fmt: skip
    kilobytes = sum(path.stat().st_size for path in pictures) / len(names) / 1000
    return Case(
        "loading, resizing" + (" and flipping" if training else "") + " pictures, to uint8 tensors "
        "and boxes; one process without workers, one thread",
        [
            *(Variant(name, _on_one_thread(run), theirs=True) for name, run in runs.items()),
            Variant("ours", _on_one_thread(ours)),
        ],
        rivals=list(runs),
        parameters={
            "pictures": f"{len(names)} of {folder.name if setting.images else '640x480, made up'}",
            "kB each": round(kilobytes),
            "short side": short,
        },
        amount=len(names),
        unit="images",
    )


def _make_pictures(setting: Setting) -> Path:
    """Make a folder of JPEGs like COCO's: 640 x 480, about 165 kB each."""
    folder = setting.folder / "pictures"
    folder.mkdir()
    for number in range(2 if setting.quick else 16):
        pixels = (255 * smooth_image(480, 640, seed=number)).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:03d}.jpg", quality=95)
    return folder


def _coco_content(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], targets: Sequence[dict[str, Tensor]]
) -> dict:
    """The content of a COCO annotation file for pictures with these sizes and targets."""
    records = []
    for name, size, target in zip(names, sizes, targets, strict=True):
        boxes, labels = target["boxes"].numpy(), target["labels"].numpy()
        crowd = np.zeros(len(labels), bool)
        records.append(Record(name, len(records) + 1, *size, boxes, labels, crowd))
    return coco_content(records, [f"class {i}" for i in range(1, NUM_CLASSES + 1)])


class _ReferencePictures(Dataset):
    """Pictures with boxes, transformed by torchvision."""

    def __init__(self, paths: list[Path], targets: list[dict], transform: Callable) -> None:
        self.paths, self.targets, self.transform = paths, targets, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        with Image.open(self.paths[index]) as image:
            image = image.convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            self.targets[index]["boxes"], format="XYXY", canvas_size=(image.height, image.width)
        )
        return self.transform(image, {"boxes": boxes, "labels": self.targets[index]["labels"]})


def _reference_loader(
    paths: list[Path],
    targets: list[dict[str, Tensor]],
    transforms: list[Callable],
    shuffle: bool,
) -> Callable[[], None]:
    """A call that loads all pictures once."""
    pictures = _ReferencePictures(paths, targets, v2.Compose(transforms))
    loader = DataLoader(pictures, batch_size=1, shuffle=shuffle, collate_fn=list)

    def run() -> None:
        for _ in loader:
            pass

    return run


def _on_one_thread(run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        torch_threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        try:
            run()
        finally:
            torch.set_num_threads(torch_threads)
            cv2.setNumThreads(cv_threads)

    return call


# -------------------------------------------------------------------------------------- evaluation
def evaluation(setting: Setting) -> Case:
    """The COCO metrics of a data set's detections."""
    images = 20 if setting.quick else 500
    targets = [random_target(480, 640, objects=7, seed=seed) for seed in range(images)]
    truth = _coco_content([f"{i}.jpg" for i in range(images)], [(480, 640)] * images, targets)
    results = _detections_near(truth["annotations"], images, each=100)
    ids = [image["id"] for image in truth["images"]]
    categories = [category["id"] for category in truth["categories"]]
    names = [category["name"] for category in truth["categories"]]

    def ours() -> object:
        return coco_metrics(ids, truth["annotations"], results, categories, names)

    case = Case(
        "the COCO figures for boxes, from annotations and results in memory",
        [],
        rivals=["pycocotools"],
        parameters={"images": images, "classes": NUM_CLASSES, "detections": len(results)},
        amount=images,
        unit="images",
    )
    case.variants += [
        _coco_variant("pycocotools", COCO, COCOeval, truth, results),
        _coco_variant("faster-coco-eval", FastCOCO, FastCOCOeval, truth, results),
        Variant("ours", ours),
    ]
    return case


def _detections_near(annotations: list[dict], images: int, each: int) -> list[dict]:
    """COCO results: `each` boxes per image, most of them near an object of their class."""
    rng = np.random.default_rng(0)
    by_image: list[list[dict]] = [[] for _ in range(images + 1)]
    for annotation in annotations:
        by_image[annotation["image_id"]].append(annotation)
    results = []
    for image_id in range(1, images + 1):
        for _ in range(each):
            near = by_image[image_id][rng.integers(len(by_image[image_id]))]
            x, y, width, height = near["bbox"]
            shift = rng.normal(scale=0.2, size=2) * (width, height)
            wrong = rng.random() < 0.2
            label = int(rng.integers(1, NUM_CLASSES + 1)) if wrong else near["category_id"]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [float(x + shift[0]), float(y + shift[1]), width, height],
                    "score": float(rng.random()),
                }
            )
    return results


def _coco_variant(name: str, coco: type, evaluator: type, truth: dict, results: list) -> Variant:
    truth, results = copy.deepcopy(truth), copy.deepcopy(results)  # both are modified

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            index = coco()
            index.dataset = truth
            index.createIndex()
            evaluation = evaluator(index, index.loadRes(results), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

    return Variant(name, run, theirs=True)


# ------------------------------------------------------------------------- checkpoints and start-up
def weights(setting: Setting) -> Case:
    """Loading the weights of a detector from a file into the model."""
    model = build_detector(our_config("R_50_NAS_head"), NUM_CLASSES)
    path = setting.folder / "weights.pth"
    torch.save({"model": model.state_dict()}, path)

    def theirs() -> None:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])

    plain = "torch.load, load_state_dict"
    return Case(
        "R_50_NAS_head's weights from a file that is in the page cache into the model, on the CPU",
        [
            Variant(plain, theirs, theirs=True),
            Variant("nasfcos.load_weights", lambda: load_weights(model, path)),
        ],
        rivals=[plain],
        parameters={"MB": round(path.stat().st_size / 1e6)},
    )


def checkpoint(setting: Setting) -> Case:
    """Loading the checkpoint of a training run, as resuming does."""
    model = build_detector(our_config("R_50_NAS_head"), NUM_CLASSES)
    tensors = model.state_dict()
    moments = {i: {"momentum_buffer": x.clone()} for i, x in enumerate(model.parameters())}
    path = setting.folder / "model_0000001.pth"
    state = dict.fromkeys(CONTENT, {}) | {"model": tensors, "iteration": 1}
    state["optimizer"] = {"state": moments, "param_groups": []}
    save_checkpoint(state, path)
    plain = "torch.load"
    return Case(
        "R_50_NAS_head's training checkpoint from a file that is in the page cache; ours verifies "
        "the checksums",
        [
            Variant(
                plain,
                lambda: torch.load(path, map_location="cpu", weights_only=True),
                theirs=True,
            ),
            Variant("load_checkpoint", lambda: load_checkpoint(path)),
        ],
        rivals=[plain],
        parameters={"MB": round(path.stat().st_size / 1e6)},
    )


def start_up(setting: Setting) -> Case:
    """Starting a Python process that imports a package and exits."""

    def importing(module: str) -> Callable[[], None]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    return Case(
        "a fresh Python process that imports the package and ends",
        [
            Variant(f"import {module}", importing(module), theirs=module != "nasfcos", memory=False)
            for module in ("torchvision", "torch", "nasfcos")
        ],
        rivals=["import torchvision"],
    )
