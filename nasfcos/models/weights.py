"""Weights from files: released models, own checkpoints, ImageNet backbones.

Whatever its form, a source becomes a plain dict of tensors under this project's names; then one
function puts it into the model and accounts for every tensor. Nothing in a file is executed: torch
files are read with ``weights_only``, Caffe2 pickles by an unpickler that knows nothing but numpy
arrays and plain containers.
"""

from __future__ import annotations

import codecs
import collections
import errno
import io
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..download import local_path, resolve_source
from .detector import CAFFE2_MEAN
from .layers import FrozenBatchNorm2d

logger = logging.getLogger(__name__)

# torchvision's ImageNet normalisation (RGB in 0..1) and the epsilon of its batch norms.
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)
TORCHVISION_BN_EPS = 1e-5

# How a zip begins, which is what torch has written since version 1.6.
ZIP_START = b"PK\x03\x04"

# Names of each kind that a message lists.
SHOWN = 20

Tensors = dict[str, Tensor]


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit the model; the message lists what and why."""


@dataclass
class Weights:
    """What a source holds.

    Attributes:
        name: of the source, for messages.
        tensors: by this project's names.
        kind: "detector" (own or released), or "backbone" (ImageNet).
        description: the source's form, for the log.
        classes: names of the object classes, where the file records them.
    """

    name: str
    tensors: Tensors
    kind: str
    description: str
    classes: list[str] | None = None


@dataclass
class LoadReport:
    """What `load_weights` did with each tensor (names are this project's)."""

    kind: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    classes: list[str] | None = None

    @property
    def complete(self) -> bool:
        """Whether no tensor is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.misshapen)

    def problems(self) -> str:
        """The tensors that did not load, a line each; of many of a kind the first, and how many."""
        lines = []
        for what, names in (
            ("missing from the source", self.missing),
            ("unknown to the model", self.unexpected),
            ("another shape", self.misshapen),
        ):
            lines += [f"  {what}: {name}" for name in names[:SHOWN]]
            if len(names) > SHOWN:
                lines.append(f"  {what}: and {len(names) - SHOWN} more, {len(names)} in all")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | Weights,
    strict: bool = True,
) -> LoadReport:
    """Put weights into a detector.

    Args:
        model: a `Detector`, wrapped (for several devices, by `torch.compile`) or not.
        source: a path, a URL (downloaded once), ``catalog://`` or ``torchvision://`` names of
            ImageNet backbones, or a state dict; in the layout of this project or of the release,
            with or without a wrapper's prefix (``module.``, ``_orig_mod.``), alone or under
            ``model``. ImageNet backbones set the backbone and the input normalisation only. Or what
            `read_weights` gave.
        strict: refuse a source unless every tensor has its counterpart of the same shape. False:
            load what fits (fine-tuning to other classes) and log the rest, but refuse a source
            of which no parameter fits, and an ImageNet backbone without most of the convolutions
            of the model's: it is another one.

    Raises:
        WeightsError: unreadable, or not matching; the tensors that do not fit are listed, and the
            model is left as it was.
        TypeError: the source is none of these.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    name = weights.name
    tensors = weights.tensors
    own = {_unwrapped_name(k): v for k, v in model.state_dict(keep_vars=True).items()}
    wanted = own
    if weights.kind == "backbone":
        tensors = _fit_batch_norms(model, tensors)
        wanted = {k: v for k, v in own.items() if k.startswith(("backbone.", "preprocess."))}

    report = LoadReport(weights.kind, classes=weights.classes)
    for key in wanted:
        if key not in tensors:
            report.missing.append(key)
        elif tensors[key].shape != own[key].shape:
            shapes = f"{list(tensors[key].shape)} there, {list(own[key].shape)} in the model"
            report.misshapen.append(f"{key} ({shapes})")
        else:
            report.loaded.append(key)
    report.unexpected = [key for key in tensors if key not in wanted]

    if not report.complete and strict:
        raise WeightsError(
            f"{name} ({weights.description}) does not fit the model:\n{report.problems()}\n"
            "Use a config that describes the weights' model, or load with strict=False "
            "(fine-tuning) to take only what fits."
        )
    if lack := _what_lacks(weights.kind, {key: own[key] for key in wanted}, report.loaded):
        raise WeightsError(
            f"{name} ({weights.description}) is of another model: {lack}\n{report.problems()}\n"
            "Use weights of the config's model (MODEL.WEIGHT), or a config that describes the "
            "weights' model (MODEL.BACKBONE, MODEL.RESNET)."
        )
    with torch.no_grad():
        for key in report.loaded:
            own[key].copy_(tensors[key])
    logger.info("%s (%s): %d tensors loaded", name, weights.description, len(report.loaded))
    if not report.complete:
        logger.warning("%s does not fit the model everywhere:\n%s", name, report.problems())
    return report


def _what_lacks(kind: str, wanted: Mapping[str, Tensor], loaded: Sequence[str]) -> str | None:
    """Why what fits is too little to go on with; None: it is not."""
    names = {name for name, tensor in wanted.items() if isinstance(tensor, nn.Parameter)}
    if kind == "detector":
        return None if names.intersection(loaded) else "no parameter of the model is in it."
    # Shapes agree by chance between backbones: half of a ResNet-18's fit into a ResNet-50.
    convs = {name for name in names if wanted[name].dim() == 4}
    found = len(convs.intersection(loaded))
    if found > len(convs) / 2:
        return None
    return f"{found} of the {len(convs)} convolutions of the model's backbone are in it."


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> Weights:
    """The tensors of a source under this project's names (see `load_weights`).

    Raises:
        WeightsError: missing or unreadable file, or content that is no known kind of weights.
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(f"weights are a path, a URL or a state dict, not {type(source).__name__}")
    if source == "":
        raise WeightsError("no weights are named: the source is an empty text")
    name = "the given state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read_source(str(source))
    classes = content.get("classes") if isinstance(content, Mapping) else None
    for wrapper in ("model", "state_dict", "blobs"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = _plain_tensors(content, name)
    if any(key.startswith(("encoder.", "decoder.")) for key in tensors):
        return Weights(name, _from_released(tensors), "detector", "released model")
    if any(key.startswith(("backbone.", "neck.", "head.")) for key in tensors):
        names = [str(c) for c in classes] if isinstance(classes, (list, tuple)) else None
        return Weights(name, tensors, "detector", "own checkpoint", names)
    if "conv1_w" in tensors:
        return Weights(name, _from_caffe2(tensors), "backbone", "Caffe2 ImageNet backbone")
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        converted = _from_torchvision_resnet(tensors)
        return Weights(name, converted, "backbone", "torchvision ResNet")
    if "features.0.0.weight" in tensors:
        converted = _from_torchvision_mobilenet(tensors)
        return Weights(name, converted, "backbone", "torchvision MobileNetV2")
    raise WeightsError(
        f"{name} holds none of the known kinds of weights (own, released, Caffe2 or torchvision "
        f"ImageNet backbone); its tensors begin: {', '.join(list(tensors)[:5]) or 'there are none'}"
    )


# ------------------------------------------------------------------------------------- reading


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """The content of a file of `torch.save`, on the CPU.

    torch itself verifies no checksums: they are verified here, in files that have some. That this
    reads the file before torch does costs no second reading from the disk.

    Raises:
        WeightsError: the file is damaged, or not of this kind.
        OSError: it could not be read, which says nothing about what is in it.
    """
    try:
        damaged = None
        with open(path, "rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # zipfile and torch.load raise many kinds
        # Damaged files send zipfile to places before their start (EINVAL), and its unpackers have
        # no number for what they find.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = str(path)
            raise
        raise WeightsError(f"{path} cannot be read as weights: {_reason(error)}") from error
    raise WeightsError(
        f"{path} is damaged: wrong checksum of {damaged} (or it has none, being saved under "
        "torch.serialization.set_crc32_options(False): save it without that)"
    )


def read_saved(path: Path) -> dict:
    """A dict saved by torch; empty where the file is missing or, with a warning, damaged."""
    if not path.exists():
        return {}
    try:
        return dict(read_torch_file(path))
    except (WeightsError, TypeError, ValueError) as error:
        logger.warning("%s is damaged: %s", path, error)
        return {}


def _read_source(source: str) -> Any:
    path = resolve_source(source)
    try:
        return _read_file(path)
    except WeightsError as error:
        if local_path(source) is not None:
            raise
        raise WeightsError(
            f"{error}. It is what {source} gave when it was downloaded: if that was something else "
            f"(a page that asks to log in), delete {path} to have it downloaded again"
        ) from error


def _read_file(path: Path) -> Any:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder: name a weight file in it (MODEL.WEIGHT)")
    if not path.is_file():
        raise WeightsError(f"the weight file {path} does not exist (MODEL.WEIGHT)")
    try:
        return read_torch_file(path)
    except WeightsError as torch_error:
        data = path.read_bytes()
        if data.startswith(ZIP_START):
            raise
        try:
            content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
            if not isinstance(content, Mapping):
                raise pickle.UnpicklingError("it does not begin with a dict")
            return content
        except Exception as pickle_error:
            raise WeightsError(
                f"{torch_error}. It is no pickle of numpy arrays either: {_reason(pickle_error)}"
            ) from None
    except OSError as error:
        raise WeightsError(f"the weight file cannot be read (MODEL.WEIGHT): {error}") from error


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "weights_only" in text:  # torch advises to execute what the file says
        return (
            "torch.save did not write it, or it holds more than tensors, numbers and text in plain "
            "containers (save the model's state dict alone)"
        )
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut off or damaged ({text})"
    return text.splitlines()[0].rstrip(".")


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays of numbers and plain containers, and refuses every other object.

    numpy's own classes stay out of it: their ``__setstate__`` trusts what it is given, down to
    pointers. The stand-ins below read a type code and raw bytes, and nothing else.
    """

    MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
    NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if module in self.MULTIARRAY and name == "_reconstruct":
            return lambda kind, shape, dtype: _Array()
        if module in self.MULTIARRAY and name == "scalar":
            return lambda dtype, data: dtype.array(data, ())
        if module in self.NUMERIC and name == "_frombuffer":
            return lambda data, dtype, shape, order: dtype.array(data, shape, order)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights do not need")


class _Dtype:
    """Stands in for numpy.dtype: floats, integers and booleans in either byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[fiub][1248]", code):
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order, details = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(detail is not None for detail in details):
            raise pickle.UnpicklingError("an array of a structured type")
        self.order = order

    def array(self, data: Any, shape: Any, order: str = "C") -> np.ndarray:
        if isinstance(data, str):  # bytes of Python 2, which are read as text
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"an array whose content is {type(data).__name__}")
        return np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order=order)


class _Array:
    """Stands in for numpy.ndarray while a pickle is read; `value` is the array."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type")
        self.value = dtype.array(data, shape, "F" if fortran else "C")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return codecs.encode(text, "latin1")


def _plain_tensors(content: Any, name: str) -> Tensors:
    """The content's arrays as tensors."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name} holds {type(content).__name__}, not a dict of tensors")
    tensors = {}
    for key, value in content.items():
        if isinstance(value, _Array):
            value = value.value
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            native = value.dtype.newbyteorder("=")
            value = torch.from_numpy(np.array(value, dtype=native, order="C"))
        if isinstance(value, Tensor):
            tensors[_unwrapped_name(str(key))] = value.detach()
    return tensors


def _unwrapped_name(name: str) -> str:
    """A tensor's name without what PyTorch's wrappers put before it: those for several devices, and
    `torch.compile`, of the model or of a part of it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


# ---------------------------------------------------------------------------------- conversion

CAFFE2_INPUT = {"preprocess.mean": torch.tensor(CAFFE2_MEAN), "preprocess.std": torch.ones(3)}
TORCHVISION_INPUT = {
    "preprocess.mean": 255 * torch.tensor(TORCHVISION_MEAN),
    "preprocess.std": 255 * torch.tensor(TORCHVISION_STD),
}

# Released names -> this project's, for what does not depend on the tensors' shapes.
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
        shapes: each released name with its tensor's number of dimensions: a plain tower counts its
            convs, norms and activations in one sequence, and the convs are those of four.
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


def _from_released(tensors: Tensors) -> Tensors:
    names = released_names({name: tensor.dim() for name, tensor in tensors.items()})
    return {names[name]: tensor for name, tensor in tensors.items()} | CAFFE2_INPUT


def _from_caffe2(tensors: Tensors) -> Tensors:
    """Caffe2's ResNets: BGR, the frozen norms folded to a scale and a shift."""
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
    """``res3_0_branch2a_bn_s`` is ``backbone.layer2.0.bn1.weight``; None: not of the backbone."""
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


def _from_torchvision_resnet(tensors: Tensors) -> Tensors:
    converted = dict(TORCHVISION_INPUT)
    for name, tensor in tensors.items():
        if name.startswith("fc."):
            continue
        if name.startswith(("conv1.", "bn1.")):
            name = f"stem.{name}"
        converted[f"backbone.{name}"] = tensor
    return _reverse_input(converted, "backbone.stem.conv1.weight")


def _from_torchvision_mobilenet(tensors: Tensors) -> Tensors:
    """torchvision nests each conv, norm and activation; ours is one flat sequence a block."""
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
    """The first conv for BGR input, which this project's models take, from one for RGB."""
    return tensors | {name: tensors[name].flip(1)}


def _fit_batch_norms(model: nn.Module, tensors: Tensors) -> Tensors:
    """Backbone norms as the model's own kind has them.

    Frozen ones have no epsilon, so torchvision's goes into their variance, and no counter;
    trainable ones need a counter.
    """
    fitted = dict(tensors)
    torchvision = not torch.equal(tensors["preprocess.std"], torch.ones(3))
    for path, module in model.named_modules():
        path = _unwrapped_name(path)
        counter = f"{path}.num_batches_tracked"
        if isinstance(module, FrozenBatchNorm2d):
            fitted.pop(counter, None)
            variance = f"{path}.running_var"
            if torchvision and variance in fitted:
                fitted[variance] = fitted[variance] + TORCHVISION_BN_EPS
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and path.startswith("backbone."):
            if f"{path}.weight" in fitted:
                fitted.setdefault(counter, torch.tensor(0))
    if torchvision and any(getattr(module, "stride_in_1x1", False) for module in model.modules()):
        logger.warning(
            "torchvision's ResNets stride in the 3x3 conv: set MODEL.RESNET.STRIDE_IN_1X1 False "
            "for their weights"
        )
    return fitted
