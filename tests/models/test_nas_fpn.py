import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nasfcos.models import layers
from nasfcos.models.layers import OPERATIONS
from nasfcos.models.necks.nas_fpn import Concat
from tests.operators import check_close

FORMATS = [torch.channels_last, torch.contiguous_format]


def by_hand(block, x, y):
    """The searched concatenation in PyTorch's own operators."""
    both = F.relu(block.norm(torch.cat((x, y), dim=1)))
    return F.conv2d(both, block.conv.weight, groups=block.conv.groups)


@pytest.mark.parametrize("format", FORMATS)
def test_concatenation(format):
    """Outputs and gradients; the gradients of the maps have the maps' memory format."""
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
    """As if one of them came from a weighted sum, whose factors are float32."""
    block = Concat(8, nn.BatchNorm2d)
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, y).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and y.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("name", ["concat", "conv1x1", "sep_conv_3x3", "def_conv_3x3"])
def test_running_statistics_are_those_of_pytorch(name, momentum, monkeypatch):
    torch.manual_seed(0)
    block = (Concat if name == "concat" else OPERATIONS[name])(8, nn.BatchNorm2d)
    block.norm.momentum = momentum
    maps = [
        torch.randn(2, 8, 90, 100).contiguous(memory_format=torch.channels_last)
        for _ in range(2 if name == "concat" else 1)
    ]
    found = []
    compiled = layers._FUSED_NORMS
    for own in (True, False):
        monkeypatch.setattr(layers, "_FUSED_NORMS", own and compiled)
        form = copy.deepcopy(block).to(memory_format=torch.channels_last)
        for _ in range(3):
            out = form(*maps)
        assert ("nasfcos_batch_norm" in out.grad_fn.name()) == (own and compiled)
        found.append([out, *form.norm.state_dict().values()])
        evaluated = form.eval()(*maps)
        assert not torch.allclose(evaluated, out) or momentum == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side, fused", [(90, True), (6, False)])
@pytest.mark.parametrize("name", ["conv1x1", "sep_conv_3x3", "def_conv_3x3"])
def test_group_norms_are_those_of_pytorch(name, side, fused, monkeypatch):
    """With the fused kernel where maps are large, for which it is faster."""
    torch.manual_seed(0)
    block = OPERATIONS[name](8, functools.partial(nn.GroupNorm, 4))
    nn.init.normal_(block.norm.weight)
    block.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last)
    compiled, found = layers._FUSED_NORMS, []
    for own in (True, False):
        monkeypatch.setattr(layers, "_FUSED_NORMS", own and compiled)
        out = block(x)
        assert ("nasfcos_group_norm" in out.grad_fn.name()) == (own and compiled and fused)
        block.zero_grad()
        out.cos().sum().backward()
        found.append([out, *(p.grad.clone() for p in block.parameters())])
    check_close(*found, 1e-4)


def test_one_value_a_channel_has_no_statistics():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        OPERATIONS["conv1x1"](8, nn.BatchNorm2d)(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize(
    "width, dtype, settings",
    [
        (8, torch.float32, {"momentum": None}),
        (8, torch.float32, {"track_running_stats": False}),
        (8, torch.float32, {"affine": False}),
        (8, torch.bfloat16, {}),
        (9, torch.float32, {}),
    ],
)
def test_other_norms_and_widths_train_as_well(width, dtype, settings):
    x = torch.randn(2, width, 90, 100).to(dtype, memory_format=torch.channels_last)
    blocks = (
        OPERATIONS["conv1x1"](width, functools.partial(nn.BatchNorm2d, **settings)),
        Concat(width, functools.partial(nn.BatchNorm2d, **settings)),
    )
    for block, maps in zip(blocks, ((x,), (x, x.flip(0))), strict=True):
        block.to(dtype, memory_format=torch.channels_last)(*maps).sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())
