"""Image files of all modes, depths and orientations."""

import numpy as np
import pytest
from PIL import Image

from nasfcos.data import DataError, build_dataset
from nasfcos.data.dataset import DetectionDataset
from nasfcos.data.images import load_image, load_pixels, read_size
from nasfcos.data.records import UnreadableImage

RAMP = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (24, 1))


def rgb(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"),
     ("L", "jpg"), ("P", "gif"), ("CMYK", "tif")],
)  # fmt: skip
def test_modes(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).convert(mode).save(path)
    found = rgb(load_image(path))
    assert found.shape == (24, 32, 3)
    expected = np.array(Image.fromarray(RAMP).convert("1").convert("L")) if mode == "1" else RAMP
    assert np.abs(found - expected[..., None].astype(int)).max() <= (6 if suffix != "png" else 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert (rgb(load_image(path)) == RAMP[..., None]).all()


def test_big_endian_and_integer_and_float(tmp_path):
    deep = RAMP.astype(np.uint16) * 257
    big = Image.frombytes("I;16B", (32, 24), deep.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float255.tif")
    for name in ("big", "int", "float", "float255"):
        assert (rgb(load_image(tmp_path / f"{name}.tif")) == RAMP[..., None]).all(), name


def stored_with_orientation(path, orientation):
    """A picture of 32 x 24 stored pixels whose upper left stored corner is red."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:8, :8, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),  # where the red corner is when displayed (row, column)
    [(1, (32, 24), (0, 0)), (2, (32, 24), (0, -1)), (3, (32, 24), (-1, -1)),
     (4, (32, 24), (-1, 0)), (5, (24, 32), (0, 0)), (6, (24, 32), (0, -1)),
     (7, (24, 32), (-1, -1)), (8, (24, 32), (-1, 0))],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, size, corner, suffix):
    path = stored_with_orientation(tmp_path / f"x.{suffix}", orientation)
    image = load_image(path)
    assert image.size == size and read_size(path) == size[::-1]
    assert rgb(image)[corner].tolist() == [255, 0, 0]


def test_annotated_size_decides_about_quarter_turns(tmp_path):
    path = stored_with_orientation(tmp_path / "x.png", 6)
    assert load_image(path, (24, 32)).size == (32, 24)  # annotated on the stored pixels
    assert load_image(path, (32, 24)).size == (24, 32)  # annotated as displayed
    assert load_image(path, (99, 99)).size == (24, 32)
    half_turn = stored_with_orientation(tmp_path / "y.png", 3)
    assert rgb(load_image(half_turn, (24, 32)))[-1, -1].tolist() == [255, 0, 0]


def photograph(size=(90, 127)):
    """Colours that vary at every scale."""
    rng = np.random.default_rng(0)
    layers = [
        np.array(Image.fromarray(rng.integers(0, 80, (n, n, 3), dtype=np.uint8)).resize(size[::-1]))
        for n in (3, 13, 64)
    ]
    return Image.fromarray(sum(layers))


JPEGS = {
    "plain": {},
    "fine": {"quality": 98, "subsampling": 0},
    "half": {"subsampling": 1},
    "coarse": {"quality": 10},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_pixels_of_jpegs_are_those_of_pil(tmp_path, kind):
    settings = dict(JPEGS[kind])
    photograph().convert(settings.pop("mode", "RGB")).save(tmp_path / "x.jpg", **settings)
    pixels, size = load_pixels(tmp_path / "x.jpg")
    assert size == (90, 127) and pixels.dtype == np.uint8
    assert (pixels == rgb(load_image(tmp_path / "x.jpg"))).all()


@pytest.mark.parametrize("annotated", [None, (24, 32), (32, 24)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_pixels_are_turned_as_pictures_are(tmp_path, orientation, suffix, annotated):
    path = stored_with_orientation(tmp_path / f"x.{suffix}", orientation)
    image = load_image(path, annotated)
    pixels, size = load_pixels(path, annotated)
    assert size == (image.height, image.width)
    assert (pixels == rgb(image)).all()


def test_pixels_of_real_photographs_are_those_of_pil(real_data):
    paths = sorted((real_data / "coco").rglob("*.jpg"))[::4]
    assert len(paths) >= 10
    for path in paths:
        assert (load_pixels(path)[0] == rgb(load_image(path))).all(), path


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "enough", "reduction"),
    [((96, 128), None, 1), ((96, 128), 97, 1), ((96, 128), 49, 1), ((96, 128), 48, 2),
     ((96, 128), 25, 2), ((96, 128), 24, 4), ((96, 128), 12, 8), ((96, 128), 1, 8),
     ((96, 127), 12, 1), ((95, 128), 12, 1), ((96, 132), 12, 4)],
)  # fmt: skip
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(
    tmp_path, size, enough, reduction, orientation
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(size).save(tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    pixels, whole_size = load_pixels(tmp_path / "x.jpg", enough=enough)
    whole = load_image(tmp_path / "x.jpg")
    assert whole_size == (whole.height, whole.width)
    assert pixels.shape == (whole.height // reduction, whole.width // reduction, 3)
    assert np.abs(pixels - rgb(whole.reduce(reduction))).mean() < 1


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_files_that_break_off_are_not_taken_for_whole(tmp_path, share):
    path = tmp_path / "x.jpg"
    photograph().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match="truncated"):
        load_pixels(path)
    path.write_bytes(whole + b"\0" * 50)  # such as some cameras and file systems leave
    assert (load_pixels(path)[0] == rgb(load_image(path))).all()


@pytest.fixture
def dataset(make_config, write_coco):
    """load(overrides): five images with one box each."""

    def load(*overrides) -> DetectionDataset:
        entry = write_coco([{"image_id": i} for i in range(1, 6)], sizes=[(40, 60)] * 5)
        return build_dataset(make_config(*overrides, mine={**entry, "CLASSES": ["dog"]},
                             ), "mine")  # fmt: skip

    return load


def test_unreadable_images_are_named_once_then_too_many(dataset, tmp_path, caplog):
    data = dataset("DATASETS.TRAIN", ("mine",), "DATASETS.MAX_BAD_IMAGES", 2)
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "2.png").write_bytes(b"")
    whole = (tmp_path / "images" / "3.png").read_bytes()
    (tmp_path / "images" / "3.png").write_bytes(whole[: len(whole) // 2])
    for name in ("1.png", "2.png", "1.png"):
        with pytest.raises(UnreadableImage, match=name):
            data[int(name[0]) - 1]
    assert caplog.text.count("1.png is skipped") == 1
    assert caplog.text.count("2.png is skipped") == 1
    assert data[4][0].size == (60, 40)
    with pytest.raises(DataError, match=r"3 images.*1\.png, 2\.png, 3\.png.*MAX_BAD_IMAGES = 2"):
        data[2]


def test_size_that_differs_from_the_annotation_is_logged_once(dataset, tmp_path, caplog):
    data = dataset("DATASETS.TRAIN", ("mine",))
    for name in ("1.png", "2.png"):
        Image.new("RGB", (25, 12)).save(tmp_path / "images" / name)
    image, target = data[0]
    assert target["original_size"] == (12, 25) and image.size == (25, 12)
    assert target["boxes"].tolist() == [[10, 5, 24, 11]]
    data[1]
    assert caplog.text.count("annotated as 40 x 60") == 1
