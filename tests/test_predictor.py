"""Prediction with a small real model of random weights."""

import json
import os
import pickle
import resource
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.config import ConfigError, load_config, override_config
from nasfcos.data import DataError
from nasfcos.data.records import UnreadableImage
from nasfcos.engine.checkpoint import CONTENT
from nasfcos.models.build import build_detector
from nasfcos.models.weights import WeightsError
from nasfcos.predictor import Predictor, find_inputs, predict_files
from nasfcos.visualize import draw_detections

CLASSES = ["cat", "dog", "ox"]


SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.NECK.NAME", "fpn", "MODEL.NECK.CHANNELS", 64),
    *("MODEL.RESNET.BLOCKS", [1, 1, 1, 1], "MODEL.RESNET.STEM_CHANNELS", 8),
    *("MODEL.HEAD.NUM_CONVS", 1, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
    # A fresh model is sure of nothing; these let some of it through.
    *("TEST.SCORE_THRESHOLD", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10),
]


def small_config(*overrides):
    return load_config(None, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def cfg():
    return small_config()


@pytest.fixture(scope="module")
def checkpoint(cfg, tmp_path_factory):
    torch.manual_seed(0)
    model = build_detector(cfg, len(CLASSES))
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict(), "classes": CLASSES}, path)
    return path


@pytest.fixture(scope="module")
def predictor(cfg, checkpoint):
    return Predictor(cfg, checkpoint)


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    return blobs.resize((250, 150), Image.Resampling.BICUBIC)


def assert_same(a, b):
    assert a.keys() == b.keys() == {"boxes", "scores", "labels"}
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_boxes_come_back_in_the_pixels_of_the_image(predictor, picture):
    found = predictor(picture)
    assert len(found["boxes"]) >= 10
    # 150 x 250 becomes 64 x 106: the long side is cut to a whole number, so the ratios differ.
    small = np.array(picture.resize((106, 64), Image.Resampling.BILINEAR))
    with torch.no_grad():
        raw = predictor.model([torch.from_numpy(small).permute(2, 0, 1)])[0]
    expected = raw["boxes"] * torch.tensor([250 / 106, 150 / 64, 250 / 106, 150 / 64])
    expected = expected.minimum(torch.tensor([249.0, 149, 249, 149])).clamp(min=0)
    torch.testing.assert_close(found["boxes"], expected)
    torch.testing.assert_close(found["scores"], raw["scores"])
    assert (found["boxes"][:, 2] > 110).any()  # beyond the resized image
    assert found["scores"].diff().max() <= 0
    assert set(found["labels"].tolist()) <= {1, 2, 3}


def test_every_way_to_give_an_image_gives_the_same(predictor, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = predictor(picture)
    for image in (path, str(path), array, tensor, tensor.float() / 255, picture.convert("RGBA")):
        assert_same(predictor(image), expected)
    both = predictor([path, array])
    assert isinstance(both, list) and len(both) == 2
    assert_same(both[1], expected)
    assert predictor([]) == []


def test_draws_what_it_found(predictor, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    found = predictor(path)
    threshold = float(found["scores"][1:3].mean())
    best = {key: x[:2] for key, x in found.items()}
    drawn = predictor.draw(path, found, threshold)
    assert isinstance(drawn, Image.Image) and drawn.size == picture.size
    expected = draw_detections(picture, best, CLASSES, 0.0)
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    np.testing.assert_array_equal(np.asarray(predictor.draw(picture, best, 0.0)), expected)
    assert predictor.draw(path, found, 1.1).tobytes() == picture.tobytes()


def test_files_are_turned_upright(predictor, picture, tmp_path):
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert_same(predictor(tmp_path / "turned.png"), predictor(picture))


def test_grey_and_cmyk_files_are_read(predictor, picture, tmp_path):
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("grey.png", "cmyk.jpg"):
        assert predictor(tmp_path / name)["boxes"].shape[1] == 4


def test_what_is_no_image_is_refused(predictor, tmp_path):
    with pytest.raises(UnreadableImage, match="nowhere.jpg does not exist"):
        predictor(tmp_path / "nowhere.jpg")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UnreadableImage, match="text.jpg cannot be read"):
        predictor(tmp_path / "text.jpg")
    for bad in (
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 3), np.float64),
        np.zeros((0, 30, 3), np.uint8),
        torch.zeros(1, 20, 30),
        torch.zeros(20, 30, 3),
        torch.full((3, 20, 30), 200.0),
        torch.full((3, 20, 30), torch.nan),
        Image.new("RGB", (0, 30)),
        b"not a picture",
        None,
    ):
        with pytest.raises(ValueError, match="an image (must|of)"):
            predictor(bad)


def test_dtype(cfg, checkpoint, picture):
    exact = Predictor(cfg, checkpoint)(picture)
    rounded = Predictor(small_config("TEST.DTYPE", "bfloat16"), checkpoint)(picture)
    assert rounded["scores"].dtype == rounded["boxes"].dtype == torch.float32
    assert not torch.equal(rounded["scores"], exact["scores"])
    torch.testing.assert_close(rounded["scores"][:10], exact["scores"][:10], rtol=0.02, atol=0.001)
    with pytest.raises(ConfigError, match="TEST.DTYPE: float16 needs a GPU"):
        Predictor(small_config("TEST.DTYPE", "float16"), checkpoint)


def test_class_names_follow_the_weights_then_the_data_then_numbers(cfg, checkpoint):
    assert Predictor(cfg, checkpoint).class_names == CLASSES
    nameless = {"model": torch.load(checkpoint, weights_only=True)["model"]}

    own = {"FORMAT": "coco", "IMAGES": "i", "ANNOTATIONS": "a.json", "CLASSES": ["a", "b", "c"]}
    known = small_config("DATASETS.TRAIN", ["own"], "DATASETS.CUSTOM", {"own": own})
    assert Predictor(known, nameless).class_names == ["a", "b", "c"]

    unknown = small_config("MODEL.NUM_CLASSES", 3)  # and coco, the default data, has 80
    assert Predictor(unknown, nameless).class_names == ["1", "2", "3"]


def write_checkpoint(path, classes):
    model = build_detector(small_config(), len(classes))
    content = {"model": model.state_dict(), "classes": classes, "iteration": 10}
    torch.save(dict.fromkeys(CONTENT, {}) | content, path)


def config_file(path, weight, output_dir):
    path.write_text(f"MODEL: {{WEIGHT: '{weight}'}}\nOUTPUT_DIR: {output_dir}\n")
    return path


@pytest.mark.parametrize(
    "source", ["", "catalog://ImageNetPretrained/MSRA/R-50", "torchvision://resnet50", "resnet.pth"]
)
def test_without_a_detector_the_newest_checkpoint_counts(source, tmp_path):
    if source == "resnet.pth":
        source = str(backbone_file(tmp_path))
    config = load_config(config_file(tmp_path / "own.yaml", source, tmp_path), SMALL)
    with pytest.raises(ConfigError, match="no checkpoint.*trained detector.*MODEL.WEIGHT"):
        Predictor(config)
    write_checkpoint(tmp_path / "model_0000010.pth", CLASSES)
    assert Predictor(config).class_names == CLASSES


def test_what_a_run_started_from_does_not_replace_what_it_trained(tmp_path):
    start, final = tmp_path / "start.pth", tmp_path / "out" / "model_final.pth"
    final.parent.mkdir()
    write_checkpoint(start, ["bird"])
    file = config_file(tmp_path / "own.yaml", start, final.parent)
    config = load_config(file, SMALL)
    assert Predictor(config).class_names == ["bird"]
    write_checkpoint(final, CLASSES)
    assert Predictor(config).class_names == CLASSES
    assert Predictor(pickle.loads(pickle.dumps(config.clone()))).class_names == CLASSES

    given = load_config(file, [*SMALL, "MODEL.WEIGHT", str(start)])
    assert Predictor(given).class_names == ["bird"]
    assert Predictor(override_config(config, ["MODEL.WEIGHT", str(start)], "")).class_names == [
        "bird"
    ]
    config = load_config(config_file(file, "", final.parent), SMALL)
    config.defrost()
    config.MODEL.WEIGHT = str(start)
    assert Predictor(config).class_names == ["bird"]
    with pytest.raises(ConfigError, match="MODEL.WEIGHT torchvision://resnet50 is a backbone"):
        Predictor(override_config(config, ["MODEL.WEIGHT", "torchvision://resnet50"], ""))


def backbone_file(folder):
    weights = {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1)}
    torch.save(weights, folder / "resnet.pth")
    return folder / "resnet.pth"


def test_a_file_of_a_backbone_is_refused(cfg, tmp_path):
    with pytest.raises(WeightsError, match="resnet.pth.*trained detector"):
        Predictor(cfg, backbone_file(tmp_path))


def test_weights_of_another_model_are_refused(checkpoint):
    with pytest.raises(WeightsError, match="does not fit"):
        Predictor(small_config("MODEL.NECK.CHANNELS", 128), checkpoint)


# --------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path, picture):
    path = tmp_path / "in"
    (path / "deep").mkdir(parents=True)
    picture.save(path / "a.jpg")
    picture.crop((0, 0, 100, 140)).save(path / "b.bmp")
    picture.save(path / "deep" / "c.png")
    (path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (path / "notes.txt").write_text("not an image")
    return path


def files_in(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_a_folder_becomes_pictures_and_json(predictor, folder, tmp_path, caplog):
    out = tmp_path / "out"
    found = predictor(folder / "b.bmp")
    threshold = float(found["scores"][4:6].mean())
    summary = predict_files(predictor, str(folder), out, threshold)
    assert (summary.images, summary.videos, summary.skipped) == (2, 0, 1)
    assert "broken.png" in caplog.text
    assert files_in(out) == ["a.jpg", "b.bmp.jpg", "detections.json", "sheet.jpg"]

    first, second = json.loads((out / "detections.json").read_text())
    assert (first["file"], first["width"], first["height"]) == ("a.jpg", 250, 150)
    assert (second["file"], second["width"], second["height"]) == ("b.bmp", 100, 140)
    assert len(second["detections"]) == (found["scores"] >= threshold).sum() == 5
    for entry, box, label in zip(
        second["detections"], found["boxes"].tolist(), found["labels"].tolist(), strict=False
    ):
        assert entry["box"] == pytest.approx(box, abs=0.01)
        assert entry["score"] >= threshold - 1e-5
        assert (entry["label"], entry["class"]) == (label, CLASSES[label - 1])

    drawn = np.array(Image.open(out / "b.bmp.jpg")).astype(int)
    assert drawn.shape == (140, 100, 3)
    assert np.abs(drawn - np.array(Image.open(folder / "b.bmp")).astype(int)).max() > 100


def test_inputs_by_file_folder_and_pattern(folder):
    assert find_inputs(str(folder / "a.jpg")) == (folder, [folder / "a.jpg"])
    root, files = find_inputs(str(folder))
    assert root == folder and [f.name for f in files] == ["a.jpg", "b.bmp", "broken.png"]
    root, files = find_inputs(str(folder / "**" / "*.[jp][pn]g"))
    assert root == folder
    assert [f.relative_to(folder).as_posix() for f in files] == [
        "a.jpg",
        "broken.png",
        "deep/c.png",
    ]
    for nothing in (folder / "*.tiff", folder / "missing.jpg", folder / "missing"):
        with pytest.raises(DataError, match="does not exist"):
            find_inputs(str(nothing))
    (folder / "empty").mkdir()
    (folder / "empty" / "._a.jpg").touch()
    with pytest.raises(DataError, match="holds no images"):
        find_inputs(str(folder / "empty"))


def test_inputs_are_never_overwritten(predictor, folder):
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    with pytest.raises(DataError, match="would replace an input"):
        predict_files(predictor, str(folder), folder)
    with pytest.raises(DataError, match="a.jpg is a file; name a folder"):
        predict_files(predictor, str(folder / "broken.png"), folder / "a.jpg")
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == before


def test_a_link_to_nothing_is_skipped_aloud(predictor, folder, tmp_path, caplog):
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    before = predict_files(predictor, str(folder), tmp_path / "one").skipped
    (folder / "gone.jpg").unlink()
    assert "gone.jpg does not exist" in caplog.text
    assert predict_files(predictor, str(folder), tmp_path / "two").skipped == before - 1


def test_an_output_folder_that_cannot_be_made(predictor, folder):
    with pytest.raises(DataError, match="output folder .* cannot be made.*name another one"):
        predict_files(predictor, str(folder / "a.jpg"), folder / "a.jpg" / "found")


def test_outputs_never_overwrite_each_other(predictor, folder, tmp_path):
    out = tmp_path / "out"
    (folder / "a.jpg").rename(folder / "sheet.jpg")
    with pytest.raises(DataError, match="sheet.jpg would be written twice"):
        predict_files(predictor, str(folder), out)
    assert not out.exists()
    predict_files(predictor, str(folder / "sheet.jpg"), out)  # alone, there is no sheet
    assert files_in(out) == ["detections.json", "sheet.jpg"]
    (folder / "sheet.jpg").rename(folder / "b.bmp.jpg")
    with pytest.raises(DataError, match="b.bmp.jpg would be written twice"):
        predict_files(predictor, str(folder), out)


def test_what_an_input_leaves_besides_is_looked_at(predictor, tmp_path):
    """A video's lines, and the PNG that a picture too long for a JPEG becomes."""
    for folder in ("videos", "short", "long"):
        (tmp_path / folder).mkdir()
    for name in ("a.mp4", "a.MP4"):
        (tmp_path / "videos" / name).touch()
    with pytest.raises(DataError, match="a.jsonl would be written twice"):
        predict_files(predictor, str(tmp_path / "videos"), tmp_path / "out")
    for folder, width in (("short", 90), ("long", 65501)):
        Image.new("RGB", (90, 60)).save(tmp_path / folder / "a.jpg.png")
        Image.new("RGB", (width, 2)).save(tmp_path / folder / "a.bmp")
        (tmp_path / folder / "a.bmp").rename(tmp_path / folder / "a.jpg")
    assert predict_files(predictor, str(tmp_path / "short"), tmp_path / "out").images == 2
    with pytest.raises(DataError, match="a.jpg.png would be written twice"):
        predict_files(predictor, str(tmp_path / "long"), tmp_path / "out")


def test_a_picture_too_long_for_jpeg_becomes_png(predictor, tmp_path):
    Image.new("RGB", (65501, 2)).save(tmp_path / "long.bmp")
    assert predict_files(predictor, str(tmp_path / "long.bmp"), tmp_path / "out").images == 1
    assert files_in(tmp_path / "out") == ["detections.json", "long.bmp.jpg.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_is_kept_when_it_ends_early(
    predictor, folder, tmp_path, monkeypatch, error
):
    images = []

    def detect_one(self, picture):
        if images:
            raise error
        images.append(picture)
        return detect(self, picture)

    detect = Predictor._detect
    monkeypatch.setattr(Predictor, "_detect", detect_one)
    with pytest.raises(error):
        predict_files(predictor, str(folder), tmp_path / "out")
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["file"] == "a.jpg"


@pytest.mark.skipif(sys.platform != "linux", reason="names are not bytes elsewhere")
def test_a_name_in_another_encoding_loses_nothing(predictor, picture, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "a.png")
    for name in (b"/caf\xe9.png", b"/caf\xe9.avi"):
        os.link(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + name)
    summary = predict_files(predictor, str(tmp_path / "in"), tmp_path / "out")
    assert (summary.images, summary.skipped) == (2, 1)
    assert "caf\\xe9.avi: OpenCV takes only names in UTF-8; rename the video" in caplog.text
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in entries] == ["a.png", "caf\\xe9.png"]


def test_a_name_too_long_for_what_is_written_is_skipped(predictor, picture, tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for name in ("a" * 250 + ".bmp", "b.bmp"):
        picture.save(tmp_path / "in" / name)
    summary = predict_files(predictor, str(tmp_path / "in"), tmp_path / "out")
    assert (summary.images, summary.skipped) == (1, 1)
    assert "too long a name" in caplog.text
    assert files_in(tmp_path / "out") == ["b.bmp.jpg", "detections.json"]


def test_a_video_that_breaks_off_is_told(predictor, picture, tmp_path, caplog):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for _ in range(8):
        writer.write(np.array(picture.crop((0, 0, 96, 64))))
    writer.release()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert predict_files(predictor, str(path), tmp_path / "out").videos == 1
    lines = (tmp_path / "out" / "clip.avi.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 8
    assert f"only {len(lines)} of about 8 frames" in caplog.text


def test_a_video_that_cannot_be_written_replaces_none(predictor, picture, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for _ in range(2):
        writer.write(np.array(picture.crop((0, 0, 96, 64))))
    writer.release()
    out = tmp_path / "out"
    out.mkdir()
    (out / "clip.avi.mp4").write_bytes(b"of an earlier run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a full disk looks the same
    try:
        with pytest.raises(OSError, match="clip.avi.mp4 could not be written"):
            predict_files(predictor, str(path), out, score_threshold=0.99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(out) == ["clip.avi.mp4"]
    assert (out / "clip.avi.mp4").read_bytes() == b"of an earlier run"


def test_a_video_becomes_a_video_and_json_lines(predictor, picture, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for shift in range(4):
        frame = np.array(picture.crop((shift, 0, shift + 96, 64)))
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    (tmp_path / "broken.mp4").write_bytes(b"nothing")

    out = tmp_path / "out"
    summary = predict_files(predictor, str(tmp_path / "*.*"), out, score_threshold=0.0)
    assert (summary.images, summary.videos, summary.skipped) == (0, 1, 1)
    assert files_in(out) == ["clip.avi.jsonl", "clip.avi.mp4"]
    lines = [json.loads(line) for line in (out / "clip.avi.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["time"]) for line in lines] == [
        (0, 0),
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
    ]
    assert all(line["detections"] and line["width"] == 96 for line in lines)
    capture = cv2.VideoCapture(str(out / "clip.avi.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    frames = 0
    while capture.read()[0]:
        frames += 1
    assert frames == 4
