import pytest
import torch
import torch.nn.functional as F

from nasfcos.ops import reference, sigmoid_focal_loss
from tests.operators import DEVICES, needs_compiled

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def random_case(rows, classes, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(-1, classes + 1, (rows,), generator=generator)
    return logits.to(dtype), targets


def by_definition(logits, targets, gamma=2.0, alpha=0.25):
    """Equation 5 of the paper with one-hot targets, in float64; [N, C]."""
    logits = logits.double()
    one_hot = F.one_hot(targets.clamp(min=0), logits.shape[1] + 1)[:, 1:].double()
    p = logits.sigmoid()
    p_t = p * one_hot + (1 - p) * (1 - one_hot)
    alpha_t = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    return alpha_t * (1 - p_t) ** gamma * entropy * (targets >= 0)[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.0, 0.5), (1.5, 0.9)])
@pytest.mark.parametrize("rows, classes", [(0, 4), (1, 1), (7, 3), (301, 80), (5, 1301)])
def test_value_and_gradient_follow_the_definition(rows, classes, gamma, alpha, device):
    logits, targets = random_case(rows, classes, dtype=torch.float64)
    logits.requires_grad_()
    want = by_definition(logits, targets, gamma, alpha)
    (want_grad,) = torch.autograd.grad(want.sum(), logits)

    x = logits.detach().to(device, torch.float32).requires_grad_()
    for reduction in ("sum", "none"):
        got = sigmoid_focal_loss(x, targets.to(device), gamma, alpha, reduction)
        (grad,) = torch.autograd.grad(got.sum(), x)
        expected = want.sum() if reduction == "sum" else want
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [2.0, 0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_agrees_with_the_reference(dtype, scale, gamma, device):
    logits, targets = random_case(50, 13, scale, dtype)
    close = dict(rtol=TOLERANCE[dtype], atol=1e-30)
    for reduce in (True, False):
        args = (logits, targets, gamma, 0.25)
        on_device = (logits.to(device), targets.to(device), gamma, 0.25)
        want = reference.sigmoid_focal_loss(*args, reduce)
        got = torch.ops.nasfcos.sigmoid_focal_loss(*on_device, reduce)
        torch.testing.assert_close(got.cpu(), want, **close)
        grad = torch.linspace(-2, 3, want.numel()).to(want.dtype).reshape(want.shape)
        want = reference.sigmoid_focal_loss_backward(grad, *args)
        got = torch.ops.nasfcos.sigmoid_focal_loss_backward(grad.to(device), *on_device)
        torch.testing.assert_close(got.cpu(), want, **close)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtype_of_the_result(dtype):
    logits, targets = random_case(600, 80, dtype=dtype)
    total = sigmoid_focal_loss(logits, targets)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert sigmoid_focal_loss(logits, targets, reduction="none").dtype == dtype
    # Half types lose only the rounding of the logits.
    want = by_definition(logits, targets).sum()
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_logits_of_any_size(gamma, device):
    inf = float("inf")
    logits = torch.tensor([[1e4, -1e4], [88.0, -88.0], [inf, -inf]], device=device)
    for sign in (1, -1):
        x = (sign * logits).requires_grad_()
        targets = torch.tensor([0, 0, 0], device=device)
        loss = sigmoid_focal_loss(x, targets, gamma, 0.25, reduction="none")
        finite = loss[:2].detach().cpu()
        big, small = (0, 1) if sign > 0 else (1, 0)
        torch.testing.assert_close(finite[:, big], 0.75 * torch.tensor([1e4, 88.0]))
        assert (finite[:, small] >= 0).all() and (finite[:, small] < 1e-30).all()
        assert loss[2, big] == inf and loss[2, small] == 0
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad[:, big].cpu(), torch.full((3,), 0.75))
        assert (grad[:, small].abs() < 1e-30).all()

    x = torch.tensor([[1e4], [-1e4]], device=device, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.ones(2, dtype=torch.int64, device=device), gamma, 0.25)
    torch.testing.assert_close(loss.item(), 0.25 * 1e4)
    loss.backward()
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[0.0], [-0.25]]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nan_is_not_hidden(reduction):
    logits = torch.zeros(3, 40)
    logits[1, 7] = torch.nan
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, torch.zeros(3, dtype=torch.int64), reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.sum().isnan()
    assert grad.isnan().nonzero().tolist() == [[1, 7]]


def test_ignored_rows_count_for_nothing():
    logits, _ = random_case(4, 6)
    logits[1] = float("inf")
    logits[3] = torch.nan
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, torch.tensor([2, -1, 0, -1]))
    loss.backward()
    want = by_definition(logits[[0, 2]], torch.tensor([2, 0])).sum()
    torch.testing.assert_close(loss.double(), want)
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(gamma, reduction):
    logits, targets = random_case(6, 5, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, targets, gamma, 0.3, reduction), logits
    )


@needs_compiled("sigmoid_focal_loss")
def test_sum_does_not_depend_on_threads():
    logits, targets = random_case(4000, 20)
    threads = torch.get_num_threads()
    sums = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            sums.append(sigmoid_focal_loss(logits, targets).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1


def test_strided_inputs():
    logits, targets = random_case(30, 8)
    want = sigmoid_focal_loss(logits, targets)
    assert torch.equal(sigmoid_focal_loss(logits.t().contiguous().t(), targets.int()), want)


@pytest.mark.parametrize("bad", [-2, 4])
def test_target_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"targets must lie in -1\.\.3 .* got {bad}"):
        sigmoid_focal_loss(torch.zeros(3, 3), torch.tensor([0, bad, 1]))
    with pytest.raises(ValueError, match=rf"targets must lie in -1\.\.3 .* got {bad}"):
        reference.sigmoid_focal_loss(torch.zeros(3, 3), torch.tensor([0, bad, 1]), 2.0, 0.25, True)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"targets \[N\], got \[3, 2\] and \[2\]"):
        sigmoid_focal_loss(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="'mean'"):
        sigmoid_focal_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), reduction="mean")


def test_registration():
    logits, targets = random_case(6, 5)
    logits.requires_grad_()
    for reduce in (True, False):
        torch.library.opcheck(
            torch.ops.nasfcos.sigmoid_focal_loss, (logits, targets, 2.0, 0.25, reduce)
        )
    torch.library.opcheck(
        torch.ops.nasfcos.sigmoid_focal_loss_backward,
        (torch.tensor(2.0), logits.detach(), targets, 2.0, 0.25),
    )


def test_compiles_into_one_graph():
    logits, targets = random_case(20, 5)
    compiled = torch.compile(sigmoid_focal_loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (sigmoid_focal_loss, compiled):
        x = logits.clone().requires_grad_()
        function(x, targets).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_autocast_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = random_case(20, 5, dtype=dtype)
        want = sigmoid_focal_loss(logits, targets)
        with torch.autocast("cpu", torch.bfloat16):
            got = sigmoid_focal_loss(logits, targets)
        assert got.dtype == torch.float32 and torch.equal(got, want)
