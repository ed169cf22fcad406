"""What is particular to Winograd's algorithm, and the ReLU of the 3x3 convolution."""

import itertools

import pytest
import torch

from nasfcos.ops import conv3x3, reference
from tests.operators import FORMATS, check_close, needs_compiled, outcome
from tests.ops.cases import OPERATORS

OPERATOR = OPERATORS["conv3x3"]
ordinary = OPERATOR.ordinary


def last(*tensors):
    return [t.contiguous(memory_format=torch.channels_last) for t in tensors]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", OPERATOR.cases)
def test_relu_and_no_bias(case, format, dtype, tolerance):
    x, weight, _ = OPERATOR.tensors(case, dtype)
    x = x.contiguous(memory_format=format)
    want = outcome(lambda *t: ordinary(*t, relu=True), (x, weight))
    got = outcome(lambda *t: conv3x3(*t, relu=True), (x, weight))
    if dtype == torch.float32:  # rounding may decide a ReLU, and with it gradients
        got, want = got[:1], want[:1]
    check_close(got, want, tolerance)


def test_gradient_of_the_relu():
    tensors = OPERATOR.tensors("many small images")
    leaves = [t.requires_grad_() for t in (*last(tensors[0]), *tensors[1:])]
    assert torch.autograd.gradcheck(lambda *t: conv3x3(*t, relu=True), leaves, fast_mode=True)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("channels", [64, 256])
def test_rounding_stays_small(channels):
    """In units of the rounding of the values, because PyTorch's sums differ between processors: its
    errors are 1 to 6 units, ours 5 to 11, and with the usual points they would be 12 to 17."""
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
    x, weight, bias = OPERATOR.tensors("parts of vectors and panels")
    x = x.contiguous(memory_format=format)
    got = reference.conv3x3(x, weight, bias, relu)
    assert got.is_contiguous(memory_format=format)
    check_close([got], [ordinary(x, weight, bias, relu)], 1e-12)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("case", OPERATOR.typical)
def test_gradient_of_the_weight_lies_as_the_weight(case):
    x, weight, bias = last(*OPERATOR.tensors(case)[:2]) + [None]
    weight = weight.new_empty(x.shape[1], len(weight), 3, 3).transpose(0, 1).copy_(weight)
    grad = torch.ops.nasfcos.conv3x3(x, weight, bias, False)
    gradient = torch.ops.nasfcos.conv3x3_weight_backward(grad, x, weight)
    assert gradient.stride() == weight.stride()


def test_of_some_channels_of_a_map():
    x, weight, bias = OPERATOR.tensors("parts of vectors and panels", torch.float32)
    for format, cut in itertools.product(FORMATS, (slice(3, 36), slice(0, 34, 2))):
        part = x.contiguous(memory_format=format)[:, cut]
        arguments = (weight[:, cut], bias)
        want = outcome(ordinary, (part.contiguous(), *arguments))
        check_close(outcome(conv3x3, (part, *arguments)), want, 1e-5)
        check_close([conv3x3(part, *arguments)], want[:1], 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_reach_no_further_than_their_tiles(bad):
    x, weight, _ = OPERATOR.tensors("whole tiles and panels", torch.float32)
    # The first pixel is inside a tile, the second in its corner, which three other tiles read.
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
    x, weight, bias = OPERATOR.tensors("parts of tiles")
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
    x, weight, bias = last(*OPERATOR.tensors("parts of tiles", dtype)[:2]) + [None]
    assert torch.equal(conv3x3(x, weight, bias, True), ordinary(x, weight, bias, True))


def test_autocast_decides_the_precision():
    x, weight, _ = OPERATOR.tensors("parts of tiles", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = conv3x3(*last(x), weight)
        assert got.dtype == torch.bfloat16 and torch.equal(got, ordinary(*last(x), weight))


def test_errors_name_the_shapes():
    x, weight, bias = OPERATOR.tensors("parts of tiles")
    for wrong in ((x[0], weight), (x, weight[:, 1:]), (x, weight[..., 1:])):
        with pytest.raises(ValueError, match=r"weight \[Cout, C, 3, 3\], got \[1?"):
            conv3x3(*wrong)
    with pytest.raises(ValueError, match=r"bias must be \[16\], got \[15\]"):
        conv3x3(x, weight, bias[1:])


@needs_compiled("conv3x3")
@pytest.mark.parametrize("case", OPERATOR.typical)
def test_registration_with_relu(case):
    leaves = [t.requires_grad_() for t in last(*OPERATOR.tensors(case)[:2])]
    torch.library.opcheck(torch.ops.nasfcos.conv3x3, (*leaves, None, True))
