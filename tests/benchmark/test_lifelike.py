import pytest
import torch
from torch import nn

from nasfcos.benchmark.inputs import head_outputs, map_shapes, random_target, smooth_image
from nasfcos.benchmark.lifelike import set_candidates, settle
from nasfcos.config import load_config
from nasfcos.models import build_detector
from nasfcos.models.layers import FrozenBatchNorm2d, ModulatedDeformConv

CONFIG = [
    *("MODEL.GENOTYPE", [[[1, 2, 4, 3, 1]], [[2, 3, 0, 3, 0]], [[3, 3, 0, 0, 0]]]),
    *("MODEL.NECK.NAME", "nas_fpn", "MODEL.NECK.CHANNELS", 32, "MODEL.HEAD.NUM_CONVS", 1),
    *("MODEL.RESNET.BLOCKS", [1, 1, 1, 1], "MODEL.RESNET.STEM_CHANNELS", 8),
    *("MODEL.RESNET.WIDTH_PER_GROUP", 8),
]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = build_detector(load_config(None, CONFIG), num_classes=7).eval()
    image = smooth_image(96, 128)
    run = torch.no_grad()(lambda: model([image]))
    settle(model, run)
    return model, run


def watch(modules, run):
    """The outputs of these modules in a run."""
    outputs = []

    def note(module, inputs, output):
        outputs.append(output.clone())  # a ReLU may follow in place

    hooks = [module.register_forward_hook(note) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


def test_norms_have_the_statistics_of_what_they_see(detector):
    model, run = detector
    norms = [m for m in model.modules() if isinstance(m, (FrozenBatchNorm2d, nn.BatchNorm2d))]
    outputs = watch(norms, run)
    assert len(outputs) > 10
    for output in outputs:
        torch.testing.assert_close(output.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
        assert 0.05 < output.std(correction=0) < 1.001


def test_offsets_are_about_a_pixel(detector):
    model, run = detector
    convs = [m.conv_offset_mask for m in model.modules() if isinstance(m, ModulatedDeformConv)]
    outputs = watch(convs, run)
    assert outputs
    for output in outputs:
        torch.testing.assert_close(output.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("count", [1, 40, 300])
@pytest.mark.parametrize("with_centerness", [False, True])
def test_so_many_candidates_pass_the_threshold(detector, count, with_centerness):
    model, run = detector
    head = model.head
    centerness = head.centerness if with_centerness else None
    threshold = 0.04 if with_centerness else head.post_process.score_threshold
    assert set_candidates(head.cls_logits, run, count, threshold, centerness) == count
    with torch.no_grad():
        batch, _ = model.preprocess([smooth_image(96, 128)])
        logits, _, centre = head(model.neck(model.backbone(batch)))
    scores = [x.sigmoid() for x in logits]
    if with_centerness:
        scores = [s * c.sigmoid() for s, c in zip(scores, centre, strict=True)]
    passing = [score > threshold for score in scores]
    assert sum(int(x.sum()) for x in passing) == count
    if count == 300:
        classes = torch.stack([x.sum((0, 2, 3)) for x in passing]).sum(0)
        assert (classes > 0).all()


def test_no_more_candidates_than_there_are(detector):
    model, run = detector
    total = 7 * sum(h * w for h, w in map_shapes(96, 128))
    assert set_candidates(model.head.cls_logits, run, 10**6, 0.05) == total


def test_inputs_are_the_same_each_time_and_fit_the_image():
    for seed in range(20):
        target = random_target(64, 200, objects=50, classes=3, seed=seed)
        boxes = target["boxes"]
        assert boxes.shape == (50, 4)
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= 199).all() and (boxes[:, 3] <= 63).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 8).all()
        assert set(target["labels"].tolist()) <= {1, 2, 3}
        assert torch.equal(boxes, random_target(64, 200, 50, 3, seed)["boxes"])
    image = smooth_image(50, 70)
    assert image.shape == (3, 50, 70) and image.min() >= 0 and image.max() <= 1
    assert torch.equal(image, smooth_image(50, 70))
    assert not torch.equal(image, smooth_image(50, 70, seed=1))


def test_head_outputs_find_their_objects():
    logits, distances, centerness = head_outputs(256, 320, objects=5, classes=4)
    assert [tuple(x.shape[-2:]) for x in logits] == map_shapes(256, 320)
    assert all((d > 0).all() for d in distances)
    sure = [(x.sigmoid() > 0.5).any(1).sum().item() for x in logits]
    assert 5 <= sum(sure) < sum(h * w for h, w in map_shapes(256, 320)) / 4
    assert [c.shape[1] for c in centerness] == [1] * 5
