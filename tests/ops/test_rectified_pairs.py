import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import rectified_pairs
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, format, dtype, tolerance, device, implementation):
    x, weight = random_case(name, dtype)
    want = outcome(ordinary, (x, weight))
    x = x.to(device).contiguous(memory_format=format)
    got = outcome(rectified_pairs, (x, weight.to(device)))
    assert all(a.dtype == dtype for a in got)
    check_close([a.cpu() for a in got], want, tolerance)


@pytest.mark.parametrize("name", ["several blocks", "fewer channels than a vector"])
def test_gradcheck(name):
    leaves = [t.requires_grad_() for t in random_case(name)]
    assert torch.autograd.gradcheck(rectified_pairs, leaves, fast_mode=True)


@needs_compiled("rectified_pairs")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format):
    tensors = random_case("several blocks", torch.float32)
    check_results_lie_as_arguments("rectified_pairs", tensors, format)


def test_result_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 80, 60, 50, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 2, 1, 1, generator=generator, dtype=torch.float64)
    check_threads(rectified_pairs, (x, weight))


def test_what_is_not_a_number_stays_so():
    x, weight = random_case("several blocks", torch.float32)
    x[0, 7, 3, 3] = torch.nan
    got, grad_x, _ = outcome(rectified_pairs, (x, weight))
    want, grad_want, _ = outcome(ordinary, (x, weight))
    assert got[0, 3, 3, 3].isnan() and got.isnan().sum() == 1
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(grad_x, grad_want)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name):
    check_bfloat16(rectified_pairs, random_case(name))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    check_autocast(rectified_pairs, ordinary, *random_case("several blocks"), device)


def test_float16():
    check_float16(rectified_pairs, random_case("several blocks"))


@needs_compiled("rectified_pairs")
def test_second_derivatives_are_refused():
    check_once_differentiable(rectified_pairs, random_case("several blocks"))


def misfits():
    x, weight = random_case("several blocks")
    return (x[0], weight), (x[:, 1:], weight), (x, weight[1:]), (x, weight[:, :1])


def test_shapes_that_do_not_fit():
    for wrong in misfits():
        with pytest.raises(ValueError, match=r"input must be \[N, 2 \* C, H, W\]"):
            rectified_pairs(*wrong)


@needs_compiled("rectified_pairs")
def test_the_operator_called_directly_does_not_read_out_of_bounds():
    for wrong in misfits():
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.nasfcos.rectified_pairs(*wrong)
    x, weight = random_case("several blocks")
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.rectified_pairs_backward(x, x, weight)


@needs_compiled("rectified_pairs")
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
    cases = [random_case(name) for name in ("several blocks", "fewer channels than a vector")]
    check_compiles(rectified_pairs, cases)
