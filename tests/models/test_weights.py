"""Weight files of every kind, and other files."""

import argparse
import collections
import contextlib
import hashlib
import http.server
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import nasfcos
from nasfcos import download
from nasfcos.models.weights import WeightsError, read_weights
from tests.known import ROOT, known_weights


def build(*overrides):
    path = ROOT / "configs" / "baselines" / "R_50_FPN_FCOS.yaml"
    return nasfcos.build_detector(nasfcos.load_config(path, ["MODEL.DEVICE", "cpu", *overrides]))


def caffe2_blobs(blocks=(3, 4, 6, 3)):
    """The content of a pickled Caffe2 ResNet-50."""
    random = np.random.RandomState(0)
    blobs = {}

    def conv(name, out_channels, in_channels, kernel):
        shape = (out_channels, in_channels, kernel, kernel)
        blobs[f"{name}_w"] = random.standard_normal(shape).astype(np.float32) * 0.05
        norm = "res_conv1_bn" if name == "conv1" else f"{name}_bn"
        blobs[f"{norm}_s"] = random.uniform(0.5, 1, out_channels).astype(np.float32)
        blobs[f"{norm}_b"] = random.standard_normal(out_channels).astype(np.float32) * 0.1

    conv("conv1", 64, 3, 7)
    channels = 64
    for stage, depth in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(depth):
            name = f"res{stage + 2}_{block}_branch"
            if block == 0:
                conv(f"{name}1", 4 * width, channels, 1)
            conv(f"{name}2a", width, channels, 1)
            conv(f"{name}2b", width, width, 3)
            conv(f"{name}2c", 4 * width, width, 1)
            channels = 4 * width
    blobs["fc1000_w"] = np.zeros((10, 2048), np.float32)
    blobs["fc1000_b"] = np.zeros(10, np.float32)
    blobs["conv1_w_momentum"] = np.zeros(3, np.float32)
    return blobs


def test_caffe2_pickle(tmp_path):
    blobs = caffe2_blobs()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    model = build()
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    assert nasfcos.load_weights(model, path).complete
    state = model.backbone.state_dict()
    block = "layer3.2"
    for part, name in (("2a", "1"), ("2b", "2"), ("2c", "3")):
        assert np.array_equal(state[f"{block}.conv{name}.weight"], blobs[f"res4_2_branch{part}_w"])
        assert np.array_equal(state[f"{block}.bn{name}.weight"], blobs[f"res4_2_branch{part}_bn_s"])
        assert np.array_equal(state[f"{block}.bn{name}.bias"], blobs[f"res4_2_branch{part}_bn_b"])
    assert np.array_equal(state["layer2.0.downsample.0.weight"], blobs["res3_0_branch1_w"])
    assert np.array_equal(state["stem.bn1.bias"], blobs["res_conv1_bn_b"])
    assert (state["layer4.2.bn3.running_var"] == 1).all()
    assert model.preprocess.std.tolist() == [1, 1, 1]
    for key, value in model.head.state_dict().items():
        assert torch.equal(value, head[key])


def randomize_norms(module):
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            torch.nn.init.uniform_(norm.weight, 0.5, 1, generator=generator)


@torch.no_grad()
def test_torchvision_resnet_gives_torchvision_features(tmp_path):
    reference = torchvision.models.resnet50(weights=None).eval()
    randomize_norms(reference)
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    model = build("MODEL.RESNET.STRIDE_IN_1X1", False).eval()
    report = nasfcos.load_weights(model, tmp_path / "resnet50.pth")
    assert report.complete

    image = torch.rand(3, 64, 96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image - mean[:, None, None]) / std[:, None, None])[None]
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    maps = model.backbone(model.preprocess([image])[0])
    for name, features in zip(("layer1", "layer2", "layer3", "layer4"), maps, strict=True):
        x = getattr(reference, name)(x)
        torch.testing.assert_close(features, x, rtol=1e-3, atol=1e-4 * x.std().item())


@torch.no_grad()
def test_torchvision_mobilenet_gives_torchvision_features():
    reference = torchvision.models.mobilenet_v2(weights=None).eval()
    randomize_norms(reference)
    model = build("MODEL.BACKBONE.NAME", "mobilenet_v2").eval()
    assert nasfcos.load_weights(model, reference.state_dict()).complete
    image = torch.rand(3, 64, 96)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((image - mean[:, None, None]) / std[:, None, None])[None]
    maps = model.backbone(model.preprocess([image])[0])
    for index, layer in enumerate(reference.features[:18]):
        x = layer(x)
        if index in (3, 6, 13, 17):
            features = maps[(3, 6, 13, 17).index(index)]
            torch.testing.assert_close(features, x, rtol=1e-3, atol=1e-4 * x.std().item())


def test_strict_lists_every_tensor_that_does_not_fit_and_changes_nothing():
    model = build("MODEL.NUM_CLASSES", 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = build("MODEL.NUM_CLASSES", 7).state_dict()
    state["head.extra"] = state.pop("head.centerness.bias")
    with pytest.raises(WeightsError) as error:
        nasfcos.load_weights(model, {"model": state})
    text = str(error.value)
    assert "missing from the source: head.centerness.bias" in text
    assert "unknown to the model: head.extra" in text
    assert "another shape: head.cls_logits.weight ([7, 256, 3, 3] there, [5, 256, 3, 3]" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_not_strict_loads_what_fits_and_logs_the_rest(caplog):
    source = build("MODEL.NUM_CLASSES", 7)
    model = build("MODEL.NUM_CLASSES", 5)
    fresh = model.head.cls_logits.weight.clone()
    report = nasfcos.load_weights(model, source.state_dict(), strict=False)
    assert len(report.misshapen) == 2 and not report.missing and not report.unexpected
    assert torch.equal(model.head.cls_logits.weight, fresh)
    assert torch.equal(model.head.box_pred.weight, source.head.box_pred.weight)
    assert "head.cls_logits.weight" in caplog.text


def model_files(folder):
    torchvision_models = torchvision.models
    sources = {
        "mobilenet_v2": torchvision_models.mobilenet_v2(weights=None).state_dict(),
        "resnet18": torchvision_models.resnet18(weights=None).state_dict(),
        "head": {"head.other": torch.ones(3), "preprocess.mean": torch.ones(3)},
    }
    for name, state in sources.items():
        torch.save(state, folder / f"{name}.pth")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("mobilenet_v2", "torchvision MobileNetV2.*: 0 of the 53 convolutions"),
        ("resnet18", "torchvision ResNet.*: 9 of the 53 convolutions"),
        ("head", "own checkpoint.*: no parameter"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_model_are_refused(tmp_path, file, words, strict):
    """Also for fine-tuning, which would be a training from scratch; the model is not changed."""
    model_files(tmp_path)
    model = build("MODEL.RESNET.STRIDE_IN_1X1", False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match="does not fit" if strict else words) as error:
        nasfcos.load_weights(model, tmp_path / f"{file}.pth", strict=strict)
    text = str(error.value)
    assert f"{file}.pth" in text and len(text.splitlines()) < 70
    missing = [line for line in text.splitlines() if "missing from the source" in line]
    assert len(missing) == 21 and re.search(r"and \d+ more, \d+ in all$", missing[-1])
    report = error.value.report
    count = int(re.search(r"(\d+) in all$", missing[-1])[1])
    assert len(report.missing) == count and not report.complete
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_backbone_that_lacks_some_loads_for_fine_tuning(caplog):
    source = torchvision.models.resnet50(weights=None).state_dict()
    del source["layer4.2.conv3.weight"], source["layer4.2.bn3.weight"]
    model = build("MODEL.RESNET.STRIDE_IN_1X1", False, "MODEL.RESNET.NORM", "bn")
    report = nasfcos.load_weights(model, source, strict=False)
    assert "backbone.layer4.2.conv3.weight" in report.missing
    assert "layer4.2.conv3.weight" in caplog.text
    conv = model.backbone.layer3[0].conv2.weight
    assert torch.equal(conv, source["layer3.0.conv2.weight"])


def test_own_checkpoint_keeps_classes_and_input_normalisation(tmp_path):
    source, model = build("MODEL.NUM_CLASSES", 2), build("MODEL.NUM_CLASSES", 2)
    source.preprocess.mean.fill_(7)
    torch.save({"model": source.state_dict(), "classes": ["a", "b"]}, tmp_path / "own.pth")
    assert read_weights(tmp_path / "own.pth").classes == ["a", "b"]
    nasfcos.load_weights(model, str(tmp_path / "own.pth"))
    assert model.preprocess.mean.tolist() == [7, 7, 7]


class Evil:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.nasfcos_was_here = True",))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_nothing_in_a_file_is_executed(tmp_path, suffix, protocol):
    import builtins

    path = tmp_path / f"evil.{suffix}"
    content = {"blobs": {"conv1_w": Evil()}, "model": Evil()}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_weights(path)
    assert not hasattr(builtins, "nasfcos_was_here")


class Corrupt:
    """An array with a dtype that would make numpy follow the array's bytes as pointers."""

    class Dtype:
        def __reduce__(self):
            state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 1)
            return np.dtype, ("V8", False, True), state

    def __reduce__(self):
        state = (1, (1,), Corrupt.Dtype(), False, b"\x41" * 8)
        return np.core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_array_types_with_pointers_are_refused(tmp_path):
    path = tmp_path / "corrupt.pkl"
    path.write_bytes(pickle.dumps({"conv1_w": Corrupt()}, protocol=2))
    with pytest.raises(WeightsError, match="an array of"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"conv1_w": np.array([object], dtype=object)}, protocol=2))
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_every_layout(tmp_path, protocol):
    arrays = {
        "conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "res_conv1_bn_s": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "res_conv1_bn_b": np.arange(3, dtype=">f4"),
        "step": np.float64(3),
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(collections.OrderedDict(arrays), protocol=protocol))
    tensors = read_weights(path).tensors
    for name, key in (
        ("conv1_w", "stem.conv1.weight"),
        ("res_conv1_bn_s", "stem.bn1.weight"),
        ("res_conv1_bn_b", "stem.bn1.bias"),
    ):
        assert np.array_equal(tensors[f"backbone.{key}"].numpy(), arrays[name])


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04broken"])
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"broken\.pth cannot be read"):
        read_weights(path)
    with pytest.raises(WeightsError, match=r"gone\.pth does not exist \(MODEL\.WEIGHT\)"):
        read_weights(tmp_path / "gone.pth")
    torch.save({"model": {"something.else": torch.ones(1)}}, path)
    with pytest.raises(WeightsError, match=r"none of the known kinds.*something\.else"):
        read_weights(path)


def flip_a_bit(path, value):
    """Damage one of the numbers `value` in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(np.full(8, value, np.float32).tobytes()) + 17] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"backbone.x": torch.full((100,), 3.0)}}, path)
    assert read_weights(path).tensors["backbone.x"].sum() == 300
    flip_a_bit(path, 3.0)
    with pytest.raises(WeightsError, match=r"model\.pth is damaged: wrong checksum of .*data/0 "):
        read_weights(path)


def test_a_file_that_was_cut_off_is_called_so(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"backbone.x": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(WeightsError, match=r"model\.pth cannot be read .*cut off"):
        read_weights(path)


@pytest.mark.parametrize("kind", ["text", "torch", "old torch"])
def test_nobody_is_advised_to_execute_a_file(tmp_path, kind):
    path = tmp_path / "model.pth"
    if kind == "text":
        path.write_text("MODEL:\n  WEIGHT: model.pth\n")
    else:
        content = {"model": {}, "args": argparse.Namespace(lr=0.01)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(WeightsError, match="save the model's state dict alone") as error:
        read_weights(path)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "module.module."])
def test_names_that_wrappers_made(prefix):
    model = build("MODEL.RESNET.BLOCKS", (1, 1, 1, 1))
    weights = {f"{prefix}{name}": x + 1 for name, x in model.state_dict().items()}
    assert nasfcos.load_weights(model, weights).complete
    assert all(torch.equal(x, weights[f"{prefix}{k}"]) for k, x in model.state_dict().items())
    weights = {name: x - 1 for name, x in model.state_dict().items()}
    parts = torch.nn.DataParallel(model)
    model.backbone = torch.compile(model.backbone, backend="eager")
    assert nasfcos.load_weights(parts, weights).complete
    assert nasfcos.load_weights(torch.compile(model, backend="eager"), weights).complete
    assert torch.equal(model.head.cls_logits.bias, weights["head.cls_logits.bias"])


def test_what_are_no_weights():
    model = build("MODEL.RESNET.BLOCKS", (1, 1, 1, 1))
    for source in (model, b"weights.pth", 3):
        with pytest.raises(TypeError, match="a path, a URL or a state dict, not"):
            nasfcos.load_weights(model, source)
    for source, words in (("", "no weights are named"), ({}, "the given state dict holds none")):
        with pytest.raises(WeightsError, match=words):
            nasfcos.load_weights(model, source)


@pytest.mark.parametrize("odd", ["sparse", "complex"])
def test_tensors_that_are_no_plain_numbers_are_refused(odd):
    model = build()
    state = {key: x.clone() for key, x in model.state_dict().items()}
    key = "backbone.stem.conv1.weight"
    source = dict(state)
    source[key] = state[key].to_sparse() if odd == "sparse" else state[key].to(torch.complex64)
    with pytest.raises(WeightsError, match=f"{re.escape(key)} is no plain tensor of numbers"):
        nasfcos.load_weights(model, source)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_released_file_on_disk(tmp_path):
    """As the release saved it: with the module prefix, beside the state of the finished run."""
    weights = {f"module.{k}": v for k, v in known_weights("Mobile_NAS_densebox").items()}
    path = tmp_path / "mbv2-NAS.pth"
    extra = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 90000}, "iteration": 90000}
    torch.save({"model": weights, **extra}, path, _use_new_zipfile_serialization=False)
    config = ROOT / "configs" / "search" / "Mobile_NAS_densebox.yaml"
    model = nasfcos.build_detector(nasfcos.load_config(config, ["MODEL.DEVICE", "cpu"]))
    assert nasfcos.load_weights(model, path).complete


@contextlib.contextmanager
def serving(handler):
    """A server on the loopback address; yields its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder served on the loopback address, its URL and the paths requested from it."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with serving(Handler) as url:
        yield folder, url, asked


def test_url_is_downloaded_once_and_verified(server):
    folder, url, asked = server
    content = b"weights" * 1000
    (folder / "model.pth").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()

    path = download.resolve_source(f"{url}/model.pth#sha256={checksum}")
    assert path.read_bytes() == content
    assert download.resolve_source(f"{url}/model.pth") == path
    assert asked == ["/model.pth"]
    assert download.resolve_source(f"{url}/model.pth#sha256={checksum[:8].upper()}") == path
    assert asked == ["/model.pth"]
    (folder / "other").mkdir()
    (folder / "other" / "model.pth").write_bytes(b"other weights")
    assert download.resolve_source(f"{url}/other/model.pth").read_bytes() == b"other weights"
    asked.clear()

    path.write_bytes(b"damaged")
    assert download.resolve_source(f"{url}/model.pth").read_bytes() == content
    assert asked == ["/model.pth"]


def test_a_page_in_place_of_weights_is_told_and_can_be_replaced(server):
    folder, url, _ = server
    (folder / "model.pth").write_text("<html>Please log in</html>")
    for _ in range(2):
        with pytest.raises(WeightsError, match="log in.*delete .*model.pth to have it downl") as e:
            read_weights(f"{url}/model.pth")
    torch.save({"backbone.x": torch.ones(2)}, folder / "model.pth")
    Path(re.search(r"delete (\S+)", str(e.value))[1]).unlink()
    assert read_weights(f"{url}/model.pth").tensors["backbone.x"].sum() == 2


def test_wrong_checksum_leaves_nothing_behind(server, monkeypatch):
    folder, url, _ = server
    monkeypatch.setattr(download, "NAMED_BY_CHECKSUM", url)
    content = b"something else"
    checksum = hashlib.sha256(content).hexdigest()
    (folder / "model-0123abcd.pth").write_bytes(content)
    for source in (f"{url}/model-0123abcd.pth", f"{url}/model-0123abcd.pth#sha256=01234567"):
        message = f"checksum is {checksum}, not 0123.*write {url}.*#sha256={checksum[:8]}"
        with pytest.raises(download.DownloadError, match=message):
            download.resolve_source(source)
    assert not list(download.cache_dir().rglob("*.pth"))
    source = f"{url}/model-0123abcd.pth#sha256={checksum[:8]}"
    assert download.resolve_source(source).read_bytes() == content
    with pytest.raises(download.DownloadError, match="fetch it by other means"):
        download.resolve_source(f"{url}/gone.pth")


def test_a_date_in_a_name_is_no_checksum(server):
    folder, url, _ = server
    (folder / "model-20200512.pth").write_bytes(b"weights")
    assert download.resolve_source(f"{url}/model-20200512.pth").read_bytes() == b"weights"
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.startswith(
        download.NAMED_BY_CHECKSUM
    )


@pytest.mark.parametrize(
    "header, start, end",
    [
        (("Content-Length", "7000"), b"", b""),
        (("Transfer-Encoding", "chunked"), b"1b58\r\n", b"\r\n0\r\n\r\n"),
    ],
)
def test_a_download_that_breaks_off_leaves_nothing_behind(
    header, start, end, monkeypatch, tmp_path
):
    content = b"weights" * 1000
    answers = [start + content[:99], start + content + end]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header(*header)
            self.end_headers()
            self.wfile.write(answers.pop(0))

        def log_message(self, *args):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serving(Handler) as url:
        reason = "(ended 6901 bytes early|Incomplete).*Try again"
        with pytest.raises(download.DownloadError, match=reason):
            download.resolve_source(f"{url}/model.pth")
        left = [path.name for path in download.cache_dir().rglob("*") if path.is_file()]
        assert left in ([], ["model.pth.lock"])
        assert download.resolve_source(f"{url}/model.pth").read_bytes() == content


@pytest.mark.parametrize(
    "fragment", ["", "sha256=", "sha256=0123abc", "sha256=0123abcg", "sha1=0123abcd", "0" * 65]
)
def test_what_is_no_checksum_is_refused_before_anything_is_downloaded(server, fragment):
    folder, url, asked = server
    (folder / "model.pth").write_bytes(b"weights")
    with pytest.raises(download.DownloadError, match="no checksum; write #sha256="):
        download.resolve_source(f"{url}/model.pth#{fragment}")
    assert not asked


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(WeightsError, match="is a folder: name a weight file in it"):
        read_weights(str(tmp_path))


def test_a_file_url_is_a_path(tmp_path):
    path = tmp_path / "weights 1 é.pth"
    path.write_bytes(b"")
    assert download.resolve_source(path.as_uri()) == path
    assert download.resolve_source(path.as_uri().replace("///", "//localhost/")) == path
    assert download.resolve_source("file://weights/one.pth") == Path("weights/one.pth")
    assert download.resolve_source("file://~/one.pth") == Path.home() / "one.pth"


def test_what_only_begins_like_a_url():
    with pytest.raises(download.DownloadError, match=r"http://\[bad/x is neither a path nor a URL"):
        read_weights("http://[bad/x")


def test_unknown_names():
    with pytest.raises(download.DownloadError, match="MSRA/R-50"):
        download.resolve_source("catalog://R-50")
    with pytest.raises(download.DownloadError, match="resnet50"):
        download.resolve_source("torchvision://resnet5")
