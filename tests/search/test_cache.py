"""The feature cache: its files, and what makes a cache another one."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nasfcos.config import load_config
from nasfcos.data import DataError, build_dataset, class_names
from nasfcos.genotype import Genotype
from nasfcos.models import build_detector
from nasfcos.models.necks.nas_fpn import NASFPN
from nasfcos.search.cache import (
    CacheError,
    FeatureCache,
    build_caches,
    cache_features,
    cache_pyramid,
    feature_shapes,
    features,
    store,
)
from nasfcos.search.cache.keys import feature_key
from nasfcos.search.cache.store import estimate_bytes
from nasfcos.search.crops import Crops
from nasfcos.search.split import split_training_data

SIZE = 64


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(config_file, tmp_path):
    """The tiny job after its split."""
    cfg = load_config(config_file, ["SEARCH.CACHE.SIZE", SIZE, "SEARCH.CACHE.CROPS", 2])
    return split_training_data(cfg, tmp_path / "split", seed=0)


def make_model(cfg):
    torch.manual_seed(0)
    model = build_detector(cfg, num_classes=2)
    target = {"boxes": torch.tensor([[1.0, 1, 30, 30]]), "labels": torch.tensor([1])}
    # Statistics unlike those of fresh batch norms, so that train and eval mode differ.
    model(list(torch.rand(2, 3, SIZE, SIZE)), 2 * [target])
    return model


@pytest.fixture
def model(cfg):
    return make_model(cfg)


@pytest.fixture
def dataset(cfg):
    return build_dataset(cfg, "train_val")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


# ----------------------------------------------------------------------------------------- content
def test_the_maps_are_those_of_the_backbone(model, dataset, folder):
    model.train()
    model.head.eval()
    crops = Crops([dataset], SIZE)
    cache = cache_features(folder, model, crops, batch_size=4)
    assert model.training and model.backbone.training and not model.head.training
    assert len(cache) == len(dataset) == len(cache.targets) > 5
    assert cache.size == SIZE and cache.folder.parent == folder.resolve()
    model.eval()
    for index in range(len(dataset)):
        ((image, target),) = crops[index]
        batch, _ = model.preprocess([image])
        with torch.no_grad():
            expected = model.backbone(batch)
        assert len(cache.maps) == 4
        for array, level in zip(cache.maps, expected, strict=True):
            assert array.dtype == np.float16
            torch.testing.assert_close(
                torch.tensor(array[index]).float(), level[0], rtol=2e-3, atol=1e-3
            )
        for key in ("boxes", "labels"):
            assert torch.equal(cache.targets[index][key], target[key])


def test_crops_of_one_image_lie_side_by_side(model, dataset, folder):
    crops = Crops([dataset], SIZE, crops=3, seed=1)
    cache = cache_features(folder, model, crops, batch_size=4)
    assert len(cache) == 3 * len(dataset)
    for number, (image, _) in enumerate(crops[2]):
        batch, _ = model.preprocess([image])
        with torch.no_grad():
            level = model.eval().backbone(batch)[0][0]
        found = torch.tensor(cache.maps[0][6 + number]).float()
        torch.testing.assert_close(found, level, rtol=2e-3, atol=1e-3)


def test_a_batch_comes_in_the_order_asked_for(model, dataset, folder):
    cache = cache_features(folder, model, Crops([dataset], SIZE))
    indices = [4, 0, 4, 2]
    for given in (indices, np.array(indices), torch.tensor(indices)):
        maps = cache.read(given, torch.device("cpu"))
        for level, array in zip(maps, cache.maps, strict=True):
            assert level.dtype == torch.float16
            assert level.is_contiguous(memory_format=torch.channels_last)
            np.testing.assert_array_equal(level.numpy(), array[indices])
    maps[0].zero_()  # a copy, not the file
    assert cache.maps[0][4].any()
    with pytest.raises(IndexError):
        cache.read([len(cache)])
    assert cache.to_device("cpu") is False


def test_a_cache_travels_by_its_folder(model, dataset, folder):
    cache = cache_features(folder, model, Crops([dataset], SIZE))
    parcel = pickle.dumps(cache)
    assert len(parcel) < 1000
    again = pickle.loads(parcel)
    np.testing.assert_array_equal(again.maps[3], cache.maps[3])


@pytest.mark.gpu
def test_a_cache_held_on_the_gpu(model, dataset, folder, monkeypatch):
    cache = cache_features(folder, model, Crops([dataset], SIZE))
    indices = [3, 1, 3]
    expected = cache.read(indices)
    streamed = cache.read(indices, "cuda")
    monkeypatch.setattr(features, "GPU_SHARE", 0.0)
    assert not cache.to_device("cuda")
    monkeypatch.undo()
    monkeypatch.setattr(features, "_TRANSFER", 100_000)
    assert cache.to_device("cuda")
    held = cache.read(indices, "cuda")
    for one, other, third in zip(expected, streamed, held, strict=True):
        assert other.is_cuda and third.is_cuda
        assert torch.equal(one, other.cpu()) and torch.equal(one, third.cpu())


def test_workers_and_odd_sizes_give_the_same(model, dataset, folder):
    """A side that is no multiple of 32 is padded, as in the detector."""
    crops = Crops([dataset], 50, crops=2)
    one = cache_features(folder / "a", model, crops, workers=0)
    two = cache_features(folder / "b", model, crops, workers=2)
    assert one.folder.name == two.folder.name
    assert one.maps[0].shape[2:] == (16, 16)
    for a, b in zip(one.maps, two.maps, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(t["boxes"].max() <= 49 for t in one.targets if len(t["boxes"]))


# -------------------------------------------------------------------------------------------- keys
@pytest.fixture
def own_copy(cfg, data_root, tmp_path):
    """A config whose data may be changed: a copy of the small set."""
    shutil.copytree(data_root / "val", tmp_path / "copy")
    entry = {
        "FORMAT": "coco",
        "IMAGES": str(tmp_path / "copy/images"),
        "ANNOTATIONS": str(tmp_path / "copy/annotations.json"),
    }
    own = ["DATASETS.CUSTOM", {"copy": entry}, "DATASETS.TRAIN", ["copy"], "DATASETS.TEST", []]
    return lambda: build_dataset(load_config(None, own), "copy")


def test_what_makes_another_cache(model, own_copy, tmp_path):
    def key(crops=0, size=SIZE, seed=0):
        return feature_key(model, Crops([own_copy()], size, crops, seed), tmp_path)

    def repaint():
        """Another picture, to the byte as large."""
        path = tmp_path / "copy/images/001.png"
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes(8) + content[-12:])

    def relabel(change):
        path = tmp_path / "copy/annotations.json"
        tree = json.loads(path.read_text())
        change(tree["annotations"][0])
        path.write_text(json.dumps(tree))

    def crowd(box):
        box["iscrowd"] = 1

    def move(box):
        box["bbox"][0] += 1

    def category(box):
        box["category_id"] = 30 - box["category_id"]

    first = key()
    os.utime(tmp_path / "copy/images/001.png", (1, 1))
    assert key() == first  # a copy of the data need not keep the files' times
    assert key(seed=1) == first  # the centre is not random
    keys = [first, key(size=96), key(crops=1), key(crops=2), key(crops=1, seed=1)]
    assert feature_key(model, Crops([own_copy()] * 2, SIZE), tmp_path) not in keys
    model.head.cls_logits.bias.data += 1
    assert key() == first  # the head takes no part
    changes = [
        repaint,
        lambda: relabel(move),
        lambda: relabel(category),
        lambda: relabel(crowd),
        (tmp_path / "copy/images/002.png").unlink,
        lambda: model.preprocess.mean.add_(1),
        lambda: setattr(model.preprocess, "size_divisibility", 64),
        lambda: next(model.backbone.parameters()).data.view(-1)[-1].add_(1e-3),
        lambda: next(
            m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)
        ).running_var.mul_(2),
        lambda: setattr(
            next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)), "stride", (1, 1)
        ),
    ]
    for change in changes:
        change()
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_images_are_read_once_to_know_their_content(model, own_copy, tmp_path, monkeypatch):
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))

    def key():
        read.clear()
        return feature_key(model, Crops([own_copy()], SIZE), tmp_path / "cache")

    (tmp_path / "cache").mkdir()
    images = sorted((tmp_path / "copy/images").iterdir())
    first = key()
    assert sorted(read) == images
    assert key() == first and read == []
    os.utime(images[2], (1, 1))
    assert key() == first and read == [images[2]]
    shutil.copytree(tmp_path / "copy", tmp_path / "newer")  # with times of its own
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "newer").rename(tmp_path / "copy")
    assert key() == first and len(read) == len(images)
    for damage in (b"{", b"[]", b'{"x": 1}', b"\xff"):
        (tmp_path / "cache/images.json").write_bytes(damage)
        assert key() == first and len(read) == len(images)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("level*.npy"))}


def test_a_finished_cache_is_found_again(cfg, model, folder, caplog):
    caplog.set_level(logging.INFO)
    train, val = build_caches(cfg, model, folder)
    assert len(train) == 2 * len(build_dataset(cfg, "train_train"))
    assert len(val) == len(build_dataset(cfg, "train_val"))
    assert not list(folder.glob("*.partial"))
    assert "may be deleted" not in caplog.text
    before = stamps(folder)
    assert len(before) == 8
    again = build_caches(cfg, make_model(cfg), folder)
    assert [c.folder for c in again] == [train.folder, val.folder]
    assert stamps(folder) == before

    next(model.backbone.parameters()).data.mul_(1.5)
    other = build_caches(cfg, model, folder)
    assert {c.folder for c in other}.isdisjoint({train.folder, val.folder})
    assert before.items() <= stamps(folder).items()
    (line,) = [r.getMessage() for r in caplog.records if "may be deleted" in r.getMessage()]
    assert train.folder.name in line and val.folder.name in line and "MB)" in line


def test_crops_without_a_box(cfg, model, folder, monkeypatch, caplog):
    """Of one class, which is told; and of all, which is refused."""
    dropped = [1]
    crop = Crops._crop

    def cropped(crops, *args):
        picture, target = crop(crops, *args)
        keep = torch.tensor([int(label) not in dropped for label in target["labels"]]).bool()
        return picture, target | {name: target[name][keep] for name in ("boxes", "labels")}

    monkeypatch.setattr(Crops, "_crop", cropped)
    names = class_names(cfg)
    build_caches(cfg, model, folder / "one")
    assert f"meta-val: no crop has a box of {names[0]!r}" in caplog.text
    dropped += range(2, len(names) + 1)
    with pytest.raises(DataError, match=r"no crop of meta-train has a box.*SEARCH\.CACHE\.CROPS"):
        build_caches(cfg, model, folder / "none")


def shorten(folder):
    path = folder / "level2.npy"
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, "level2.npy has .* bytes instead of"),
        (lambda folder: (folder / "targets.npz").unlink(), "targets.npz is missing"),
        (lambda folder: (folder / "cache.json").unlink(), "has no cache.json"),
        (lambda folder: (folder / "cache.json").write_text("{"), "cache.json is damaged"),
    ],
)
def test_a_damaged_cache_is_made_anew(model, dataset, folder, damage, message, caplog):
    crops = Crops([dataset], SIZE)
    cache = cache_features(folder, model, crops)
    expected = np.array(cache.maps[2])
    damage(cache.folder)
    with pytest.raises(CacheError, match=message):
        FeatureCache.open(cache.folder)
    again = cache_features(folder, model, crops)
    assert "cache features is made anew" in caplog.text
    np.testing.assert_array_equal(again.maps[2], expected)


@pytest.mark.parametrize("name", ["level1.npy", "targets.npz"])
def test_damage_that_keeps_the_size_is_found(model, dataset, folder, name, caplog):
    crops = Crops([dataset], SIZE)
    cache = cache_features(folder, model, crops)
    expected = np.array(cache.maps[1])
    with (cache.folder / name).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff\xff" * 4)  # nan in half precision
    again = cache_features(folder, model, crops)
    assert f"{name} is damaged: its checksum is wrong" in caplog.text
    np.testing.assert_array_equal(again.maps[1], expected)
    caplog.clear()
    cache_features(folder, model, crops)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# -------------------------------------------------------------------------------------- what fails
def nothing_but_locks(folder):
    """Nor the memory of what the images are."""
    return all(path.suffix == ".lock" or path.name == "images.json" for path in folder.iterdir())


def test_the_estimate_is_the_size(model, dataset, folder):
    cache = cache_features(folder, model, Crops([dataset], SIZE))
    shapes = feature_shapes(model, SIZE)
    assert [array.shape[1:] for array in cache.maps] == shapes
    files = sum(path.stat().st_size for path in cache.folder.glob("level*.npy"))
    assert estimate_bytes(shapes, len(dataset)) == cache.nbytes == files - 4 * 128


Usage = namedtuple("Usage", "total used free")


def test_too_small_a_disk(cfg, model, folder, monkeypatch):
    """The two caches have to fit together, and leave a little room."""
    train, val = (len(build_dataset(cfg, f"train_{part}")) for part in ("train", "val"))
    needed = estimate_bytes(feature_shapes(model, SIZE), 2 * train + val)
    free = int(needed / 0.95) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    with pytest.raises(CacheError) as error:
        build_caches(cfg, model, folder)
    for part in (
        *(f"{2 * train} (meta-train) and {val} (meta-val)", f"{needed / 1e6:.1f} MB"),
        *("SEARCH.CACHE.SIZE", "SEARCH.CACHE.CROPS", "SEARCH.CACHE.FOLDER", str(folder)),
    ):
        assert part in str(error.value)
    assert nothing_but_locks(folder)
    free += 2
    build_caches(cfg, model, folder)
    free = 0
    build_caches(cfg, model, folder)  # they are there


def test_a_cache_that_is_not_accepted_is_not_made(cfg, model, folder):
    train, val = build_caches(cfg, model, folder / "a")
    asked = []

    def refuse(*names):
        asked.append(names)
        raise ValueError("not these")

    with pytest.raises(ValueError, match="not these"):
        build_caches(cfg, model, folder / "b", refuse)
    assert asked == [(train.folder.name, val.folder.name)]
    assert not [path for path in folder.glob("b/*") if path.is_dir()]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile(model, dataset, folder, monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(CacheError) as error:
        cache_features(folder, model, Crops([dataset], SIZE))
    needed = estimate_bytes(feature_shapes(model, SIZE), len(dataset))
    for part in (str(folder), f"{needed / 1e6:.1f} MB are needed", "are free",
                 os.strerror(number), "SEARCH.CACHE.FOLDER"):  # fmt: skip
        assert part in str(error.value)
    assert nothing_but_locks(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits for files here")
def test_the_longest_file_a_process_may_write(model, dataset, folder):
    import resource

    longest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, longest[1]))
    try:
        with pytest.raises(CacheError, match="File too large.*SEARCH.CACHE.FOLDER"):
            cache_features(folder, model, Crops([dataset], SIZE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, longest)
    assert nothing_but_locks(folder)


def test_maps_beyond_half_precision(model, dataset, folder):
    with torch.no_grad():
        for layer in model.backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.mul_(1000)
    with pytest.raises(CacheError, match=r"map \d reaches .*half precision"):
        cache_features(folder, model, Crops([dataset], SIZE), workers=1)
    assert nothing_but_locks(folder)
    assert not multiprocessing.active_children()


def test_unreadable_images_are_left_out(model, own_copy, tmp_path, folder, caplog):
    expected = cache_features(folder, model, Crops([own_copy()], SIZE, crops=2))
    for name in ("002.png", "007.png"):
        (tmp_path / "copy/images" / name).write_bytes(b"no picture")
    dataset = own_copy()
    cache = cache_features(folder, model, Crops([dataset], SIZE, crops=2), workers=1)
    assert cache.folder != expected.folder
    assert len(cache) == len(expected) - 4 == len(cache.maps[0])
    keep = [row for row in range(len(expected)) if row // 2 not in (1, 6)]
    # Batches are composed otherwise, so sums may be rounded otherwise.
    for a, b in zip(cache.maps, expected.maps, strict=True):
        np.testing.assert_allclose(a.astype(float), b[keep].astype(float), rtol=2e-3, atol=1e-3)
    for target, row in zip(cache.targets, keep, strict=True):
        assert torch.equal(target["boxes"], expected.targets[row]["boxes"])
    assert "4 of 14 crops are missing" in caplog.text
    assert len(FeatureCache.open(cache.folder)) == 10

    dataset.max_bad_images = 1
    with pytest.raises(DataError, match="MAX_BAD_IMAGES = 1"):
        cache_features(folder / "other", model, Crops([dataset], SIZE))
    assert nothing_but_locks(folder / "other")


def test_no_readable_image(model, own_copy, tmp_path, folder):
    for path in (tmp_path / "copy/images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the images can be read"):
        cache_features(folder, model, Crops([own_copy()], SIZE))
    assert nothing_but_locks(folder)


# --------------------------------------------------------------------------------------- processes
FORK = multiprocessing.get_context("fork")


def test_what_a_killed_build_leaves_is_removed(model, dataset, folder, caplog):
    def build_and_die():
        model.backbone.register_forward_hook(
            lambda *_: (
                os.kill(os.getpid(), signal.SIGKILL)
                if list(folder.glob("*.partial/level0.npy"))
                else None
            )
        )
        cache_features(folder, model, Crops([dataset], SIZE), batch_size=2)

    process = FORK.Process(target=build_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (partial,) = folder.glob("*.partial")
    caplog.set_level(logging.INFO)
    cache = cache_features(folder, model, Crops([dataset], SIZE, crops=1))  # another one
    assert not partial.exists() and f"removing {partial}" in caplog.text
    assert [path for path in folder.iterdir() if path.is_dir()] == [cache.folder]


def test_a_process_may_have_the_number_of_one_that_was_killed(
    model, dataset, folder, monkeypatch
):
    """As in a container that was started anew; here on a file system without locks."""
    first = cache_features(folder, model, Crops([dataset], SIZE))
    monkeypatch.setattr(store, "unless_held", lambda path: contextlib.nullcontext(None))
    name = f"{first.folder.name}.{socket.gethostname()}-{os.getpid()}.partial"
    first.folder.rename(folder / name)
    assert len(cache_features(folder, model, Crops([dataset], SIZE))) == len(first)
    assert not (folder / name).exists()


def test_two_processes_make_it_once(model, dataset, folder):
    counter = folder.parent / "batches"

    def build():
        def count(*_):
            with counter.open("a") as file:
                file.write("x")

        model.backbone.register_forward_hook(count)
        cache = cache_features(folder, model, Crops([dataset], SIZE), batch_size=2)
        assert len(cache) == len(dataset)

    processes = [FORK.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # One of them is for the shapes.
    assert len(counter.read_text()) == 1 + -(-len(dataset) // 2)


def test_progress_in_the_log(model, dataset, folder, caplog, monkeypatch):
    monkeypatch.setattr("nasfcos.engine.logging.LOG_EVERY", 0.0)
    caplog.set_level(logging.INFO)
    cache_features(folder, model, Crops([dataset], SIZE), batch_size=4, title="meta-val")
    lines = [r.getMessage() for r in caplog.records if getattr(r, "periodic", False)]
    assert lines[0].startswith(f"content of the images: {len(dataset)} of {len(dataset)} files, ")
    assert lines[1].startswith(f"cache meta-val: 4 of {len(dataset)} crops, ")
    assert lines[1].endswith(" to go")


# ------------------------------------------------------------------------------------- the pyramid
CELLS = [[[1, 2, 4, 3, 1]], [[2, 3, 0, 3, 0]], [[3, 3, 0, 0, 0]]]


def make_neck(model, cells=CELLS):
    torch.manual_seed(1)
    return NASFPN(model.backbone.out_channels, 16, Genotype.parse(cells))


def test_the_pyramid_is_the_neck_s(model, dataset, folder):
    source = cache_features(folder, model, Crops([dataset], SIZE))
    neck = make_neck(model).train()
    pyramid = cache_pyramid(folder, neck, source, batch_size=4)
    assert neck.training and len(pyramid) == len(source) and pyramid.size == SIZE
    maps = [level.float() for level in source.read(range(len(source)))]
    with torch.no_grad():
        expected = neck.eval()(maps)
    assert len(pyramid.maps) == 5
    for array, level in zip(pyramid.maps, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(np.array(array)).float(), level, rtol=2e-3, atol=1e-3
        )
    for one, other in zip(pyramid.targets, source.targets, strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
        assert torch.equal(one["labels"], other["labels"])


def test_what_makes_another_pyramid(model, dataset, folder, caplog):
    caplog.set_level(logging.INFO)
    source = cache_features(folder, model, Crops([dataset], SIZE))
    first = cache_pyramid(folder, make_neck(model), source)
    before = stamps(folder)
    assert cache_pyramid(folder, make_neck(model), source).folder == first.folder
    assert stamps(folder) == before
    assert "may be deleted" not in caplog.text
    # The same layers and weights, connected otherwise.
    rewired = make_neck(model, [[[2, 1, 4, 3, 1]], *CELLS[1:]])
    others = [
        cache_pyramid(folder, rewired, source),
        cache_pyramid(
            folder, make_neck(model), cache_features(folder, model, Crops([dataset], 96))
        ),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 3
    (line,) = [r.getMessage() for r in caplog.records if "may be deleted" in r.getMessage()]
    assert first.folder.name in line and Path(source.folder).name not in line
