"""The statistics of the group norm, and its parameters in half precision."""

import pytest
import torch

from nasfcos.ops import reference
from tests.operators import check_close
from tests.ops.cases import EPS, OPERATORS

OPERATOR = OPERATORS["group_norm_relu"]


@pytest.mark.parametrize("case", OPERATOR.cases)
@pytest.mark.parametrize(
    "operators", [torch.ops.nasfcos, reference], ids=["dispatched", "reference"]
)
def test_statistics(operators, case):
    x, weight, bias = OPERATOR.tensors(case, torch.float32)
    (n, *_), _, (groups, _) = OPERATOR.cases[case]
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


def test_nan_spoils_only_its_own_group():
    case = "many channels"
    tensors = OPERATOR.tensors(case, torch.float32)
    tensors[0][1, 7, 3, 3] = torch.nan
    got, want = OPERATOR.bind(case)(*tensors), OPERATOR.bind(case, ordinary=True)(*tensors)
    spoiled = got.isnan().flatten(2).any(2).nonzero().tolist()
    assert spoiled == [[1, channel] for channel in range(6, 12)]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_parameters_of_half_precision():
    """As in a model that is in half precision as a whole."""
    function = OPERATOR.bind("many channels")
    maps, *parameters = (t.bfloat16() for t in OPERATOR.tensors("many channels"))
    want = function(maps, *(t.float() for t in parameters))
    assert torch.equal(function(maps, *parameters), want)
