import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nasfcos.models.necks.nas_fpn import Concat

FORMATS = [torch.channels_last, torch.contiguous_format]


def by_hand(block, x, y):
    """The searched concatenation in PyTorch's own operators."""
    both = F.relu(block.norm(torch.cat((x, y), dim=1)))
    return F.conv2d(both, block.conv.weight, groups=block.conv.groups)


@pytest.mark.parametrize("format", FORMATS)
def test_concatenation(format):
    """Its outputs and gradients; those of the maps are maps of the same memory format."""
    torch.manual_seed(0)
    block = Concat(12, nn.BatchNorm2d).double()
    nn.init.uniform_(block.norm.weight)
    nn.init.uniform_(block.norm.bias, -0.5, 0.5)
    x, y = (
        torch.randn(2, 12, 5, 7, dtype=torch.float64)
        .contiguous(memory_format=format)
        .requires_grad_()
        for _ in range(2)
    )
    leaves = [x, y, *block.parameters()]
    results = []
    for form in (block, lambda *maps: by_hand(block, *maps)):
        out = form(x, y)
        results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert all(map_.is_contiguous(memory_format=format) for map_ in results[0][:3])


def test_concatenation_of_maps_of_two_dtypes_under_autocast():
    """As where one of them comes from a weighted sum, whose factors are float32."""
    block = Concat(8, nn.BatchNorm2d)
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, y).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and y.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
