"""Known weights and a known image, for which `tests/golden` has the expected values; and the known
architecture."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasfcos.genotype import Genotype

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]

BOXES = torch.tensor(
    [[20.0, 30, 110, 120], [150, 60, 290, 200], [40, 150, 90, 230], [200, 10, 240, 50]]
)
LABELS = torch.tensor([1, 17, 45, 80])
TARGETS = [
    {"boxes": BOXES, "labels": LABELS},
    {"boxes": BOXES[:2], "labels": LABELS[:2]},
]

PUBLISHED = Genotype.parse(
    [
        [[3, 3, 4, 4, 1]],
        [[3, 3, 4, 4, 1]],
        [[4, 3, 4, 3, 1]],
        [[1, 3, 4, 3, 1]],
        [[5, 3, 4, 4, 1]],
        [[4, 7, 4, 4, 1]],
        [[7, 2, 4, 4, 1]],
        [0],
        [5, 1, 5, 0, 4, 4],
    ]
)
"""The architecture found by the paper (FPN and head)."""


@functools.cache
def golden() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@functools.cache
def layout() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "layout.json.gz").read_bytes()))


def known_weights(model: str) -> dict[str, Tensor]:
    """Tensors under the released names; each follows from its name and shape alone."""
    return {
        name: _known_tensor(name, shape) for name, shape in layout()[model]["state_dict"].items()
    }


def _known_tensor(name: str, shape: list[int]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    fan_in = np.prod(shape[1:])
    if name.endswith("running_var"):
        x = 0.5 + np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif name.endswith("cls_logits.bias"):
        x = -2 + 0.2 * x
    elif name.endswith("bias"):
        x = 0.05 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    elif "conv_offset_mask" in name:
        x = 0.3 * x / np.sqrt(fan_in)
    elif name.endswith(("cls_logits.weight", "bbox_pred.weight", "centerness.weight")):
        x = 0.25 * x / np.sqrt(fan_in)
    elif len(shape) == 4:
        x = 1.2 * x / np.sqrt(fan_in)
    else:
        x = 1 + 0.1 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def known_image() -> Tensor:
    """[3, 240, 320] uint8 RGB: waves and four rectangles."""
    y, x = np.mgrid[0:240, 0:320].astype(np.float64)
    waves = [127 + 90 * np.sin(x / 17 + c) + 30 * np.cos(y / (11 + 3 * c)) for c in range(3)]
    image = np.stack(waves)
    for i, (x0, y0, x1, y1) in enumerate(BOXES.int().tolist()):
        color = ((60 * i + 30) % 255, (200 - 40 * i) % 255, (90 + 50 * i) % 255)
        image[:, y0:y1, x0:x1] = np.array(color)[:, None, None]
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def known_batch(model: torch.nn.Module) -> Tensor:
    """The training batch: the normalised image, and its mirror image times 0.9."""
    image = known_image()
    batch, _ = model.preprocess([image, image])
    height, width = image.shape[-2:]
    batch[1, :, :height, :width] = batch[0, :, :height, :width].flip(2) * 0.9
    return batch
