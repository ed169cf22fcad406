"""Benchmarks of the parts of a detector: targets, losses, post-processing, operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from ..config import load_config
from ..models import layers
from ..models.build import build_head
from ..models.heads.dense import DenseHead
from ..models.necks.nas_fpn import Concat, WeightedSum
from ..ops import (
    batched_nms,
    depthwise_conv2d,
    modulated_deform_conv2d,
    sigmoid_focal_loss,
)
from ..ops import conv3x3 as our_conv3x3
from .inputs import (
    NUM_CLASSES,
    OBJECTS,
    count_candidates,
    generator,
    head_outputs,
    map_shapes,
    random_target,
)
from .measure import Case, Variant
from .reference import fcos_detections, retinanet_detections
from .setting import Setting

TORCHVISION = "torchvision"
PYTORCH = "PyTorch"
RETINANET_ANCHORS = 9
CHANNELS = 256


class _NoBackbone(nn.Identity):
    """Stands in for the backbone of a torchvision detector of which only the head is used."""

    out_channels = CHANNELS


class _MatchesOnly(nn.Module):
    """Stands in for torchvision's head: returns the matches instead of computing losses."""

    def compute_loss(self, targets, outputs, anchors, matched_idxs):
        return matched_idxs


@dataclass(frozen=True)
class HeadKind:
    """A kind of head: TEST.NMS_IOU, torchvision's detector, and anchors per location."""

    nms_iou: float
    rival: type[nn.Module]
    anchors: int


HEADS = {
    "fcos": HeadKind(0.6, FCOS, 1),
    "retinanet": HeadKind(0.4, RetinaNet, RETINANET_ANCHORS),
}


def our_head(name: str, classes: int, device: torch.device) -> DenseHead:
    """Our head, for its post-processing, assignment and losses; its layers are not used."""
    cfg = load_config(
        None,
        [
            *("MODEL.HEAD.NAME", name, "MODEL.HEAD.NUM_CONVS", 1),
            *("TEST.NMS_IOU", HEADS[name].nms_iou),
        ],
    )
    return build_head(cfg, classes).to(device)


def their_head(name: str, classes: int, device: torch.device, **settings) -> nn.Module:
    """torchvision's detector without a backbone; `settings` go to its constructor."""
    return HEADS[name].rival(_NoBackbone(), classes, **settings).to(device)


def their_anchors(
    model: nn.Module, size: tuple[int, int], images: int, device: torch.device
) -> list[Tensor]:
    """The anchors of each image in torchvision's detector."""
    features = [torch.empty(images, 1, *shape, device=device) for shape in map_shapes(*size)]
    return model.anchor_generator(
        ImageList(torch.empty(images, 3, *size, device=device), [size] * images), features
    )


def flat(levels: Sequence[Tensor], channels: int) -> Tensor:
    """Convert maps [N, A * channels, H, W] to torchvision's [N, sum of H * W * A, channels]."""
    return torch.cat(
        [
            x.view(len(x), -1, channels, *x.shape[-2:])
            .permute(0, 3, 4, 1, 2)
            .reshape(len(x), -1, channels)
            for x in levels
        ],
        dim=1,
    )


def codes_like(logits: list[Tensor], classes: int) -> list[Tensor]:
    """Small random box codes [N, 4 * A, H, W] for class logits [N, A * classes, H, W] by level."""
    random = generator(1)
    return [
        0.1 * torch.randn((len(x), 4 * (x.shape[1] // classes), *x.shape[-2:]), generator=random)
        for x in logits
    ]


def head_maps(
    name: str,
    size: tuple[int, int],
    device: torch.device,
    images: int = 1,
    objects: int = 30,
    classes: int = NUM_CLASSES,
) -> tuple[list[Tensor], ...]:
    """Outputs like those of a trained head of `HEADS`: see `head_outputs`, `DenseHead.forward`."""
    logits, distances, centerness = head_outputs(
        *size, images=images, objects=objects, classes=classes, anchors=HEADS[name].anchors
    )
    fcos = (logits, distances, centerness)
    maps = fcos if name == "fcos" else (logits, codes_like(logits, classes))
    return tuple([x.to(device) for x in levels] for levels in maps)


def _size_parameters(size: tuple[int, int], **further: object) -> dict[str, object]:
    return {"image": f"{size[0]}x{size[1]}", "classes": NUM_CLASSES, **further}


# ------------------------------------------------------------------------------ targets and losses
def _targets(size: tuple[int, int], images: int, device: torch.device) -> list[dict[str, Tensor]]:
    return [random_target(*size, seed=seed, device=device) for seed in range(images)]


def assignment(name: str, setting: Setting) -> Case:
    """Target assignment in two images."""
    size, images = setting.image_size(), 2
    targets = _targets(size, images, setting.device)
    shapes = map_shapes(*size)
    head = our_head(name, NUM_CLASSES, setting.device)
    theirs = their_head(name, NUM_CLASSES, setting.device)
    anchors = their_anchors(theirs, size, images, setting.device)
    theirs.head = _MatchesOnly()
    case = Case(
        "target assignment; torchvision's without gathering the labels and boxes of what it "
        "matched, which ours does",
        [Variant(TORCHVISION, lambda: theirs.compute_loss(targets, {}, anchors), theirs=True)],
        rivals=[TORCHVISION],
        parameters=_size_parameters(size, batch=images, objects=f"{OBJECTS} an image"),
        amount=images,
        unit="images",
    )
    if name == "fcos":
        levels = [h * w for h, w in shapes]
        case.variants[0].run = lambda: theirs.compute_loss(targets, {}, anchors, levels)
    case.variants.append(Variant("ours", lambda: head.assign(shapes, targets)))
    return case


def losses(name: str, setting: Setting) -> Case:
    """All losses of a batch, including target assignment and the gradients of the head's maps."""
    size, images = setting.image_size(), 2
    targets = _targets(size, images, setting.device)
    maps = head_maps(name, size, setting.device, images=images)
    leaves = [x.requires_grad_() for levels in maps for x in levels]
    head = our_head(name, NUM_CLASSES, setting.device)
    theirs = their_head(name, NUM_CLASSES, setting.device)
    anchors = their_anchors(theirs, size, images, setting.device)
    levels = [h * w for h, w in map_shapes(*size)]
    their_targets = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]

    def finish(terms: dict[str, Tensor]) -> None:
        sum(terms.values()).backward()
        for leaf in leaves:
            leaf.grad = None

    def run_theirs() -> None:
        outputs = {"cls_logits": flat(maps[0], NUM_CLASSES), "bbox_regression": flat(maps[1], 4)}
        if name == "fcos":
            outputs["bbox_ctrness"] = flat(maps[2], 1)
            finish(theirs.compute_loss(their_targets, outputs, anchors, levels))
        else:
            finish(theirs.compute_loss(their_targets, outputs, anchors))

    return Case(
        "all losses of a batch from the head's maps, forward and backward, target assignment "
        "included",
        [
            Variant(TORCHVISION, run_theirs, theirs=True),
            Variant("ours", lambda: finish(head.losses(maps, targets))),
        ],
        rivals=[TORCHVISION],
        parameters=_size_parameters(size, batch=images, objects=f"{OBJECTS} an image"),
        amount=images,
        unit="images",
    )


def focal_loss(setting: Setting) -> Case:
    """The sigmoid focal loss of two images, forward and backward."""
    places = 2 * (500 if setting.quick else 22_000)
    random = generator()
    logits = -4 + torch.randn(places, NUM_CLASSES, generator=random)
    logits = logits.to(setting.device).requires_grad_()
    labels = torch.randint(1, NUM_CLASSES + 1, (places,), generator=random)
    labels[torch.rand(places, generator=random) > 0.01] = 0
    labels = labels.to(setting.device)

    def one_hot() -> Tensor:
        hot = torch.zeros_like(logits)
        where = labels.nonzero().squeeze(1)
        hot[where, labels[where] - 1] = 1
        return hot

    made = one_hot()
    rival = torchvision.ops.sigmoid_focal_loss

    def gradient(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        logits.grad = None

    def theirs(targets: Callable[[], Tensor]) -> Tensor:
        return rival(logits, targets(), alpha=0.25, gamma=2, reduction="sum")

    return Case(
        "sigmoid focal loss, forward and backward; torchvision's takes dense targets, made "
        "beforehand unless the name says otherwise",
        [
            Variant(TORCHVISION, lambda: gradient(lambda: theirs(lambda: made)), theirs=True),
            Variant(
                f"{TORCHVISION}, targets made",
                lambda: gradient(lambda: theirs(one_hot)),
                theirs=True,
            ),
            Variant("ours", lambda: gradient(lambda: sigmoid_focal_loss(logits, labels))),
        ],
        rivals=[TORCHVISION],
        parameters={"places": places, "classes": NUM_CLASSES},
    )


# --------------------------------------------------------------------------------- post-processing
def post_processing(name: str, setting: Setting) -> Case:
    """Post-processing: from the head's maps to the detections of one image."""
    size, device = setting.image_size(), setting.device
    maps = head_maps(name, size, device)
    candidates = count_candidates(maps[0])
    channels_last = tuple(
        [x.contiguous(memory_format=torch.channels_last) for x in levels] for levels in maps
    )
    head = our_head(name, NUM_CLASSES, device)
    if name == "fcos":
        by_loops = partial(fcos_detections, maps, [size], head.post_process)
        scores = [(x.sigmoid() * c.sigmoid()).sqrt() for x, c in zip(maps[0], maps[2], strict=True)]
    else:
        by_loops = partial(retinanet_detections, head, maps, [size])
        scores = [x.sigmoid() for x in maps[0]]
    # The same number of candidates for torchvision, whose score is another function of the maps.
    highest = torch.cat([x.flatten() for x in scores]).topk(candidates + 1).values
    theirs = their_head(
        name,
        NUM_CLASSES,
        device,
        score_thresh=highest[-2:].mean().item(),
        nms_thresh=head.post_process.nms_iou,
        detections_per_img=head.post_process.detections_per_image,
    )
    anchors = their_anchors(theirs, size, 1, device)
    counts = [h * w * HEADS[name].anchors for h, w in map_shapes(*size)]
    level_anchors = [list(x.split(counts)) for x in anchors]

    def run_theirs() -> object:
        outputs = {"cls_logits": flat(maps[0], NUM_CLASSES), "bbox_regression": flat(maps[1], 4)}
        if name == "fcos":
            outputs["bbox_ctrness"] = flat(maps[2], 1)
        by_level = {key: list(x.split(counts, dim=1)) for key, x in outputs.items()}
        return theirs.postprocess_detections(by_level, level_anchors, [size])

    loops = "loop over levels and classes"
    runs = {
        loops: by_loops,
        TORCHVISION: run_theirs,
        "ours": lambda: head.detect(maps, [size]),
        "ours, channels-last maps": lambda: head.detect(channels_last, [size]),
    }
    return Case(
        "detections of one image from the head's maps of five levels",
        [
            Variant(key, torch.inference_mode()(run), theirs=key in (loops, TORCHVISION))
            for key, run in runs.items()
        ],
        rivals=[loops, TORCHVISION],
        parameters=_size_parameters(size, candidates=candidates),
        amount=1,
        unit="images",
    )


def nms(count: int, setting: Setting) -> Case:
    """Class-wise non-maximum suppression of the candidates of an image."""
    random = generator()
    objects = random_target(800, 1088, objects=count // 10, seed=1)
    which = torch.randint(0, len(objects["boxes"]), (count,), generator=random)
    boxes = objects["boxes"][which]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.1 * sides * torch.randn(count, 4, generator=random)
    boxes = torch.cat((boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])), 1)
    data = boxes, torch.rand(count, generator=random), objects["labels"][which]
    boxes, scores, labels = (x.to(setting.device) for x in data)
    return Case(
        "class-wise NMS, ten boxes per object",
        [
            Variant(
                TORCHVISION,
                lambda: torchvision.ops.batched_nms(boxes, scores, labels, 0.6),
                theirs=True,
            ),
            Variant("ours", lambda: batched_nms(boxes, scores, labels, 0.6, legacy=True)),
        ],
        rivals=[TORCHVISION],
        parameters={"boxes": count, "classes": NUM_CLASSES},
    )


# --------------------------------------------------------------------------- deformable convolution
def deform_conv(backward: bool, setting: Setting) -> Case:
    """The modulated deformable 3x3 convolution of the searched necks and heads, on P3."""
    height, width = map_shapes(*setting.image_size())[0]
    random = generator()
    groups = 2
    shapes = {
        "x": (1, CHANNELS, height, width),
        "offset": (1, groups * 18, height, width),
        "mask": (1, groups * 9, height, width),
        "weight": (CHANNELS, CHANNELS, 3, 3),
    }
    tensors = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    tensors["mask"] = tensors["mask"].sigmoid()
    tensors["weight"] *= (9 * CHANNELS) ** -0.5
    tensors = {key: x.to(setting.device).requires_grad_(backward) for key, x in tensors.items()}
    x, offset, mask, weight = tensors.values()
    last = [
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_(backward)
        for t in (x, offset, mask)
    ]
    grad = torch.randn(shapes["x"], generator=random).to(setting.device)
    leaves = [*tensors.values(), *last]

    def ours(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return modulated_deform_conv2d(x, offset, mask, weight, padding=1, offset_groups=groups)

    return operator_case(
        "modulated deformable 3x3 convolution",
        {
            TORCHVISION: lambda: torchvision.ops.deform_conv2d(
                x, offset, weight, padding=1, mask=mask
            ),
            "ours": lambda: ours(x, offset, mask),
            "ours, channels-last": lambda: ours(*last),
        },
        leaves,
        grad if backward else None,
        {"map": f"{height}x{width}", "channels": CHANNELS, "offset groups": groups},
    )


def operator_case(
    title: str,
    forwards: dict[str, Callable[[], Tensor]],
    leaves: list[Tensor],
    grad: Tensor | None,
    parameters: dict[str, object],
) -> Case:
    """A case for an operator in several versions.

    Args:
        title: name of the operator.
        forwards: by name, a function that computes the output; the first is the rival's.
        leaves: tensors whose gradients are reset after each call.
        grad: gradient of the output; None: forward only.
        parameters: see `Case`.
    """

    def finish(forward: Callable[[], Tensor]) -> None:
        output = forward()
        if grad is not None:
            output.backward(grad)
            for leaf in leaves:
                leaf.grad = None

    rival = next(iter(forwards))
    return Case(
        f"{title}, float32, {'forward' if grad is None else 'forward and backward'}",
        [
            Variant(name, partial(finish, forward), theirs=name == rival)
            for name, forward in forwards.items()
        ],
        rivals=[rival],
        parameters=parameters,
    )


# ----------------------------------------------------------- layers of the models, channels-last
def conv3x3(backward: bool, setting: Setting) -> Case:
    """The 3x3 convolution, on P3."""
    height, width = map_shapes(*setting.image_size())[0]
    x, grad = _last_maps(setting, CHANNELS, CHANNELS, backward)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, generator=generator())
    weight = weight.to(setting.device, memory_format=torch.channels_last)
    weight.requires_grad_(backward)
    return operator_case(
        "3x3 convolution",
        {
            PYTORCH: lambda: F.conv2d(x, weight, padding=1),
            "ours": lambda: our_conv3x3(x, weight),
        },
        [x, weight],
        grad if backward else None,
        {"map": f"{height}x{width}", "channels": CHANNELS},
    )


def depthwise_conv(backward: bool, setting: Setting) -> Case:
    """The depthwise 5x5 convolution with dilation 6, on P3."""
    height, width = map_shapes(*setting.image_size())[0]
    x, grad = _last_maps(setting, CHANNELS, CHANNELS, backward)
    weight = torch.randn(CHANNELS, 1, 5, 5, generator=generator()).to(setting.device)
    weight.requires_grad_(backward)
    return operator_case(
        "depthwise 5x5 convolution, dilation 6",
        {
            PYTORCH: lambda: F.conv2d(x, weight, padding=12, dilation=6, groups=CHANNELS),
            "ours": lambda: depthwise_conv2d(x, weight, 6),
        },
        [x, weight],
        grad if backward else None,
        {"map": f"{height}x{width}", "channels": CHANNELS},
    )


def concat(backward: bool, setting: Setting) -> Case:
    """The concatenation of searched necks with its batch norm, in training mode, on P3."""
    height, width = map_shapes(*setting.image_size())[0]
    x, grad = _last_maps(setting, CHANNELS, CHANNELS, backward)
    y = x.detach().flip(1).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    block = Concat(CHANNELS, nn.BatchNorm2d).to(setting.device).requires_grad_(backward)

    def ordinary() -> Tensor:
        both = F.relu(block.norm(torch.cat((x, y), dim=1)), inplace=True)
        return F.conv2d(both, block.conv.weight, groups=CHANNELS)

    return operator_case(
        "searched concatenation in training (concatenation, batch norm, ReLU, grouped 1x1 conv)",
        {PYTORCH: ordinary, "ours": lambda: block(x, y)},
        [x, y, *block.parameters()],
        grad if backward else None,
        {"maps": f"{height}x{width}", "output channels": CHANNELS},
    )


def norm_relu(backward: bool, setting: Setting) -> Case:
    """Batch norm and ReLU in training mode, on P3."""
    return _norm_case("batch norm and ReLU in training", nn.BatchNorm2d, backward, setting)


def group_norm_relu(backward: bool, setting: Setting) -> Case:
    """Group norm and ReLU of the heads, on P3."""
    return _norm_case("group norm and ReLU", layers.group_norm, backward, setting)


def _norm_case(title: str, make: layers.Norm, backward: bool, setting: Setting) -> Case:
    height, width = map_shapes(*setting.image_size())[0]
    x, grad = _last_maps(setting, CHANNELS, CHANNELS, backward)
    norm = make(CHANNELS).to(setting.device).requires_grad_(backward)
    return operator_case(
        title,
        {
            PYTORCH: lambda: F.relu(norm(x), inplace=True),
            "ours": lambda: layers.norm_relu(norm, x),
        },
        [x, *norm.parameters()],
        grad if backward else None,
        {"map": f"{height}x{width}", "channels": CHANNELS},
    )


def weighted_sum(backward: bool, setting: Setting) -> Case:
    """The weighted sum of searched necks (a factor per channel of both maps), on P3."""
    height, width = map_shapes(*setting.image_size())[0]
    x, grad = _last_maps(setting, CHANNELS, CHANNELS, backward)
    y = x.detach().flip(1).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    block = WeightedSum(CHANNELS, nn.BatchNorm2d).to(setting.device).requires_grad_(backward)
    return operator_case(
        "searched weighted sum",
        {PYTORCH: lambda: block.a * x + block.b * y, "ours": lambda: block(x, y)},
        [x, y, *block.parameters()],
        grad if backward else None,
        {"maps": f"{height}x{width}", "channels": CHANNELS},
    )


def _last_maps(
    setting: Setting, channels: int, out_channels: int, backward: bool
) -> tuple[Tensor, Tensor]:
    """Random channels-last maps of the size of P3: an input, and a gradient of the output."""
    size = map_shapes(*setting.image_size())[0]
    maps = [
        torch.randn(1, c, *size, generator=generator())
        .to(setting.device)
        .contiguous(memory_format=torch.channels_last)
        for c in (channels, out_channels)
    ]
    return maps[0].requires_grad_(backward), maps[1]
