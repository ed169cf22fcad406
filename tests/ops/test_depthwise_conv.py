"""The arguments and non-finite values of the depthwise convolution."""

import itertools

import pytest
import torch

from nasfcos.ops import depthwise_conv2d
from tests.operators import FORMATS, check_close, outcome
from tests.ops.cases import OPERATORS

OPERATOR = OPERATORS["depthwise_conv2d"]


def test_of_some_channels_of_a_map():
    case = "several vectors"
    x, weight = OPERATOR.tensors(case, torch.float32)
    ours, theirs = OPERATOR.bind(case), OPERATOR.bind(case, ordinary=True)
    for format, cut in itertools.product(FORMATS, (slice(3, 40), slice(0, 64, 2))):
        part = x.contiguous(memory_format=format)[:, cut]
        want = outcome(theirs, (part.contiguous(), weight[cut]))
        check_close([ours(part, weight[cut])], want[:1], 1e-5)
        check_close(outcome(ours, (part, weight[cut])), want, 1e-5)


def test_bad_pixels_reach_only_what_is_near():
    case = "more taps outside than inside"
    x, weight = OPERATOR.tensors(case, torch.float32)
    x[0, 3, 4, 5] = torch.nan
    x[0, 4, 0, 0] = torch.inf
    got = OPERATOR.bind(case)(x, weight)
    near = torch.zeros_like(got, dtype=torch.bool)
    # Taps are six pixels apart.
    near[0, 3, 4::6, 5::6] = True
    near[0, 4, 0::6, 0::6] = True
    assert torch.equal(~got.isfinite(), near)


def test_bfloat16_keeps_nan():
    case = "several vectors"
    x, weight = OPERATOR.tensors(case, torch.bfloat16)
    # A NaN with all bits of the fraction set, which rounding must not carry into another number.
    x[0, 3, 5, 5] = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    got = OPERATOR.bind(case)(x, weight)
    assert got[0, 3, 4:7, 4:7].isnan().all() and got.isnan().sum() == 9


def test_errors_name_the_shapes():
    x, weight = OPERATOR.tensors("several vectors")
    with pytest.raises(ValueError, match=r"must have four dimensions, got \[80, 9, 13\]"):
        depthwise_conv2d(x[0], weight)
    with pytest.raises(ValueError, match=r"weight must be \[80, 1, k, k\].*\[79, 1, 3, 3\]"):
        depthwise_conv2d(x, weight[1:])
    with pytest.raises(ValueError, match=r"with an odd k, got \[80, 1, 2, 2\]"):
        depthwise_conv2d(x, weight[:, :, 1:, 1:])
    with pytest.raises(ValueError, match="dilation 0 must be positive"):
        depthwise_conv2d(x, weight, 0)
