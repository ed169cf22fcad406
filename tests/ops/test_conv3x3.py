import itertools

import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import conv3x3, reference
from tests.operators import (
    FORMATS,
    check_close,
    check_compiles,
    check_once_differentiable,
    check_threads,
    needs_compiled,
    outcome,
)

# input [N, C, H, W], output channels
CASES = {
    "whole tiles and panels": ((2, 32, 24, 32), 48),
    "parts of tiles": ((1, 16, 29, 38), 16),
    "parts of vectors and panels": ((1, 37, 30, 31), 21),
    "a panel and one channel": ((2, 17, 21, 34), 17),
    "several blocks of tiles": ((1, 16, 150, 210), 32),
    "one row": ((1, 16, 1, 260), 16),
    "one column": ((3, 16, 130, 1), 16),
    "many small images": ((60, 16, 2, 3), 16),
    "few tiles": ((2, 32, 9, 8), 32),
    "few channels": ((1, 3, 40, 50), 4),
    "no image": ((0, 16, 30, 30), 16),
}


def random_case(name, dtype=torch.float64):
    """Input, weight and bias."""
    shape, out_channels = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (out_channels, shape[1], 3, 3), (out_channels,))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def gradients(*tensors):
    operators = torch.ops.nasfcos
    return [getattr(operators, f"conv3x3_{of}_backward")(*tensors) for of in ("input", "weight")]


def last(*tensors):
    return [t.contiguous(memory_format=torch.channels_last) for t in tensors]


def ordinary(x, weight, bias=None, relu=False):
    output = F.conv2d(x, weight, bias, padding=1)
    return output.relu() if relu else output


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance):
    x, weight, bias = random_case(name, dtype)
    x = x.contiguous(memory_format=format)
    for arguments, relu in (((x, weight, bias), False), ((x, weight), True)):
        want = outcome(lambda *t, relu=relu: ordinary(*t, relu=relu), arguments)
        got = outcome(lambda *t, relu=relu: conv3x3(*t, relu=relu), arguments)
        if relu and dtype == torch.float32:  # rounding may turn a ReLU, and gradients with it
            got, want = got[:1], want[:1]
        check_close(got, want, tolerance)


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu):
    x, weight, bias = (t.requires_grad_() for t in random_case("many small images"))

    def function(x, weight, bias):
        return conv3x3(*last(x), weight, bias, relu)

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("channels", [64, 256])
def test_rounding_stays_small(channels):
    """In units of the values' own rounding, since PyTorch's sums differ between processors: its
    errors are 1 to 6 of them, ours 5 to 11, and those of a tile with the usual points 12 to 17."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 40, 40, generator=generator).relu()
    weight = torch.randn(64, channels, 3, 3, generator=generator)
    grad = torch.randn(1, 64, 40, 40, generator=generator)
    x, weight, grad = last(x, weight, grad)

    def outcomes(function, x, weight, grad):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    found = outcomes(conv3x3, x, weight, grad)
    direct = outcomes(ordinary, x, weight, grad)
    exact = outcomes(ordinary, x.double(), weight.double(), grad.double())
    for ours, other, values in zip(found, direct, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * values.square().mean().sqrt()
        assert not torch.equal(ours, other)
        assert (ours - values).square().mean().sqrt() < 14 * unit


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_reference_implementation(format, relu):
    x, weight, bias = random_case("parts of vectors and panels")
    x = x.contiguous(memory_format=format)
    got = reference.conv3x3(x, weight, bias, relu)
    assert got.is_contiguous(memory_format=format)
    check_close([got], [ordinary(x, weight, bias, relu)], 1e-12)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["parts of vectors and panels", "few tiles"])
def test_memory_format_of_the_results(name, format):
    x, weight, _ = random_case(name, torch.float32)
    x, weight = (t.contiguous(memory_format=format) for t in (x, weight))
    output = torch.ops.nasfcos.conv3x3(x, weight, None, False)
    grads = gradients(output.contiguous(), x, weight)
    assert all(t.is_contiguous(memory_format=format) for t in (output, grads[0]))
    # A weight's gradient lies as the weight does, or DDP would copy it.
    assert grads[1].shape == weight.shape and grads[1].stride() == weight.stride()
    # So it does however that is.
    weight = weight.new_empty(x.shape[1], len(weight), 3, 3).transpose(0, 1).copy_(weight)
    assert gradients(output, x, weight)[1].stride() == weight.stride()


def test_of_some_channels_of_a_map():
    x, weight, bias = random_case("parts of vectors and panels", torch.float32)
    for format, cut in itertools.product(FORMATS, (slice(3, 36), slice(0, 34, 2))):
        part = x.contiguous(memory_format=format)[:, cut]
        arguments = (weight[:, cut], bias)
        want = outcome(ordinary, (part.contiguous(), *arguments))
        check_close(outcome(conv3x3, (part, *arguments)), want, 1e-5)
        check_close([conv3x3(part, *arguments)], want[:1], 1e-5)


@pytest.mark.parametrize("shape, out_channels", [((2, 16, 60, 50), 40), ((1, 256, 28, 29), 264)])
def test_result_does_not_depend_on_threads(shape, out_channels):
    """Three divide tiles in the first case and output channels in the second, four both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(out_channels, shape[1], 3, 3, generator=generator, dtype=torch.float64)
    check_threads(lambda x, weight: conv3x3(*last(x), weight), (x, weight), counts=(3, 4, 7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_reach_no_further_than_their_tiles(bad):
    x, weight, _ = random_case("whole tiles and panels", torch.float32)
    # The first is inside a tile, the second in its corner, which three others read.
    for row, column, rows, columns in ((9, 14, (8, 12), (12, 16)), (8, 12, (4, 12), (8, 16))):
        hit = x.clone()
        hit[0, 3, row, column] = bad
        got = conv3x3(*last(hit), weight)
        assert not got[0, :, row - 1 : row + 2, column - 1 : column + 2].isfinite().any()
        got[0, :, slice(*rows), slice(*columns)] = 0
        assert got.isfinite().all()
    assert conv3x3(*last(hit), weight, relu=True)[0, :, 8, 12].isnan().all() or bad == torch.inf


@needs_compiled("conv3x3")
def test_only_the_gradients_that_are_wanted():
    x, weight, bias = random_case("parts of tiles")
    every = outcome(lambda *t: conv3x3(*last(t[0]), *t[1:]), (x, weight, bias))[1:]
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias))]
        with torch.profiler.profile() as profile:
            output = conv3x3(*last(leaves[0]), *leaves[1:])
            generator = torch.Generator().manual_seed(0)
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            output.backward(grad)
        torch.testing.assert_close(leaves[wanted].grad, every[wanted])
        called = {event.key for event in profile.key_averages()}
        for index, of in enumerate(("input", "weight")):
            assert (f"nasfcos::conv3x3_{of}_backward" in called) == (index == wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_torchs(dtype):
    x, weight, bias = last(*random_case("parts of tiles", dtype)[:2]) + [None]
    assert torch.equal(conv3x3(x, weight, bias, True), ordinary(x, weight, bias, True))


def test_autocast_decides_the_precision():
    x, weight, _ = random_case("parts of tiles", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = conv3x3(*last(x), weight)
        assert got.dtype == torch.bfloat16 and torch.equal(got, ordinary(*last(x), weight))


@needs_compiled("conv3x3")
def test_second_derivatives_are_refused():
    check_once_differentiable(
        lambda x, weight: conv3x3(*last(x), weight), random_case("parts of tiles")[:2]
    )


def test_shapes_that_do_not_fit():
    x, weight, bias = random_case("parts of tiles")
    for wrong in ((x[0], weight), (x, weight[:, 1:]), (x, weight[..., 1:])):
        with pytest.raises(ValueError, match=r"weight \[Cout, C, 3, 3\], got \[1?"):
            conv3x3(*wrong)
    with pytest.raises(ValueError, match=r"bias must be \[16\], got \[15\]"):
        conv3x3(x, weight, bias[1:])
    # the operators themselves, without their face, must not read out of bounds either
    for wrong in (
        (x, weight[:, 1:], None, False),
        (x, weight, bias[1:], False),
        (x, weight.float(), None, False),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.conv3x3(*wrong)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.conv3x3_input_backward(x[:, :, 1:], x, weight)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.conv3x3_weight_backward(x[:, :, 1:], x, weight)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["parts of tiles", "few tiles"])
def test_registration(name, format):
    x, weight, bias = random_case(name)
    x = x.contiguous(memory_format=format).requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.nasfcos.conv3x3, (x, weight, bias.requires_grad_(), True))
    maps = (torch.randn(x.shape[0], len(bias), *x.shape[2:]).to(x), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.nasfcos.conv3x3_input_backward, maps)
    torch.library.opcheck(torch.ops.nasfcos.conv3x3_weight_backward, maps)


def test_compiles_into_one_graph_of_dynamic_shape():
    cases = [random_case(n) for n in ("parts of tiles", "parts of vectors and panels")]
    check_compiles(lambda x, *further: conv3x3(*last(x), *further), cases)
