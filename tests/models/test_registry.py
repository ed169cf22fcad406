"""Custom parts that a config imports."""

import importlib
import re
import sys

import pytest
import torch
import yaml

import nasfcos
from nasfcos.config import ConfigError, load_config
from nasfcos.models import BACKBONES, HEADS, NECKS
from nasfcos.models.registry import import_parts
from nasfcos.search.decoder import build_decoder
from tests.known import ROOT

PARTS = """
from torch import nn
from nasfcos.models import HEADS, NECKS
from nasfcos.models.heads.fcos import build_fcos_head
from nasfcos.models.necks.fpn import FPN


@NECKS.register("widened")
def build_widened(cfg, in_channels):
    neck = FPN(in_channels, cfg.MODEL.NECK.CHANNELS)
    neck.factor = cfg.MODEL.CUSTOM.FACTOR
    return neck


@HEADS.register("doubled")
def build_doubled(cfg, num_classes, post_process):
    head = build_fcos_head(cfg, num_classes, post_process)
    head.focal_alpha = cfg.MODEL.CUSTOM.ALPHA
    return head
"""


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """A folder on Python's path; parts that its modules register are removed afterwards."""
    for registry in (BACKBONES, NECKS, HEADS):
        monkeypatch.setattr(registry, "_builders", dict(registry._builders))
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def documented(first_line):
    """The block of docs/custom_parts.md that begins with a line."""
    text = (ROOT / "docs/custom_parts.md").read_text()
    (block,) = re.findall(rf"```\w+\n({re.escape(first_line)}\n.*?)```", text, re.S)
    return block


def test_the_documented_backbone(own_parts):
    (own_parts / "my_parts.py").write_text(documented("# my_parts.py"))
    tree = yaml.safe_load(documented("# configs/convnext.yaml"))
    tree["_BASE_"] = str(ROOT / "configs" / tree["_BASE_"])
    tree["MODEL"]["CUSTOM"]["WEIGHTS"] = ""  # nothing is downloaded here
    file = own_parts / "convnext.yaml"
    file.write_text(yaml.safe_dump(tree))
    small = ["MODEL.DEVICE", "cpu", "MODEL.NUM_CLASSES", 3, "MODEL.NECK.CHANNELS", 32]
    model = nasfcos.build_detector(load_config(file, [*small, "TEST.SCORE_THRESHOLD", 0.0]))

    images = [torch.rand(3, 96, 128), torch.rand(3, 120, 100)]
    target = {"boxes": torch.tensor([[10.0, 10, 70, 80]]), "labels": torch.tensor([2])}
    losses = model(images, [target, target])
    sum(losses.values()).backward()
    # The stem is trained; layers that the neck does not use are not.
    assert model.backbone.stages[0][0][0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    # The pixels are normalised as by torchvision's own transforms.
    taken = []
    hook = model.backbone.stages[0].register_forward_pre_hook(lambda _, x: taken.append(x[0]))
    with torch.no_grad():
        (expected,) = model.eval()(images[:1])
    hook.remove()
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(taken[0][0], (images[0] - mean) / std, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        (found,) = nasfcos.optimize_for_inference(model)(images[:1])
        (half,) = nasfcos.optimize_for_inference(model, torch.bfloat16)(images[:1])
    assert len(expected["boxes"]) > 10
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(half["scores"], expected["scores"], rtol=0.1, atol=1e-3)


def test_own_necks_and_heads_and_their_settings(own_parts):
    (own_parts / "more_parts.py").write_text(PARTS)
    file = own_parts / "own.yaml"
    file.write_text(
        "MODEL:\n  IMPORTS: [more_parts]\n  CUSTOM: {FACTOR: 2, ALPHA: 0.5}\n  NUM_CLASSES: 2\n"
        "  DEVICE: cpu\n  NECK: {NAME: widened, CHANNELS: 16}\n  HEAD: {NAME: doubled}\n"
        "  RESNET: {STEM_CHANNELS: 4, WIDTH_PER_GROUP: 4}\n"
    )
    cfg = load_config(file, ["MODEL.CUSTOM.ALPHA", 0.75])
    model = nasfcos.build_detector(cfg)
    assert model.neck.factor == 2 and model.head.focal_alpha == 0.75
    decoder = build_decoder(cfg, model.backbone.out_channels, 2, seed=0)
    assert decoder.neck.factor == 2 and decoder.head.focal_alpha == 0.75


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"MODEL\.IMPORTS names 'missing_parts'.*No module named.*PYTHONPATH"),
        ("import surely_not_there", r"'missing_parts'.*No module named 'surely_not_there'"),
    ],
)
def test_a_module_that_is_not_there(own_parts, content, message):
    if content is not None:
        (own_parts / "missing_parts.py").write_text(content)
    cfg = load_config(None, ["MODEL.IMPORTS", ["missing_parts"], "MODEL.NUM_CLASSES", 1])
    with pytest.raises(ConfigError, match=message):
        nasfcos.build_detector(cfg)


def test_a_module_that_is_imported_again(own_parts):
    """As in a notebook, after fixing a mistake; but two parts with one name are an error."""
    file = own_parts / "later_parts.py"
    file.write_text(PARTS + "\nimport surely_not_there")
    with pytest.raises(ConfigError, match="surely_not_there"):
        import_parts(["later_parts"])
    file.write_text(PARTS)
    importlib.invalidate_caches()
    import_parts(["later_parts"])
    importlib.reload(sys.modules["later_parts"])
    (own_parts / "third_parts.py").write_text(PARTS)
    with pytest.raises(ValueError, match="'widened' is registered already"):
        import_parts(["third_parts"])


@pytest.mark.parametrize("part, others", [("NECK", "nas_fpn"), ("HEAD", "retinanet")])
def test_a_part_that_nobody_registered(part, others):
    cfg = load_config(None, [f"MODEL.{part}.NAME", others + "s", "MODEL.NUM_CLASSES", 1])
    with pytest.raises(ConfigError, match=rf"MODEL\.{part}\.NAME.*Did you mean '?{others}"):
        nasfcos.build_detector(cfg)
