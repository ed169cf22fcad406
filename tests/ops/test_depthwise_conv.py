import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nasfcos.ops import depthwise_conv2d, plain

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.channels_last, torch.contiguous_format]

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


def random_case(name, dtype=torch.float64, seed=0):
    shape, kernel, dilation = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, (shape[1], 1, kernel, kernel))
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)
    return x, weight, dilation


def ordinary(x, weight, dilation):
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])


def outcome(function, x, weight, dilation, seed=0):
    """Output and both gradients for one random gradient of the output."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    output = function(x, weight, dilation)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, (x, weight), grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance, device):
    x, weight, dilation = random_case(name, dtype)
    want = outcome(ordinary, x, weight, dilation)
    x = x.to(device).contiguous(memory_format=format)
    got = outcome(depthwise_conv2d, x, weight.to(device), dilation)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["vectors and single channels", "more taps outside than inside"])
def test_gradcheck(name):
    x, weight, dilation = random_case(name)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda *t: depthwise_conv2d(*t, dilation), leaves, fast_mode=True
    )


@pytest.mark.parametrize("version", ["dispatched", "plain"])
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format, version):
    """As the fake kernels say, on which compiled code relies."""
    x, weight, dilation = random_case("several vectors", torch.float32)
    x = x.contiguous(memory_format=format)
    operators = plain if version == "plain" else torch.ops.nasfcos
    output = operators.depthwise_conv2d(x, weight, dilation)
    # The gradient's own format does not matter.
    grads = operators.depthwise_conv2d_backward(output.contiguous(), x, weight, dilation)
    assert all(t.is_contiguous(memory_format=format) for t in (output, grads[0]))

    # A weight's gradient lies as the weight does, or DDP would copy it.
    weight = weight.contiguous(memory_format=format)
    _, grad = operators.depthwise_conv2d_backward(output, x, weight, dilation)
    assert grad.shape == weight.shape and grad.stride() == weight.stride()


def test_of_some_channels_of_a_map():
    x, weight, dilation = random_case("several vectors", torch.float32)
    for format, cut in itertools.product(FORMATS, (slice(3, 40), slice(0, 64, 2))):
        part = x.contiguous(memory_format=format)[:, cut]
        got = outcome(depthwise_conv2d, part, weight[cut], dilation)
        want = outcome(ordinary, part.clone(), weight[cut], dilation)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_result_does_not_depend_on_threads():
    # Large enough to be divided.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 60, 50, generator=generator)
    weight = torch.randn(40, 1, 5, 5, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(outcome(depthwise_conv2d, x.double(), weight.double(), 2))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_bad_pixels_reach_only_what_is_near():
    x, weight, dilation = random_case("more taps outside than inside", torch.float32)
    x[0, 3, 4, 5] = torch.nan
    x[0, 4, 0, 0] = torch.inf
    got = depthwise_conv2d(x, weight, dilation)
    near = torch.zeros_like(got, dtype=torch.bool)
    # Taps are six pixels apart.
    near[0, 3, 4::6, 5::6] = True
    near[0, 4, 0::6, 0::6] = True
    assert torch.equal(~got.isfinite(), near)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    x, weight, dilation = random_case(name, torch.bfloat16)
    got = outcome(depthwise_conv2d, x, weight, dilation)
    want = outcome(depthwise_conv2d, x.float(), weight.float(), dilation)
    # Sums are those of float32, rounded to the nearest; gradients are of a rounded gradient.
    assert torch.equal(got[0], want[0].bfloat16())
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == torch.bfloat16
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * scale)


def test_bfloat16_keeps_what_is_not_a_number():
    x, weight, dilation = random_case("several vectors", torch.bfloat16)
    # All bits of the fraction: rounding must not carry this into another number.
    x[0, 3, 5, 5] = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    got = depthwise_conv2d(x, weight, dilation)
    assert got[0, 3, 4:7, 4:7].isnan().all() and got.isnan().sum() == 9


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    x, weight, dilation = random_case("several vectors", torch.float32)
    x, weight = x.to(device, torch.bfloat16), weight.to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        got = depthwise_conv2d(x, weight, dilation)
    assert got.dtype == torch.bfloat16
    want = ordinary(x.float(), weight, dilation)
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)
    got.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_float16_is_computed_in_float32():
    x, weight, *rest = random_case("several vectors", torch.float16)
    got = depthwise_conv2d(x, weight, *rest)
    assert torch.equal(got, depthwise_conv2d(x.float(), weight.float(), *rest).half())


def test_second_derivatives_are_refused_and_checkpoints_taken():
    x, weight, *rest = random_case("several vectors")
    x.requires_grad_()
    weight.requires_grad_()
    output = depthwise_conv2d(x, weight, *rest)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    want = outcome(depthwise_conv2d, x, weight, *rest)
    again = partial(checkpoint, depthwise_conv2d, use_reentrant=False)
    got = outcome(again, x, weight, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit():
    x, weight, _ = random_case("several vectors")
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


@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    x, weight, dilation = random_case("vectors and single channels")
    x = x.contiguous(memory_format=format).requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.nasfcos.depthwise_conv2d, (x, weight, dilation))
    maps = (torch.randn_like(x), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.nasfcos.depthwise_conv2d_backward, (*maps, dilation))


def test_compiles_into_one_graph_of_dynamic_shape():
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("several vectors", "vectors and single channels"):
        x, weight, dilation = random_case(name, torch.float32)
        want = outcome(depthwise_conv2d, x, weight, dilation)
        for a, b in zip(outcome(compiled, x, weight, dilation), want, strict=True):
            torch.testing.assert_close(a, b)
