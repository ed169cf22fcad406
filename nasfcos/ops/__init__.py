"""Operators for detection, with kernels compiled from ``csrc/``.

Each operator is ``torch.ops.nasfcos.<name>``; ``torch.compile``, ``torch.export`` and autocast work
through it. Where no compiled kernel exists (no compiler at installation, or a device for which
``csrc/`` has none), a reference implementation in PyTorch takes its place, see :mod:`.library`; for
gradients, call the functions of this package then, not the operators.
"""

from .aggregation import fused_concat, rectified_pairs, weighted_sum
from .boxes import batched_nms, nms, nms_mask
from .conv import conv3x3, depthwise_conv2d, modulated_deform_conv2d
from .focal_loss import sigmoid_focal_loss
from .layout import memory_format
from .norm import batch_norm_concat, batch_norm_relu, group_norm_relu

__all__ = [
    "batch_norm_concat",
    "batch_norm_relu",
    "batched_nms",
    "conv3x3",
    "depthwise_conv2d",
    "fused_concat",
    "group_norm_relu",
    "memory_format",
    "modulated_deform_conv2d",
    "nms",
    "nms_mask",
    "rectified_pairs",
    "sigmoid_focal_loss",
    "weighted_sum",
]
