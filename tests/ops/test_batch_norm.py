"""Batch norm by the batch's statistics with what follows it, against PyTorch's operators."""

import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import batch_norm_concat, batch_norm_relu
from tests.operators import (
    FORMATS,
    check_autocast,
    check_close,
    check_compiles,
    check_once_differentiable,
    check_threads,
    laid_out,
    needs_compiled,
    outcome,
)

EPS = 1e-5
# [N, C, H, W] of each map
CASES = {
    "many channels": (2, 150, 7, 9),
    "several blocks of pixels": (3, 6, 20, 30),
    "fewer channels than a vector": (3, 4, 4, 6),
    "two pixels": (1, 32, 1, 2),
}
OPERATORS = {"batch_norm_relu": batch_norm_relu, "batch_norm_concat": batch_norm_concat}


def random_case(operator, name, dtype=torch.float64):
    """Maps and parameters; the maps' mean is far from zero."""
    n, channels, height, width = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = [3 * random(n, channels, height, width) + 7]
    if operator == "batch_norm_concat":
        maps.append(random(n, channels, height, width))
    total = len(maps) * channels
    parameters = [random(total), random(total)]
    if operator == "batch_norm_concat":
        parameters.append(random(channels, 2, 1, 1))
    return [t.to(dtype) for t in (*maps, *parameters)]


def ours(operator):
    return lambda *tensors: OPERATORS[operator](*tensors, EPS)[0]


def ordinary(operator):
    def relu(x, weight, bias):
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))

    def concat(x, y, weight, bias, factor):
        return F.conv2d(relu(torch.cat((x, y), 1), weight, bias), factor, groups=len(factor))

    return {"batch_norm_relu": relu, "batch_norm_concat": concat}[operator]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "two pixels"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_agrees_with_torch(operator, name, format, dtype, tolerance, implementation):
    tensors = random_case(operator, name, dtype)
    want = outcome(ordinary(operator), tensors)
    got = outcome(ours(operator), laid_out(tensors, format))
    assert all(a.dtype == dtype for a in got)
    assert got[0].is_contiguous(memory_format=format)
    check_close(got, want, tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_statistics(operator, name, implementation):
    tensors = random_case(operator, name, torch.float32)
    _, mean, variance = OPERATORS[operator](*tensors, EPS)
    maps = torch.cat([t for t in tensors if t.shape == CASES[name]], dim=1).double()
    check_close(
        (mean.double(), variance.double()),
        (maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)),
        1e-7,
    )
    assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_outlier_does_not_spoil_the_statistics(operator):
    """Also where it is the first pixel, which sums are taken relative to."""
    tensors = random_case(operator, "several blocks of pixels", torch.float32)
    x = tensors[0].sub_(7).mul_(1e-3)
    x[0, :, 0, 0] = 100.0
    _, mean, variance = OPERATORS[operator](*tensors, EPS)
    check_close(
        (mean[:6].double(), variance[:6].double()),
        (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)),
        1e-6,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator, name):
    leaves = [t.requires_grad_() for t in random_case(operator, name)]
    assert torch.autograd.gradcheck(ours(operator), leaves, fast_mode=True)


@pytest.mark.parametrize("operator", OPERATORS)
@needs_compiled("batch_norm_relu")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format, operator):
    tensors = laid_out(random_case(operator, "many channels", torch.float32), format)
    output, mean, variance = getattr(torch.ops.nasfcos, operator)(*tensors, EPS)
    # The output's gradient may lie in any way.
    grads = getattr(torch.ops.nasfcos, f"{operator}_backward")(
        output.contiguous(), *tensors, mean, variance, EPS
    )
    assert output.is_contiguous(memory_format=format)
    # The factor's gradient too lies as the factor does, or DDP would copy it.
    for gradient, t in zip(grads, tensors, strict=True):
        assert gradient.shape == t.shape and gradient.stride() == t.stride()


@pytest.mark.parametrize("operator", OPERATORS)
def test_result_does_not_depend_on_threads(operator):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 60, 50)] + [(40,)] * 2
    if operator == "batch_norm_concat":
        shapes = [(2, 40, 60, 50)] * 2 + [(80,)] * 2 + [(40, 2, 1, 1)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    check_threads(ours(operator), tensors)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_a_number_spoils_its_own_channel(operator):
    tensors = random_case(operator, "many channels", torch.float32)
    tensors[0][0, 7, 3, 3] = torch.nan
    got, want = ours(operator)(*tensors), ordinary(operator)(*tensors)
    spoiled = 7 if operator == "batch_norm_relu" else 3
    assert got.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [spoiled]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bfloat16_maps(operator):
    """Computed in float32 and rounded, with parameters and their gradients in float32."""
    exact = random_case(operator, "many channels", torch.float32)
    rough = [t.bfloat16() if t.shape == CASES["many channels"] else t for t in exact]
    same = [t.float() for t in rough]
    got, want = outcome(ours(operator), rough), outcome(ours(operator), same)
    assert torch.equal(got[0], want[0].bfloat16())
    assert [g.dtype for g in got[1:]] == [t.dtype for t in rough]
    check_close([g.float() for g in got[1:]], want[1:], 2e-2)
    half = [t.half() if t.dtype == torch.bfloat16 else t for t in rough]
    assert torch.equal(
        ours(operator)(*half), ours(operator)(*(t.float() for t in half)).half()
    )


def test_autocast():
    x, weight, bias = random_case("batch_norm_relu", "many channels")
    bias = bias.float()

    def with_bias(function):
        return lambda x, weight: function(x, weight, bias.to(weight.dtype))

    check_autocast(
        with_bias(ours("batch_norm_relu")), with_bias(ordinary("batch_norm_relu")), x, weight, "cpu"
    )


def test_maps_of_two_dtypes():
    x, y, *parameters = random_case("batch_norm_concat", "many channels", torch.float32)
    got = ours("batch_norm_concat")(x.bfloat16(), y, *parameters)
    want = ours("batch_norm_concat")(x.bfloat16().float(), y, *parameters)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@needs_compiled("batch_norm_relu")
@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives_are_refused(operator):
    check_once_differentiable(ours(operator), random_case(operator, "many channels"))


def misfits(operator):
    *maps, weight, bias = random_case("batch_norm_relu", "many channels")
    if operator == "batch_norm_concat":
        x, y, weight, bias, factor = random_case(operator, "many channels")
        yield x, y[:1], weight, bias, factor
        yield x[:, 1:], y[:, 1:], weight[2:], bias[2:], factor[1:]
        yield x, y, weight, bias, factor[1:]
        yield x[:0], y[:0], weight, bias, factor
    else:
        yield maps[0][0], weight, bias
        yield maps[0], weight[1:], bias
        yield maps[0], weight, bias[1:]
        yield maps[0][:0], weight, bias


@pytest.mark.parametrize("operator", OPERATORS)
def test_shapes_that_do_not_fit(operator):
    for wrong in misfits(operator):
        with pytest.raises(ValueError, match=operator):
            ours(operator)(*wrong)


@needs_compiled("batch_norm_relu")
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operator_called_directly_does_not_read_out_of_bounds(operator):
    for wrong in misfits(operator):
        with pytest.raises((ValueError, RuntimeError)):
            getattr(torch.ops.nasfcos, operator)(*wrong, EPS)
    tensors = random_case(operator, "many channels")
    output, mean, variance = getattr(torch.ops.nasfcos, operator)(*tensors, EPS)
    backward = getattr(torch.ops.nasfcos, f"{operator}_backward")
    for grad, moments in (
        (output[:1], (mean, variance)),
        (output.float(), (mean, variance)),
        (output, (mean[1:], variance)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            backward(grad, *tensors, *moments, EPS)


@needs_compiled("batch_norm_relu")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_registration(operator, format):
    tensors = laid_out(random_case(operator, "fewer channels than a vector"), format)
    output, mean, variance = getattr(torch.ops.nasfcos, operator)(*tensors, EPS)
    leaves = [t.clone().requires_grad_() for t in tensors]
    # The statistics have no gradient, which opcheck's comparison of gradients would ask for.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        getattr(torch.ops.nasfcos, operator), (*leaves, EPS), test_utils=utilities
    )
    torch.library.opcheck(
        getattr(torch.ops.nasfcos, f"{operator}_backward"),
        (output.cos(), *tensors, mean, variance, EPS),
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_into_one_graph_of_dynamic_shape(operator):
    names = ("many channels", "fewer channels than a vector")
    check_compiles(ours(operator), [random_case(operator, name) for name in names])
