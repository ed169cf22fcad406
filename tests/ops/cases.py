"""The operators on maps: their arguments, and the same in PyTorch's own operators."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfcos import ops

EPS = 1e-5

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class MapOperator:
    """An operator of maps, then parameters, then settings that are no tensors."""

    function: Callable[..., Tensor]
    ordinary: Callable[..., Tensor]
    """The same in PyTorch's operators."""
    maps: int
    """The number of maps among the tensors."""
    sizes: Callable[..., list[Sizes]]
    """The sizes of all tensors, for maps [N, C, H, W] and further sizes of the case."""
    cases: dict[str, tuple[Sizes, tuple[int, ...], tuple]]
    """Size of a map, further sizes, settings."""
    typical: tuple[str, str]
    large: tuple[tuple[Sizes, tuple[int, ...], tuple], ...]
    """Cases that threads divide."""
    offset: float = 0.0
    """The mean of the first maps."""
    spread: float = 0.0
    """The standard deviation of the means of their channels."""
    tolerance: tuple[float, float] = (1e-12, 1e-5)
    """For float64 and float32."""
    single_parameters: bool = True
    """Whether parameters are float32 for maps of half precision."""
    backward_settings: int = 0
    """The number of settings at the end that the backward operator takes."""

    def tensors(self, case: str | tuple, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shape, further, _ = self.cases[case] if isinstance(case, str) else case
        generator = torch.Generator().manual_seed(0)
        x, *others = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in self.sizes(shape, *further)
        )
        if self.offset:
            means = torch.randn(shape[1], 1, 1, generator=generator)
            x = 3 * x + self.offset + self.spread * means
        return [t.to(dtype) for t in (x, *others)]

    def bind(self, case: str | tuple, ordinary: bool = False) -> Callable[..., Tensor]:
        """The function of tensors alone."""
        *_, settings = self.cases[case] if isinstance(case, str) else case
        function = self.ordinary if ordinary else self.function
        return lambda *tensors: function(*tensors, *settings)


def call(name: str, tensors: list[Tensor], settings: tuple) -> list[Tensor]:
    """All outputs of ``torch.ops.nasfcos.<name>``."""
    result = getattr(torch.ops.nasfcos, name)(*tensors, *settings)
    return [result] if isinstance(result, Tensor) else list(result)


def call_backward(
    name: str, grad: Tensor, tensors: list[Tensor], statistics: list[Tensor], settings: tuple
) -> list[Tensor]:
    """The gradients from ``torch.ops.nasfcos.<name>_backward``."""
    operators = torch.ops.nasfcos
    if name == "conv3x3":
        x, weight, _ = tensors
        both = operators.conv3x3_input_backward, operators.conv3x3_weight_backward
        return [operator(grad, x, weight) for operator in both]
    count = OPERATORS[name].backward_settings
    passed = settings[len(settings) - count :]
    return list(getattr(operators, f"{name}_backward")(grad, *tensors, *statistics, *passed))


def _batch_norm_relu(x, weight, bias, eps):
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))


def _batch_norm_concat(x, y, weight, bias, factor, eps):
    h = _batch_norm_relu(torch.cat((x, y), 1), weight, bias, eps)
    return F.conv2d(h, factor, groups=len(factor))


def _conv3x3(x, weight, bias=None, relu=False):
    output = F.conv2d(x, weight, bias, padding=1)
    return output.relu() if relu else output


def _depthwise_conv2d(x, weight, dilation):
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])


_BATCH_NORM_CASES = {
    "many channels": ((2, 150, 7, 9), (), (EPS,)),
    "several blocks of pixels": ((3, 6, 20, 30), (), (EPS,)),
    "fewer channels than a vector": ((3, 4, 4, 6), (), (EPS,)),
    "two pixels": ((1, 32, 1, 2), (), (EPS,)),
}

OPERATORS = {
    "batch_norm_relu": MapOperator(
        function=lambda *arguments: ops.batch_norm_relu(*arguments)[0],
        ordinary=_batch_norm_relu,
        maps=1,
        sizes=lambda x: [x, (x[1],), (x[1],)],
        cases=_BATCH_NORM_CASES,
        typical=("many channels", "fewer channels than a vector"),
        large=(((2, 40, 60, 50), (), (EPS,)),),
        offset=7.0,
        tolerance=(1e-9, 3e-5),
        backward_settings=1,
    ),
    "batch_norm_concat": MapOperator(
        function=lambda *arguments: ops.batch_norm_concat(*arguments)[0],
        ordinary=_batch_norm_concat,
        maps=2,
        sizes=lambda x: [x, x, (2 * x[1],), (2 * x[1],), (x[1], 2, 1, 1)],
        cases=_BATCH_NORM_CASES,
        typical=("many channels", "fewer channels than a vector"),
        large=(((2, 40, 60, 50), (), (EPS,)),),
        offset=7.0,
        tolerance=(1e-9, 3e-5),
        backward_settings=1,
    ),
    "group_norm_relu": MapOperator(
        function=ops.group_norm_relu,
        ordinary=lambda x, weight, bias, groups, eps: F.relu(
            F.group_norm(x, groups, weight, bias, eps)
        ),
        maps=1,
        sizes=lambda x: [x, (x[1],), (x[1],)],
        cases={
            "many channels": ((2, 150, 7, 9), (), (25, EPS)),
            "several blocks of pixels": ((3, 6, 20, 30), (), (3, EPS)),
            "a group of all channels": ((2, 5, 4, 6), (), (1, EPS)),
            "a group for each channel": ((2, 8, 5, 5), (), (8, EPS)),
            "one pixel": ((3, 32, 1, 1), (), (4, EPS)),
            "one pixel and channel": ((2, 4, 1, 1), (), (4, EPS)),
        },
        typical=("many channels", "a group for each channel"),
        large=(((1, 40, 90, 70), (), (8, EPS)), ((5, 40, 30, 20), (), (8, EPS))),
        offset=7.0,
        spread=5.0,
        tolerance=(1e-9, 3e-5),
        backward_settings=1,
    ),
    "weighted_sum": MapOperator(
        function=ops.weighted_sum,
        ordinary=lambda x, y, a, b: a * x + b * y,
        maps=2,
        sizes=lambda x: [x, x, (x[1], 1, 1), (x[1], 1, 1)],
        cases={
            "several blocks of pixels": ((2, 150, 7, 9), (), ()),
            "fewer channels than a vector": ((3, 5, 4, 6), (), ()),
            "one channel": ((2, 1, 3, 3), (), ()),
            "one pixel": ((2, 32, 1, 1), (), ()),
            "no image": ((0, 4, 5, 5), (), ()),
        },
        typical=("several blocks of pixels", "fewer channels than a vector"),
        large=(((2, 40, 60, 50), (), ()),),
    ),
    "rectified_pairs": MapOperator(
        function=ops.rectified_pairs,
        ordinary=lambda x, weight: F.conv2d(F.relu(x), weight, groups=len(weight)),
        maps=1,
        sizes=lambda x: [x, (x[1] // 2, 2, 1, 1)],
        cases={
            "several blocks": ((2, 300, 7, 9), (), ()),
            "fewer channels than a vector": ((3, 10, 4, 6), (), ()),
            "one output channel": ((2, 2, 3, 3), (), ()),
            "one pixel": ((2, 64, 1, 1), (), ()),
            "no image": ((0, 8, 5, 5), (), ()),
        },
        typical=("several blocks", "fewer channels than a vector"),
        large=(((2, 80, 60, 50), (), ()),),
        single_parameters=False,
    ),
    "depthwise_conv2d": MapOperator(
        function=ops.depthwise_conv2d,
        ordinary=_depthwise_conv2d,
        maps=1,
        sizes=lambda x, kernel: [x, (x[1], 1, kernel, kernel)],
        cases={
            "several vectors": ((2, 80, 9, 13), (3,), (1,)),
            "vectors and single channels": ((1, 37, 12, 8), (3,), (3,)),
            "more taps outside than inside": ((2, 16, 10, 11), (5,), (6,)),
            "no tap but the centre inside": ((1, 16, 5, 4), (5,), (6,)),
            "narrower than a strip": ((3, 20, 7, 2), (3,), (1,)),
            "one pixel": ((2, 5, 1, 1), (3,), (1,)),
            "one channel": ((2, 1, 9, 8), (3,), (2,)),
            "a factor per channel": ((1, 6, 4, 5), (1,), (1,)),
            "large kernel": ((1, 4, 9, 9), (7,), (1,)),
            "no image": ((0, 4, 5, 5), (3,), (1,)),
        },
        typical=("several vectors", "vectors and single channels"),
        large=(((2, 40, 60, 50), (5,), (2,)),),
        single_parameters=False,
        backward_settings=1,
    ),
    "conv3x3": MapOperator(
        function=ops.conv3x3,
        ordinary=_conv3x3,
        maps=1,
        sizes=lambda x, channels: [x, (channels, x[1], 3, 3), (channels,)],
        cases={
            "whole tiles and panels": ((2, 32, 24, 32), (48,), (False,)),
            "parts of tiles": ((1, 16, 29, 38), (16,), (False,)),
            "parts of vectors and panels": ((1, 37, 30, 31), (21,), (False,)),
            "a panel and one channel": ((2, 17, 21, 34), (17,), (False,)),
            "several blocks of tiles": ((1, 16, 150, 210), (32,), (False,)),
            "one row": ((1, 16, 1, 260), (16,), (False,)),
            "one column": ((3, 16, 130, 1), (16,), (False,)),
            "many small images": ((60, 16, 2, 3), (16,), (False,)),
            "few tiles": ((2, 32, 9, 8), (32,), (False,)),
            "few channels": ((1, 3, 40, 50), (4,), (False,)),
            "no image": ((0, 16, 30, 30), (16,), (False,)),
        },
        typical=("parts of vectors and panels", "few tiles"),
        # Three threads divide tiles in the first case and output channels in the second, four both.
        large=(((2, 16, 60, 50), (40,), (False,)), ((1, 256, 28, 29), (264,), (False,))),
    ),
}
