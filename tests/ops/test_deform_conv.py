import pytest
import torch
import torch.nn.functional as F
import torchvision

from nasfcos.ops import modulated_deform_conv2d, reference
from tests.operators import DEVICES, FORMATS, check_close, check_threads, outcome

# input [N, C, H, W], out channels, kernel, stride, padding, dilation, offset groups
CASES = {
    "the model's": ((1, 32, 19, 23), 32, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "batch, more than one chunk": ((2, 16, 25, 34), 8, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "odd channels": ((2, 6, 7, 9), 5, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "one channel a group": ((1, 3, 5, 5), 2, (1, 1), (1, 1), (0, 0), (1, 1), 3),
    "all unequal": ((1, 4, 11, 8), 3, (3, 2), (2, 1), (2, 0), (1, 3), 2),
    "one pixel": ((1, 20, 1, 1), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no image": ((0, 4, 5, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def random_case(name, dtype=torch.float64, spread=2.0, seed=0):
    shape, out_channels, kernel, stride, padding, dilation, groups = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    taps = groups * kernel[0] * kernel[1]
    size = [
        (shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    tensors = [
        random(*shape),
        random(shape[0], 2 * taps, *size) * spread,
        random(shape[0], taps, *size).sigmoid(),
        random(out_channels, shape[1], *kernel) / (shape[1] * kernel[0] * kernel[1]) ** 0.5,
        random(out_channels),
    ]
    return tensors, dict(stride=stride, padding=padding, dilation=dilation, offset_groups=groups)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """A GPU would multiply in TF32, which is too coarse for comparisons."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def half_tolerance(dtype, device):
    """The CPU kernel rounds samples to bfloat16, the CUDA kernel to either half precision. On the
    CPU, float16 is computed in float32."""
    if dtype == torch.bfloat16:
        return {"rtol": 2e-2, "atol": 2e-2}
    return {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 2e-3, "atol": 2e-3}


def operators_of(geometry):
    """Calls the two operators directly: output, and gradients in float32."""
    settings = [geometry[name] for name in ("stride", "padding", "dilation", "offset_groups")]
    operators = torch.ops.nasfcos

    def both(grad, x, offset, mask, weight, bias):
        output = operators.modulated_deform_conv2d(x, offset, mask, weight, bias, *settings)
        grads = operators.modulated_deform_conv2d_backward(
            grad, x.float(), offset, mask, weight.float(), *settings
        )
        return [output, *grads]

    return both


def torchvisions(geometry):
    geometry = {k: v for k, v in geometry.items() if k != "offset_groups"}

    def function(x, offset, mask, weight, bias):
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, mask=mask, **geometry)

    return function


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torchvision(name, dtype, tolerance, device):
    tensors, geometry = random_case(name, dtype)
    want = outcome(torchvisions(geometry), tensors)
    got = outcome(
        lambda *t: modulated_deform_conv2d(*t, **geometry), [t.to(device) for t in tensors]
    )
    for name, a, b in zip(
        ("output", "input", "offset", "mask", "weight", "bias"), got, want, strict=True
    ):
        assert a.dtype == dtype and a.is_contiguous()
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(
            a.cpu(), b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_offset_and_full_mask_is_an_ordinary_convolution():
    (x, offset, mask, weight, bias), geometry = random_case("the model's")
    got = modulated_deform_conv2d(
        x, torch.zeros_like(offset), torch.ones_like(mask), weight, bias, **geometry
    )
    torch.testing.assert_close(got, F.conv2d(x, weight, bias, padding=1))


def test_whole_offsets_move_the_taps_of_their_group():
    # One tap: group 0 reads 2 pixels down and 1 right, group 1 one pixel left.
    x = torch.arange(2 * 5 * 6, dtype=torch.float32).reshape(1, 2, 5, 6)
    offset = torch.tensor([2.0, 1, 0, -1])[None, :, None, None].expand(1, 4, 5, 6)
    mask = torch.tensor([1.0, 0.5])[None, :, None, None].expand(1, 2, 5, 6)
    got = modulated_deform_conv2d(x, offset, mask, torch.eye(2)[..., None, None], offset_groups=2)
    want = torch.zeros_like(x)
    want[0, 0, :3, :5] = x[0, 0, 2:, 1:]
    want[0, 1, :, 1:] = 0.5 * x[0, 1, :, :-1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["odd channels", "all unequal"])
def test_gradcheck(name, device):
    tensors, geometry = random_case(name)
    tensors = [t[:1] if i < 3 else t for i, t in enumerate(tensors)]
    leaves = [t.to(device, copy=True).requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: modulated_deform_conv2d(*t, **geometry), leaves, fast_mode=True,
        nondet_tol=0 if device == "cpu" else 1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["dispatched", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("device", DEVICES)
def test_offsets_that_are_no_positions(value, version, device):
    tensors, geometry = random_case("the model's", torch.float32)
    tensors = [t.to(device) for t in tensors]
    x, offset, mask, weight, bias = tensors
    clean = outcome(lambda *t: modulated_deform_conv2d(*t, **geometry), tensors)
    hit = torch.zeros(1, 1, *offset.shape[2:], dtype=torch.bool, device=device)
    hit[0, 0, 4, 5] = hit[0, 0, 0, 0] = hit[0, 0, -1, -1] = True
    offset[:, 7:11] = offset[:, 7:11].masked_fill(hit, value)

    geometry = {k: list(v) if k != "offset_groups" else v for k, v in geometry.items()}
    args = (geometry["stride"], geometry["padding"], geometry["dilation"], 2)
    operators = reference if version == "reference" else torch.ops.nasfcos
    output = operators.modulated_deform_conv2d(x, offset, mask, weight, bias, *args)
    grads = operators.modulated_deform_conv2d_backward(
        torch.ones_like(output), x, offset, mask, weight, *args
    )

    elsewhere = ~hit.expand_as(output)
    torch.testing.assert_close(output[elsewhere], clean[0][elsewhere])
    at_hit = output[~elsewhere]
    if value != value:
        assert at_hit.isnan().all()
    else:
        assert at_hit.isfinite().all()
    grad_input, grad_offset, grad_mask, grad_weight = grads
    lost = hit.expand_as(grad_offset[:, 7:11])
    assert (grad_offset[:, 7:11][lost].nan_to_num() == 0).all()
    assert grad_input.isfinite().all()
    assert grad_mask[~hit.expand_as(grad_mask)].isfinite().all()
    if value == value:
        assert all(grad.isfinite().all() for grad in grads)
        # A sample outside the image is like a tap with mask zero.
        shut = mask.clone()
        for tap in (3, 4, 5):
            shut[:, tap : tap + 1].masked_fill_(hit, 0)
        torch.testing.assert_close(
            output,
            operators.modulated_deform_conv2d(
                x, offset.nan_to_num(0, 0, 0).clamp(-50, 50), shut, weight, bias, *args
            ),
        )


@pytest.mark.parametrize("device", DEVICES)
def test_bad_pixels_reach_only_samples_that_touch_them(device):
    """Samples outside the image do not read the values at its corners."""
    tensors, geometry = random_case("the model's", torch.float32)
    x, offset, mask, weight, bias = (t.to(device) for t in tensors)
    x[:, :, 0, 0] = x[:, :, -1, -1] = torch.nan
    offset[:, :, :, :10] = 1000.0
    got = modulated_deform_conv2d(x, offset, mask, weight, bias, **geometry)
    want = bias[None, :, None, None].expand_as(got[..., :10])
    torch.testing.assert_close(got[..., :10], want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels_last", "some_channels", "unaligned", "strided"])
def test_memory_layout_of_the_arguments(layout, device):
    tensors, geometry = random_case("batch, more than one chunk", torch.float32)
    tensors = [t.to(device) for t in tensors]
    want = outcome(lambda *t: modulated_deform_conv2d(*t, **geometry), tensors)

    def function(*leaves):
        x, offset, mask, weight, bias = leaves
        if layout == "channels_last":
            x, offset, mask, weight = (
                t.contiguous(memory_format=torch.channels_last) for t in (x, offset, mask, weight)
            )
        elif layout == "some_channels":
            x, offset, mask = (
                torch.cat((t, t), dim=1)
                .contiguous(memory_format=torch.channels_last)
                .narrow(1, t.shape[1], t.shape[1])
                for t in (x, offset, mask)
            )
        elif layout == "unaligned":
            n, channels, height, width = x.shape
            rows = torch.cat((x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()))
            x = rows[1:].view(n, height, width, channels).permute(0, 3, 1, 2)
        else:
            x, offset, mask = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in leaves[:3])
        return modulated_deform_conv2d(x, offset, mask, weight, bias, **geometry)

    for a, b in zip(outcome(function, tensors), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", ["dispatched", "reference"])
@pytest.mark.parametrize("format", FORMATS)
def test_memory_format_of_the_results(format, version, device):
    """As the fake kernels say, on which compiled code relies."""
    tensors, geometry = random_case("batch, more than one chunk", torch.float32)
    x, offset, mask, weight = (t.to(device) for t in tensors[:4])
    x, weight = (t.contiguous(memory_format=format) for t in (x, weight))
    both = torch.cat((offset, mask), dim=1).contiguous(memory_format=format)
    offset, mask = both.split((offset.shape[1], mask.shape[1]), dim=1)
    args = (geometry["stride"], geometry["padding"], geometry["dilation"], 2)
    operators = reference if version == "reference" else torch.ops.nasfcos
    output = operators.modulated_deform_conv2d(x, offset, mask, weight, None, *args)
    grads = operators.modulated_deform_conv2d_backward(output, x, offset, mask, weight, *args)
    assert all(t.is_contiguous(memory_format=format) for t in (output, *grads))


def test_result_does_not_depend_on_threads():
    tensors, geometry = random_case("batch, more than one chunk", torch.float64)
    check_threads(lambda *t: modulated_deform_conv2d(*t, **geometry), tensors)


def test_without_bias_and_with_frozen_arguments():
    (x, offset, mask, weight, _), geometry = random_case("the model's")
    offset.requires_grad_()
    output = modulated_deform_conv2d(x, offset, mask, weight, **geometry)
    output.sum().backward()
    assert offset.grad is not None and offset.grad.abs().sum() > 0
    want = torchvisions(geometry)(x, offset.detach(), mask, weight, None)
    torch.testing.assert_close(output.detach(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_keeps_nan_and_infinity(device):
    tensors, geometry = random_case("the model's", torch.bfloat16)
    x, offset, mask, weight, bias = (t.to(device) for t in tensors)
    # A NaN with all bits of the fraction set, which rounding must not carry into another number.
    x[0, 3, 5, 5] = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    x[0, 4, 9, 9] = torch.inf
    got = modulated_deform_conv2d(x, 0 * offset, mask, weight, bias, **geometry)
    assert got[0, :, 4:7, 4:7].isnan().all()
    assert not got[0, :, 8:11, 8:11].isfinite().any()
    assert got[0, :, 12:].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype, device):
    tensors, geometry = random_case("the model's", torch.float32)
    half = [t.to(device, dtype) for t in tensors]
    want = modulated_deform_conv2d(*(t.float() for t in half), **geometry)
    got = modulated_deform_conv2d(*half, **geometry)
    assert got.dtype == dtype
    tolerance = half_tolerance(dtype, device)
    torch.testing.assert_close(got, want.to(dtype), **tolerance)

    # As in a model: the maps come from autocast layers, the parameters are float32.
    weight, bias = (t.to(device).requires_grad_() for t in tensors[3:])
    with torch.autocast(device, dtype):
        got = modulated_deform_conv2d(*half[:3], weight, bias, **geometry)
    assert got.dtype == dtype
    want = modulated_deform_conv2d(*(t.float() for t in half[:3]), weight, bias, **geometry)
    torch.testing.assert_close(got, want.to(dtype), **tolerance)
    got.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()

    # After a group norm, which autocast computes in float32 on a GPU.
    full = [t.float() for t in half[:3]]
    with torch.autocast(device, dtype):
        got = modulated_deform_conv2d(*full, weight, bias, **geometry)
    assert got.dtype == (torch.float32 if device == "cpu" else dtype)
    torch.testing.assert_close(got.to(dtype), want.to(dtype), **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_half_types_and_their_gradients(name, format, dtype, device):
    tensors, geometry = random_case(name, dtype)
    half = [t.to(device) for t in tensors]
    half[0] = half[0].contiguous(memory_format=format)
    got = outcome(lambda *t: modulated_deform_conv2d(*t, **geometry), half)
    want = outcome(lambda *t: modulated_deform_conv2d(*t, **geometry), [t.float() for t in half])
    assert all(t.dtype == dtype for t in got)
    tolerance = half_tolerance(dtype, device)
    torch.testing.assert_close(got[0], want[0].to(dtype), **tolerance)
    # The gradients are computed in float32 from a rounded gradient of the output.
    check_close([t.float() for t in got[1:]], want[1:], 2e-2)


@pytest.mark.gpu
def test_works_on_the_current_stream():
    """The tensors are written late, so a kernel on another stream would read the old values."""
    tensors, geometry = random_case("the model's", torch.float32)
    tensors = [t.cuda() for t in tensors]
    function = operators_of(geometry)
    grad = torch.ones_like(modulated_deform_conv2d(*tensors, **geometry))
    want = function(grad, *tensors)
    late = [torch.zeros_like(t) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
        got = function(grad, *late)
    stream.synchronize()
    check_close(got, want, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_in_a_cuda_graph(dtype):
    def arguments(seed):
        (x, *positions, weight, bias), _ = random_case("the model's", torch.float32, seed=seed)
        # With 32 channels in and out, the input can serve as the output's gradient.
        tensors = [x, x.to(dtype), *positions, weight.to(dtype), bias.to(dtype)]
        return [t.cuda() for t in tensors]

    function = operators_of(random_case("the model's")[1])
    still = arguments(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first call, which initialises the libraries
        function(*still)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*still)
    for seed in (1, 2):
        fresh = arguments(seed)
        for to, t in zip(still, fresh, strict=True):
            to.copy_(t)
        graph.replay()
        check_close(results, function(*fresh), 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_columns_of_several_chunks(format):
    """2 * 130 * 131 pixels with 9 * 256 float32 values each are too many for one chunk."""
    generator = torch.Generator().manual_seed(0)
    x, offset, mask, weight, bias = (
        torch.randn(size, generator=generator)
        for size in ((2, 256, 130, 131), (2, 18, 130, 131), (2, 9, 130, 131), (4, 256, 3, 3), (4,))
    )
    tensors = [x, 3 * offset, mask.sigmoid(), weight / 48, bias]
    want = outcome(lambda *t: modulated_deform_conv2d(*t, padding=1), tensors)
    tensors = [t.cuda() for t in tensors]
    tensors[0] = tensors[0].contiguous(memory_format=format)
    got = outcome(lambda *t: modulated_deform_conv2d(*t, padding=1), tensors)
    check_close([t.cpu() for t in got], want, 1e-4)


@pytest.mark.gpu
def test_tensors_on_two_devices():
    (x, offset, mask, weight, bias), geometry = random_case("the model's", torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        modulated_deform_conv2d(x.cuda(), offset, mask.cuda(), weight.cuda(), **geometry)


@pytest.mark.gpu
def test_backward_is_refused_where_sums_must_have_an_order():
    tensors, geometry = random_case("the model's", torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            outcome(lambda *t: modulated_deform_conv2d(*t, **geometry), [t.cuda() for t in tensors])
    finally:
        torch.use_deterministic_algorithms(False)


def test_shapes_that_do_not_fit():
    (x, offset, mask, weight, bias), geometry = random_case("the model's")
    with pytest.raises(ValueError, match=r"offset must be \[1, 36, 19, 23\], got \[1, 18, 19, 23"):
        modulated_deform_conv2d(x, offset[:, :18], mask, weight, bias, **geometry)
    with pytest.raises(ValueError, match=r"mask must be \[1, 18, 19, 23\]"):
        modulated_deform_conv2d(x, offset, mask[..., :-1], weight, bias, **geometry)
    with pytest.raises(ValueError, match="weight is for 31 input channels, input has 32"):
        modulated_deform_conv2d(x, offset, mask, weight[:, 1:], bias, **geometry)
    with pytest.raises(ValueError, match=r"bias must be \[32\]"):
        modulated_deform_conv2d(x, offset, mask, weight, bias[1:], **geometry)
    with pytest.raises(ValueError, match="32 input channels do not divide into 3"):
        modulated_deform_conv2d(x, offset, mask, weight, bias, padding=1, offset_groups=3)
    with pytest.raises(ValueError, match="2x2 input is too small for the 3x3 kernel"):
        modulated_deform_conv2d(x[:, :, :2, :2], offset, mask, weight, bias, offset_groups=2)
    # The operator called directly must not read out of bounds either.
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.nasfcos.modulated_deform_conv2d(
            x, offset[:, :18], mask, weight, bias, [1, 1], [1, 1], [1, 1], 2
        )


def test_registration():
    tensors, _ = random_case("odd channels")
    leaves = [t.requires_grad_() for t in tensors]
    args = ([1, 1], [1, 1], [1, 1], 3)
    torch.library.opcheck(torch.ops.nasfcos.modulated_deform_conv2d, (*leaves, *args))
    last = [t.contiguous(memory_format=torch.channels_last) for t in leaves[:3]]
    torch.library.opcheck(
        torch.ops.nasfcos.modulated_deform_conv2d, (*last, *leaves[3:], *args)
    )
    detached = [t.detach() for t in leaves[:4]]
    torch.library.opcheck(
        torch.ops.nasfcos.modulated_deform_conv2d_backward,
        (torch.randn(2, 5, 7, 9, dtype=torch.float64), *detached, *args),
    )


def test_compiles_into_one_graph_of_dynamic_shape():
    compiled = torch.compile(
        modulated_deform_conv2d, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for name in ("the model's", "batch, more than one chunk"):
        tensors, geometry = random_case(name, torch.float32)
        geometry["padding"] = 1
        want = outcome(lambda *t, g=geometry: modulated_deform_conv2d(*t, **g), tensors)
        got = outcome(lambda *t, g=geometry: compiled(*t, **g), tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
