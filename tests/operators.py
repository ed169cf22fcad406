"""What the tests of several operators ask."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nasfcos.ops.library import has_compiled

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.channels_last, torch.contiguous_format]

Operator = Callable[..., Tensor]


def needs_compiled(name: str) -> pytest.MarkDecorator:
    """For what only our kernel of an operator promises."""
    return pytest.mark.skipif(
        not has_compiled(name, "cpu"), reason=f"csrc/ is not compiled: PyTorch serves for {name}"
    )


def laid_out(tensors: Sequence[Tensor], format: torch.memory_format) -> list[Tensor]:
    """Maps in this memory format, beside what has no four dimensions."""
    return [t.contiguous(memory_format=format) if t.dim() == 4 else t for t in tensors]


def outcome(function: Operator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients of all tensors for one random gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Relative to each value and to the largest of its tensor."""
    for a, b in zip(got, want, strict=True):
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def check_threads(
    function: Operator, tensors: Sequence[Tensor], counts: Sequence[int] = (3,)
) -> None:
    """As one thread, so give so many; tensors should be float64 and large enough to divide."""
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, *counts):
            torch.set_num_threads(n)
            results.append(outcome(function, tensors))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def check_bfloat16(function: Operator, tensors: Sequence[Tensor]) -> None:
    """Sums are those of float32, rounded to the nearest; gradients are of a rounded gradient."""
    got = outcome(function, [t.bfloat16() for t in tensors])
    want = outcome(function, [t.bfloat16().float() for t in tensors])
    assert torch.equal(got[0], want[0].bfloat16())
    assert all(gradient.dtype == torch.bfloat16 for gradient in got)
    check_close([gradient.float() for gradient in got[1:]], want[1:], 2e-2)


def check_float16(function: Operator, tensors: Sequence[Tensor]) -> None:
    """Computed in float32 on the CPU."""
    half = [t.half() for t in tensors]
    assert torch.equal(function(*half), function(*(t.float() for t in half)).half())


def check_autocast(
    function: Operator, ordinary: Operator, x: Tensor, weight: Tensor, device: str
) -> None:
    """As in a model: the maps come from autocast layers, the parameters are float32."""
    x = x.to(device, torch.bfloat16)
    weight = weight.to(device, torch.float32).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        got = function(x, weight)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), ordinary(x.float(), weight), rtol=3e-2, atol=3e-2)
    got.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def check_once_differentiable(function: Operator, tensors: Sequence[Tensor]) -> None:
    """Second derivatives are refused; a checkpoint changes nothing."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    again = partial(checkpoint, function, use_reentrant=False)
    for a, b in zip(outcome(again, tensors), outcome(function, tensors), strict=True):
        torch.testing.assert_close(a, b)


def check_results_lie_as_arguments(
    name: str, tensors: Sequence[Tensor], format: torch.memory_format, *settings
) -> None:
    """As the fake kernels say, on which compiled code relies."""
    x, weight = (t.contiguous(memory_format=format) for t in tensors)
    output = getattr(torch.ops.nasfcos, name)(x, weight, *settings)
    # The output's gradient may have any memory format.
    backward = getattr(torch.ops.nasfcos, f"{name}_backward")
    grads = backward(output.contiguous(), x, weight, *settings)
    assert all(t.is_contiguous(memory_format=format) for t in (output, grads[0]))
    # A weight's gradient lies as the weight does, or DDP would copy it.
    assert grads[1].shape == weight.shape and grads[1].stride() == weight.stride()


def check_compiles(function: Operator, cases: Sequence[Sequence[Tensor]]) -> None:
    """Into one graph of dynamic shape."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tensors in cases:
        want = outcome(function, tensors)
        for a, b in zip(outcome(compiled, tensors), want, strict=True):
            torch.testing.assert_close(a, b)
