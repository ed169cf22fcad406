"""Loading of weights: released models, own checkpoints, ImageNet backbones.

Every kind of source is first converted to a plain dict of tensors under this project's names; then
one function copies them into the model and accounts for every tensor. Nothing in a file is executed
(see `torch_files` and `pickles`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..download import local_path, resolve_source
from ..torch_files import ZIP_START, TorchFileError, read_torch_file, reason
from .layers import FrozenBatchNorm2d
from .layouts import (
    Tensors,
    from_caffe2,
    from_released,
    from_torchvision_mobilenet,
    from_torchvision_resnet,
)
from .pickles import PickledArray, read_pickle

logger = logging.getLogger(__name__)

# Epsilon of torchvision's batch norms.
TORCHVISION_BN_EPS = 1e-5

# Number of tensors of each kind that a message lists.
SHOWN = 20


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit the model; the message says what and why.

    Attributes:
        report: what `load_weights` did with each tensor, if the weights do not fit.
    """

    def __init__(self, message: str, report: LoadReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Weights:
    """Weights read from a source.

    Attributes:
        name: name of the source, for messages.
        tensors: the tensors by this project's names.
        kind: "detector" (own or released) or "backbone" (ImageNet).
        description: format of the source, for the log.
        classes: names of the object classes; None if the source does not record them.
    """

    name: str
    tensors: Tensors
    kind: str
    description: str
    classes: list[str] | None = None


@dataclass
class LoadReport:
    """Names (this project's) of the tensors by what `load_weights` did with them.

    Attributes:
        loaded: copied into the model.
        missing: in the model but not in the source.
        unexpected: in the source but not in the model.
        misshapen: of different shapes in the two; each with both shapes.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether no tensor is missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def problems(self, most: int = SHOWN) -> str:
        """The tensors that did not load, one line each: at most `most` of a kind, then their
        number."""
        lines = []
        for what, names in (
            ("missing from the source", self.missing),
            ("unknown to the model", self.unexpected),
            ("another shape", self.misshapen),
        ):
            lines += [f"  {what}: {name}" for name in names[:most]]
            if len(names) > most:
                lines.append(f"  {what}: and {len(names) - most} more, {len(names)} in all")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | Weights,
    strict: bool = True,
) -> LoadReport:
    """Load weights into a detector.

    Args:
        model: a `Detector`, possibly wrapped (for several devices, by `torch.compile`).
        source: a path, a URL (downloaded once), a ``catalog://`` or ``torchvision://`` name of an
            ImageNet backbone, a state dict, or a result of `read_weights`. State dicts may be in
            the layout of this project or of the release, with or without a wrapper's prefix
            (``module.``, ``_orig_mod.``), alone or under ``model``. ImageNet backbones only set
            the backbone and the input normalisation.
        strict: True: refuse a source unless every tensor has a counterpart of the same shape.
            False: load what fits (fine-tuning to other classes) and log the rest, but refuse a
            source of which no parameter fits, and an ImageNet backbone that lacks most of the
            convolutions of the model's backbone: it is a different one.

    Returns:
        what was done with each tensor.

    Raises:
        WeightsError: the source is unreadable or does not fit; the message lists the tensors that
            do not fit, and the model is unchanged.
        DownloadError: the source cannot be downloaded.
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

    report = LoadReport()
    for key in wanted:
        if key not in tensors:
            report.missing.append(key)
        elif tensors[key].shape != own[key].shape:
            shapes = f"{list(tensors[key].shape)} there, {list(own[key].shape)} in the model"
            report.misshapen.append(f"{key} ({shapes})")
        else:
            report.loaded.append(key)
    report.unexpected = [key for key in tensors if key not in wanted]

    if not report.complete:
        logger.debug("%s, tensor by tensor:\n%s", name, report.problems(most=sys.maxsize))
    if not report.complete and strict:
        raise WeightsError(
            f"{name} ({weights.description}) does not fit the model:\n{report.problems()}\n"
            "Use a config that describes the weights' model, or load with strict=False "
            "(fine-tuning) to take only what fits.",
            report,
        )
    if lack := _what_lacks(weights.kind, {key: own[key] for key in wanted}, report.loaded):
        raise WeightsError(
            f"{name} ({weights.description}) is of another model: {lack}\n{report.problems()}\n"
            "Use weights of the config's model (MODEL.WEIGHT), or a config that describes the "
            "weights' model (MODEL.BACKBONE, MODEL.RESNET).",
            report,
        )
    with torch.no_grad():
        for key in report.loaded:
            own[key].copy_(tensors[key])
    logger.info("%s (%s): %d tensors loaded", name, weights.description, len(report.loaded))
    if not report.complete:
        logger.warning("%s does not fit the model everywhere:\n%s", name, report.problems())
    return report


def _what_lacks(kind: str, wanted: Mapping[str, Tensor], loaded: Sequence[str]) -> str | None:
    """Why the loaded tensors are too few to be of use; None: they are enough."""
    names = {name for name, tensor in wanted.items() if isinstance(tensor, nn.Parameter)}
    if kind == "detector":
        return None if names.intersection(loaded) else "no parameter of the model is in it."
    # Shapes can agree by chance: half of the tensors of a ResNet-18 fit into a ResNet-50.
    convs = {name for name in names if wanted[name].dim() == 4}
    found = len(convs.intersection(loaded))
    if found > len(convs) / 2:
        return None
    return f"{found} of the {len(convs)} convolutions of the model's backbone are in it."


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> Weights:
    """Read weights and convert their names to this project's.

    Args:
        source: a path, URL, name or state dict as in `load_weights`.

    Raises:
        WeightsError: the file is missing or unreadable, or its content is no known kind of
            weights.
        DownloadError: the source cannot be downloaded.
        TypeError: the source is none of these.
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
        return Weights(name, from_released(tensors), "detector", "released model")
    if any(key.startswith(("backbone.", "neck.", "head.")) for key in tensors):
        names = [str(c) for c in classes] if isinstance(classes, (list, tuple)) else None
        return Weights(name, tensors, "detector", "own checkpoint", names)
    if "conv1_w" in tensors:
        return Weights(name, from_caffe2(tensors), "backbone", "Caffe2 ImageNet backbone")
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        converted = from_torchvision_resnet(tensors)
        return Weights(name, converted, "backbone", "torchvision ResNet")
    if "features.0.0.weight" in tensors:
        converted = from_torchvision_mobilenet(tensors)
        return Weights(name, converted, "backbone", "torchvision MobileNetV2")
    raise WeightsError(
        f"{name} holds none of the known kinds of weights (own, released, Caffe2 or torchvision "
        f"ImageNet backbone); its tensors begin: {', '.join(list(tensors)[:5]) or 'there are none'}"
    )


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
    except TorchFileError as torch_error:
        data = path.read_bytes()
        if data.startswith(ZIP_START):
            raise WeightsError(str(torch_error)) from torch_error
        try:
            return read_pickle(data)
        except Exception as error:  # unpicklers raise many kinds
            raise WeightsError(
                f"{torch_error}. It is no pickle of numpy arrays either: {reason(error)}"
            ) from None
    except OSError as error:
        raise WeightsError(f"the weight file cannot be read (MODEL.WEIGHT): {error}") from error


def _plain_tensors(content: Any, name: str) -> Tensors:
    """The arrays of a state dict as tensors; other entries are dropped."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{name} holds {type(content).__name__}, not a dict of tensors")
    tensors = {}
    for key, value in content.items():
        if isinstance(value, PickledArray):
            value = value.value
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            native = value.dtype.newbyteorder("=")
            value = torch.from_numpy(np.array(value, dtype=native, order="C"))
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_complex() or value.is_quantized:
                kind = f"{value.dtype}, {value.layout}"
                raise WeightsError(f"{name}: {key} is no plain tensor of numbers ({kind})")
            tensors[_unwrapped_name(str(key))] = value.detach()
    return tensors


def _unwrapped_name(name: str) -> str:
    """A tensor's name without the prefixes of PyTorch's wrappers: those for several devices, and
    `torch.compile` of the model or of a part of it."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _fit_batch_norms(model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors with backbone norms converted to the kind of norm that the model has.

    Frozen norms have no epsilon, so torchvision's is added to their variance, and no counter;
    trainable norms need a counter.
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
