"""Each released model against a second, plain implementation of it (`tests/models/released.py`),
in double precision: outputs, losses, gradients and detections."""

import pytest
import torch

import nasfcos
from nasfcos.models.layouts import released_names
from tests.known import LABELS, ROOT, known_image, known_weights, layout
from tests.models import released

# Parts of the known image. The second has no objects.
SIZES = [(120, 168), (96, 160)]
BOXES = torch.tensor(
    [[20.0, 30, 110, 115], [100, 40, 167, 119], [40, 60, 90, 110], [110, 5, 140, 30]]
)
NONE = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)

# The others take a minute more.
ORDINARY = {"Mobile_NAS_head", "R_50_NAS_retinanet"}


def build(name):
    """The detector with its known weights, and those weights."""
    cfg = nasfcos.load_config(ROOT / "configs/search" / f"{name}.yaml", ["MODEL.DEVICE", "cpu"])
    model, weights = nasfcos.build_detector(cfg), known_weights(name)
    if "retinanet" in name:
        for key, x in weights.items():
            if key.endswith(("cls_logits.weight", "bbox_pred.weight")):
                x *= 0.02  # else many scores are 1, and many boxes have no area
            if "cell_anchors" in key:
                x.copy_(released.anchor_windows(released.STRIDES[int(key[-1])]))
    nasfcos.load_weights(model, weights)
    floats = {key: x.double() if x.is_floating_point() else x for key, x in weights.items()}
    return model.double(), floats


@pytest.fixture(
    scope="module",
    params=[x if x in ORDINARY else pytest.param(x, marks=pytest.mark.slow) for x in layout()],
)
def pair(request):
    return request.param, *build(request.param)


def images():
    return [known_image()[:, :height, :width] for height, width in SIZES]


def test_outputs_and_detections(pair):
    name, model, weights = pair
    batch, sizes = released.preprocess(images(), dtype=torch.float64)
    with torch.no_grad():
        our_batch, our_sizes = model.eval().preprocess(images())
        torch.testing.assert_close(our_batch, batch, rtol=0, atol=1e-5)
        assert our_sizes == sizes
        pyramid = model.neck(model.backbone(batch))
        ours = model.head(pyramid)
        outputs = released.outputs(name, weights, batch, training=False)
        torch.testing.assert_close(pyramid, outputs["pyramid"])
        kinds = [kind for kind in ("logits", "boxes", "centerness") if kind in outputs]
        torch.testing.assert_close(list(ours), [outputs[kind] for kind in kinds])

        # Scores are in single precision, in which the order of the best depends on rounding.
        single = {kind: [x.float() for x in outputs[kind]] for kind in outputs}
        found = model.head.detect([single[kind] for kind in kinds], sizes)
        expected = released.detections(name, single, sizes)
    for one, other in zip(map(by_class, found), map(by_class, expected), strict=True):
        assert len(other["scores"]) >= 100
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3, check_dtype=False)


def by_class(detections):
    """In the order of classes, and of scores within a class."""
    order = detections["labels"].argsort(stable=True)
    return {key: x[order] for key, x in detections.items()}


@pytest.mark.parametrize("objects", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_and_gradients(pair, objects):
    name, model, weights = pair
    batch, _ = released.preprocess(images(), dtype=torch.float64)
    first = (BOXES.double(), LABELS) if objects else NONE
    boxes, labels = zip(first, NONE, strict=True)
    trained = {key: x.requires_grad_() for key, x in weights.items() if released.trains(key)}
    outputs = released.outputs(name, weights, batch, training=True)
    expected = released.losses(name, outputs, boxes, labels)
    expected_gradients = torch.autograd.grad(
        sum(expected.values()), trained.values(), allow_unused=True
    )

    model.train().zero_grad()
    outputs = model.head(model.neck(model.backbone(batch)))
    targets = [{"boxes": b, "labels": x} for b, x in zip(boxes, labels, strict=True)]
    losses = model.head.losses(outputs, targets)
    torch.testing.assert_close(losses, expected)
    sum(losses.values()).backward()
    names = released_names({key: x.dim() for key, x in weights.items()})
    for key, gradient in zip(trained, expected_gradients, strict=True):
        ours = model.get_parameter(names[key]).grad
        assert (ours is None) == (gradient is None), key
        if gradient is not None:
            torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-9, msg=key)
