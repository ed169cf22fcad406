"""Detection in files."""

import json
import os
import resource
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from nasfcos.data import DataError
from nasfcos.prediction import find_inputs, predict_files
from nasfcos.predictor import Predictor
from tests.small import CLASSES


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
    """A video's JSON lines, and the PNG for a picture that is too long for JPEG."""
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
