import pytest
import torch

from nasfcos.ops import weighted_sum
from tests.operators import (
    DEVICES,
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

# [N, C, H, W]
CASES = {
    "several blocks of pixels": (2, 150, 7, 9),
    "fewer channels than a vector": (3, 5, 4, 6),
    "one channel": (2, 1, 3, 3),
    "one pixel": (2, 32, 1, 1),
    "no image": (0, 4, 5, 5),
}


def random_case(name, dtype=torch.float64):
    shape = CASES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = shape, shape, (shape[1], 1, 1), (shape[1], 1, 1)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def ordinary(x, y, a, b):
    return a * x + b * y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance, device, implementation):
    tensors = random_case(name, dtype)
    want = outcome(ordinary, tensors)
    got = outcome(weighted_sum, [t.to(device) for t in laid_out(tensors, format)])
    assert all(a.dtype == dtype for a in got)
    check_close([a.cpu() for a in got], want, tolerance)


@pytest.mark.parametrize("name", ["several blocks of pixels", "fewer channels than a vector"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck(format, name):
    leaves = [t.requires_grad_() for t in laid_out(random_case(name), format)]
    assert torch.autograd.gradcheck(weighted_sum, leaves, fast_mode=True)


def test_of_a_map_and_itself():
    x, _, a, b = laid_out(random_case("several blocks of pixels"), torch.channels_last)
    got = outcome(lambda x, a, b: weighted_sum(x, x, a, b), (x, a, b))
    check_close(got, outcome(lambda x, a, b: a * x + b * x, (x, a, b)), 1e-12)


@needs_compiled("weighted_sum")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format):
    tensors = laid_out(random_case("several blocks of pixels", torch.float32), format)
    output = torch.ops.nasfcos.weighted_sum(*tensors)
    # The output's gradient may lie in any way.
    grads = torch.ops.nasfcos.weighted_sum_backward(output.contiguous(), *tensors)
    assert output.is_contiguous(memory_format=format)
    for gradient, t in zip(grads, tensors, strict=True):
        assert gradient.shape == t.shape and gradient.stride() == t.stride()


def test_result_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 60, 50)] * 2 + [(40, 1, 1)] * 2
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    check_threads(weighted_sum, laid_out(tensors, torch.channels_last))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_maps_of_half_precision(half, format, device):
    """Computed in float32 and rounded once, with factors and their gradients in float32."""
    tensors = laid_out(random_case("several blocks of pixels", torch.float32), format)
    rough = [t.to(device, half) if t.dim() == 4 else t.to(device) for t in tensors]
    got = outcome(weighted_sum, rough)
    want = outcome(weighted_sum, [t.float() for t in rough])
    assert torch.equal(got[0], want[0].to(half))
    assert [g.dtype for g in got[1:]] == [t.dtype for t in rough]
    check_close([g.float() for g in got[1:]], want[1:], 2e-2)


@pytest.mark.parametrize("format", FORMATS)
def test_all_of_half_precision(format):
    """As in a whole model in half precision."""
    tensors = laid_out([t.bfloat16() for t in random_case("several blocks of pixels")], format)
    got = outcome(weighted_sum, tensors)
    want = outcome(ordinary, [t.float() for t in tensors])
    assert all(t.dtype == torch.bfloat16 for t in got)
    check_close([t.float() for t in got], want, 2e-2)


def test_maps_of_two_dtypes():
    x, y, a, b = laid_out(
        random_case("several blocks of pixels", torch.float32), torch.channels_last
    )
    got = weighted_sum(x.bfloat16(), y, a, b)
    assert got.dtype == torch.float32
    assert torch.equal(got, weighted_sum(x.bfloat16().float(), y, a, b))


def test_autocast():
    x, y, a, b = laid_out(random_case("several blocks of pixels"), torch.channels_last)

    def with_the_rest(function):
        return lambda x, a: function(x, y.to(x.dtype), a, b.to(a.dtype))

    check_autocast(with_the_rest(weighted_sum), with_the_rest(ordinary), x, a, "cpu")


@needs_compiled("weighted_sum")
def test_second_derivatives_are_refused():
    tensors = laid_out(random_case("several blocks of pixels"), torch.channels_last)
    check_once_differentiable(weighted_sum, tensors)


def misfits():
    x, y, a, b = random_case("several blocks of pixels")
    yield x[0], y[0], a, b
    yield x, y[:1], a, b
    yield x, y, a[1:], b
    yield x, y, a, b[1:]


def test_shapes_that_do_not_fit():
    for wrong in misfits():
        with pytest.raises(ValueError, match="weighted_sum"):
            weighted_sum(*wrong)


@needs_compiled("weighted_sum")
def test_the_operator_called_directly_does_not_read_out_of_bounds():
    x, y, a, b = random_case("several blocks of pixels")
    for wrong in (*misfits(), (x, y.float(), a, b), (x, y, a.float(), b)):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.weighted_sum(*wrong)
    for grad in (x[:1], x.float()):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.weighted_sum_backward(grad, x, y, a, b)


@needs_compiled("weighted_sum")
@pytest.mark.parametrize("format", FORMATS)
def test_registration(format):
    tensors = laid_out(random_case("fewer channels than a vector"), format)
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.nasfcos.weighted_sum, leaves)
    torch.library.opcheck(
        torch.ops.nasfcos.weighted_sum_backward, (tensors[0].cos(), *tensors)
    )


@pytest.mark.parametrize("format", FORMATS)
def test_compiles_into_one_graph_of_dynamic_shape(format):
    names = ("several blocks of pixels", "fewer channels than a vector")
    check_compiles(weighted_sum, [laid_out(random_case(name), format) for name in names])
