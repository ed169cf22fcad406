"""The inference form finds what the model finds."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nasfcos
from nasfcos.models.inference import FusedConv, GroupNormRelu, InferenceDetector
from nasfcos.models.layers import (
    Conv3x3,
    ConvNormAct,
    DeformConv,
    FrozenBatchNorm2d,
    SeparableConv,
)
from nasfcos.models.necks.nas_fpn import Concat, WeightedSum
from nasfcos.ops import fused_concat, reference
from tests.known import ROOT, golden, known_image, known_weights
from tests.operators import needs_compiled

GENOTYPE = [
    [[0, 2, 1, 3, 1]], [[3, 1, 4, 0, 0]], [[1, 4, 2, 3, 1]], [[3, 5, 4, 4, 1]], [[6, 2, 4, 1, 0]],
    [[2, 7, 3, 2, 1]], [[4, 0, 3, 3, 1]], [1], [5, 3, 0, 4, 2, 1],
]  # fmt: skip
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.NUM_CLASSES", 7, "MODEL.NECK.CHANNELS", 32]
RESNET = [
    "MODEL.RESNET.BLOCKS", [1, 2, 1, 1], "MODEL.RESNET.STEM_CHANNELS", 16,
    "MODEL.RESNET.WIDTH_PER_GROUP", 16,
]  # fmt: skip
MODELS = {
    "R_50_NAS_densebox": RESNET,
    "R_50_NAS_head": RESNET,
    "R_50_NAS_retinanet": RESNET,
    "R_101_X_32x8d_NAS_densebox": [*RESNET, "MODEL.RESNET.NUM_GROUPS", 4],
    "Mobile_NAS_head": [],
    "other operations": [*RESNET, "MODEL.RESNET.NORM", "bn", "MODEL.GENOTYPE", GENOTYPE],
}


def lively(name):
    """A small detector whose norms, offsets and scores all matter, in evaluation mode."""
    file = "R_50_NAS_head" if name == "other operations" else name
    cfg = nasfcos.load_config(ROOT / "configs" / "search" / f"{file}.yaml", SMALL + MODELS[name])
    torch.manual_seed(0)
    model = nasfcos.build_detector(cfg).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
            elif isinstance(module, DeformConv):
                nn.init.normal_(module.conv.conv_offset_mask.weight, std=0.02)
                nn.init.normal_(module.conv.bias, std=0.1)
        model.preprocess.std.fill_(60.0)
        model.head.cls_logits.bias.fill_(-1.5)
    return model


def head_outputs(model, image):
    dtype = getattr(model, "dtype", torch.float32)
    with torch.no_grad():
        batch, _ = model.preprocess([image])
        return model.head(model.neck(model.backbone(batch.to(dtype))))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_same_outputs(name, dtype, tolerance):
    model = lively(name)
    before = copy.deepcopy(model.state_dict())
    fast = nasfcos.optimize_for_inference(model, dtype)
    image = torch.rand(3, 140, 190, generator=torch.Generator().manual_seed(1))
    for got, want in zip(head_outputs(fast, image), head_outputs(model, image), strict=True):
        for a, b in zip(got, want, strict=True):
            error = (a.float() - b).abs().mean() / b.abs().mean()
            assert error < tolerance
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.fixture
def exact_products():
    """A GPU's convolutions must not round float32 maps first, as they do by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(None, 1e-3), (torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
def test_a_gpu_gives_the_cpus_outputs(name, dtype, tolerance):
    image = torch.rand(3, 140, 190, generator=torch.Generator().manual_seed(1))
    model = lively(name)
    want = head_outputs(model, image)
    model = model.cuda()
    if dtype is not None:
        model = nasfcos.optimize_for_inference(model, dtype)
    for found, expected in zip(head_outputs(model, image), want, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert a.is_cuda
            assert (a.cpu().float() - b).abs().mean() / b.abs().mean() < tolerance
    found = model([image])[0]
    assert len(found["boxes"]) > 10 and all(value.is_cuda for value in found.values())


@pytest.mark.usefixtures("two_threads")
def test_golden_detections():
    cfg = nasfcos.load_config(
        ROOT / "configs" / "search" / "R_50_NAS_head.yaml", ["MODEL.DEVICE", "cpu"]
    )
    model = nasfcos.build_detector(cfg)
    nasfcos.load_weights(model, {"model": known_weights("R_50_NAS_head")})
    (found,) = nasfcos.optimize_for_inference(model)([known_image()])
    expected = torch.tensor(golden()["R_50_NAS_head"]["detections"])
    # Some recorded scores differ by 1.2e-4 from those with every 3x3 convolution in float64.
    torch.testing.assert_close(found["scores"], expected[:, 4], rtol=2e-4, atol=0)
    # Detections with almost equal scores may be in another order.
    found = torch.cat((found["boxes"], found["labels"][:, None]), dim=1)
    apart = (found[:, None] - expected[None, :, [0, 1, 2, 3, 5]]).abs().amax(dim=2)
    assert (apart.amin(dim=0) < 1e-3).all() and (apart.amin(dim=1) < 1e-3).all()


@pytest.mark.parametrize("name", ["R_50_NAS_densebox", "other operations"])
def test_small_changes_of_group_norms_reach_bfloat16(name):
    """A factor that bfloat16 would round to one scales every position of a map."""
    means = []
    for factor in (1.0, 1.0015):
        model = lively(name)
        last = [m for m in model.head.box_tower.modules() if isinstance(m, nn.GroupNorm)][-1]
        nn.init.constant_(last.weight, factor)
        fast = nasfcos.optimize_for_inference(model, torch.bfloat16)
        pyramid = [torch.rand(1, 32, 64, 64, generator=torch.Generator().manual_seed(2))] * 5
        maps = fast.head.box_tower([x.bfloat16() for x in pyramid])
        means.append(torch.stack([x.double().mean() for x in maps]).mean())
    assert means[1] / means[0] == pytest.approx(1.0015, abs=2e-4)


@pytest.mark.parametrize("name", ["a", "b"])
def test_small_changes_of_weighted_sums_reach_bfloat16(name):
    """Each factor by itself: bfloat16 has no number between 1 and 1.0078."""
    maps = torch.rand(2, 1, 32, 64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    means = []
    for factor in (1.0, 1.003):
        model = lively("other operations")
        cell, block = next(
            (number, cell.aggregate) for number, cell in enumerate(model.neck.cells)
            if isinstance(cell.aggregate, WeightedSum)
        )  # fmt: skip
        nn.init.constant_(getattr(block, name), factor)
        fast = nasfcos.optimize_for_inference(model, torch.bfloat16)
        out = fast.neck.cells[cell].aggregate(*maps)
        assert out.dtype == torch.bfloat16
        means.append(out.double().mean())
    assert means[1] / means[0] == pytest.approx(1.0015, abs=3e-4)


def test_nothing_is_left_to_fold_and_dead_branches_are_gone():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_head"))
    kinds = {type(module) for module in fast.modules()}
    assert not kinds & {nn.BatchNorm2d, FrozenBatchNorm2d, Concat}
    assert not any(isinstance(module, DeformConv) for module in fast.neck.modules())
    unused = set(range(4)) - fast.neck.genotype.consumed
    assert unused and all(isinstance(fast.neck.adapt[node], nn.Identity) for node in unused)
    fast = nasfcos.optimize_for_inference(lively("other operations"))
    searched = (ConvNormAct, SeparableConv, DeformConv)
    assert not any(isinstance(module, searched) for module in fast.modules())
    # Group norms cannot be folded; each is fused with its ReLU.
    norms = [sum(isinstance(m, t) for m in fast.modules()) for t in (nn.GroupNorm, GroupNormRelu)]
    assert norms[0] == norms[1] > 0


@pytest.mark.parametrize("compile", [False, True])
def test_a_copy_computes_with_its_own_weights(compile):
    """Checked without compiling: the function to be compiled is the copy's own method."""
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_retinanet"), compile=compile)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        method = getattr(other._outputs, "_torchdynamo_orig_callable", other._outputs)
        assert method.__self__ is other
        assert (other._outputs is not method) == compile


def test_only_inference():
    fast = nasfcos.optimize_for_inference(lively("R_50_NAS_head"))
    assert isinstance(fast, InferenceDetector) and not fast.training and fast.eval() is fast
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()
    with pytest.raises(ValueError, match="the list of images is empty"):
        fast([])
    with pytest.raises(ValueError, match="not torch.float64"):
        nasfcos.optimize_for_inference(lively("R_50_NAS_head"), torch.float64)
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        nasfcos.optimize_for_inference(lively("R_50_NAS_head"), torch.float16)
    for change in (fast.double, fast.half, lambda: fast.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="keeps its dtype"):
            change()
    assert fast.to(torch.float32) is fast
    narrow = nasfcos.optimize_for_inference(lively("R_50_NAS_retinanet"), torch.bfloat16)
    with pytest.raises(RuntimeError, match="keeps its dtype"):
        narrow.to(torch.bfloat16)  # some parts are float32


@pytest.mark.parametrize("name", ["R_50_NAS_retinanet", "other operations"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_another_precision(name, dtype):
    """The inference form has the same weights, in single precision."""
    model, image = lively(name).to(dtype), torch.rand(3, 96, 128)
    got = head_outputs(nasfcos.optimize_for_inference(model), image)
    want = head_outputs(model.float(), image)
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().mean() / b.abs().mean() < 1e-4


@pytest.mark.parametrize("name", ["Mobile_NAS_head", "other operations"])
def test_a_compiler_sees_through_it(name):
    """One graph, without a break at an unknown operator."""
    fast = nasfcos.optimize_for_inference(lively(name))
    batch, _ = fast.preprocess([torch.rand(3, 96, 128)])
    batch = batch.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fast._compute, fullgraph=True, backend="aot_eager")(batch)
        for got, want in zip(compiled, fast._compute(batch), strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_detections_are_ordinary_tensors():
    model = lively("R_50_NAS_densebox")
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    (found,) = nasfcos.optimize_for_inference(model)([image])
    assert len(found["boxes"]) > 10
    before = found["boxes"].clone()
    torch.testing.assert_close(found["boxes"].mul_(2), 2 * before)
    factor = torch.ones(1, requires_grad=True)
    (factor * found["scores"]).sum().backward()
    torch.testing.assert_close(factor.grad[0], found["scores"].sum())


@pytest.mark.parametrize("limit", [None, 6.0])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_fused_convolution(relu, residual, limit):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1).requires_grad_(False)
    x = 20 * torch.randn(2, 8, 9, 9)
    other = 20 * torch.randn(2, 8, 5, 5) if residual else None
    want = conv(x) if other is None else conv(x) + other
    want = want.clamp(0, limit) if relu else want
    torch.testing.assert_close(FusedConv(conv, relu, limit)(x, other), want)


@pytest.mark.parametrize("limit", [None, 6.0])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_fused_3x3_convolution(relu, residual, limit):
    torch.manual_seed(0)
    conv = Conv3x3(16, 16).to(memory_format=torch.channels_last).requires_grad_(False)
    x, other = (
        10 * torch.randn(1, 16, 30, 31).to(memory_format=torch.channels_last) for _ in range(2)
    )
    want = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    want = want + other if residual else want
    want = want.clamp(0, limit) if relu else want
    got = FusedConv(conv, relu, limit)(x, other.clone() if residual else None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_compiled("conv3x3")
def test_a_compiled_3x3_convolution_keeps_its_relu():
    conv = Conv3x3(16, 16).to(memory_format=torch.channels_last).requires_grad_(False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, 16, 30, 31).to(memory_format=torch.channels_last)
    compiled = torch.compile(FusedConv(conv, relu=True), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x).relu())
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert called == [torch.ops.nasfcos.conv3x3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, 6, 64, 70])
def test_concat(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, channels, 5, 7, generator=generator).to(dtype).unbind()
    terms = torch.randn(3, 2 * channels, generator=generator)
    terms = terms.to(torch.promote_types(dtype, torch.float32)).unbind()
    got = fused_concat(x, y, *terms)
    want = reference.fused_concat(*(t.double() for t in (x, y, *terms)))
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    # Half precision is rounded once, at the end.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for output in (got, reference.fused_concat(x, y, *terms)):
        torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=min(tolerance, 1e-5))

    torch.library.opcheck(torch.ops.nasfcos.fused_concat, (x, y, *terms))
    # The ReLU does not turn NaN into zero.
    x[1, 0, 2, 3] = torch.nan
    at = fused_concat(x, y, *terms).isnan().nonzero().tolist()
    assert at == [[1, 0, 2, 3]]
    with pytest.raises(ValueError, match="even C"):
        fused_concat(x[:, :1], y[:, :1], *terms)
    with pytest.raises((ValueError, RuntimeError)):  # PyTorch's, without a compiled kernel
        torch.ops.nasfcos.fused_concat(x[:, :1], y[:, :1], *terms)
    with pytest.raises(ValueError, match="shift must be"):
        fused_concat(x, y, terms[0], terms[1][1:], terms[2])


@pytest.mark.slow
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled(device):
    model = lively("R_50_NAS_head").to(device)
    image = torch.rand(3, 96, 128)
    fast = nasfcos.optimize_for_inference(model, compile=True)
    with torch.no_grad():
        (want,), (got,) = model([image]), fast([image])
    assert len(want["boxes"]) > 10
    torch.testing.assert_close(got["scores"], want["scores"], rtol=1e-3, atol=1e-4)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), padding=1)


def conv(**settings):
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **settings})


def shared():
    once = conv()
    parts = [nn.Sequential(once, nn.BatchNorm2d(8)) for _ in range(2)]
    return nn.Sequential(*parts, once)


ODD = {
    "its own forward": lambda: Residual(conv(), nn.BatchNorm2d(8), nn.ReLU()),
    "its own convolution": lambda: nn.Sequential(Standardised(8, 8, 3), nn.BatchNorm2d(8)),
    "reflected": lambda: nn.Sequential(conv(padding_mode="reflect"), nn.BatchNorm2d(8)),
    "padding in words": lambda: nn.Sequential(conv(padding="same"), nn.BatchNorm2d(8), nn.ReLU()),
    "shared": shared,
    "norms without factors": lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, affine=False)),
    "norms of the batch": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "two rectifiers": lambda: nn.Sequential(conv(), nn.ReLU6(), nn.ReLU()),
    "as usual": lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU6(), conv(), nn.ReLU()),
}


@pytest.mark.parametrize("kind", ODD)
def test_parts_of_others_compute_what_they_did(kind):
    torch.manual_seed(0)
    model = lively("R_50_NAS_densebox")
    part = ODD[kind]().eval()
    with torch.no_grad():
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    x = 3 * torch.randn(2, 8, 10, 12)
    with torch.no_grad():
        expected = part(x)
        model.backbone = part
        found = nasfcos.optimize_for_inference(model).backbone(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
