"""What all operators on maps promise."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nasfcos.ops import library
from tests.operators import (
    DEVICES,
    FORMATS,
    check_close,
    check_compiles,
    check_threads,
    laid_out,
    needs_compiled,
    outcome,
)
from tests.ops.cases import EPS, OPERATORS, call, call_backward

every_operator = pytest.mark.parametrize("name", OPERATORS)
# Without those where the norm is 1, -1 or 0 for any input, so that rounding decides the gradients.
DEFINITE = [
    (name, case)
    for name, operator in OPERATORS.items()
    for case in operator.cases
    if case not in ("two pixels", "one pixel and channel")
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """A GPU would multiply in TF32, which is too coarse for comparisons."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def typical(name, format=torch.channels_last, dtype=torch.float64):
    """An operator, its tensors and settings."""
    operator = OPERATORS[name]
    case = operator.typical[0]
    return operator, laid_out(operator.tensors(case, dtype), format), operator.cases[case][2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name, case", DEFINITE)
def test_agrees_with_torch(name, case, format, dtype, device):
    check_agrees(name, case, format, dtype, device)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "conv3x3"])
def test_reference_agrees_with_torch(name, which, format, monkeypatch):
    """Of the functions where no kernel is compiled; for conv3x3 that is PyTorch's own."""
    monkeypatch.setattr(library, "_CPU_KERNELS", False)
    check_agrees(name, OPERATORS[name].typical[which], format, torch.float64, "cpu")


def check_agrees(name, case, format, dtype, device):
    operator = OPERATORS[name]
    tensors = operator.tensors(case, dtype)
    want = outcome(operator.bind(case, ordinary=True), tensors)
    got = outcome(operator.bind(case), [t.to(device) for t in laid_out(tensors, format)])
    assert all(t.dtype == dtype for t in got)
    assert got[0].is_contiguous(memory_format=format) or not got[0].numel()
    check_close([t.cpu() for t in got], want, operator.tolerance[dtype == torch.float32])


@pytest.mark.parametrize(
    "name, case",
    [
        (name, case)
        for name, operator in OPERATORS.items()
        for case in operator.cases
        if name != "conv3x3" or case in ("many small images", "parts of tiles")
    ],
)
def test_gradcheck(name, case):
    operator = OPERATORS[name]
    tensors = laid_out(operator.tensors(case), torch.channels_last)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(operator.bind(case), leaves, fast_mode=True)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", [0, 1])
@every_operator
def test_memory_format_of_the_results(name, which, format):
    """As the fake kernels say, on which compiled code relies."""
    operator = OPERATORS[name]
    case = operator.typical[which]
    tensors, settings = operator.tensors(case, torch.float32), operator.cases[case][2]
    tensors = laid_out(tensors, format)
    output, *statistics = call(name, tensors, settings)
    assert output.is_contiguous(memory_format=format)
    # The output's gradient may have any memory format. A parameter's gradient has the strides of
    # the parameter, or DDP would copy it.
    grads = call_backward(name, output.contiguous(), tensors, statistics, settings)
    for gradient, t in zip(grads, tensors, strict=False):
        assert gradient.shape == t.shape and gradient.stride() == t.stride()


@pytest.mark.parametrize(
    "name, case", [(name, case) for name in OPERATORS for case in OPERATORS[name].large]
)
def test_result_does_not_depend_on_threads(name, case):
    operator = OPERATORS[name]
    tensors = laid_out(operator.tensors(case), torch.channels_last)
    counts = (3, 4, 7) if name == "conv3x3" else (3,)
    check_threads(operator.bind(case), tensors, counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, case",
    [(name, case) for name, case in DEFINITE if name != "conv3x3"],  # see test_conv3x3.py
)
def test_half_precision(name, case, half, format, device):
    """Computed in float32 and rounded once; gradients are those of a rounded gradient."""
    operator = OPERATORS[name]
    tensors = laid_out(operator.tensors(case, torch.float32), format)
    count = operator.maps if operator.single_parameters else len(tensors)
    rough = [t.to(device, half if i < count else t.dtype) for i, t in enumerate(tensors)]
    got = outcome(operator.bind(case), rough)
    want = outcome(operator.bind(case), [t.float() for t in rough])
    if device == "cpu" or operator.single_parameters:
        assert torch.equal(got[0], want[0].to(half))
    else:  # PyTorch's convolution on a GPU
        check_close([got[0].float()], want[:1], 2e-2)
    assert [t.dtype for t in got[1:]] == [t.dtype for t in rough]
    check_close([t.float() for t in got[1:]], want[1:], 2e-2)


@pytest.mark.parametrize("device", DEVICES)
@every_operator
def test_autocast(name, device):
    """As in a model: the maps come from autocast layers, the parameters are float32."""
    operator, tensors, settings = typical(name, dtype=torch.float32)
    tensors = [t.to(device) for t in tensors]
    maps = [t.bfloat16() for t in tensors[: operator.maps]]
    parameters = [t.requires_grad_() for t in tensors[operator.maps :]]
    with torch.autocast(device, torch.bfloat16):
        got = operator.function(*maps, *parameters, *settings)
    assert got.dtype == torch.bfloat16
    want = operator.ordinary(*(t.float() for t in maps), *parameters, *settings)
    check_close([got.float()], [want], 3e-2)
    got.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in parameters)


@needs_compiled("conv3x3")
@every_operator
def test_second_derivatives_are_refused(name):
    operator, tensors, settings = typical(name)
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss = operator.function(*leaves, *settings).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@every_operator
def test_a_checkpoint_changes_nothing(name):
    operator, tensors, settings = typical(name)
    again = partial(checkpoint, operator.bind(operator.typical[0]), use_reentrant=False)
    want = outcome(operator.bind(operator.typical[0]), tensors)
    torch.testing.assert_close(outcome(again, tensors), want)


def misfits(name):
    """Tensors and settings that an operator refuses."""
    operator, tensors, settings = typical(name)
    x, *others = tensors
    yield x[0], *others, *settings
    yield x[:, 1:], *others, *settings
    for i in range(1, len(tensors)):
        yield *tensors[:i], tensors[i][1:], *tensors[i + 1 :], *settings
    if name.endswith("norm_relu") or name == "batch_norm_concat":  # there are no statistics
        yield *(t[:0] if i < operator.maps else t for i, t in enumerate(tensors)), *settings
    if name == "group_norm_relu":
        yield *tensors, 4, EPS
        yield *tensors, 0, EPS
    if name == "batch_norm_concat":  # an odd number of channels
        x, y, weight, bias, factor = tensors
        yield x[:, 1:], y[:, 1:], weight[2:], bias[2:], factor[1:], *settings
    if name == "rectified_pairs":
        yield x, others[0][:, :1]
    if name == "conv3x3":
        yield x, others[0][..., 1:], others[1], False
    if name == "depthwise_conv2d":
        yield x, others[0][..., 1:, 1:], 1
        yield x, others[0], 0


@every_operator
def test_shapes_that_do_not_fit(name):
    for wrong in misfits(name):
        with pytest.raises(ValueError, match=name):
            OPERATORS[name].function(*wrong)


@needs_compiled("conv3x3")
@every_operator
def test_an_operator_called_directly_does_not_read_out_of_bounds(name):
    operator, tensors, settings = typical(name)
    refuses = partial(pytest.raises, (ValueError, RuntimeError))
    function = getattr(torch.ops.nasfcos, name)
    for wrong in misfits(name):
        with refuses():
            function(*wrong)
    for i in range(len(tensors)):
        with refuses():
            function(*tensors[:i], tensors[i].float(), *tensors[i + 1 :], *settings)
    grad, *statistics = call(name, tensors, settings)
    for wrong in (grad[1:], grad[:, 1:], grad[..., 1:], grad.float()):
        with refuses():
            call_backward(name, wrong, tensors, statistics, settings)
    if not statistics:
        return
    mean, variance = statistics
    for cut in (lambda t: t[1:], lambda t: t[..., 1:], lambda t: t[..., :0], lambda t: t.float()):
        for wrong in ((cut(mean), cut(variance)), (cut(mean), variance), (mean, cut(variance))):
            with refuses():
                call_backward(name, grad, tensors, wrong, settings)


@needs_compiled("conv3x3")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name, case",
    [*((name, operator.typical[1]) for name, operator in OPERATORS.items()),
     ("conv3x3", OPERATORS["conv3x3"].typical[0])],  # for Winograd's algorithm
)  # fmt: skip
def test_registration(name, case, format):
    operator = OPERATORS[name]
    tensors, settings = laid_out(operator.tensors(case), format), operator.cases[case][2]
    output, *statistics = call(name, tensors, settings)
    leaves = [t.clone().requires_grad_() for t in tensors]
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not statistics:  # which have no gradient, as this compares
        utilities.append("test_aot_dispatch_dynamic")
    operators = torch.ops.nasfcos
    torch.library.opcheck(getattr(operators, name), (*leaves, *settings), test_utils=utilities)
    if name == "conv3x3":
        for of in ("input", "weight"):
            backward = getattr(operators, f"conv3x3_{of}_backward")
            torch.library.opcheck(backward, (output.cos(), *tensors[:2]))
    else:
        passed = settings[len(settings) - operator.backward_settings :]
        backward = getattr(operators, f"{name}_backward")
        torch.library.opcheck(backward, (output.cos(), *tensors, *statistics, *passed))


@every_operator
def test_compiles_into_one_graph_of_dynamic_shape(name):
    operator, tensors, _ = typical(name)
    cropped = [t[:1, :, 1:] if i < operator.maps else t for i, t in enumerate(tensors)]
    cases = [tensors, laid_out(cropped, torch.channels_last)]
    check_compiles(operator.bind(operator.typical[0]), cases)
