import pytest
import torch
import torch.nn.functional as F

from nasfcos.models.necks.top import TopLevels


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (1, 3), (5, 7)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_levels_and_gradients(size, dtype, tolerance):
    """Also for maps of one column, whose bfloat16 gradients some processors leave unwritten."""
    torch.manual_seed(0)
    top = TopLevels(16).to(dtype)
    for _ in range(20):  # with different content in uninitialised memory
        p5 = torch.randn(2, 16, *size).to(dtype)
        levels = top(p5)
        found = torch.autograd.grad(sum(x.float().square().sum() for x in levels), top.parameters())
        exact = [p.detach().double().requires_grad_() for p in top.parameters()]
        p6 = F.conv2d(p5.double(), *exact[:2], stride=2, padding=1)
        p7 = F.conv2d(p6.relu(), *exact[2:], stride=2, padding=1)
        wanted = torch.autograd.grad(p6.square().sum() + p7.square().sum(), exact)
        for a, b in zip((*levels, *found), (p6, p7, *wanted), strict=True):
            assert a.shape == b.shape
            scale = tolerance * b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=scale)
