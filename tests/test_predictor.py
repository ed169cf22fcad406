"""Prediction with a small real model with random weights."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nasfcos.config import ConfigError, load_config, override_config
from nasfcos.data.records import UnreadableImage
from nasfcos.engine.checkpoint import CONTENT
from nasfcos.models.build import build_detector
from nasfcos.models.weights import WeightsError
from nasfcos.predictor import Predictor
from nasfcos.visualize import draw_detections
from tests.small import CLASSES, SMALL, small_config


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
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
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

    unknown = small_config("MODEL.NUM_CLASSES", 3)  # COCO, the default data, has 80
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
