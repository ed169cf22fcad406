"""The eight released detectors, written a second time and as plainly as possible, for comparison.

Everything is a function of `weights`: a dict of tensors under the released names, whose dtype
(float32 or float64, the batch's too) decides the arithmetic's. Boxes are (x0, y0, x1, y1) in pixels
of the resized image. In shapes: N images, P places (locations or anchors), B boxes of an image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

CONFIGS = json.loads((Path(__file__).parents[1] / "golden/configs.json").read_text())
BLOCKS = {"R-50-NAS": (3, 4, 6, 3), "R-101-NAS": (3, 4, 23, 3)}
STRIDES = (8, 16, 32, 64, 128)
RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

Weights = Mapping[str, Tensor]
Outputs = dict[str, list[Tensor]]
Terms = dict[str, Tensor]


# Input


def preprocess(
    images: list[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[tuple[int, int]]]:
    """RGB images [3, H, W] in 0..255 -> batch [N, 3, H', W'] and each image's (height, width).

    All eight released checkpoints want BGR less the mean.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height = math.ceil(max(h for h, _ in sizes) / 32) * 32
    width = math.ceil(max(w for _, w in sizes) / 32) * 32
    batch = torch.zeros(len(images), 3, height, width, dtype=dtype)
    mean = torch.tensor([102.9801, 115.9465, 122.7717], dtype=dtype)
    for image, (h, w), padded in zip(images, sizes, batch, strict=True):
        padded[:, :h, :w] = image.flip(0).to(dtype) - mean[:, None, None]
    return batch, sizes


# Layers


def batch_norm(weights: Weights, name: str, x: Tensor, training: bool) -> Tensor:
    """Batch statistics in training; the running ones, never changed here, otherwise."""
    mean = None if training else weights[f"{name}.running_mean"]
    var = None if training else weights[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], training)


def frozen_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    scale = weights[f"{name}.weight"] / weights[f"{name}.running_var"].sqrt()  # no epsilon
    shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def group_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"])


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """A convolution that keeps the size (before its stride), with a bias where there is one."""
    weight = weights[f"{name}.weight"]
    bias = weights[f"{name}.bias"] if f"{name}.bias" in weights else None
    return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)


def deformable(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Modulated deformable 3x3 convolution, 2 offset groups."""
    offset_mask = conv(weights, f"{name}.conv_offset_mask", x)  # [N, 36 + 18, H, W]
    offset, mask = offset_mask[:, :36], offset_mask[:, 36:].sigmoid()
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# Backbones: batch [N, 3, H, W] -> C2..C5, of strides 4..32


def resnet(weights: Weights, x: Tensor, model: dict) -> list[Tensor]:
    settings = model.get("RESNETS", {})
    groups, in_1x1 = settings.get("NUM_GROUPS", 1), settings.get("STRIDE_IN_1X1", True)
    x = conv(weights, "encoder.body.stem.conv1", x, stride=2)
    x = F.relu(frozen_norm(weights, "encoder.body.stem.bn1", x))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, blocks in enumerate(BLOCKS[model["BACKBONE"]["CONV_BODY"]], start=1):
        for block in range(blocks):
            name = f"encoder.body.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if block == 0:
                shortcut = conv(weights, f"{name}.downsample.0", x, stride)
                shortcut = frozen_norm(weights, f"{name}.downsample.1", shortcut)
            y = conv(weights, f"{name}.conv1", x, stride if in_1x1 else 1)
            y = F.relu(frozen_norm(weights, f"{name}.bn1", y))
            y = conv(weights, f"{name}.conv2", y, 1 if in_1x1 else stride, groups)
            y = F.relu(frozen_norm(weights, f"{name}.bn2", y))
            y = frozen_norm(weights, f"{name}.bn3", conv(weights, f"{name}.conv3", y))
            x = F.relu(y + shortcut)
        maps.append(x)
    return maps


def mobilenet(weights: Weights, x: Tensor, training: bool) -> list[Tensor]:
    def conv_norm(name: str, i: int, x: Tensor, stride: int = 1, depthwise: bool = False) -> Tensor:
        x = conv(weights, f"{name}.{i}", x, stride, groups=x.shape[1] if depthwise else 1)
        return batch_norm(weights, f"{name}.{i + 1}", x, training)

    x = F.relu6(conv_norm("encoder.body.features.0", 0, x, stride=2))
    maps = []
    for feature in range(1, 18):
        name = f"encoder.body.features.{feature}.conv"
        stride = 2 if feature in (2, 4, 7, 14) else 1
        y, i = x, 0
        if feature > 1:  # the first block does not expand
            y, i = F.relu6(conv_norm(name, 0, x)), 3
        y = F.relu6(conv_norm(name, i, y, stride, depthwise=True))
        y = conv_norm(name, i + 3, y)
        x = x + y if y.shape == x.shape else y
        if feature in (3, 6, 13, 17):
            maps.append(x)
    return maps


# Searched pyramid


def cell_operation(weights: Weights, name: str, op: int, x: Tensor, training: bool) -> Tensor:
    if op == 3:  # skip_connect
        return x
    if op != 4:
        raise NotImplementedError("no released model has a separable convolution")
    x = deformable(weights, f"{name}.dcn.0", x)
    return F.relu(batch_norm(weights, f"{name}.dcn.1", x, training))


def aggregate(weights: Weights, name: str, x: Tensor, y: Tensor, training: bool) -> Tensor:
    """`cat`, the only aggregation of the released models."""
    size = max(tuple(x.shape[-2:]), tuple(y.shape[-2:]))
    joined = torch.cat([resize(x, size), resize(y, size)], dim=1)
    joined = F.relu(batch_norm(weights, f"{name}.conv1x1.0", joined, training))
    out = weights[f"{name}.conv1x1.2.weight"].shape[0]
    return conv(weights, f"{name}.conv1x1.2", joined, groups=out)


def pyramid(weights: Weights, maps: list[Tensor], cells: list, training: bool) -> list[Tensor]:
    """C2..C5 -> P3..P7, each [N, 256, H, W]."""
    fpn = "decoder.fpn"
    nodes: list[Tensor | None] = [None]  # C2 is never consumed: its `adapt1` is not computed
    for i, c in enumerate(maps[1:], start=2):
        x = conv(weights, f"{fpn}.adapt{i}.0", c)
        nodes.append(F.relu(batch_norm(weights, f"{fpn}.adapt{i}.1", x, training)))
    unconsumed: list[int] = []
    for i, [(in0, in1, op0, op1, aggregation)] in enumerate(cells):
        assert aggregation == 1
        name = f"{fpn}._ops.{i}"
        x = cell_operation(weights, f"{name}.0", op0, nodes[in0], training)
        y = cell_operation(weights, f"{name}.1", op1, nodes[in1], training)
        unconsumed = [node for node in unconsumed if node not in (in0, in1)] + [len(nodes)]
        nodes.append(aggregate(weights, f"{name}.2", x, y, training))
    levels = []
    for node, c in zip(reversed(unconsumed[-3:]), maps[1:], strict=True):  # P3, P4, P5
        x = nodes[node]
        for other in unconsumed[:-3]:
            x = x + resize(nodes[other], nodes[node].shape[-2:])
        levels.append(resize(x, c.shape[-2:]))
    p6 = conv(weights, f"{fpn}.top_blocks.p6", levels[-1], stride=2)
    p7 = conv(weights, f"{fpn}.top_blocks.p7", F.relu(p6), stride=2)
    return [*levels, p6, p7]


# Heads


def plain_tower(weights: Weights, name: str, x: Tensor, norm: bool) -> Tensor:
    for i in range(4):
        x = conv(weights, f"{name}.{i * (3 if norm else 2)}", x)
        x = F.relu(group_norm(weights, f"{name}.{i * 3 + 1}", x) if norm else x)
    return x


def searched_tower(weights: Weights, name: str, ops: list[int], x: Tensor) -> Tensor:
    for i, op in enumerate(ops):
        if op == 4:  # skip_connect
            continue
        if op not in (0, 1, 5):
            raise NotImplementedError("no released model has a separable convolution")
        layer, part = (deformable, f"{name}.{i}.dcn") if op == 5 else (conv, f"{name}.{i}")
        x = F.relu(group_norm(weights, f"{part}.1", layer(weights, f"{part}.0", x)))
    return x


def outputs(name: str, weights: Weights, batch: Tensor, training: bool) -> Outputs:
    """What the detector `name` makes of a preprocessed batch [N, 3, H, W].

    A list per kind, of an entry per level: `pyramid` [N, 256, h, w], `logits` [N, A*80, h, w],
    `boxes` [N, A*4, h, w] (FCOS: distances in pixels; RetinaNet: codes) and, FCOS only,
    `centerness` [N, 1, h, w] before its sigmoid. A, the boxes per location: 1 (FCOS) or 9.
    RetinaNet only: `windows` [9, 4], the checkpoint's anchors at the first location, which should
    be what `anchor_windows` computes.
    """
    config = CONFIGS[name]
    model, genotype = config["MODEL"], config["SEARCH"]["DECODER"]["CONFIG"]
    if model["BACKBONE"]["CONV_BODY"] == "MobileNetV2":
        maps = mobilenet(weights, batch, training)
    else:
        maps = resnet(weights, batch, model)
    head = "decoder.rpn.head"
    retinanet = model.get("RETINANET_ON", False)
    result: Outputs = {"pyramid": pyramid(weights, maps, genotype[:7], training)}
    result |= {"logits": [], "boxes": []} | ({} if retinanet else {"centerness": []})
    for level, x in enumerate(result["pyramid"]):
        if config["SEARCH"].get("NAS_HEAD_ON", False):
            assert genotype[7] == [0]  # every layer is shared by the levels
            for_class = searched_tower(weights, f"{head}._cls_head_global_ops", genotype[8], x)
            for_box = searched_tower(weights, f"{head}._reg_head_global_ops", genotype[8], x)
        else:
            for_class = plain_tower(weights, f"{head}.cls_tower", x, norm=not retinanet)
            for_box = plain_tower(weights, f"{head}.bbox_tower", x, norm=not retinanet)
        result["logits"].append(conv(weights, f"{head}.cls_logits", for_class))
        box = conv(weights, f"{head}.bbox_pred", for_box)
        if not retinanet:
            box = torch.exp(weights[f"{head}.scales.{level}.scale"] * box)
            result["centerness"].append(conv(weights, f"{head}.centerness", for_class))
        result["boxes"].append(box)
    if retinanet:
        anchors = "decoder.rpn.anchor_generator.cell_anchors"
        result["windows"] = [weights[f"{anchors}.{level}"] for level in range(len(STRIDES))]
    return result


def trains(key: str) -> bool:
    """Whether SGD may change the tensor of this released name."""
    if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
        return False
    if "cell_anchors" in key or key.startswith(("encoder.body.stem.", "encoder.body.layer1.")):
        return False
    if key.startswith(("encoder.body.features.0.", "encoder.body.features.1.")):
        return False
    # What is left of a ResNet's frozen norms:
    return not (key.startswith("encoder.body.layer") and (".bn" in key or "downsample.1" in key))


# Places


def flat(x: Tensor, channels: int) -> Tensor:
    """[N, A*channels, H, W] -> [N, P, channels], places in the order (y, x, anchor)."""
    n, _, h, w = x.shape
    return x.view(n, -1, channels, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, channels)


def locations(x: Tensor, stride: int, offset: int) -> Tensor:
    """The grid of a level's map [..., H, W]: [H*W, 2] of x and y, row after row."""
    h, w = x.shape[-2:]
    y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (torch.stack([x_, y], dim=-1).reshape(-1, 2) * stride + offset).to(x)


def anchor_windows(stride: int) -> Tensor:
    """RetinaNet's anchors at a level's first location: [9, 4], float64, ratio-major."""
    windows = []
    centre = 0.5 * (stride - 1)
    for ratio in (0.5, 1.0, 2.0):
        width = round(math.sqrt(stride * stride / ratio))
        height = round(width * ratio)  # a half goes to the even integer
        for octave in range(3):
            scale = 4 * 2 ** (octave / 3)  # 32 for stride 8, doubling as the strides do
            dx, dy = 0.5 * (width * scale - 1), 0.5 * (height * scale - 1)
            windows.append((centre - dx, centre - dy, centre + dx, centre + dy))
    return torch.tensor(windows, dtype=torch.float64)


def anchors(outs: Outputs, level: int) -> Tensor:
    """The anchors of a level: [P, 4]."""
    corners = locations(outs["boxes"][level], STRIDES[level], 0).repeat(1, 2)
    return (corners[:, None] + outs["windows"][level].to(corners)).reshape(-1, 4)


def legacy_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


def legacy_iou(a: Tensor, b: Tensor) -> Tensor:
    """[A, 4], [B, 4] -> [A, B]"""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    overlap = (high - low + 1).clamp(min=0).prod(dim=2)
    return overlap / (legacy_area(a)[:, None] + legacy_area(b) - overlap)


def centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes[:, :2] + 0.5 * size, size


# Losses


def losses(name: str, outs: Outputs, boxes: list[Tensor], labels: list[Tensor]) -> Terms:
    """The named terms of the loss; per image `boxes` [B, 4] and `labels` [B] in 1..80."""
    boxes = [b.reshape(-1, 4).to(outs["logits"][0]) for b in boxes]
    if CONFIGS[name]["MODEL"].get("RETINANET_ON", False):
        return retinanet_losses(outs, boxes, labels)
    return fcos_losses(outs, boxes, labels)


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over logits [P, K]; labels [P] are 0 for background, -1 for places to be ignored."""
    classes = torch.arange(1, logits.shape[1] + 1)
    positive = labels[:, None] == classes
    p = logits.sigmoid()
    loss = torch.where(
        positive,
        -0.25 * (1 - p) ** 2 * F.logsigmoid(logits),
        -0.75 * p**2 * F.logsigmoid(-logits),
    )
    return loss[labels >= 0].sum()


def fcos_targets(
    points: Tensor, span: tuple[float, float], boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Per location [P, 2] of a level: its label [P], 0 for background, and distances [P, 4]."""
    if len(boxes) == 0:
        return torch.zeros(len(points), dtype=torch.int64), points.new_zeros(len(points), 4)
    to_low = points[:, None] - boxes[:, :2]
    to_high = boxes[:, 2:] - points[:, None]
    distances = torch.cat([to_low, to_high], dim=2)  # [P, B, 4]
    furthest = distances.amax(dim=2)
    inside = (distances.amin(dim=2) > 0) & (furthest >= span[0]) & (furthest <= span[1])
    area, best = torch.where(inside, legacy_area(boxes), math.inf).min(dim=1)
    label = torch.where(area.isinf(), 0, labels[best])
    return label, distances[torch.arange(len(points)), best]


def fcos_losses(outs: Outputs, boxes: list[Tensor], labels: list[Tensor]) -> Terms:
    rows = []  # label, target distances, logits, predicted distances, centerness
    for level, stride in enumerate(STRIDES):
        points = locations(outs["logits"][level], stride, stride // 2)
        for i in range(len(boxes)):
            label, distances = fcos_targets(points, RANGES[level], boxes[i], labels[i])
            logits = flat(outs["logits"][level], 80)[i]
            box = flat(outs["boxes"][level], 4)[i]
            centerness = flat(outs["centerness"][level], 1)[i, :, 0]
            rows.append((label, distances, logits, box, centerness))
    label, target, logits, box, centerness = (torch.cat(x) for x in zip(*rows, strict=True))
    positive = label > 0
    count = int(positive.sum())
    loss_cls = focal_loss(logits, label) / (count + len(boxes))
    target, box, centerness = target[positive], box[positive], centerness[positive]
    if count == 0:  # zero, with a graph
        return {"loss_cls": loss_cls, "loss_box": box.sum(), "loss_centerness": centerness.sum()}
    least = torch.minimum(target[:, :2], target[:, 2:])
    most = torch.maximum(target[:, :2], target[:, 2:])
    goal = (least / most).prod(dim=1).sqrt()
    overlap = torch.minimum(box, target)
    overlap = (overlap[:, :2] + overlap[:, 2:]).prod(dim=1)
    union = sum((x[:, :2] + x[:, 2:]).prod(dim=1) for x in (box, target)) - overlap
    iou_loss = -torch.log((overlap + 1) / (union + 1))
    return {
        "loss_cls": loss_cls,
        "loss_box": (iou_loss * goal).sum() / goal.sum(),
        "loss_centerness": F.binary_cross_entropy_with_logits(centerness, goal),
    }


def retinanet_targets(places: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per anchor [P, 4]: its label [P], 0 for background, -1 to ignore, and box code [P, 4]."""
    if len(boxes) == 0:
        return torch.zeros(len(places), dtype=torch.int64), torch.zeros_like(places)
    iou = legacy_iou(boxes, places)
    best, box = iou.max(dim=0)
    label = labels[box]
    label[best < 0.5] = -1
    label[best < 0.4] = 0
    forced = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
    label[forced] = labels[box[forced]]
    (centre, size), (from_centre, from_size) = centre_and_size(boxes[box]), centre_and_size(places)
    code = torch.cat([(centre - from_centre) / from_size, torch.log(size / from_size)], dim=1)
    return label, code * code.new_tensor(BOX_WEIGHTS)


def retinanet_losses(outs: Outputs, boxes: list[Tensor], labels: list[Tensor]) -> Terms:
    places = torch.cat([anchors(outs, level) for level in range(len(STRIDES))])
    all_logits = torch.cat([flat(x, 80) for x in outs["logits"]], dim=1)
    all_codes = torch.cat([flat(x, 4) for x in outs["boxes"]], dim=1)
    loss_cls, loss_box, count = torch.zeros(()), torch.zeros(()), 0
    for logits, code, *truth in zip(all_logits, all_codes, boxes, labels, strict=True):
        label, target = retinanet_targets(places, *truth)
        positive = label > 0
        loss_cls = loss_cls + focal_loss(logits, label)
        loss_box = loss_box + F.smooth_l1_loss(
            code[positive], target[positive], beta=0.11, reduction="sum"
        )
        count += int(positive.sum())
    return {"loss_cls": loss_cls / (count + len(boxes)), "loss_box": loss_box / max(4 * count, 1)}


# Detections


def decode(outs: Outputs, level: int, image: int) -> Tensor:
    """Boxes [P, 4] of a level, not yet clipped."""
    x = flat(outs["boxes"][level], 4)[image]
    if "centerness" in outs:
        points = locations(outs["boxes"][level], STRIDES[level], STRIDES[level] // 2)
        return torch.cat([points - x[:, :2], points + x[:, 2:]], dim=1)
    centre, size = centre_and_size(anchors(outs, level))
    x = x / x.new_tensor(BOX_WEIGHTS)
    centre = centre + x[:, :2] * size
    size = size * torch.exp(x[:, 2:].clamp(max=math.log(1000 / 16)))
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size - 1], dim=1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """The kept rows, best first. `torchvision.ops.nms` has other widths and keeps an equal IoU."""
    kept: list[int] = []
    rest = scores.argsort(descending=True, stable=True)
    while len(rest):
        kept.append(int(rest[0]))
        iou = legacy_iou(boxes[rest[:1]], boxes[rest])[0]
        iou[0] = 1  # even a box of no area is done with
        rest = rest[~(iou >= threshold)]  # two boxes of no area have an IoU of nan
    return kept


def detections(
    name: str, outs: Outputs, image_sizes: list[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Per image of size (height, width): `boxes` [D, 4], `scores` [D], `labels` [D], best first."""
    threshold = CONFIGS[name]["MODEL"]["RETINANET"]["NMS_TH"]
    found = []
    for image, (h, w) in enumerate(image_sizes):
        rows = []
        for level in range(len(STRIDES)):
            p = flat(outs["logits"][level], 80)[image].sigmoid()
            score = p
            if "centerness" in outs:
                score = p * flat(outs["centerness"][level], 1)[image].sigmoid()
            candidate = p > 0.05
            place, label = candidate.nonzero(as_tuple=True)
            score = score[candidate]
            best = score.argsort(descending=True, stable=True)[:1000]
            box = decode(outs, level, image)[place[best]]
            box = torch.minimum(box.clamp(min=0), box.new_tensor([w - 1, h - 1, w - 1, h - 1]))
            rows.append((box, score[best], label[best] + 1))
        boxes, scores, labels = (torch.cat(x) for x in zip(*rows, strict=True))
        kept = []
        for label in range(1, 81):
            of_class = (labels == label).nonzero()[:, 0]
            kept += of_class[nms(boxes[of_class], scores[of_class], threshold)].tolist()
        best = torch.tensor(kept, dtype=torch.int64)
        best = best[scores[best].argsort(descending=True, stable=True)]
        if len(best) > 100:  # all that tie with the hundredth stay
            best = best[scores[best] >= scores[best[99]]]
        found.append({"boxes": boxes[best], "scores": scores[best], "labels": labels[best]})
    return found
