"""Group norm with its ReLU, against PyTorch's operators."""

import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import group_norm_relu, reference
from tests.operators import (
    DEVICES,
    FORMATS,
    check_autocast,
    check_close,
    check_compiles,
    check_once_differentiable,
    check_threads,
    needs_compiled,
    outcome,
)

EPS = 1e-5
# [N, C, H, W] and groups
CASES = {
    "many channels": ((2, 150, 7, 9), 25),
    "several blocks of pixels": ((3, 6, 20, 30), 3),
    "a group of all channels": ((2, 5, 4, 6), 1),
    "a group for each channel": ((2, 8, 5, 5), 8),
    "one pixel": ((3, 32, 1, 1), 4),
    "one pixel and channel": ((2, 4, 1, 1), 4),
}


def random_case(name, dtype=torch.float64):
    """Maps, weight and bias. The maps' mean is far from zero, and channels from one another."""
    shape, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = 3 * random(*shape) + 7 + 5 * random(shape[1], 1, 1)
    return [t.to(dtype) for t in (maps, random(shape[1]), random(shape[1]))]


def ours(name):
    return lambda x, weight, bias: group_norm_relu(x, weight, bias, CASES[name][1], EPS)


def ordinary(name):
    return lambda x, weight, bias: F.relu(F.group_norm(x, CASES[name][1], weight, bias, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "one pixel and channel"])
def test_agrees_with_torch(name, format, dtype, tolerance, device, implementation):
    tensors = random_case(name, dtype)
    want = outcome(ordinary(name), tensors)
    tensors[0] = tensors[0].contiguous(memory_format=format)
    got = outcome(ours(name), [t.to(device) for t in tensors])
    assert all(a.dtype == dtype for a in got)
    assert got[0].is_contiguous(memory_format=format)
    check_close([a.cpu() for a in got], want, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    leaves = [t.requires_grad_() for t in random_case(name)]
    assert torch.autograd.gradcheck(ours(name), leaves, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "operators", [torch.ops.nasfcos, reference], ids=["dispatched", "reference"]
)
def test_statistics(operators, name):
    x, weight, bias = random_case(name, torch.float32)
    (n, *_), groups = CASES[name]
    _, mean, variance = operators.group_norm_relu(x, weight, bias, groups, EPS)
    values = x.double().view(n, groups, -1)
    check_close(
        (mean.double(), variance.double()), (values.mean(2), values.var(2, correction=0)), 1e-6
    )


def test_a_mean_far_larger_than_the_deviation():
    x = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1) + torch.randn(1, 2, 40, 50) * 1e-2
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(2), torch.zeros(2)
    _, mean, variance = torch.ops.nasfcos.group_norm_relu(x, weight, bias, 2, EPS)
    check_close((mean, variance), (x.mean((2, 3)), x.double().var((2, 3)).float()), 1e-2)


@needs_compiled("group_norm_relu")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format):
    x, weight, bias = random_case("many channels", torch.float32)
    x = x.contiguous(memory_format=format)
    output, *moments = torch.ops.nasfcos.group_norm_relu(x, weight, bias, 25, EPS)
    # The output's gradient may lie in any way.
    grads = torch.ops.nasfcos.group_norm_relu_backward(
        output.contiguous(), x, weight, bias, *moments, EPS
    )
    assert output.is_contiguous(memory_format=format)
    for gradient, t in zip(grads, (x, weight, bias), strict=True):
        assert gradient.shape == t.shape and gradient.stride() == t.stride()


@pytest.mark.parametrize("shape", [(1, 40, 90, 70), (5, 40, 30, 20)])
def test_result_does_not_depend_on_threads(shape):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in (shape, (40,), (40,))
    ]
    check_threads(lambda *t: group_norm_relu(*t, 8, EPS), tensors)


def test_what_is_not_a_number_spoils_its_own_group():
    name = "many channels"
    tensors = random_case(name, torch.float32)
    tensors[0][1, 7, 3, 3] = torch.nan
    got = ours(name)(*tensors)
    spoiled = got.isnan().flatten(2).any(2).nonzero().tolist()
    assert spoiled == [[1, channel] for channel in range(6, 12)]
    torch.testing.assert_close(
        got, ordinary(name)(*tensors), equal_nan=True, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision(half, device):
    """Computed in float32 and rounded, with parameters and their gradients in float32."""
    name = "many channels"
    x, *terms = (t.to(device) for t in random_case(name, torch.float32))
    rough = [x.to(half), *terms]
    got = outcome(ours(name), rough)
    want = outcome(ours(name), [t.float() for t in rough])
    assert torch.equal(got[0], want[0].to(half))
    assert [g.dtype for g in got[1:]] == [t.dtype for t in rough]
    check_close([g.float() for g in got[1:]], want[1:], 2e-2)


def test_parameters_of_half_precision():
    """As those of a whole model in half precision are."""
    tensors = [t.bfloat16() for t in random_case("many channels")]
    got = ours("many channels")(*tensors)
    assert torch.equal(got, ours("many channels")(tensors[0], *(t.float() for t in tensors[1:])))


def test_autocast():
    name = "many channels"
    x, weight, bias = random_case(name)

    def with_bias(function):
        return lambda x, weight: function(x, weight, bias.to(weight.dtype))

    check_autocast(with_bias(ours(name)), with_bias(ordinary(name)), x, weight, "cpu")


@needs_compiled("group_norm_relu")
def test_second_derivatives_are_refused():
    check_once_differentiable(ours("many channels"), random_case("many channels"))


def misfits():
    x, weight, bias = random_case("many channels")
    yield x[0], weight, bias, 25
    yield x, weight[1:], bias, 25
    yield x, weight, bias[1:], 25
    yield x, weight, bias, 4
    yield x, weight, bias, 0
    yield x[:0], weight, bias, 25


def test_shapes_that_do_not_fit():
    for wrong in misfits():
        with pytest.raises(ValueError, match="group_norm_relu"):
            group_norm_relu(*wrong, EPS)


@needs_compiled("group_norm_relu")
def test_the_operator_called_directly_does_not_read_out_of_bounds():
    for wrong in misfits():
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.group_norm_relu(*wrong, EPS)
    tensors = random_case("many channels")
    output, mean, variance = torch.ops.nasfcos.group_norm_relu(*tensors, 25, EPS)
    for grad, moments in (
        (output[:1], (mean, variance)),
        (output.float(), (mean, variance)),
        (output, (mean[1:], variance[1:])),
        (output, (mean[:, 1:], variance[:, 1:])),
        (output, (mean, variance[1:])),
        (output, (mean[:, :0], variance[:, :0])),
        (output, (mean.float(), variance.float())),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.group_norm_relu_backward(grad, *tensors, *moments, EPS)


@needs_compiled("group_norm_relu")
@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    x, weight, bias = random_case("a group for each channel")
    x = x.contiguous(memory_format=format)
    output, *moments = torch.ops.nasfcos.group_norm_relu(x, weight, bias, 4, EPS)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    # The statistics have no gradient, which opcheck's comparison of gradients would ask for.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.nasfcos.group_norm_relu, (*leaves, 4, EPS), test_utils=utilities
    )
    torch.library.opcheck(
        torch.ops.nasfcos.group_norm_relu_backward,
        (output.cos(), x, weight, bias, *moments, EPS),
    )


def test_compiles_into_one_graph_of_dynamic_shape():
    x, weight, bias = random_case("many channels")
    other = [x[:1, :, 1:], weight, bias]
    check_compiles(ours("many channels"), [[x, weight, bias], other])
