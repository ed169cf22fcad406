import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import depthwise_conv2d
from tests.operators import (
    DEVICES,
    FORMATS,
    check_autocast,
    check_bfloat16,
    check_close,
    check_compiles,
    check_float16,
    check_once_differentiable,
    check_results_lie_as_arguments,
    check_threads,
    needs_compiled,
    outcome,
)

# input [N, C, H, W], kernel, dilation
CASES = {
    "several vectors": ((2, 80, 9, 13), 3, 1),
    "vectors and single channels": ((1, 37, 12, 8), 3, 3),
    "more taps outside than inside": ((2, 16, 10, 11), 5, 6),
    "no tap but the centre inside": ((1, 16, 5, 4), 5, 6),
    "narrower than a strip": ((3, 20, 7, 2), 3, 1),
    "one pixel": ((2, 5, 1, 1), 3, 1),
    "one channel": ((2, 1, 9, 8), 3, 2),
    "a factor per channel": ((1, 6, 4, 5), 1, 1),
    "large kernel": ((1, 4, 9, 9), 7, 1),
    "no image": ((0, 4, 5, 5), 3, 1),
}


def random_case(name, dtype=torch.float64):
    """Input, weight, and the operator and PyTorch's with the case's dilation."""
    shape, kernel, dilation = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (shape[1], 1, kernel, kernel))
    tensors = [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes
    ]
    return tensors, partial(depthwise_conv2d, dilation=dilation), partial(ordinary, dilation)


def ordinary(dilation, x, weight):
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance, device, implementation):
    (x, weight), ours, theirs = random_case(name, dtype)
    want = outcome(theirs, (x, weight))
    x = x.to(device).contiguous(memory_format=format)
    got = outcome(ours, (x, weight.to(device)))
    assert all(a.dtype == dtype for a in got)
    check_close([a.cpu() for a in got], want, tolerance)


@pytest.mark.parametrize("name", ["vectors and single channels", "more taps outside than inside"])
def test_gradcheck(name):
    tensors, ours, _ = random_case(name)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=True)


@needs_compiled("depthwise_conv2d")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format):
    tensors, _, _ = random_case("several vectors", torch.float32)
    check_results_lie_as_arguments("depthwise_conv2d", tensors, format, 1)


def test_of_some_channels_of_a_map():
    (x, weight), ours, theirs = random_case("several vectors", torch.float32)
    for format, cut in itertools.product(FORMATS, (slice(3, 40), slice(0, 64, 2))):
        part = x.contiguous(memory_format=format)[:, cut]
        want = outcome(theirs, (part.contiguous(), weight[cut]))
        check_close([ours(part, weight[cut])], want[:1], 1e-5)
        check_close(outcome(ours, (part, weight[cut])), want, 1e-5)


def test_result_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 60, 50, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 1, 5, 5, generator=generator, dtype=torch.float64)
    check_threads(partial(depthwise_conv2d, dilation=2), (x, weight))


def test_bad_pixels_reach_only_what_is_near():
    (x, weight), ours, _ = random_case("more taps outside than inside", torch.float32)
    x[0, 3, 4, 5] = torch.nan
    x[0, 4, 0, 0] = torch.inf
    got = ours(x, weight)
    near = torch.zeros_like(got, dtype=torch.bool)
    # Taps are six pixels apart.
    near[0, 3, 4::6, 5::6] = True
    near[0, 4, 0::6, 0::6] = True
    assert torch.equal(~got.isfinite(), near)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    tensors, ours, _ = random_case(name)
    check_bfloat16(ours, tensors)


def test_bfloat16_keeps_what_is_not_a_number():
    (x, weight), ours, _ = random_case("several vectors", torch.bfloat16)
    # All bits of the fraction: rounding must not carry this into another number.
    x[0, 3, 5, 5] = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    got = ours(x, weight)
    assert got[0, 3, 4:7, 4:7].isnan().all() and got.isnan().sum() == 9


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    tensors, ours, theirs = random_case("several vectors")
    check_autocast(ours, theirs, *tensors, device)


def test_float16():
    tensors, ours, _ = random_case("several vectors")
    check_float16(ours, tensors)


@needs_compiled("depthwise_conv2d")
def test_second_derivatives_are_refused():
    tensors, ours, _ = random_case("several vectors")
    check_once_differentiable(ours, tensors)


def test_shapes_that_do_not_fit():
    (x, weight), _, _ = random_case("several vectors")
    with pytest.raises(ValueError, match=r"must have four dimensions, got \[80, 9, 13\]"):
        depthwise_conv2d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight must be \[80, 1, k, k\].*\[79, 1, 3, 3\]"):
        depthwise_conv2d(x, weight[1:])
    with pytest.raises(ValueError, match=r"with an odd k, got \[80, 1, 2, 2\]"):
        depthwise_conv2d(x, weight[:, :, 1:, 1:])
    with pytest.raises(ValueError, match="dilation 0 must be positive"):
        depthwise_conv2d(x, weight, 0)
    # the operators themselves, without their face, must not read out of bounds either
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.depthwise_conv2d(x, weight[1:], 1)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.depthwise_conv2d_backward(x[:, :, 1:], x, weight, 1)


@needs_compiled("depthwise_conv2d")
@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    (x, weight), _, _ = random_case("vectors and single channels")
    x = x.contiguous(memory_format=format).requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.nasfcos.depthwise_conv2d, (x, weight, 3))
    maps = (torch.randn_like(x), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.nasfcos.depthwise_conv2d_backward, (*maps, 3))


def test_compiles_into_one_graph_of_dynamic_shape():
    cases = [random_case(n)[0] for n in ("several vectors", "vectors and single channels")]
    check_compiles(partial(depthwise_conv2d, dilation=2), cases)
