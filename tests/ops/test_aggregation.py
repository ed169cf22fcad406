"""Further arguments of the weighted sum, and NaN in the concatenation."""

import pytest
import torch

from nasfcos.ops import weighted_sum
from tests.operators import FORMATS, check_close, laid_out, outcome
from tests.ops.cases import OPERATORS

SUM, PAIRS = OPERATORS["weighted_sum"], OPERATORS["rectified_pairs"]
CASE = "several blocks of pixels"


def test_sum_of_a_map_and_itself():
    x, _, a, b = laid_out(SUM.tensors(CASE), torch.channels_last)
    got = outcome(lambda x, a, b: weighted_sum(x, x, a, b), (x, a, b))
    check_close(got, outcome(lambda x, a, b: a * x + b * x, (x, a, b)), 1e-12)


@pytest.mark.parametrize("format", FORMATS)
def test_factors_of_half_precision(format):
    """As in a model that is in half precision as a whole."""
    tensors = laid_out([t.bfloat16() for t in SUM.tensors(CASE)], format)
    got = outcome(weighted_sum, tensors)
    want = outcome(SUM.ordinary, [t.float() for t in tensors])
    assert all(t.dtype == torch.bfloat16 for t in got)
    check_close([t.float() for t in got], want, 2e-2)


def test_maps_of_two_dtypes():
    x, y, a, b = laid_out(SUM.tensors(CASE, torch.float32), torch.channels_last)
    got = weighted_sum(x.bfloat16(), y, a, b)
    assert got.dtype == torch.float32
    assert torch.equal(got, weighted_sum(x.bfloat16().float(), y, a, b))


def test_nan_passes_the_relu():
    x, weight = PAIRS.tensors("several blocks", torch.float32)
    x[0, 7, 3, 3] = torch.nan
    got, grad_x, _ = outcome(PAIRS.function, (x, weight))
    want, grad_want, _ = outcome(PAIRS.ordinary, (x, weight))
    assert got[0, 3, 3, 3].isnan() and got.isnan().sum() == 1
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(grad_x, grad_want)
