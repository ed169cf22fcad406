"""The detectors under comparison, ours and torchvision's, ready to run side by side.

All have random weights that behave like trained ones (see `lifelike`): on the image `smooth_image`
of its size, each detector has the same number of candidates above its score threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    FCOS,
    RetinaNet,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from yacs.config import CfgNode

from ..config import load_config
from ..engine.solver import build_optimizer
from ..engine.step import forward_backward, update
from ..models import Detector, build_detector, optimize_for_inference
from ..models.heads.fcos import FCOSHead
from ..models.heads.locations import STRIDES
from .inputs import NUM_CLASSES, smooth_image
from .lifelike import set_candidates, settle
from .measure import Skip

CONFIGS = Path(__file__).parents[2] / "configs"
OURS = {
    "R_50_NAS_head": "search/R_50_NAS_head.yaml",
    "R_50_NAS_densebox": "search/R_50_NAS_densebox.yaml",
    "Mobile_NAS_head": "search/Mobile_NAS_head.yaml",
    "R_50_NAS_retinanet": "search/R_50_NAS_retinanet.yaml",
    "R_50_FPN_FCOS": "baselines/R_50_FPN_FCOS.yaml",
}
"""Our configs by name: files under `CONFIGS`."""

THEIR_FCOS, THEIR_RETINANET = "torchvision FCOS", "torchvision RetinaNet"
CANDIDATES = 1000
"""Number of class probabilities above the threshold in the image, for every detector."""
STEP_SIZE = 1e-7
"""Learning rate of measured training steps; random weights would diverge with a larger one."""

Size = tuple[int, int]


def our_config(name: str) -> CfgNode:
    """A config of `OURS`, for 80 classes whatever its data.

    Raises:
        Skip: the config files are missing.
    """
    path = CONFIGS / OURS[name]
    if not path.exists():
        raise Skip(f"{path} is not there: run from a checkout of the source")
    return load_config(
        path, ["MODEL.NUM_CLASSES", NUM_CLASSES, "MODEL.WEIGHT", "", "SOLVER.BASE_LR", STEP_SIZE]
    )


@functools.lru_cache(maxsize=1)
def our_detector(name: str, size: Size, device: torch.device) -> Detector:
    """A detector of `OURS` in evaluation mode. It is cached: do not modify it."""
    torch.manual_seed(0)
    model = build_detector(our_config(name), NUM_CLASSES).to(device).eval()
    images = [smooth_image(*size).to(device)]
    if isinstance(model.head, FCOSHead):
        _predict_boxes(model.head.box_pred, bias=1)
        for stride, scale in zip(STRIDES, model.head.scales, strict=True):
            nn.init.constant_(scale.scale, torch.tensor(4.0 * stride).log().item())
    run = torch.no_grad()(lambda: model(images))
    settle(model, run)
    threshold = model.head.post_process.score_threshold
    set_candidates(model.head.cls_logits, run, CANDIDATES, threshold)
    return model


@functools.lru_cache(maxsize=4)
def their_detector(name: str, size: Size, device: torch.device, frozen: bool = False) -> nn.Module:
    """torchvision's FCOS or RetinaNet with ResNet-50 in evaluation mode, without resizing.

    Args:
        name: `THEIR_FCOS` or `THEIR_RETINANET`.
        size: (height, width) of the images.
        device: device of the model.
        frozen: freeze batch norms and the first two stages, as torchvision does for pretrained
            weights, and as ours are. Otherwise the backbone has plain batch norms, which are a
            little faster at inference.
    """
    torch.manual_seed(0)
    settings = {
        "num_classes": NUM_CLASSES,
        "min_size": min(size),
        "max_size": max(size),
        "detections_per_img": 100,
    }
    if frozen:
        backbone = resnet_fpn_backbone(
            backbone_name="resnet50",
            weights=None,
            trainable_layers=3,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        model = {THEIR_FCOS: FCOS, THEIR_RETINANET: RetinaNet}[name](backbone, **settings)
    else:
        build = {THEIR_FCOS: fcos_resnet50_fpn, THEIR_RETINANET: retinanet_resnet50_fpn}[name]
        model = build(weights=None, weights_backbone=None, **settings)
    model = model.to(device).eval()
    images = [smooth_image(*size).to(device)]
    classifier, centerness = model.head.classification_head.cls_logits, None
    threshold = model.score_thresh
    if isinstance(model, FCOS):
        _predict_boxes(model.head.regression_head.bbox_reg, bias=4)
        # Its threshold applies to the square root of class probability times centerness.
        centerness, threshold = model.head.regression_head.bbox_ctrness, threshold**2
    run = torch.no_grad()(lambda: model(images))
    settle(model, run)
    set_candidates(classifier, run, CANDIDATES, threshold, centerness)
    return model


def _predict_boxes(conv: nn.Conv2d, bias: float) -> None:
    """Make a box layer predict distances of about four strides to each side."""
    with torch.no_grad():
        conv.weight *= 0.2
        nn.init.constant_(conv.bias, bias)


@functools.lru_cache(maxsize=4)
def optimized_detector(model: Detector, dtype: torch.dtype, compile: bool) -> nn.Module:
    """Our detector, optimized for inference.

    Raises:
        Skip: the processor has no instructions for `dtype`.
    """
    device = model.preprocess.mean.device
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise Skip(f"this {device.type} has no bfloat16 instructions")
    return optimize_for_inference(model, dtype=dtype, compile=compile)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def inference_call(
    model: nn.Module, images: Sequence[Tensor], amp: torch.dtype | None = None
) -> Callable[[], object]:
    """A call that detects objects in these images, on their device.

    Args:
        model: detector in evaluation mode.
        images: [3, H, W] each.
        amp: dtype of autocast; None: no autocast.
    """
    images, device = list(images), images[0].device.type

    @torch.inference_mode()
    def call() -> object:
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            return model(images)

    return call


def our_training(
    name: str, size: Size, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A detector of `OURS` in training mode, channels-last as training has it; its optimizer."""
    model = our_detector.__wrapped__(name, size, device).train()  # not the shared one
    model = model.to(memory_format=torch.channels_last)
    return model, build_optimizer(our_config(name), model)


def training_call(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    amp: torch.dtype | None = None,
) -> Callable[[], object]:
    """A call that takes a training step like `nasfcos.engine`, with these images and targets."""
    scaler = torch.amp.GradScaler(images[0].device.type, enabled=False)

    def step() -> object:
        losses = forward_backward(model, images, targets, scaler, amp=amp)
        update(optimizer, scaler)
        return losses

    return step


def our_step(
    name: str,
    size: Size,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    amp: torch.dtype | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
    """A detector of `OURS`, its optimizer, and a call that takes a training step."""
    model, optimizer = our_training(name, size, images[0].device)
    return model, optimizer, training_call(model, optimizer, images, targets, amp)


def their_step(
    name: str,
    size: Size,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    amp: torch.dtype | None = None,
    frozen: bool = True,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
    """`our_step` for torchvision, trained as by its reference scripts: SGD with momentum.

    As in ours, gradients are freed between steps, so that a step's memory includes them.
    """
    device = images[0].device
    model = their_detector.__wrapped__(name, size, device, frozen).train()
    model = model.to(memory_format=memory_format)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=STEP_SIZE, momentum=0.9, weight_decay=1e-4)
    # torchvision's labels start at 0 here, since these detectors do not predict the background.
    targets = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]
    images = list(images)

    def step() -> object:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            losses = model(images, targets)
            total = sum(losses.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses

    return model, optimizer, step
