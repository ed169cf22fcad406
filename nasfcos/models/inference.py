"""Detectors for inference: the same detections from a faster form of the model."""

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
    """A copy of a detector that finds the same objects faster, and cannot be trained.

    Batch norms become part of the convolutions before them; maps are channels-last; activations
    and residual sums are computed with their convolution where the CPU's library can; the searched
    concatenation with its norm, ReLU and grouped convolution is one pass; branches that nothing
    uses are gone.

    Args:
        model: a detector of this package with its weights loaded. It is not changed, and what is
            loaded into it later does not reach the copy.
        dtype: of maps and weights. bfloat16 is for processors and GPUs that multiply it; pixels,
            boxes and scores stay float32.
        compile: run backbone, neck and head through `torch.compile`, on a GPU with CUDA graphs.
            Each new size of a batch is compiled when it is first met, which can take minutes;
            after as many sizes as ``torch._dynamo.config.recompile_limit`` says (8), further ones
            run uncompiled.

    Returns:
        a module that is called as the detector is in evaluation mode.

    Raises:
        ValueError: a dtype other than float32, bfloat16 and, on a GPU, float16.
    """
    device = next(model.parameters()).device
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"detectors run in float32, bfloat16 or float16, not {dtype}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("float16 needs a GPU; take bfloat16 or float32 on the CPU")
    # Single precision first: norms are folded in it, and some parts stay in it.
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
    """A detector that is only evaluated; made by `optimize_for_inference`."""

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
        """Each image's detections, in its own pixels; images as `Detector` takes them.

        Raises:
            ValueError: no images, or an image of the wrong shape or type.
        """
        if len(images) == 0:
            raise ValueError("the list of images is empty")
        with torch.inference_mode():
            batch, sizes = self.preprocess(images)
            batch = batch.to(dtype=self.dtype, memory_format=torch.channels_last)
            detections = self.head.detect(self._outputs(batch), sizes)
        # Tensors of inference mode cannot be changed in place; copies made after it can.
        return [{name: x.clone() for name, x in found.items()} for found in detections]

    def _compute(self, batch: Tensor) -> tuple[list[Tensor], ...]:
        return self.head(self.neck(self.backbone(batch)))

    def _callable(self) -> Callable[[Tensor], tuple[list[Tensor], ...]]:
        if not self.compile_outputs:
            return self._compute
        mode = "reduce-overhead" if self.preprocess.mean.is_cuda else "default"
        return torch.compile(self._compute, mode=mode, dynamic=False)

    # What is compiled belongs to one object: copies, and what is pickled, compile for themselves.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_outputs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._outputs = self._callable()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceDetector:
        """
        Raises:
            RuntimeError: `fn` changes the dtype, which the fused layers are made for.
        """
        held = {self.dtype, torch.float32}  # of which some parts stay
        if any(fn(torch.empty(0, dtype=dtype)).dtype != dtype for dtype in held):
            raise RuntimeError(
                "a detector optimised for inference keeps its dtype; name another one to "
                "optimize_for_inference(model, dtype=...)"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> InferenceDetector:
        """
        Raises:
            RuntimeError: for `mode`; the detector that this one was made of can be trained.
        """
        if mode:
            raise RuntimeError(
                "a detector optimised for inference cannot be trained; train the one it was made of"
            )
        return self


# ------------------------------------------------------------------------------ fused layers


class FusedConv(nn.Module):
    """Convolution, optional sum with a residual (which may be overwritten), optional ReLU (cut off
    at `limit`)."""

    def __init__(self, conv: nn.Conv2d, relu: bool, limit: float | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu
        self.limit = limit

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        plain = residual is None and self.limit is None
        if plain and isinstance(conv, Conv3x3) and x.dtype == torch.float32:
            return conv3x3(x, conv.weight, conv.bias, self.relu)
        # A compiler sees through PyTorch's operators only, and fuses what follows them itself.
        by_parts = torch.compiler.is_compiling() or x.device.type != "cpu"
        if by_parts or x.dtype not in _ONEDNN_DTYPES:
            return self._activate(conv(x) if residual is None else conv(x).add_(residual))
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if residual is not None:
            relu = "relu" if self.relu and self.limit is None else None
            # Into the residual: where maps are large, a new one takes longer than the convolution.
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
        # A float, which PyTorch's exporter to ONNX cannot do without.
        return x.clamp_(0.0, self.limit) if self.relu else x


def _onednn_dtypes() -> set[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return set()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {torch.float32, torch.bfloat16} if bfloat16 else {torch.float32}


_ONEDNN_DTYPES = _onednn_dtypes()
"""What oneDNN, which computes a convolution and what follows it in one, takes on this CPU."""


class FusedBottleneck(nn.Module):
    """`Bottleneck` with its norms folded in."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.downsample = None
        if block.downsample is not None:
            self.downsample = FusedConv(folded(*block.downsample), relu=False)
        self.conv1 = FusedConv(folded(block.conv1, block.bn1), relu=True)
        self.conv2 = FusedConv(folded(block.conv2, block.bn2), relu=True)
        self.conv3 = FusedConv(folded(block.conv3, block.bn3), relu=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)


class FusedInvertedResidual(nn.Module):
    """`InvertedResidual` with its norms folded in."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        *first, self.last = _fuse_sequence(block.conv)
        self.first = nn.Sequential(*first)
        self.residual = block.residual

    def forward(self, x: Tensor) -> Tensor:
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
        return fused_concat(x, y, self.scale, self.shift, self.weight)


class InFloat32(nn.Module):
    """A layer that is computed in float32 whatever its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


class GroupNormRelu(nn.Module):
    """A group norm and ReLU. The norm's factors stay float32 whatever its input: training moves
    them away from one by less than half precision can tell, and all places of a map would be off
    the same way."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # whose kernels take such a mixture
            return norm_relu(self.norm, x)
        return norm_relu(self.norm, x.float()).to(x.dtype)


# -------------------------------------------------------------------- from layers to fused ones


def _unshare(module: nn.Module, seen: set[nn.Module]) -> None:
    """Give each place its own copy of a module that has several: what is made of it may differ."""
    for name, child in module.named_children():
        if child in seen:
            child = copy.deepcopy(child)
            setattr(module, name, child)
        seen.add(child)
        _unshare(child, seen)


def is_fixed(norm: nn.Module) -> bool:
    """Whether a norm is a factor and a shift per channel once training is over."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return norm.affine and norm.track_running_stats
    return type(norm) is FrozenBatchNorm2d


def _is_plain(conv: nn.Module) -> bool:
    """Whether a layer is a convolution and nothing more."""
    return (
        type(conv) in (nn.Conv2d, Conv3x3)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def fixed_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The factor and the shift [C] of a norm that `is_fixed`."""
    scale = norm.weight * (norm.running_var + getattr(norm, "eps", 0.0)).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """The convolution itself, its weight [C, ...] and bias [C] changed to include the norm."""
    scale, shift = fixed_affine(norm)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


@functools.singledispatch
def optimized(module: nn.Module) -> nn.Module:
    """A module's form for inference; the module given is used up. Other modules' layers are
    optimised where they are."""
    for name, child in module.named_children():
        setattr(module, name, optimized(child))
    return module


@optimized.register
def _(module: nn.Sequential) -> nn.Module:
    if type(module).forward is not nn.Sequential.forward:  # it does more than one after the other
        return optimized.dispatch(nn.Module)(module)
    return nn.Sequential(*_fuse_sequence(module))


def _fuse_sequence(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers with each run of convolution, norm and ReLU or ReLU6 made one."""
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
    """Layers for a convolution, its norm and ReLU."""
    if isinstance(norm, nn.GroupNorm):
        return [conv, GroupNormRelu(norm)]
    if is_fixed(norm):
        conv, norm = folded(conv, norm), nn.Identity()
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.Identity):
        return [FusedConv(conv, relu=True)]
    return [conv, optimized(norm), nn.ReLU()]  # not in place, for exporters of PyTorch 2.6


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
    # A box side is the exponential of what is predicted: half precision would move it by pixels.
    for name, child in module.named_children():
        setattr(module, name, InFloat32(child) if name == "box_pred" else optimized(child))
    return module


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the parameters' dtype, but for those that a result's precision hangs on. Buffers, such
    as anchors and statistics, stay float32."""
    if isinstance(module, (InFloat32, GroupNormRelu, WeightedSum, Scale, *BATCH_NORMS)):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    for child in module.children():
        _cast(child, dtype)
