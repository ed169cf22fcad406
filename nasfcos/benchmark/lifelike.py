"""Random weights that behave like trained ones.

The speed of a detector depends on its values in three ways: denormal and non-finite numbers are
slow, deformable convolutions that sample far outside the map are fast, and the number of candidates
above the score threshold decides on the work after the head. So each norm layer gets the statistics
of its input, offsets get a standard deviation of one pixel, and the classifier's biases are set so
that a given number of candidates passes the threshold, spread over all classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..models.layers import ModulatedDeformConv

MIN_VARIANCE = 1e-2


@torch.no_grad()
def settle(model: nn.Module, run: Callable[[], object]) -> None:
    """Give the layers of a randomly initialised model sensible scales.

    Args:
        model: model in evaluation mode.
        run: applies the model to an image; called once.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                hooks.enter_context(_hooked(module.register_forward_pre_hook(_take_statistics)))
            if isinstance(module, ModulatedDeformConv):
                conv = module.conv_offset_mask
                nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
                hooks.enter_context(_hooked(conv.register_forward_hook(_scale_to_one)))
        run()


@torch.no_grad()
def set_candidates(
    classifier: nn.Conv2d,
    run: Callable[[], object],
    count: int,
    threshold: float,
    centerness: nn.Conv2d | None = None,
) -> int:
    """Shift the biases of `classifier` so that `count` class probabilities exceed the threshold.

    Args:
        classifier: the convolution that gives the class logits.
        run: applies the model to the image.
        count: wanted number of candidates.
        threshold: threshold of the class probability or, with `centerness`, of its product with
            the centerness.
        centerness: the convolution that gives the centerness logits, if the model applies its
            threshold to the product.

    Returns:
        The number of candidates, below `count` if there are not as many probabilities.

    Raises:
        ValueError: the logits are not finite.
    """
    logits = _outputs_of(classifier, run)
    centre = [torch.zeros(()) for _ in logits]
    if centerness is not None:
        # log(1 / sigmoid): by how much centerness lowers the logarithm of the score
        centre = [nn.functional.softplus(-x.double()) for x in _outputs_of(centerness, run)]
    total = sum(x[0, 0].numel() for x in logits) * len(logits[0])
    mean = sum(x.double().sum((0, 2, 3)) for x in logits) / total
    missing = []
    for level, loss in zip(logits, centre, strict=True):
        needed = threshold * loss.exp().to(level.device)  # class probability to reach
        wanted = torch.where(needed < 1, torch.logit(needed, eps=1e-12), torch.inf)
        missing.append((wanted - (level.double() - mean[:, None, None])).flatten())
    ordered = torch.cat(missing).sort().values
    count = min(count, int(ordered.isfinite().sum()))
    # Halfway to the next candidate, so that rounding changes nothing.
    after = ordered[count] if count < len(ordered) else ordered[count - 1] + 1
    shift = (ordered[count - 1] + after) / 2 if after.isfinite() else ordered[count - 1] + 1
    classifier.bias += (shift - mean).to(classifier.bias.dtype)
    return count


@contextmanager
def _hooked(handle):
    try:
        yield
    finally:
        handle.remove()


def _take_statistics(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    variance, mean = torch.var_mean(inputs[0].double(), dim=(0, 2, 3), correction=0)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance.clamp(min=MIN_VARIANCE))


def _scale_to_one(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    deviation = output.std()
    conv.weight /= deviation
    return output / deviation


def _outputs_of(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    outputs: list[Tensor] = []
    with _hooked(module.register_forward_hook(lambda _, __, output: outputs.append(output))):
        run()
    if not outputs or not all(x.isfinite().all() for x in outputs):
        raise ValueError("the model gave no finite class logits")
    return outputs
