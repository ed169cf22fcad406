"""Helpers for the tests of operators."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nasfcos.ops.library import has_compiled

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.channels_last, torch.contiguous_format]

Operator = Callable[..., Tensor]


def needs_compiled(name: str) -> pytest.MarkDecorator:
    """Skips a test of properties that only the compiled kernel has."""
    return pytest.mark.skipif(
        not has_compiled(name, "cpu"), reason=f"csrc/ is not compiled: no kernel for {name}"
    )


def laid_out(tensors: Sequence[Tensor], format: torch.memory_format) -> list[Tensor]:
    """The tensors, those with four dimensions in this memory format."""
    return [t.contiguous(memory_format=format) if t.dim() == 4 else t for t in tensors]


def outcome(function: Operator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all tensors for a fixed random gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Tolerance relative to each value and to the largest value of its tensor."""
    for a, b in zip(got, want, strict=True):
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def check_threads(
    function: Operator, tensors: Sequence[Tensor], counts: Sequence[int] = (3,)
) -> None:
    """Several threads compute what one computes. The tensors should be float64, and large enough to
    be divided."""
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


def check_compiles(function: Operator, cases: Sequence[Sequence[Tensor]]) -> None:
    """torch.compile makes one graph with dynamic shapes of it."""
    torch._dynamo.reset()  # the functions may share their code
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tensors in cases:
        want = outcome(function, tensors)
        for a, b in zip(outcome(compiled, tensors), want, strict=True):
            torch.testing.assert_close(a, b)
