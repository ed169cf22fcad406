"""The detector's parts against simple reference implementations, and its edge cases."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import nasfcos
from nasfcos.boxes import legacy_iou, legacy_sizes
from nasfcos.config import ConfigError
from nasfcos.genotype import FPN_OPS, HEAD_OPS, Genotype
from nasfcos.models import build_detector
from nasfcos.models.detector import Detector
from nasfcos.models.heads import anchors as anchors_module
from nasfcos.models.heads import sparse, static
from nasfcos.models.heads.anchors import (
    AMBIGUOUS,
    UNMATCHED,
    base_anchors,
    decode_boxes,
    encode_boxes,
    match_anchors,
)
from nasfcos.models.heads.fcos_assignment import WORD, assign_fcos
from nasfcos.models.heads.locations import STRIDES
from nasfcos.models.heads.post_process import PostProcess, threshold_logit
from nasfcos.models.layers import FrozenBatchNorm2d, group_norm
from nasfcos.models.necks.nas_fpn import NASFPN
from nasfcos.ops import nms, nms_mask
from tests.copies import Copies, pin
from tests.plain import plain_losses

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.NUM_CLASSES", 3, "MODEL.RESNET.BLOCKS", [1, 1, 1, 1],
    "MODEL.RESNET.STEM_CHANNELS", 4, "MODEL.RESNET.WIDTH_PER_GROUP", 4,
    "MODEL.RESNET.NORM", "bn", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.NECK.CHANNELS", 16,
]  # fmt: skip
CELLS = [
    [[2, 3, 0, 1, 0]],
    [[1, 3, 2, 4, 1]],
    [[0, 2, 3, 3, 1]],
    [[3, 4, 1, 4, 0]],
    [[1, 1, 4, 0, 1]],
]
SHAPES = [(9, 12), (5, 6), (3, 3), (2, 2), (1, 1)]
SIZES = [(70, 90), (66, 96)]


def tiny(*overrides):
    torch.manual_seed(0)
    return nasfcos.build_detector(nasfcos.load_config(None, [*TINY, *overrides]))


def searched(split, ops, head="fcos"):
    return tiny(
        "MODEL.NECK.NAME", "nas_fpn", "MODEL.HEAD.TOWER", "searched", "MODEL.HEAD.NAME", head,
        "MODEL.GENOTYPE", [*CELLS, [split], ops],
    )  # fmt: skip


def as_on_a_cpu(head, outputs, sizes):
    return head.detect(outputs, sizes)


def as_on_a_gpu(head, outputs, sizes):
    return static.detect(head, outputs, torch.tensor(sizes)).to_list()


both_ways = pytest.mark.parametrize("detect", [as_on_a_cpu, as_on_a_gpu])


def target(*rows):
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].long()}


IMAGES = [torch.rand(3, 90, 130), torch.rand(3, 128, 100)]
TARGETS = [target((10, 10, 80, 70, 1), (20, 5, 50, 40, 3)), target((0, 0, 99, 127, 2))]


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("split", [0, 2, 6])
def test_every_operation_trains(head, split):
    """All FPN and head operations and aggregations, shared and per-level layers: every trainable
    parameter gets a finite gradient."""
    model = searched(split, list(range(len(HEAD_OPS))), head)
    used = {FPN_OPS[op] for cell in model.neck.genotype.cells for op in cell.ops}
    assert used == set(FPN_OPS)
    losses = model(IMAGES, TARGETS)
    names = {"loss_cls", "loss_box"} | ({"loss_centerness"} if head == "fcos" else set())
    assert set(losses) == names
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    model.eval()
    with torch.no_grad():
        assert len(model(IMAGES)) == 2


def test_head_split_gives_the_first_layers_weights_of_their_own():
    def count(model):
        return sum(p.numel() for p in model.head.cls_tower.parameters())

    shared, split = searched(0, [1, 1]), searched(1, [1, 1])
    assert count(split) == count(shared) * (5 + 1) / 2


def test_unused_branches_are_neither_computed_nor_trained():
    genotype = Genotype.parse([[[3, 3, 0, 0, 0]], [[2, 3, 0, 0, 0]], [[1, 2, 0, 0, 0]]])
    neck = NASFPN([8, 8, 8, 8], 16, genotype)
    neck.adapt[0].forward = lambda x: pytest.fail("C2 is not consumed")
    features = [torch.rand(2, 8, size, size) for size in (32, 16, 8, 4)]
    levels = neck(features)
    assert [x.shape[-1] for x in levels] == [16, 8, 4, 2, 1]
    sum(x.sum() for x in levels).backward()
    assert {name for name, p in neck.named_parameters() if p.grad is None} == {
        name for name, _ in neck.named_parameters() if name.startswith("adapt.0.")
    }


@pytest.mark.parametrize("backbone", ["resnet", "mobilenet_v2"])
def test_stages_that_no_cell_takes_are_not_trained(backbone):
    cells = [[[0, 1, 0, 0, 0]], [[1, 2, 0, 0, 0]], [[0, 2, 0, 0, 0]]]
    model = tiny(
        "MODEL.BACKBONE.NAME", backbone, "MODEL.NECK.NAME", "nas_fpn", "MODEL.GENOTYPE", cells
    )
    sum(model(IMAGES, TARGETS).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not all(p.requires_grad for p in model.backbone.parameters())


def test_extra_outputs_are_added_to_each_level():
    """Skip connections and sums only: the pyramid is a sum of resized adapters."""
    genotype = Genotype.parse([[[i, i, 3, 3, 0]] for i in (1, 3, 2, 1)])
    neck = NASFPN([4, 4, 4, 4], 4, genotype).eval()
    features = [torch.rand(1, 4, size, size) for size in (32, 16, 8, 4)]
    c3, c4, c5 = (neck.adapt[i](features[i]) * 2 for i in (1, 2, 3))

    def resize(x, size):
        return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear")

    p3, p4, p5 = neck(features)[:3]
    torch.testing.assert_close(p3, c3 + c3)
    torch.testing.assert_close(p4, c4 + resize(c3, 8))
    torch.testing.assert_close(p5, c5 + resize(c3, 4))


def test_frozen_batch_norm_has_no_epsilon():
    norm = FrozenBatchNorm2d(2)
    norm.running_var.copy_(torch.tensor([1e-6, 4.0]))
    norm.running_mean.fill_(1.0)
    out = norm(torch.full((1, 2, 1, 1), 2.0)).flatten()
    torch.testing.assert_close(out, torch.tensor([1e3, 0.5]))
    assert not list(norm.parameters())


def test_frozen_batch_norm_does_not_round_its_factors():
    """Rounded to bfloat16, 1.3 is 1.2969."""
    norm = FrozenBatchNorm2d(2)
    norm.weight.fill_(1.3)
    x = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert out.double().mean() / x.double().mean() == pytest.approx(1.3, abs=3e-4)


def test_group_norm_never_has_groups_of_one_value():
    for channels in (8, 16, 32, 48, 64, 128, 256):
        norm = group_norm(channels)
        assert norm.num_groups == (32 if channels >= 64 else channels // 2 if channels != 48 else 8)
        assert torch.isfinite(norm(torch.rand(1, channels, 1, 1))).all()


# ------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("targets", [[target(), target()], [target(), TARGETS[1]]])
def test_images_without_targets_train_as_background(head, targets):
    model = tiny("MODEL.HEAD.NAME", head)
    losses = model(IMAGES, targets)
    if not sum(len(t["boxes"]) for t in targets):
        assert losses["loss_box"] == 0 and losses["loss_cls"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_no_detections_is_an_empty_result(head):
    model = tiny("MODEL.HEAD.NAME", head).eval()
    with torch.no_grad():
        for found in model(IMAGES):
            assert found["boxes"].shape == (0, 4)
            assert found["scores"].shape == found["labels"].shape == (0,)


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_detections_lie_in_their_image_and_do_not_depend_on_the_batch(head):
    model = tiny("MODEL.HEAD.NAME", head, "TEST.SCORE_THRESHOLD", 0.0).eval()
    same_size = [torch.rand(3, 120, 125), torch.rand(3, 128, 100)]  # both padded to 128 x 128
    with torch.no_grad():
        together = model(same_size)
        alone = [model([image])[0] for image in same_size]
    for image, found, single in zip(same_size, together, alone, strict=True):
        height, width = image.shape[-2:]
        assert len(found["boxes"]) >= 100
        assert found["boxes"].min() >= 0
        assert (found["boxes"].amax(0) <= torch.tensor([width, height] * 2) - 1).all()
        assert found["labels"].min() >= 1 and found["labels"].max() <= 3
        assert (found["scores"].diff() <= 0).all()
        torch.testing.assert_close(found["scores"][:50], single["scores"][:50])


def test_uint8_and_float_images_are_the_same():
    model = tiny()
    image = (torch.rand(3, 40, 50) * 255).to(torch.uint8)
    batch, sizes = model.preprocess([image, image[:, :30]])
    assert batch.shape == (2, 3, 64, 64) and sizes == [(40, 50), (30, 50)]
    same, _ = model.preprocess([image / 255])
    torch.testing.assert_close(batch[0], same[0], rtol=1e-6, atol=1e-4)
    assert (batch[1, :, 30:] == 0).all() and (batch[:, :, :, 50:] == 0).all()
    red = image[0, 3, 4].item() - 122.7717  # channels are reversed
    assert batch[0, 2, 3, 4].item() == pytest.approx(red, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.float64])
def test_preprocessing_written_out(dtype):
    preprocess = tiny().preprocess
    preprocess.mean.copy_(torch.tensor([120.0, 110.5, 100.25]))
    preprocess.std.copy_(torch.tensor([58.0, 57.0, 56.5]))
    pixels = [(torch.rand(3, *size) * 255).to(torch.uint8) for size in ((40, 50), (64, 33))]
    images = [x if dtype == torch.uint8 else (x / 255).to(dtype) for x in pixels]
    batch, _ = preprocess(images)
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 64, 64)
    expected = torch.zeros(2, 3, 64, 64)
    for index, x in enumerate(pixels):
        blue, green, red = x.double().flip(0)
        normal = torch.stack(((blue - 100.25) / 56.5, (green - 110.5) / 57, (red - 120) / 58))
        expected[index, :, : x.shape[1], : x.shape[2]] = normal.float()
    rounding = 3e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(batch, expected, rtol=1e-6, atol=rounding)
    assert images[0].dtype == dtype  # the caller's images are untouched
    assert dtype != torch.uint8 or torch.equal(images[0], pixels[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_the_images(dtype):
    """As in torchvision's detectors; they predict the effect of a small change."""
    model, sizes = tiny().train(), ((64, 96), (50, 70))
    images = [torch.rand(3, *size, dtype=dtype, requires_grad=True) for size in sizes]
    targets = [target((5, 5, 40, 40, 1)), target((9, 9, 30, 45, 2))]
    sum(model(images, targets).values()).backward()
    for image in images:
        assert image.grad.abs().sum() > 0
    direction = torch.randn_like(images[0])
    with torch.no_grad():
        step = 1e-3 * direction / direction.norm()
        moved = [[images[0] + sign * step, images[1]] for sign in (1, -1)]
        forward, backward = (sum(model(x, targets).values()) for x in moved)
    slope = (images[0].grad * step).sum() * 2
    torch.testing.assert_close(slope.float(), forward - backward, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_a_training_step_never_waits_for_the_gpu(head, monkeypatch):
    """On a fake GPU: no shape and no branch depends on values."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(Detector, "_check_values", lambda *_: None)  # only made for CPU tensors
    cfg = nasfcos.load_config(None, [*TINY, "MODEL.HEAD.NAME", head])
    images = [torch.zeros(3, 90, 130, dtype=torch.uint8), torch.zeros(3, 128, 100)]
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        with torch.device("cuda"):
            model = build_detector(cfg, 3)
        copies.waiting.clear()
        losses = model(images, TARGETS)
        assert all(loss.is_cuda and loss.shape == () for loss in losses.values())
        with pytest.raises(DynamicOutputShapeException):  # so the test would notice
            losses["loss_cls"].nonzero()
    assert copies.all >= 4 and not copies.waiting
    with FakeTensorMode(allow_non_fake_inputs=True):  # gradients need a device that exists
        sum(build_detector(cfg, 3)(images, TARGETS).values()).backward()


@pytest.mark.parametrize(
    "images, targets, message",
    [
        ([], [], "empty"),
        ([torch.rand(1, 9, 9)], [target()], r"image 0 must be a tensor \[3, H, W\]"),
        ([torch.ones(3, 9, 9, dtype=torch.int64)], [target()], "float in 0..1 or uint8"),
        ([torch.rand(3, 9, 9)], None, "needs a target"),
        ([torch.rand(3, 9, 9)], [{"boxes": torch.rand(0, 4)}], "target 0: 'labels' must be"),
        ([torch.rand(3, 9, 9)], [target((5, 5, 4, 8, 1))], "target 0: box .* x0 <= x1"),
        ([torch.rand(3, 9, 9)], [target((0, 0, 4, float("nan"), 1))], "not finite"),
        ([torch.rand(3, 9, 9)], [target((0, 0, 4, 4, 4))], "classes are 1..3"),
        ([torch.rand(3, 9, 9)], [target((0, 0, 4, 4, 0))], "classes are 1..3"),
        ([torch.rand(3, 9, 9)], [torch.rand(2, 4)], "target 0: 'boxes' must be"),
        (
            [torch.rand(3, 9, 9)],
            [{"boxes": torch.rand(1, 4), "labels": torch.tensor([1.7])}],
            "labels must be integers",
        ),
        (
            [torch.rand(3, 9, 9)],
            [{"boxes": torch.rand(2, 4), "labels": torch.ones(1)}],
            r"boxes must be \[N, 4\]",
        ),
    ],
)
def test_bad_input_is_named(images, targets, message):
    with pytest.raises(ValueError, match=message):
        tiny()(images, targets)


def test_one_tiny_image_is_too_little_for_batch_norms_only():
    tiny_image, background = torch.rand(3, 20, 32), [target()]
    searched_neck = tiny("MODEL.NECK.NAME", "nas_fpn", "MODEL.GENOTYPE", CELLS)
    with pytest.raises(ConfigError, match="at most 32 x 32 pixels.*INPUT.MIN_SIZE_TRAIN"):
        searched_neck([tiny_image], background)
    for model, images in (
        (searched_neck, [tiny_image] * 2),
        (searched_neck, [torch.rand(3, 20, 33)]),
        (tiny("MODEL.RESNET.NORM", "frozen_bn"), [tiny_image]),
    ):
        losses = model(images, background * len(images))
        assert all(map(torch.isfinite, losses.values()))


def test_unknown_part_names_the_choice():
    with pytest.raises(nasfcos.ConfigError, match=r"MODEL\.BACKBONE\.NAME.*'mobilenet_v2'"):
        tiny("MODEL.BACKBONE.NAME", "mobilenet_v3")


# ---------------------------------------------------------------- reference implementations


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 200
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 250), 1).round()


def test_fcos_assignment_against_a_plain_loop():
    """Two images; one has more boxes than a word has bits."""
    generator = torch.Generator().manual_seed(1)
    targets = [
        {"boxes": random_boxes(count, generator), "labels": torch.randint(1, 4, (count,))}
        for count in (12, 2 * WORD + 3)
    ]
    targets[0]["boxes"][3] = targets[0]["boxes"][2]  # a tie of areas: the first wins
    targets[0]["labels"][2:4] = torch.tensor([1, 2])
    shapes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    ranges = [(-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)]
    got = tiny().head.assign(shapes, targets)
    indices = assign_fcos(shapes, ranges, targets[0]["boxes"][None])[0]
    assert 2 in indices and 3 not in indices
    positives = 0
    for target, got_labels, got_distances in zip(targets, got.labels, got.box_targets, strict=True):
        index = 0
        for (rows, columns), stride, (low, high) in zip(shapes, STRIDES, ranges, strict=True):
            for y, x in itertools.product(range(rows), range(columns)):
                px, py = x * stride + stride // 2, y * stride + stride // 2
                best = None
                for box, label in zip(target["boxes"].tolist(), target["labels"], strict=True):
                    distances = (px - box[0], py - box[1], box[2] - px, box[3] - py)
                    if min(distances) > 0 and low <= max(distances) <= high:
                        area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                        if best is None or area < best[0]:
                            best = (area, label, distances)
                assert got_labels[index].item() == (best[1] if best else 0)
                if best:
                    positives += 1
                    assert got_distances[index].tolist() == list(best[2])
                index += 1
    assert positives > 300


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_assignment_of_a_batch_is_that_of_each_image(head):
    generator = torch.Generator().manual_seed(4)
    head = tiny("MODEL.HEAD.NAME", head).head
    targets = [
        {"boxes": random_boxes(count, generator), "labels": torch.randint(1, 4, (count,))}
        for count in (3, 0, 40)
    ]
    together = head.assign(SHAPES, targets)
    for index, target in enumerate(targets):
        alone = head.assign(SHAPES, [target])
        assert torch.equal(together.labels[index], alone.labels[0])
        positive = alone.labels[0] > 0
        assert positive.any() == (index != 1)
        assert torch.equal(together.box_targets[index][positive], alone.box_targets[0][positive])
        if head.box_pred.out_channels > 4:
            anchors = torch.cat(head.anchors(SHAPES))[positive]
            match = match_anchors(torch.cat(head.anchors(SHAPES)), target["boxes"], 0.5, 0.4)
            boxes = decode_boxes(alone.box_targets[0][positive], anchors)
            wanted = target["boxes"][match[positive]]
            torch.testing.assert_close(boxes, wanted, rtol=1e-4, atol=1e-2)


def test_anchor_matching_against_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    anchors, boxes = random_boxes(300, generator), random_boxes(9, generator)

    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        inside = max(0, width) * max(0, height)
        return inside / (
            (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - inside
        )

    table = [[iou(a, b) for b in boxes.tolist()] for a in anchors.tolist()]
    best_of_box = [max(row[j] for row in table) for j in range(len(boxes))]
    expected = []
    for row in table:
        best = max(row)
        own = row.index(best)
        attains = any(
            abs(value - top) < 1e-6 for value, top in zip(row, best_of_box, strict=True)
        )
        if best >= 0.5 or attains:
            expected.append(own)
        else:
            expected.append(UNMATCHED if best < 0.4 else AMBIGUOUS)
    got = match_anchors(anchors, boxes, 0.5, 0.4).tolist()
    assert got == expected
    assert {UNMATCHED, AMBIGUOUS} < set(got)


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_anchor_matching_with_ties_however_many_boxes_at_once(at_once, monkeypatch):
    """Duplicate boxes and anchors, boxes equal to anchors, and a box far from all of them."""
    monkeypatch.setattr(anchors_module, "BOXES_AT_ONCE_ON_CPU", at_once)
    generator = torch.Generator().manual_seed(5)
    anchors, boxes = random_boxes(400, generator), random_boxes(70, generator)
    anchors[200:220] = anchors[100:120]
    boxes[[9, 11, 69]] = boxes[[8, 3, 3]]
    boxes[20:30] = anchors[100:110]
    boxes[40] = torch.tensor([5000.0, 5000, 5010, 5010])
    table = legacy_iou(boxes, anchors)
    expected = []
    for column in table.t().tolist():
        best = max(column)
        own = column.index(best)
        if any(iou == top > 0 for iou, top in zip(column, table.amax(1).tolist(), strict=True)):
            expected.append(own)
        else:
            expected.append(own if best >= 0.7 else UNMATCHED if best < 0.5 else AMBIGUOUS)
    got = match_anchors(anchors, boxes, 0.7, 0.5).tolist()
    assert got == expected
    assert {UNMATCHED, AMBIGUOUS, 3, 8, 20} < set(got) and not {9, 11, 40, 69} & set(got)


def test_anchor_matching_takes_a_gpu_few_steps():
    """A step is a kernel launch, or costs as little as one."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **kwargs or {})

    with torch.device("meta"), Count() as count:
        match = match_anchors(torch.empty(10**5, 4), torch.empty(1000, 4), 0.5, 0.4)
    assert match.shape == (10**5,)
    assert 100 < count.calls < 1000


def test_anchors():
    """P3's anchors: base windows 11 x 6, 8 x 8 and 6 x 12 about (3.5, 3.5), scaled."""
    anchors = base_anchors(8, [32 * 2 ** (k / 3) for k in range(3)], (0.5, 1.0, 2.0))
    assert anchors.shape == (9, 4)
    widths, heights = legacy_sizes(anchors)
    scale = 4 * 2 ** (torch.arange(3) / 3)
    torch.testing.assert_close(widths, torch.cat([w * scale for w in (11, 8, 6)]))
    torch.testing.assert_close(heights, torch.cat([h * scale for h in (6, 8, 12)]))
    assert anchors[0].tolist() == [-18, -8, 25, 15]
    torch.testing.assert_close((anchors[:, :2] + anchors[:, 2:]) / 2, torch.full((9, 2), 3.5))
    levels = tiny("MODEL.HEAD.NAME", "retinanet").head.anchors(SHAPES)
    assert [len(level) for level in levels] == [h * w * 9 for h, w in SHAPES]
    shifted = levels[0].reshape(*SHAPES[0], 9, 4)
    torch.testing.assert_close(shifted[1, 2], anchors + torch.tensor([16.0, 8, 16, 8]))
    torch.testing.assert_close(
        levels[1][-9:], base_anchors(16, [64 * 2 ** (k / 3) for k in range(3)], (0.5, 1.0, 2.0))
        + torch.tensor([80.0, 64, 80, 64]),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_losses_against_positives_picked_out(head, layout):
    head = tiny("MODEL.HEAD.NAME", head).head
    outputs = [[x.requires_grad_() for x in maps] for maps in known_outputs(head, layout)]
    maps = [x for level in outputs for x in level]
    targets = [target((5, 3, 40, 50, 1), (30, 20, 90, 60, 3)), target()]
    expected = plain_losses(head, outputs, targets)
    losses = head.losses(outputs, targets)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=0)
        got, wanted = (
            torch.autograd.grad(x, maps, allow_unused=True, materialize_grads=True)
            for x in (loss, expected[name])
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_box_code_round_trip():
    generator = torch.Generator().manual_seed(3)
    anchors, boxes = random_boxes(50, generator), random_boxes(50, generator)
    anchors[:, 2:] += 8  # sizes grow at most 62.5-fold
    decoded = decode_boxes(encode_boxes(boxes, anchors), anchors)
    torch.testing.assert_close(decoded, boxes, rtol=1e-4, atol=1e-3)
    huge = decode_boxes(torch.full((1, 4), 1e3), torch.tensor([[0.0, 0, 15, 15]]))
    assert (huge[:, 2:] - huge[:, :2] + 1).tolist() == [[pytest.approx(1000, rel=1e-3)] * 2]


# ----------------------------------------------------------------------- post-processing

def known_outputs(head, layout=torch.contiguous_format, dtype=torch.float32, seed=0):
    """Raw outputs of a head for two images: class probabilities from nearly 0 to nearly 1."""
    generator = torch.Generator().manual_seed(seed)
    anchors = head.box_pred.out_channels // 4

    def maps(channels, mean, deviation):
        return [
            (mean + deviation * torch.randn(len(SIZES), channels, *shape, generator=generator))
            .to(dtype).contiguous(memory_format=layout)
            for shape in SHAPES
        ]  # fmt: skip

    logits = maps(anchors * head.num_classes, -4, 2.5)
    if anchors == 1:
        return logits, [x.exp() for x in maps(4, 3, 0.7)], maps(1, 0, 2)
    return logits, maps(anchors * 4, 0, 1)


def plain_detections(head, outputs, sizes):
    """A loop over images, levels and classes."""
    post = head.post_process
    shapes = [x.shape[-2:] for x in outputs[0]]
    results = []
    for image, (height, width) in enumerate(sizes):
        candidates = []
        for level, (h, w) in enumerate(shapes):
            maps = [x[level][image].float().permute(1, 2, 0) for x in outputs]
            probabilities = maps[0].reshape(-1, head.num_classes).sigmoid()
            predicted = maps[1].reshape(-1, 4)
            if len(maps) == 3:
                y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                stride = STRIDES[level]
                points = torch.stack((x, y), dim=2).view(-1, 2) * stride + stride // 2
                boxes = torch.cat((points - predicted[:, :2], points + predicted[:, 2:]), dim=1)
                factor = maps[2].reshape(-1).sigmoid()
            else:
                anchors = head.anchors(shapes)[level]
                boxes, factor = decode_boxes(predicted, anchors), torch.ones(len(anchors))
            found = [
                (probability * factor[prior], class_, boxes[prior])
                for class_, column in enumerate(probabilities.unbind(1), 1)
                for prior, probability in enumerate(column)
                if probability > post.score_threshold
            ]
            found.sort(key=lambda candidate: -candidate[0])
            candidates += found[: post.pre_nms_top_n]
        kept = []
        for class_ in range(1, head.num_classes + 1):
            own = [(score, box) for score, label, box in candidates if label == class_]
            if own:
                scores, boxes = map(torch.stack, zip(*own, strict=True))
                boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2) - 1)
                kept += [
                    (scores[i], class_, boxes[i])
                    for i in nms(boxes, scores, post.nms_iou, legacy=True)
                ]
        kept.sort(key=lambda detection: -detection[0])
        if len(kept) > post.detections_per_image:
            last = kept[post.detections_per_image - 1][0]
            kept = [detection for detection in kept if detection[0] >= last]
        results.append(kept)
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_threshold": 0.0, "detections_per_image": 1000},
        {"pre_nms_top_n": 40, "detections_per_image": 20},
    ],
)
@both_ways
def test_detections_against_a_plain_loop(detect, head, layout, settings):
    head = tiny("MODEL.HEAD.NAME", head).head
    head.post_process = replace(head.post_process, **settings)
    outputs = known_outputs(head, layout)
    for found, expected in zip(
        detect(head, outputs, SIZES), plain_detections(head, outputs, SIZES), strict=True
    ):
        assert found["labels"].tolist() == [label for _, label, _ in expected]
        scores = torch.stack([score for score, _, _ in expected])
        torch.testing.assert_close(found["scores"], scores, rtol=3e-7, atol=0)
        assert torch.equal(found["boxes"], torch.stack([box for _, _, box in expected]))


@both_ways
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_detections_of_bfloat16_outputs_are_those_of_the_same_numbers_in_float32(head, detect):
    head = tiny("MODEL.HEAD.NAME", head).head
    short = known_outputs(head, torch.channels_last, torch.bfloat16)
    long = tuple([x.float() for x in maps] for maps in short)
    for a, b in zip(detect(head, short, SIZES), detect(head, long, SIZES), strict=True):
        assert len(a["scores"]) and all(torch.equal(a[key], b[key]) for key in a)


@both_ways
def test_an_image_without_detections_beside_one_with(detect):
    head = tiny().head
    outputs = known_outputs(head)
    alone = detect(head, [[x[1:] for x in maps] for maps in outputs], SIZES[1:])[0]
    for x in outputs[0]:
        x[0] = -9
    nothing, found = detect(head, outputs, SIZES)
    assert len(nothing["boxes"]) == len(nothing["scores"]) == len(nothing["labels"]) == 0
    assert len(alone["scores"]) and all(torch.equal(found[key], alone[key]) for key in alone)


@pytest.mark.parametrize("probability", [1e-30, 1e-4, 0.05, 0.3, 0.5, 0.9, 0.9999999])
def test_threshold_of_logits_is_that_of_probabilities(probability):
    """To the last bit: the next float32 logit already has a probability above the threshold."""
    limit = threshold_logit(probability)
    numbers = torch.tensor([limit, math.inf]).float()
    following = torch.nextafter(*numbers)
    assert numbers[0].item() == limit
    below, above = torch.stack((numbers[0], following)).double().sigmoid().float()
    assert below <= torch.tensor(probability) < above


def test_thresholds_that_nothing_and_everything_passes():
    assert threshold_logit(1.0) == math.inf
    assert threshold_logit(-0.1) == -math.inf
    assert -110 < threshold_logit(0.0) < -80


def test_ties_with_the_last_kept_detection_stay():
    boxes = torch.arange(5.0)[:, None] * 20 + torch.tensor([0.0, 0, 9, 9])
    scores = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    same = torch.ones(5, dtype=torch.int64)
    two = sparse.Candidates(*(torch.cat((x, x)) for x in (same, boxes, scores, same)))
    two.image[:5] = 0
    settings = PostProcess(0.05, 1000, nms_iou=0.6, detections_per_image=2)
    sizes = torch.tensor([[200, 200]] * 2)
    mixed = [torch.stack((x[[4, 1, 0, 2, 3]], x)) for x in (boxes, scores, same)]
    for found in (
        *sparse.suppress(two, sizes.tolist(), settings),
        *static.suppress(*mixed, sizes, settings).to_list(),
    ):
        assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.5, 0.5])
        assert found["boxes"][:, 0].tolist() == [0, 20, 40, 60]


def test_detections_as_on_a_gpu_are_each_image_s_own():
    """They can be changed in place while gradients are recorded, and share no memory."""
    head = tiny().head
    first, second = as_on_a_gpu(head, known_outputs(head), SIZES)
    before = second["boxes"].clone()
    first["boxes"].mul_(2)
    assert torch.equal(second["boxes"], before)
    assert first["boxes"].untyped_storage().nbytes() == 16 * len(first["boxes"])


def test_many_predictions_are_counted_before_nms(monkeypatch):
    head = tiny().head
    outputs = known_outputs(head)
    expected = as_on_a_gpu(head, outputs, SIZES)
    given = []
    monkeypatch.setattr(static, "MAX_NMS_BOXES", 100)
    monkeypatch.setattr(
        static, "nms_mask", lambda boxes, *rest, **to: given.append(boxes.shape[1])
        or nms_mask(boxes, *rest, **to),
    )  # fmt: skip
    for found, wanted in zip(as_on_a_gpu(head, outputs, SIZES), expected, strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    counts = [len(x["scores"]) for x in expected]
    every = sum(math.prod(shape) for shape in SHAPES) * head.num_classes
    assert max(counts) <= given[0] < every


@both_ways
def test_no_prediction_above_the_threshold_of_many(detect, monkeypatch):
    monkeypatch.setattr(static, "MAX_NMS_BOXES", 100)
    head = tiny().head
    logits, *others = known_outputs(head)
    for found in detect(head, ([x.fill_(-20) for x in logits], *others), SIZES):
        assert [len(found[key]) for key in ("boxes", "scores", "labels")] == [0, 0, 0]


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_detection_waits_for_the_gpu_once(head, monkeypatch):
    """On a fake GPU, which finds three objects in one image and none in the other."""
    waits = []
    cfg = nasfcos.load_config(None, [*TINY, "MODEL.HEAD.NAME", head])
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: waits.append(x) or [3, 0])
    images = [torch.zeros(3, 90, 130, dtype=torch.uint8), torch.zeros(3, 128, 100)]
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        with torch.device("cuda"):
            model = build_detector(cfg, 3).eval()
        copies.waiting.clear()
        found, nothing = model(images)
    assert len(waits) == 1 and waits[0].is_cuda and waits[0].shape == (2,)
    assert copies.all >= 4 and not copies.waiting
    assert found["boxes"].shape == (3, 4) and nothing["boxes"].shape == (0, 4)
    assert all(x.is_cuda for result in (found, nothing) for x in result.values())


@both_ways
@pytest.mark.parametrize("maps", [0, 2])
def test_numbers_that_are_not_one_are_not_detected(detect, maps):
    """Neither through a class logit nor through centerness, and no other detection is lost."""
    head = tiny().head
    outputs = known_outputs(head)
    clean = detect(head, outputs, SIZES)
    for x in outputs[maps]:
        x[0, 0, ::2, 0] = torch.nan
    spoiled, other = detect(head, outputs, SIZES)
    assert spoiled["scores"].isfinite().all() and len(spoiled["scores"])
    assert all(torch.equal(other[key], clean[1][key]) for key in other)


@both_ways
def test_candidates_are_chosen_by_class_probability_and_ranked_by_score(detect):
    head = tiny("MODEL.NUM_CLASSES", 2, "TEST.PRE_NMS_TOP_N", 3).head
    logits = [torch.full((1, 2, 1, 3), -9.0) for _ in STRIDES]
    distances = [torch.ones(1, 4, 1, 3) for _ in STRIDES]
    centerness = [torch.zeros(1, 1, 1, 3) for _ in STRIDES]
    logits[1] = torch.tensor([[0.9, 0.05, 0.3], [0.04, 0.6, 0.2]]).logit()[None, :, None]
    centerness[1] = torch.tensor([0.1, 0.999999, 0.5]).logit()[None, None, None]
    (found,) = detect(head, (logits, distances, centerness), [(100, 100)])
    assert found["labels"].tolist() == [2, 1, 2]
    torch.testing.assert_close(found["scores"], torch.tensor([0.6, 0.15, 0.1]))
    assert found["boxes"][:, 0].tolist() == [23, 39, 39]
