import pytest
import torch
import torchvision

from nasfcos.ops import batched_nms, nms, nms_mask, reference
from tests.operators import DEVICES


def random_boxes(n, seed=0, grid=None, dtype=torch.float32):
    """Boxes that overlap a lot; rounded to `grid`, if given, so that many IoUs and scores are
    equal."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 100
    size = torch.rand(n, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + size], dim=1)
    scores = torch.rand(n, generator=generator)
    labels = torch.randint(0, 5, (n,), generator=generator)
    if grid:
        boxes = (boxes / grid).round() * grid
        scores = (scores * 10).round() / 10
    return boxes.to(dtype), scores, labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("grid", [None, 10])
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 129, 701])
def test_agrees_with_the_reference(n, grid, legacy, device):
    boxes, scores, labels = random_boxes(n, seed=n, grid=grid)
    for classes in (None, labels):
        want = reference.nms(boxes, scores, classes, 0.5, legacy)
        if classes is None:
            got = nms(boxes.to(device), scores.to(device), 0.5, legacy)
        else:
            got = batched_nms(boxes.to(device), scores.to(device), classes.to(device), 0.5, legacy)
        assert got.device.type == device and got.dtype == torch.int64
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_of_several_images(dtype, legacy, device):
    images = [random_boxes(200, seed, dtype=dtype) for seed in range(5)]
    boxes, scores, labels = (torch.stack(rows) for rows in zip(*images, strict=True))
    order = scores.argsort(dim=1, descending=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    labels = labels.gather(1, order)
    counts = torch.tensor([200, 0, 1, 64, 131])
    for classes, present in ((labels, counts), (labels, None), (None, counts)):
        given = (None if x is None else x.to(device) for x in (boxes, classes, present))
        got = nms_mask(*given, 0.5, legacy).cpu()
        assert torch.equal(got, reference.nms_mask(boxes, classes, present, 0.5, legacy))
        for image, kept in enumerate(got):
            count = 200 if present is None else counts[image]
            falling = torch.arange(int(count), 0, -1)
            own = torch.zeros(count) if classes is None else labels[image, :count]
            wanted = batched_nms(boxes[image, :count], falling, own.long(), 0.5, legacy)
            assert kept.nonzero().flatten().tolist() == wanted.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_convention_is_torchvisions(seed):
    boxes, scores, _ = random_boxes(500, seed)
    for threshold in (0.0, 0.3, 0.6, 1.0):
        want = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(nms(boxes, scores, threshold), want)


@pytest.mark.parametrize("legacy", [False, True])
def test_batched_is_one_nms_a_class(legacy):
    # With such coordinates, shifting classes apart in float32 would move boxes by whole pixels.
    boxes, scores, labels = random_boxes(400, seed=3)
    boxes = boxes + 2.0**20
    labels = labels * 10_000_000 - 3
    kept = batched_nms(boxes, scores, labels, 0.4, legacy)
    want = []
    for label in labels.unique():
        (member,) = torch.where(labels == label)
        want.append(member[nms(boxes[member], scores[member], 0.4, legacy)])
    want = torch.cat(want)
    assert set(kept.tolist()) == set(want.tolist())
    assert (scores[kept].diff() <= 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_threshold_is_inclusive_only_in_the_legacy_convention(device):
    scores = torch.tensor([0.9, 0.8], device=device)
    # The IoU is exactly 1/2, with heights of 10 and 5 in either convention.
    ordinary = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]], device=device)
    legacy = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]], device=device)
    assert nms(ordinary, scores, 0.5).tolist() == [0, 1]
    assert nms(ordinary, scores, 0.4999).tolist() == [0]
    assert nms(legacy, scores, 0.5, legacy=True).tolist() == [0]
    assert nms(legacy, scores, 0.5001, legacy=True).tolist() == [0, 1]
    # 0.6 has no exact binary form; the legacy comparison rounds it to the boxes' precision.
    third = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 5]], device=device)
    assert nms(third, scores, 0.6, legacy=True).tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_keep_input_order_and_duplicates_go(device):
    far_apart = torch.arange(6, device=device)[:, None] * 100.0 + torch.tensor(
        [0.0, 0, 10, 10], device=device
    )
    equal = torch.full((6,), 0.5, device=device)
    assert nms(far_apart, equal, 0.5).tolist() == [0, 1, 2, 3, 4, 5]
    assert nms(far_apart[:1].expand(6, 4), equal, 0.5).tolist() == [0]


def test_boxes_without_area_and_nan_do_not_suppress():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [float("nan")] * 4, [0, 0, 10, 10]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1, 2, 3]
    # In the legacy convention a point is a pixel, so the second point is a duplicate.
    assert nms(boxes, scores, 0.5, legacy=True).tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    boxes, scores, labels = random_boxes(200, seed=5, grid=4)
    want = batched_nms(boxes, scores, labels, 0.55, legacy=True)
    got = batched_nms(boxes.to(dtype), scores, labels.to(torch.int32), 0.55, legacy=True)
    assert torch.equal(got, want)


def test_inputs_need_not_be_contiguous():
    boxes, scores, labels = random_boxes(100, seed=6)
    strided = boxes.t().contiguous().t()
    spread = torch.stack([scores, scores], dim=1)[:, 0]
    want = batched_nms(boxes, scores, labels, 0.5)
    assert torch.equal(batched_nms(strided, spread, labels, 0.5), want)


def test_shapes_that_do_not_fit():
    boxes, scores, labels = random_boxes(4)
    with pytest.raises(ValueError, match=r"boxes must be \[N, 4\], got \[4, 3\]"):
        nms(boxes[:, :3], scores, 0.5)
    with pytest.raises(ValueError, match="scores must be"):
        nms(boxes, scores[:3], 0.5)
    with pytest.raises(ValueError, match="labels must be"):
        batched_nms(boxes, scores, labels[:3], 0.5)
    with pytest.raises(ValueError, match=r"boxes must be \[N, K, 4\], got \[4, 4\]"):
        nms_mask(boxes, None, None, 0.5)
    with pytest.raises(ValueError, match=r"labels must be \[1, 4\]"):
        nms_mask(boxes[None], labels, None, 0.5)
    with pytest.raises(ValueError, match=r"counts must be \[1\]"):
        nms_mask(boxes[None], None, labels, 0.5)


def test_registration():
    boxes, scores, labels = random_boxes(20)
    for classes in (None, labels):
        torch.library.opcheck(torch.ops.nasfcos.nms, (boxes, scores, classes, 0.5, True))
        rows = None if classes is None else classes[None]
        for counts in (None, torch.tensor([7])):
            torch.library.opcheck(
                torch.ops.nasfcos.nms_mask, (boxes[None], rows, counts, 0.5, True)
            )


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def detect(boxes, scores, labels):
        keep = batched_nms(boxes, scores, labels, 0.5, legacy=True)
        return boxes[keep] * 2

    for n in (30, 50):
        boxes, scores, labels = random_boxes(n)
        want = boxes[batched_nms(boxes, scores, labels, 0.5, legacy=True)] * 2
        torch.testing.assert_close(detect(boxes, scores, labels), want)


def test_exports():
    class Detect(torch.nn.Module):
        def forward(self, boxes, scores):
            return scores[nms(boxes, scores, 0.5, legacy=True)]

    boxes, scores, _ = random_boxes(30)
    n = torch.export.Dim("n", min=2, max=1000)
    program = torch.export.export(Detect(), (boxes, scores), dynamic_shapes=({0: n}, {0: n}))
    boxes, scores, _ = random_boxes(45, seed=1)
    assert torch.equal(program.module()(boxes, scores), Detect()(boxes, scores))
