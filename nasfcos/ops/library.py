"""``torch.ops.nasfcos``: schemas, kernels, fake kernels and gradients of the operators.

The schemas are defined only here. ``csrc/`` registers compiled kernels for the CPU and, if built
with CUDA, for CUDA. The reference implementations are registered for every backend with a lower
priority, so the dispatcher falls back to them for each operator and device without a compiled
kernel.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .layout import empty_like, memory_format

_log = logging.getLogger(__name__)

_SCHEMAS = {
    "nms": (
        "(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold, bool legacy) -> Tensor"
    ),
    "nms_mask": (
        "(Tensor boxes, Tensor? labels, Tensor? counts, float iou_threshold, bool legacy) -> Tensor"
    ),
    "sigmoid_focal_loss": (
        "(Tensor logits, Tensor targets, float gamma, float alpha, bool reduce) -> Tensor"
    ),
    "sigmoid_focal_loss_backward": (
        "(Tensor grad, Tensor logits, Tensor targets, float gamma, float alpha) -> Tensor"
    ),
    "fused_concat": (
        "(Tensor x, Tensor y, Tensor scale, Tensor shift, Tensor weight) -> Tensor"
    ),
    "rectified_pairs": "(Tensor input, Tensor weight) -> Tensor",
    "rectified_pairs_backward": "(Tensor grad, Tensor input, Tensor weight) -> (Tensor, Tensor)",
    "batch_norm_relu": (
        "(Tensor input, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_relu_backward": (
        "(Tensor grad, Tensor input, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
        "float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_concat": (
        "(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor factor, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_concat_backward": (
        "(Tensor grad, Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor factor, Tensor mean, "
        "Tensor variance, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "group_norm_relu": (
        "(Tensor input, Tensor weight, Tensor bias, int groups, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "group_norm_relu_backward": (
        "(Tensor grad, Tensor input, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
        "float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "weighted_sum": "(Tensor x, Tensor y, Tensor a, Tensor b) -> Tensor",
    "weighted_sum_backward": (
        "(Tensor grad, Tensor x, Tensor y, Tensor a, Tensor b)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "conv3x3": "(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    "conv3x3_input_backward": "(Tensor grad, Tensor input, Tensor weight) -> Tensor",
    "conv3x3_weight_backward": "(Tensor grad, Tensor input, Tensor weight) -> Tensor",
    "depthwise_conv2d": "(Tensor input, Tensor weight, int dilation) -> Tensor",
    "depthwise_conv2d_backward": (
        "(Tensor grad, Tensor input, Tensor weight, int dilation) -> (Tensor, Tensor)"
    ),
    "modulated_deform_conv2d": (
        "(Tensor input, Tensor offset, Tensor mask, Tensor weight, Tensor? bias, int[2] stride, "
        "int[2] padding, int[2] dilation, int offset_groups) -> Tensor"
    ),
    "modulated_deform_conv2d_backward": (
        "(Tensor grad, Tensor input, Tensor offset, Tensor mask, Tensor weight, int[2] stride, "
        "int[2] padding, int[2] dilation, int offset_groups) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
OPERATORS = tuple(name for name in _SCHEMAS if not name.endswith("_backward"))
"""The names of all operators, without those that compute gradients."""

_lib = torch.library.Library("nasfcos", "DEF")


def _load_extension() -> str | None:
    """Load ``nasfcos/_C.so``. Returns the reason if that is impossible, otherwise None."""
    path = Path(__file__).resolve().parents[1] / "_C.so"
    if not path.exists():
        return "the extension was not compiled"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load (was it built for another PyTorch?): {error}"
    return None


@functools.cache
def _warn_slow(device: str) -> None:
    """Log a warning, once per process and device."""
    _log.warning(
        "The nasfcos operators run as plain PyTorch on %s, which is slower: %s. To compile them: "
        "pip install --no-build-isolation --no-deps --force-reinstall -e . "
        "in the source folder, with a C++ compiler%s.",
        device,
        _missing or f"it was compiled without {device.upper()} kernels",
        " and, with NASFCOS_CUDA=1, nvcc" if device == "cuda" else "",
    )


def _fallback(function: Callable) -> Callable:
    """A reference implementation that warns that it is slow."""

    @functools.wraps(function)
    def call(*args):
        _warn_slow(args[0].device.type)
        return function(*args)

    return call


def has_compiled(name: str, device: str) -> bool:
    """Whether the operator `name` has a compiled kernel for `device` ("cpu" or "cuda")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"nasfcos::{name}", device.upper())


for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    if hasattr(reference, _name):
        _lib.impl(_name, _fallback(getattr(reference, _name)), "CompositeExplicitAutograd")
_missing = _load_extension()
_CPU_KERNELS = has_compiled("conv3x3", "cpu")  # if one of them is compiled, all are


def runs_on_cpu_kernels(maps: Tensor) -> bool:
    """Whether `maps` are on the CPU and its kernels are compiled."""
    return _CPU_KERNELS and maps.device.type == "cpu"


def operators_for(maps: Tensor) -> ModuleType:
    """The module whose operators run, and have a gradient, on the device of `maps`:
    ``torch.ops.nasfcos`` or the reference implementations. For operators that ``csrc/`` has only
    for the CPU."""
    if runs_on_cpu_kernels(maps):
        return torch.ops.nasfcos
    if maps.device.type == "cpu" and not torch.compiler.is_compiling():
        _warn_slow("cpu")
    return reference


def deform_output_size(
    height: int,
    width: int,
    kh: int,
    kw: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[int, int]:
    """(height, width) of the output of a convolution.

    Args:
        height, width: of the input.
        kh, kw: height and width of the kernel.
        stride, padding, dilation: (y, x) each.
    """
    return (
        (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1,
    )


@torch.library.register_fake("nasfcos::nms", lib=_lib)
def _(boxes, scores, labels, iou_threshold, legacy):
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)


@torch.library.register_fake("nasfcos::nms_mask", lib=_lib)
def _(boxes, labels, counts, iou_threshold, legacy):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


@torch.library.register_fake("nasfcos::sigmoid_focal_loss", lib=_lib)
def _(logits, targets, gamma, alpha, reduce):
    if not reduce:
        return logits.new_empty(logits.shape)
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.register_fake("nasfcos::sigmoid_focal_loss_backward", lib=_lib)
def _(grad, logits, targets, gamma, alpha):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("nasfcos::fused_concat", lib=_lib)
def _(x, y, scale, shift, weight):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("nasfcos::rectified_pairs", lib=_lib)
def _(input, weight):
    output = input.new_empty(input.shape[0], weight.shape[0], *input.shape[2:])
    return output.contiguous(memory_format=memory_format(input))


@torch.library.register_fake("nasfcos::rectified_pairs_backward", lib=_lib)
def _(grad, input, weight):
    return empty_like(input), torch.empty_like(weight)


@torch.library.register_fake("nasfcos::batch_norm_relu", lib=_lib)
def _(input, weight, bias, eps):
    return empty_like(input), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("nasfcos::batch_norm_relu_backward", lib=_lib)
def _(grad, input, weight, bias, mean, variance, eps):
    return empty_like(input), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("nasfcos::batch_norm_concat", lib=_lib)
def _(x, y, weight, bias, factor, eps):
    return empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("nasfcos::batch_norm_concat_backward", lib=_lib)
def _(grad, x, y, weight, bias, factor, mean, variance, eps):
    parameters = (torch.empty_like(t) for t in (weight, bias, factor))
    return empty_like(x), empty_like(y), *parameters


@torch.library.register_fake("nasfcos::group_norm_relu", lib=_lib)
def _(input, weight, bias, groups, eps):
    return empty_like(input), *(weight.new_empty(len(input), groups) for _ in range(2))


@torch.library.register_fake("nasfcos::group_norm_relu_backward", lib=_lib)
def _(grad, input, weight, bias, mean, variance, eps):
    return empty_like(input), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("nasfcos::weighted_sum", lib=_lib)
def _(x, y, a, b):
    return empty_like(x)


@torch.library.register_fake("nasfcos::weighted_sum_backward", lib=_lib)
def _(grad, x, y, a, b):
    return empty_like(x), empty_like(y), torch.empty_like(a), torch.empty_like(b)


@torch.library.register_fake("nasfcos::conv3x3", lib=_lib)
def _(input, weight, bias, relu):
    output = input.new_empty(input.shape[0], weight.shape[0], *input.shape[2:])
    return output.contiguous(memory_format=memory_format(input))


@torch.library.register_fake("nasfcos::conv3x3_input_backward", lib=_lib)
def _(grad, input, weight):
    return empty_like(input)


@torch.library.register_fake("nasfcos::conv3x3_weight_backward", lib=_lib)
def _(grad, input, weight):
    return torch.empty_like(weight)


@torch.library.register_fake("nasfcos::depthwise_conv2d", lib=_lib)
def _(input, weight, dilation):
    return empty_like(input)


@torch.library.register_fake("nasfcos::depthwise_conv2d_backward", lib=_lib)
def _(grad, input, weight, dilation):
    return empty_like(input), torch.empty_like(weight)


@torch.library.register_fake("nasfcos::modulated_deform_conv2d", lib=_lib)
def _(input, offset, mask, weight, bias, stride, padding, dilation, offset_groups):
    size = deform_output_size(*input.shape[2:], *weight.shape[2:], stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *size)
    return input.new_empty(shape).contiguous(memory_format=memory_format(input))


@torch.library.register_fake("nasfcos::modulated_deform_conv2d_backward", lib=_lib)
def _(grad, input, offset, mask, weight, stride, padding, dilation, offset_groups):
    return tuple(empty_like(t) for t in (input, offset, mask, weight))


def _in_float32(operator, grad: Tensor, saved: tuple[Tensor, ...], *settings) -> list[Tensor]:
    """Run a backward operator in at least float32 and cast each gradient to its tensor's dtype.

    The gradients are those of the first saved tensors. Half precision is too coarse for them:
    gradients of weights are sums over all pixels, those of offsets are differences of large
    numbers.
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grads = operator(grad.to(dtype), *(t.to(dtype) for t in saved), *settings)
    return [g.to(t.dtype) for g, t in zip(grads, saved, strict=False)]


def _register_gradient(name: str, settings: int = 0) -> None:
    """Register ``<name>_backward`` as the gradient of an operator whose arguments are tensors
    followed by other values. It takes the gradient of the first output, the tensors, the other
    outputs and the last `settings` arguments, and returns the gradients of the tensors."""
    operator = getattr(torch.ops.nasfcos, f"{name}_backward")

    def setup_context(ctx, inputs, output) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        further_outputs = output[1:] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*tensors, *further_outputs)
        ctx.others = inputs[len(tensors) :]

    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        passed = ctx.others[len(ctx.others) - settings :]
        saved = ctx.saved_tensors  # read once, because checkpointing recomputes them
        return *_in_float32(operator, grad, saved, *passed), *(None for _ in ctx.others)

    torch.library.register_autograd(
        f"nasfcos::{name}", backward, setup_context=setup_context, lib=_lib
    )


for _name, _settings in {
    "rectified_pairs": 0,
    "batch_norm_relu": 1,
    "batch_norm_concat": 1,
    "group_norm_relu": 1,
    "weighted_sum": 0,
    "depthwise_conv2d": 1,
}.items():
    _register_gradient(_name, _settings)


def _focal_context(ctx, inputs, output) -> None:
    logits, targets, ctx.gamma, ctx.alpha, _ = inputs
    ctx.save_for_backward(logits, targets)


@once_differentiable
def _focal_backward(ctx, grad: Tensor):
    grad_logits = torch.ops.nasfcos.sigmoid_focal_loss_backward(
        grad, *ctx.saved_tensors, ctx.gamma, ctx.alpha
    )
    return grad_logits, None, None, None, None


def _conv_context(ctx, inputs, output) -> None:
    input, weight, _bias, relu = inputs
    ctx.save_for_backward(input, weight, *([output] if relu else []))


@once_differentiable
def _conv_backward(ctx, grad: Tensor):
    input, weight, *rectified = ctx.saved_tensors
    if rectified:
        grad = torch.ops.aten.threshold_backward(grad, *rectified, 0)
    operators = torch.ops.nasfcos.conv3x3_input_backward, torch.ops.nasfcos.conv3x3_weight_backward
    grads = (
        operator(grad, input, weight) if needed else None
        for operator, needed in zip(operators, ctx.needs_input_grad, strict=False)
    )
    return *grads, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def _deform_context(ctx, inputs, output) -> None:
    input, offset, mask, weight, _bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


@once_differentiable
def _deform_backward(ctx, grad: Tensor):
    operator = torch.ops.nasfcos.modulated_deform_conv2d_backward
    grads = _in_float32(operator, grad, ctx.saved_tensors, *ctx.geometry)
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    return *grads, grad_bias, None, None, None, None


torch.library.register_autograd(
    "nasfcos::sigmoid_focal_loss", _focal_backward, setup_context=_focal_context, lib=_lib
)
torch.library.register_autograd(
    "nasfcos::conv3x3", _conv_backward, setup_context=_conv_context, lib=_lib
)
torch.library.register_autograd(
    "nasfcos::modulated_deform_conv2d", _deform_backward, setup_context=_deform_context, lib=_lib
)
