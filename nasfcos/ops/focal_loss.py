"""The sigmoid focal loss."""

import torch
from torch import Tensor

from . import library as _library  # noqa: F401  (defines torch.ops.nasfcos)


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    reduction: str = "sum",
) -> Tensor:
    """Sigmoid focal loss for one-vs-rest classification (Lin et al., "Focal Loss for Dense Object
    Detection", ICCV 2017, equation 5).

    Args:
        logits: [N, C] floating point, of any magnitude: the loss and its gradient do not overflow
            unless a logit itself is infinite.
        targets: [N] integer; 0 is background, 1..C a class, -1 a row to ignore (no loss, no
            gradient).
        gamma: focusing exponent, >= 0.
        alpha: weight of the positive terms; the negative ones have ``1 - alpha``.
        reduction: "sum" (a scalar; stores nothing of the logits' size besides the logits) or
            "none" ([N, C], in the logits' dtype).

    Returns:
        The sum, in float32 for float16 and bfloat16 logits, otherwise in the logits' dtype; or the
        loss of each logit.

    Raises:
        ValueError: the shapes do not match, or the reduction is unknown; on the CPU also for a
            target outside -1..C. The CUDA kernel asserts that on the device, as PyTorch's losses
            do.
    """
    if logits.dim() != 2 or targets.dim() != 1 or logits.shape[0] != targets.shape[0]:
        raise ValueError(
            "sigmoid_focal_loss: logits must be [N, C] and targets [N], "
            f"got {list(logits.shape)} and {list(targets.shape)}"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(
            f"sigmoid_focal_loss: reduction must be 'sum' or 'none', got {reduction!r}"
        )
    return torch.ops.nasfcos.sigmoid_focal_loss(
        logits, targets, float(gamma), float(alpha), reduction == "sum"
    )
