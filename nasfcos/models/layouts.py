"""Translation of other projects' weight names to this project's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .detector import CAFFE2_MEAN

# torchvision's ImageNet normalisation (RGB in 0..1).
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)

Tensors = dict[str, Tensor]

CAFFE2_INPUT = {"preprocess.mean": torch.tensor(CAFFE2_MEAN), "preprocess.std": torch.ones(3)}
TORCHVISION_INPUT = {
    "preprocess.mean": 255 * torch.tensor(TORCHVISION_MEAN),
    "preprocess.std": 255 * torch.tensor(TORCHVISION_STD),
}

# Released names to this project's, for the names that do not depend on the tensors' shapes.
_RELEASED_NAMES = [
    (r"^encoder\.body\.", "backbone."),
    (r"^decoder\.fpn\.adapt([1-4])\.0\.", lambda m: f"neck.adapt.{int(m[1]) - 1}.conv."),
    (r"^decoder\.fpn\.adapt([1-4])\.1\.", lambda m: f"neck.adapt.{int(m[1]) - 1}.norm."),
    (r"^decoder\.fpn\._ops\.(\d+)\.([01])\.dcn\.0\.", r"neck.cells.\1.op\2.conv."),
    (r"^decoder\.fpn\._ops\.(\d+)\.([01])\.dcn\.1\.", r"neck.cells.\1.op\2.norm."),
    (r"^decoder\.fpn\._ops\.(\d+)\.2\.conv1x1\.0\.", r"neck.cells.\1.aggregate.norm."),
    (r"^decoder\.fpn\._ops\.(\d+)\.2\.conv1x1\.2\.", r"neck.cells.\1.aggregate.conv."),
    (r"^decoder\.fpn\.top_blocks\.", "neck.top."),
    (r"^decoder\.rpn\.head\._cls_head_global_ops\.", "head.cls_tower.layers."),
    (r"^decoder\.rpn\.head\._reg_head_global_ops\.", "head.box_tower.layers."),
    (r"^(head\.\w+_tower\.layers\.\d+)\.(?:dcn\.)?0\.", r"\1.conv."),
    (r"^(head\.\w+_tower\.layers\.\d+)\.(?:dcn\.)?1\.", r"\1.norm."),
    (r"^decoder\.rpn\.head\.bbox_pred\.", "head.box_pred."),
    (r"^decoder\.rpn\.head\.(cls_logits|centerness|scales)\.", r"head.\1."),
    (r"^decoder\.rpn\.anchor_generator\.cell_anchors\.(\d)$", r"head.anchors\1"),
]
_RELEASED_PLAIN_TOWER = re.compile(r"^decoder\.rpn\.head\.(cls|bbox)_tower\.(\d+)\.(\w+)$")


def released_names(shapes: Mapping[str, int]) -> dict[str, str]:
    """This project's name for each released tensor.

    Args:
        shapes: number of dimensions of each released tensor by name. A plain tower numbers its
            convs, norms and activations in one sequence; its convs are the tensors of four
            dimensions.
    """
    convs: dict[str, list[int]] = {"cls": [], "bbox": []}
    for name, dim in shapes.items():
        match = _RELEASED_PLAIN_TOWER.match(name)
        if match and dim == 4:
            convs[match[1]].append(int(match[2]))
    return {name: _released_name(name, convs) for name in shapes}


def _released_name(name: str, convs: dict[str, list[int]]) -> str:
    match = _RELEASED_PLAIN_TOWER.match(name)
    if match:
        index = int(match[2])
        layer = sum(conv <= index for conv in convs[match[1]]) - 1
        part = "conv" if index in convs[match[1]] else "norm"
        tower = "cls_tower" if match[1] == "cls" else "box_tower"
        return f"head.{tower}.layers.{layer}.{part}.{match[3]}"
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def from_released(tensors: Tensors) -> Tensors:
    """Tensors of a released detector, with the input normalisation, which its file lacks."""
    names = released_names({name: tensor.dim() for name, tensor in tensors.items()})
    return {names[name]: tensor for name, tensor in tensors.items()} | CAFFE2_INPUT


def from_caffe2(tensors: Tensors) -> Tensors:
    """Tensors of a Caffe2 ResNet (BGR input), whose frozen norms are a scale and a shift."""
    converted = dict(CAFFE2_INPUT)
    for name, tensor in tensors.items():
        target = _caffe2_name(name)
        if target is None:
            continue
        converted[target] = tensor
        if re.search(r"(bn\d|downsample\.1)\.weight$", target):
            norm = target.removesuffix("weight")
            converted[norm + "running_mean"] = torch.zeros_like(tensor)
            converted[norm + "running_var"] = torch.ones_like(tensor)
    return converted


def _caffe2_name(name: str) -> str | None:
    """This project's name for a Caffe2 name; None: not part of the backbone.

    ``res3_0_branch2a_bn_s``, for example, becomes ``backbone.layer2.0.bn1.weight``.
    """
    if name == "conv1_w":
        return "backbone.stem.conv1.weight"
    kind = {"w": "weight", "s": "weight", "b": "bias"}
    match = re.match(r"res_conv1_bn_([sb])$", name)
    if match:
        return f"backbone.stem.bn1.{kind[match[1]]}"
    match = re.match(r"res([2-5])_(\d+)_branch(1|2[abc])(_bn)?_([wsb])$", name)
    if not match or (match[4] is None) != (match[5] == "w"):
        return None
    stage, block, branch, norm, last = match.groups()
    if branch == "1":
        layer = f"downsample.{1 if norm else 0}"
    else:
        layer = f"{'bn' if norm else 'conv'}{'abc'.index(branch[1]) + 1}"
    return f"backbone.layer{int(stage) - 1}.{block}.{layer}.{kind[last]}"


def from_torchvision_resnet(tensors: Tensors) -> Tensors:
    """Tensors of a torchvision ResNet (RGB input), which has no module for its stem."""
    converted = dict(TORCHVISION_INPUT)
    for name, tensor in tensors.items():
        if name.startswith("fc."):
            continue
        if name.startswith(("conv1.", "bn1.")):
            name = f"stem.{name}"
        converted[f"backbone.{name}"] = tensor
    return _reverse_input(converted, "backbone.stem.conv1.weight")


def from_torchvision_mobilenet(tensors: Tensors) -> Tensors:
    """Tensors of torchvision's MobileNetV2 (RGB input).

    There each conv, norm and activation of a block are nested; here a block is one flat sequence.
    """
    converted = dict(TORCHVISION_INPUT)
    for name, tensor in tensors.items():
        match = re.match(r"features\.(\d+)\.conv\.(\d+)\.(?:(\d+)\.)?(\w+)$", name)
        if match:
            block, outer, inner, last = match.groups()
            units = 1 if int(block) == 1 else 2  # nested triples before the last conv and norm
            if inner is not None:
                index = 3 * int(outer) + int(inner)
            else:
                index = 3 * units + int(outer) - units
            name = f"features.{block}.conv.{index}.{last}"
        elif not name.startswith("features.0."):
            continue  # the classifier and the last 1x1 conv
        converted[f"backbone.{name}"] = tensor
    return _reverse_input(converted, "backbone.features.0.0.weight")


def _reverse_input(tensors: Tensors, name: str) -> Tensors:
    """The tensors with the first conv changed from RGB to BGR, which this project's models use."""
    return tensors | {name: tensors[name].flip(1)}
