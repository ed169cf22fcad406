from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nasfcos.ops import plain, rectified_pairs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.channels_last, torch.contiguous_format]

# [N, C, H, W] of the output
CASES = {
    "several blocks": (2, 150, 7, 9),
    "fewer channels than a vector": (3, 5, 4, 6),
    "one channel": (2, 1, 3, 3),
    "one pixel": (2, 32, 1, 1),
    "no image": (0, 4, 5, 5),
}


def random_case(name, dtype=torch.float64):
    n, channels, height, width = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (n, 2 * channels, height, width), (channels, 2, 1, 1)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def ordinary(x, weight):
    return F.conv2d(F.relu(x), weight, groups=weight.shape[0])


def outcome(function, x, weight):
    """Output and both gradients for one random gradient of the output."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    output = function(x, weight)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, (x, weight), grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance, device):
    x, weight = random_case(name, dtype)
    want = outcome(ordinary, x, weight)
    x = x.to(device).contiguous(memory_format=format)
    got = outcome(rectified_pairs, x, weight.to(device))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["several blocks", "fewer channels than a vector"])
def test_gradcheck(name):
    leaves = [t.requires_grad_() for t in random_case(name)]
    assert torch.autograd.gradcheck(rectified_pairs, leaves, fast_mode=True)


@pytest.mark.parametrize("version", ["dispatched", "plain"])
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format, version):
    """As the fake kernels say, on which compiled code relies."""
    x, weight = random_case("several blocks", torch.float32)
    x = x.contiguous(memory_format=format)
    operators = plain if version == "plain" else torch.ops.nasfcos
    output = operators.rectified_pairs(x, weight)
    # The gradient's own format does not matter.
    grads = operators.rectified_pairs_backward(output.contiguous(), x, weight)
    assert all(t.is_contiguous(memory_format=format) for t in (output, grads[0]))

    # A weight's gradient lies as the weight does, or DDP would copy it.
    weight = weight.contiguous(memory_format=format)
    _, grad = operators.rectified_pairs_backward(output, x, weight)
    assert grad.shape == weight.shape and grad.stride() == weight.stride()


def test_plain_gradients_are_the_compiled_ones():
    x, weight = random_case("several blocks")
    grad = torch.ops.nasfcos.rectified_pairs(x, weight)
    want = plain.rectified_pairs_backward(grad, x, weight)
    for a, b in zip(
        torch.ops.nasfcos.rectified_pairs_backward(grad, x, weight), want, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_result_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 80, 60, 50, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 2, 1, 1, generator=generator, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(outcome(rectified_pairs, x, weight))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_is_not_a_number_stays_so():
    x, weight = random_case("several blocks", torch.float32)
    x[0, 7, 3, 3] = torch.nan
    got, grad_x, _ = outcome(rectified_pairs, x, weight)
    want, grad_want, _ = outcome(ordinary, x, weight)
    assert got[0, 3, 3, 3].isnan() and got.isnan().sum() == 1
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(grad_x, grad_want)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    x, weight = random_case(name, torch.bfloat16)
    got = outcome(rectified_pairs, x, weight)
    want = outcome(rectified_pairs, x.float(), weight.float())
    # Sums are those of float32, rounded to the nearest; gradients are of a rounded gradient.
    assert torch.equal(got[0], want[0].bfloat16())
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == torch.bfloat16
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    x, weight = (t.to(device) for t in random_case("several blocks", torch.float32))
    x, weight = x.bfloat16(), weight.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        got = rectified_pairs(x, weight)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), ordinary(x.float(), weight), rtol=3e-2, atol=3e-2)
    got.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_float16_is_computed_in_float32():
    x, weight, *rest = random_case("several blocks", torch.float16)
    got = rectified_pairs(x, weight, *rest)
    assert torch.equal(got, rectified_pairs(x.float(), weight.float(), *rest).half())


def test_second_derivatives_are_refused_and_checkpoints_taken():
    x, weight, *rest = random_case("several blocks")
    x.requires_grad_()
    weight.requires_grad_()
    output = rectified_pairs(x, weight, *rest)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
    want = outcome(rectified_pairs, x, weight, *rest)
    again = partial(checkpoint, rectified_pairs, use_reentrant=False)
    got = outcome(again, x, weight, *rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit():
    x, weight = random_case("several blocks")
    for wrong in ((x[0], weight), (x[:, 1:], weight), (x, weight[1:]), (x, weight[:, :1])):
        with pytest.raises(ValueError, match=r"input must be \[N, 2 \* C, H, W\]"):
            rectified_pairs(*wrong)
        # the operator itself, without its face, must not read out of bounds either
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.rectified_pairs(*wrong)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.rectified_pairs_backward(x, x, weight)


@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    x, weight = random_case("fewer channels than a vector")
    x = x.contiguous(memory_format=format).requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.nasfcos.rectified_pairs, (x, weight))
    grad = torch.randn(CASES["fewer channels than a vector"], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.nasfcos.rectified_pairs_backward, (grad, x.detach(), weight.detach())
    )


def test_compiles_into_one_graph_of_dynamic_shape():
    compiled = torch.compile(rectified_pairs, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("several blocks", "fewer channels than a vector"):
        tensors = random_case(name, torch.float32)
        want = outcome(rectified_pairs, *tensors)
        for a, b in zip(outcome(compiled, *tensors), want, strict=True):
            torch.testing.assert_close(a, b)
