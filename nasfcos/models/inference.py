"""The inference form of a detector: the same detections, faster."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import conv3x3, fused_concat
from .backbones.mobilenet_v2 import InvertedResidual
from .backbones.resnet import Bottleneck, Stem
from .detector import Detector
from .heads.dense import DenseHead
from .heads.post_process import Detections
from .layers import (
    Conv3x3,
    ConvNormAct,
    DeformConv,
    FrozenBatchNorm2d,
    Scale,
    SeparableConv,
    norm_relu,
)
from .necks.nas_fpn import NASFPN, Concat, WeightedSum

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def optimize_for_inference(
    model: Detector, dtype: torch.dtype = torch.float32, compile: bool = False
) -> InferenceDetector:
    """A copy of a detector that finds the same objects faster and cannot be trained.

    Batch norms are folded into the convolutions before them; maps are channels-last; activations
    and residual sums are fused with their convolution where the CPU's library can do it; the
    searched concatenation, its norm, ReLU and grouped convolution are one pass; unused branches
    are removed.

    Args:
        model: a detector of this package with its weights loaded. It is not changed, and weights
            loaded into it later do not reach the copy.
        dtype: data type of maps and weights. bfloat16 only pays on processors and GPUs that
            multiply it in hardware; pixels, boxes and scores stay float32.
        compile: run backbone, neck and head through `torch.compile`, on a GPU with CUDA graphs.
            Each new batch size and image size is compiled at its first use, which can take minutes;
            beyond ``torch._dynamo.config.recompile_limit`` (8) sizes, further ones run uncompiled.

    Returns:
        a module that is called like the detector in evaluation mode.

    Raises:
        ValueError: `dtype` is not float32, bfloat16 or, on a GPU, float16.
    """
    device = next(model.parameters()).device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype must be torch.float32, torch.bfloat16 or torch.float16, not {dtype!r}"
        )
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 needs a GPU; take bfloat16 or float32 on the CPU")
    # First everything in float32: norms are folded in it, and some parts stay in it.
    model = copy.deepcopy(model).float().eval().requires_grad_(False)
    with torch.no_grad():
        for name in ("backbone", "neck", "head"):
            part = getattr(model, name)
            _unshare(part, set())
            part = optimized(part)
            _cast(part, dtype)
            setattr(model, name, part.to(memory_format=torch.channels_last))
    return InferenceDetector(model, dtype, compile)


class InferenceDetector(nn.Module):
    """A detector for evaluation only; made by `optimize_for_inference`."""

    def __init__(self, model: Detector, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.preprocess = model.preprocess
        self.backbone = model.backbone
        self.neck = model.neck
        self.head = model.head
        self.dtype = dtype
        self.compile_outputs = compile
        self._outputs = self._callable()
        super().train(False)

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """Each image's detections, in the pixels of that image.

        Args:
            images: tensors [3, H, W] each, RGB, float in 0..1 or uint8 in 0..255.

        Raises:
            ValueError: no images, or an image of the wrong shape or type.
        """
        if len(images) == 0:
            raise ValueError("the list of images is empty")
        with torch.inference_mode():
            batch, sizes = self.preprocess(images)
            batch = batch.to(dtype=self.dtype, memory_format=torch.channels_last)
            detections = self.head.detect(self._outputs(batch), sizes)
        # Tensors made in inference mode cannot be changed in place; copies made outside it can.
        return [{name: x.clone() for name, x in found.items()} for found in detections]

    def _compute(self, batch: Tensor) -> tuple[list[Tensor], ...]:
        return self.head(self.neck(self.backbone(batch)))

    def _callable(self) -> Callable[[Tensor], tuple[list[Tensor], ...]]:
        if not self.compile_outputs:
            return self._compute
        mode = "reduce-overhead" if self.preprocess.mean.is_cuda else "default"
        return torch.compile(self._compute, mode=mode, dynamic=False)

    # Compiled code belongs to one object: copies and unpickled models compile their own.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_outputs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._outputs = self._callable()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceDetector:
        """As in `nn.Module`: what ``to``, ``half`` and the like do to every tensor.

        Raises:
            RuntimeError: `fn` changes the dtype; the fused layers were made for this one.
        """
        held = {self.dtype, torch.float32}  # some parts are float32 in any case
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in held):
            raise RuntimeError(
                "a detector optimised for inference keeps its dtype; name another one to "
                "optimize_for_inference(model, dtype=...)"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> InferenceDetector:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: `mode` is True; train the detector that this one was made of.
        """
        if mode:
            raise RuntimeError(
                "a detector optimised for inference cannot be trained; train the one it was made of"
            )
        return self


# ------------------------------------------------------------------------------ fused layers


class FusedConv(nn.Module):
    """Convolution, optional sum with a residual, optional ReLU.

    Args:
        conv: the convolution.
        relu: whether a ReLU follows.
        limit: upper bound of the ReLU; None: unbounded.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, limit: float | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu
        self.limit = limit

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']; `residual` has the output's shape and may be
        overwritten."""
        conv = self.conv
        plain = residual is None and self.limit is None
        if plain and isinstance(conv, Conv3x3) and x.dtype == torch.float32:
            return conv3x3(x, conv.weight, conv.bias, self.relu)
        # Compilers only understand PyTorch's public operators, and fuse them by themselves.
        by_parts = torch.compiler.is_compiling() or x.device.type != "cpu"
        if by_parts or x.dtype not in _ONEDNN_DTYPES:
            return self._activate(conv(x) if residual is None else conv(x).add_(residual))
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if residual is not None:
            relu = "relu" if self.relu and self.limit is None else None
            # In place: allocating a large map takes longer than the convolution.
            x = torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, conv.weight, conv.bias, *geometry, "add", 1.0, relu, [], None
            )
            return x if relu else self._activate(x)
        kind, scalars = "none", []
        if self.relu:
            kind, scalars = ("relu", []) if self.limit is None else ("hardtanh", [0.0, self.limit])
        return torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, *geometry, kind, scalars, ""
        )

    def _activate(self, x: Tensor) -> Tensor:
        # 0.0, not 0: PyTorch's ONNX exporter needs a float.
        return x.clamp_(0.0, self.limit) if self.relu else x


def _onednn_dtypes() -> set[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return set()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {torch.float32, torch.bfloat16} if bfloat16 else {torch.float32}


_ONEDNN_DTYPES = _onednn_dtypes()
"""Data types for which oneDNN fuses a convolution with what follows it on this CPU."""


class FusedBottleneck(nn.Module):
    """`Bottleneck` with its norms folded into its convolutions."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.downsample = None
        if block.downsample is not None:
            self.downsample = FusedConv(folded(*block.downsample), relu=False)
        self.conv1 = FusedConv(folded(block.conv1, block.bn1), relu=True)
        self.conv2 = FusedConv(folded(block.conv2, block.bn2), relu=True)
        self.conv3 = FusedConv(folded(block.conv3, block.bn3), relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)


class FusedInvertedResidual(nn.Module):
    """`InvertedResidual` with its norms folded into its convolutions."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        *first, self.last = _fuse_sequence(block.conv)
        self.first = nn.Sequential(*first)
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W']."""
        return self.last(self.first(x), x if self.residual else None)


class FusedConcat(nn.Module):
    """`Concat` in one pass."""

    def __init__(self, block: Concat) -> None:
        super().__init__()
        scale, shift = fixed_affine(block.norm)
        # Buffers, which stay float32 (see `_cast`).
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("weight", block.conv.weight.flatten())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two maps [N, C, H, W] to one of the same shape."""
        return fused_concat(x, y, self.scale, self.shift, self.weight)


class InFloat32(nn.Module):
    """A layer that is computed in float32, whatever the dtype of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


class GroupNormRelu(nn.Module):
    """Group norm and ReLU; the norm's parameters stay float32.

    Training moves its factors away from one by less than half precision can represent; rounded,
    they would change all positions of a map alike.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """A map [N, C, H, W], which may be overwritten, to one of the same shape and dtype."""
        if x.device.type == "cpu":  # its kernels accept mixed dtypes
            return norm_relu(self.norm, x)
        return norm_relu(self.norm, x.float()).to(x.dtype)


# -------------------------------------------------------------------- from layers to fused ones


def _unshare(module: nn.Module, seen: set[nn.Module]) -> None:
    """Give each use of a shared module its own copy: they may be optimised differently."""
    for name, child in module.named_children():
        if child in seen:
            child = copy.deepcopy(child)
            setattr(module, name, child)
        seen.add(child)
        _unshare(child, seen)


def is_fixed(norm: nn.Module) -> bool:
    """Whether a norm in evaluation mode is a constant factor and shift per channel."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return norm.affine and norm.track_running_stats
    return type(norm) is FrozenBatchNorm2d


def _is_plain(conv: nn.Module) -> bool:
    """Whether a layer is an ordinary convolution with zero padding."""
    return (
        type(conv) in (nn.Conv2d, Conv3x3)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def fixed_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift, [C] each, of a norm that `is_fixed`."""
    scale = norm.weight * (norm.running_var + getattr(norm, "eps", 0.0)).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """The given convolution, with weight [C, ...] and bias [C] changed to include the norm."""
    scale, shift = fixed_affine(norm)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


@functools.singledispatch
def optimized(module: nn.Module) -> nn.Module:
    """The inference form of a module, which takes over the module's parts.

    A module without a form of its own is returned with its children optimised.
    """
    for name, child in module.named_children():
        setattr(module, name, optimized(child))
    return module


@optimized.register
def _(module: nn.Sequential) -> nn.Module:
    if type(module).forward is not nn.Sequential.forward:  # a subclass that does something else
        return optimized.dispatch(nn.Module)(module)
    return nn.Sequential(*_fuse_sequence(module))


def _fuse_sequence(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers, each sequence of convolution, norm and ReLU or ReLU6 fused into one."""
    fused: list[nn.Module] = []
    for layer in layers:
        last = fused[-1] if fused else None
        if _is_plain(layer):
            fused.append(FusedConv(layer, relu=False))
        elif is_fixed(layer) and isinstance(last, FusedConv) and not last.relu:
            folded(last.conv, layer)
        elif type(layer) in (nn.ReLU, nn.ReLU6) and isinstance(last, FusedConv) and not last.relu:
            last.relu = True
            last.limit = 6.0 if isinstance(layer, nn.ReLU6) else None
        else:
            fused.append(optimized(layer))
    return fused


@optimized.register
def _(module: Stem) -> nn.Module:
    conv = FusedConv(folded(module.conv1, module.bn1), relu=True)
    return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))


@optimized.register
def _(module: Bottleneck) -> nn.Module:
    return FusedBottleneck(module)


@optimized.register
def _(module: InvertedResidual) -> nn.Module:
    return FusedInvertedResidual(module)


def _rectified(conv: nn.Module, norm: nn.Module) -> list[nn.Module]:
    """The layers of a convolution, its norm and a ReLU."""
    if isinstance(norm, nn.GroupNorm):
        return [conv, GroupNormRelu(norm)]
    if is_fixed(norm):
        conv, norm = folded(conv, norm), nn.Identity()
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.Identity):
        return [FusedConv(conv, relu=True)]
    return [conv, optimized(norm), nn.ReLU()]  # not in place: PyTorch 2.6 cannot export that


@optimized.register(ConvNormAct)
@optimized.register(DeformConv)
def _(module: ConvNormAct | DeformConv) -> nn.Module:
    return nn.Sequential(*_rectified(module.conv, module.norm))


@optimized.register
def _(module: SeparableConv) -> nn.Module:
    return nn.Sequential(module.depthwise, *_rectified(module.pointwise, module.norm))


@optimized.register
def _(module: Concat) -> nn.Module:
    even = module.conv.out_channels % 2 == 0
    return FusedConcat(module) if even and is_fixed(module.norm) else module


@optimized.register
def _(module: NASFPN) -> nn.Module:
    for node in range(len(module.adapt)):
        used = node in module.genotype.consumed
        module.adapt[node] = optimized(module.adapt[node]) if used else nn.Identity()
    optimized(module.cells)
    return module


@optimized.register
def _(module: DenseHead) -> nn.Module:
    # Box sides are an exponential of the prediction: half precision would move them by pixels.
    for name, child in module.named_children():
        setattr(module, name, InFloat32(child) if name == "box_pred" else optimized(child))
    return module


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a module's parameters, except where it would cost precision.

    Buffers, such as anchors and statistics, stay float32.
    """
    if isinstance(module, (InFloat32, GroupNormRelu, WeightedSum, Scale, *BATCH_NORMS)):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for child in module.children():
        _cast(child, dtype)
