"""The statistics of the batch norms."""

import pytest
import torch

from nasfcos.ops import batch_norm_concat, batch_norm_relu, reference
from tests.operators import check_close
from tests.ops.cases import EPS, OPERATORS

FUNCTIONS = {"batch_norm_relu": batch_norm_relu, "batch_norm_concat": batch_norm_concat}
both = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("case", OPERATORS["batch_norm_relu"].cases)
@pytest.mark.parametrize(
    "operators", [torch.ops.nasfcos, reference], ids=["dispatched", "reference"]
)
@both
def test_statistics(name, operators, case):
    operator = OPERATORS[name]
    tensors = operator.tensors(case, torch.float32)
    _, mean, variance = getattr(operators, name)(*tensors, EPS)
    maps = torch.cat(tensors[: operator.maps], dim=1).double()
    check_close(
        (mean.double(), variance.double()),
        (maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)),
        1e-7,
    )


@both
def test_statistics_have_no_gradient(name):
    tensors = OPERATORS[name].tensors("two pixels")
    _, *statistics = FUNCTIONS[name](*(t.requires_grad_() for t in tensors), EPS)
    assert not any(t.requires_grad for t in statistics)


@both
def test_an_outlier_does_not_spoil_the_statistics(name):
    """Not even as the first pixel, from which the differences are taken that are summed."""
    tensors = OPERATORS[name].tensors("several blocks of pixels", torch.float32)
    x = tensors[0].sub_(7).mul_(1e-3)
    x[0, :, 0, 0] = 100.0
    _, mean, variance = FUNCTIONS[name](*tensors, EPS)
    check_close(
        (mean[:6].double(), variance[:6].double()),
        (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)),
        1e-6,
    )


@both
def test_nan_spoils_only_its_own_channel(name):
    operator, case = OPERATORS[name], "many channels"
    tensors = operator.tensors(case, torch.float32)
    tensors[0][0, 7, 3, 3] = torch.nan
    got, want = operator.bind(case)(*tensors), operator.bind(case, ordinary=True)(*tensors)
    spoiled = 7 if name == "batch_norm_relu" else 3
    assert got.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [spoiled]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_maps_of_two_dtypes():
    operator = OPERATORS["batch_norm_concat"]
    x, y, *parameters = operator.tensors("many channels", torch.float32)
    got = operator.function(x.bfloat16(), y, *parameters, EPS)
    want = operator.function(x.bfloat16().float(), y, *parameters, EPS)
    assert got.dtype == torch.float32 and torch.equal(got, want)
