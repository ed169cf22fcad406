"""The loaders as training and testing use them."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.config import ConfigError
from nasfcos.data import DataError, build_dataset, build_test_loader, build_train_loader

SIZES = [(40, 60)] * 6 + [(60, 40)] * 5


@pytest.fixture
def config(make_config, write_coco):
    def make(*overrides, annotations=None, sizes=SIZES):
        if annotations is None:
            annotations = [{"image_id": i, "bbox": [i, 2, 20, 10]} for i in range(1, 12)]
        return make_config(
            *("DATASETS.TRAIN", ("mine",), "SOLVER.IMS_PER_BATCH", 4, "TEST.IMS_PER_BATCH", 4),
            *("INPUT.MIN_SIZE_TRAIN", (32, 40, 48), "INPUT.BRIGHTNESS", 0.3, "INPUT.HUE", 0.1),
            *("INPUT.MIN_SIZE_TEST", 80, *overrides),
            mine=write_coco(annotations, sizes=sizes),
        )

    return make


@contextmanager
def stopped_after(seconds):
    """Fail, in this process, instead of hanging."""

    def give_up(*_):
        raise TimeoutError(f"nothing within {seconds} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def names(batch):
    return [target["file_name"] for target in batch[1]]


def assert_same(one, two):
    assert len(one) == len(two)
    for (images, targets), (others, other_targets) in zip(one, two, strict=True):
        for image, other in zip(images, others, strict=True):
            assert torch.equal(image, other)
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])
            assert torch.equal(target["labels"], other["labels"])
            assert target["file_name"] == other["file_name"]


def test_batch_contents(config):
    images, targets = next(iter(build_train_loader(config())))
    assert len(images) == len(targets) == 4
    for image, target in zip(images, targets, strict=True):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert min(image.shape[1:]) in (32, 40, 48)
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (1, 4)
        assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [1]
        assert target["original_size"] in ((40, 60), (60, 40))
    assert len({image.shape[1] >= image.shape[2] for image in images}) == 1


def test_repeats_exactly_whatever_the_workers(config):
    alone = list(islice(build_train_loader(config()), 6))
    helped = list(islice(build_train_loader(config("DATALOADER.NUM_WORKERS", 2)), 6))
    assert_same(alone, helped)
    other = list(islice(build_train_loader(config("SEED", 1)), 6))
    assert [names(batch) for batch in alone] != [names(batch) for batch in other]


def test_workers_start_after_opencv_had_threads_in_this_process(config):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (9, 9), 2)
        alone = list(islice(build_train_loader(config()), 2))
        assert_same(alone, list(islice(build_train_loader(config("DATALOADER.NUM_WORKERS", 2)), 2)))
    finally:
        cv2.setNumThreads(threads)


def test_resumes_identically(config):
    whole = list(islice(build_train_loader(config()), 12))
    rest = list(islice(build_train_loader(config(), start_iteration=7), 5))
    assert_same(whole[7:], rest)


def test_two_processes_see_the_same_batches(config):
    whole = list(islice(build_train_loader(config()), 5))
    parts = [list(islice(build_train_loader(config(), rank, 2), 5)) for rank in (0, 1)]
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*parts, strict=True)]
    assert_same(whole, joined)


def test_several_training_sets_are_joined(config):
    cfg = config().clone()
    cfg.defrost()
    cfg.DATASETS.CUSTOM["again"] = cfg.DATASETS.CUSTOM["mine"]
    cfg.DATASETS.TRAIN = ("mine", "again")
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 22  # one epoch of both
    batch = next(iter(build_train_loader(cfg)))
    assert sorted(names(batch)) == sorted(2 * [f"{i}.png" for i in range(1, 12)])


def test_images_without_boxes_are_left_out_or_trained_as_background(config):
    annotations = [{"image_id": 1}, {"image_id": 2, "iscrowd": 1}, {"image_id": 3}]
    seen = {
        skip: {
            name
            for batch in islice(
                build_train_loader(config("DATALOADER.SKIP_EMPTY", skip, annotations=annotations)),
                20,
            )
            for name in names(batch)
        }
        for skip in (True, False)
    }
    assert seen[True] == {"1.png", "3.png"}
    assert seen[False] == {f"{i}.png" for i in range(1, 12)}


def test_nothing_to_train_on(config):
    with pytest.raises(DataError, match=r"no image of mine.*DATALOADER\.SKIP_EMPTY"):
        build_train_loader(config(annotations=[]))


def test_unannotated_set_cannot_be_trained_on(make_config, write_coco):
    entry = write_coco([], annotations=None)
    with pytest.raises(DataError, match="no annotations"):
        build_train_loader(make_config("DATASETS.TRAIN", ("mine",), mine=entry))


def test_wrong_number_of_classes_is_refused(config):
    with pytest.raises(ConfigError, match=r"MODEL\.NUM_CLASSES is 5.*2 classes"):
        build_train_loader(config("MODEL.NUM_CLASSES", 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_by_the_next(config, tmp_path, workers):
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    before = list(islice(build_train_loader(cfg), 8))
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    after = list(islice(build_train_loader(cfg), 8))
    replaced = {"3.png": "5.png", "4.png": "5.png"}
    expected = [[replaced.get(name, name) for name in names(batch)] for batch in before]
    assert [names(batch) for batch in after] == expected
    assert any("3.png" in names(batch) for batch in before)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_with_their_names(config, tmp_path, workers):
    cfg = config("DATALOADER.NUM_WORKERS", workers, "DATASETS.MAX_BAD_IMAGES", 1)
    for i in (3, 4, 5):
        (tmp_path / "images" / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"\.png.*DATASETS\.MAX_BAD_IMAGES = 1"):
        list(islice(build_train_loader(cfg), 8))


def test_errors_in_workers_name_the_file(config, tmp_path):
    cfg = config("DATALOADER.NUM_WORKERS", 1).clone()
    cfg.defrost()
    cfg.INPUT.HUE = 3.0  # which load_config would refuse: torchvision allows 0.5
    with pytest.raises(DataError, match=r"\d\.png: ValueError: hue_factor"):
        list(islice(build_train_loader(cfg), 8))


def test_too_little_shared_memory_is_said(config):
    """As in a container with little of it, where PyTorch by itself would wait forever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = iter(build_train_loader(config("DATALOADER.NUM_WORKERS", 1)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # also of shared memory's "files"
    try:
        with stopped_after(60), pytest.raises(DataError, match="shm-size.*NUM_WORKERS 0"):
            next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loader_gives_each_image_once(config, workers):
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    data = build_dataset(cfg, "mine")
    targets = []
    for rank in (0, 1):
        loader = build_test_loader(cfg, data, rank, 2)
        batches = list(loader)
        assert len(batches) == len(loader)
        for images, batch in batches:
            assert len(images) == len(batch) <= 2
            assert all(min(image.shape[1:]) == 80 for image in images)
            targets += batch
    assert sorted(target["image_id"] for target in targets) == list(range(1, 12))
    first = next(target for target in targets if target["image_id"] == 1)
    assert first["original_size"] == (40, 60)
    assert first["boxes"].tolist() == [[2, 4, 40, 22]]  # (1, 2, 20, 11) twice as large


def test_test_loader_leaves_out_what_cannot_be_read(config, tmp_path, caplog):
    cfg = config("TEST.IMS_PER_BATCH", 1)
    (tmp_path / "images" / "2.png").unlink()
    found = [names(batch) for batch in build_test_loader(cfg, build_dataset(cfg, "mine"))]
    assert sorted(sum(found, [])) == sorted(f"{i}.png" for i in range(1, 12) if i != 2)
    assert all(found)
    assert "2.png is skipped" in caplog.text


def test_exif_turned_images_go_with_their_boxes(config, tmp_path):
    cfg = config(annotations=[{"image_id": 1, "bbox": [0, 0, 30, 20]}], sizes=[(40, 60)])
    stored = Image.new("RGB", (60, 40))
    stored.paste((255, 0, 0), (0, 0, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "images" / "1.png", exif=exif)
    ((images, targets),) = build_test_loader(cfg, build_dataset(cfg, "mine"))
    x0, y0, x1, y1 = targets[0]["boxes"][0].round().int().tolist()
    red = images[0][0] > 127
    assert red[y0 : y1 + 1, x0 : x1 + 1].all() and red.sum() == pytest.approx(60 * 40, rel=0.05)


def test_leaving_in_the_middle_does_not_hang(config, tmp_path):
    cfg = config()
    script = (
        "import sys\n"
        "from yacs.config import CfgNode\n"
        "from nasfcos.data import build_train_loader\n"
        "cfg = CfgNode.load_cfg(open(sys.argv[1]))\n"
        "cfg.DATALOADER.NUM_WORKERS = 2\n"
        "batches = iter(build_train_loader(cfg))\n"
        "next(batches)\n"
        "print('done')\n"
    )
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cfg.yaml")],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr
    assert "Error" not in result.stderr


def test_real_images_train_and_test(make_config, real_data):
    cfg = make_config(
        *("DATASETS.ROOT", str(real_data), "SOLVER.IMS_PER_BATCH", 2, "TEST.IMS_PER_BATCH", 16),
        *("INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MIN_SIZE_TEST", 64),
    )
    for images, targets in islice(build_train_loader(cfg), 4):
        for image, target in zip(images, targets, strict=True):
            boxes = target["boxes"]
            assert len(boxes) and (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()
    data = build_dataset(cfg, "coco_2017_val")
    found = [t["image_id"] for _, targets in build_test_loader(cfg, data) for t in targets]
    assert sorted(found) == [record.image_id for record in data.records]
