"""Exported detectors as ONNX files, for runtimes without this package."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
import torch

from ..files import replacing
from ..ops import reference
from ..ops.library import OPERATORS

# DeformConv exists since opset 19, and in ONNX Runtime since 1.25.
OPSET = 20
# Type numbers of onnx.TensorProto.
_INT32, _BOOL = 6, 9

_NMS_MASK = torch.ops.nasfcos.nms_mask.default


def check_onnx(dtype: torch.dtype, nms_iou: float) -> None:
    """Check in advance that a detector can be written as an ONNX file.

    Args:
        dtype: data type of the detector's maps and weights.
        nms_iou: IoU from which its NMS suppresses.

    Raises:
        ImportError: the packages of ``nasfcos[onnx]`` are not installed.
        ValueError: `dtype` is not float32, or `nms_iou` is 0.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files are written with onnxscript, which is not installed: "
            "pip install 'nasfcos[onnx]'"
        ) from error
    if dtype != torch.float32:
        raise ValueError(f"TEST.DTYPE: a detector for ONNX must be in float32, not {dtype}")
    if nms_iou <= 0:
        raise ValueError("TEST.NMS_IOU 0: NMS of ONNX cannot suppress boxes that do not overlap")


def export_onnx(
    program: torch.export.ExportedProgram,
    file: str | os.PathLike[str],
    class_names: Sequence[str] = (),
) -> None:
    """Write an exported detector as an ONNX file with standard operators only.

    The inputs ``images`` and ``sizes`` and the outputs ``boxes``, ``scores``, ``labels`` and
    ``counts`` are those of the program (see `export_detector`).

    Args:
        program: a detector that `export_detector` returned, in float32.
        file: path to write to; an existing file is replaced once the new one is complete.
        class_names: the name of label n at index n - 1; stored as a JSON list under ``classes`` in
            the file's metadata.

    Raises:
        ImportError: the packages of ``nasfcos[onnx]`` are not installed.
        ValueError: as `check_onnx`, or the program is not an exported detector.
    """
    suppressions = program.graph.find_nodes(op="call_function", target=_NMS_MASK)
    if len(suppressions) != 1:
        raise ValueError("export_onnx takes what export_detector made of a detector")
    (nms,) = suppressions
    # Of a detector in half precision, some weights are still float32.
    half = {x.dtype for x in program.state_dict.values()} & {torch.float16, torch.bfloat16}
    check_onnx(half.pop() if half else torch.float32, nms.args[3])

    translated = translations()
    operators = {getattr(torch.ops.nasfcos, name).default: name for name in OPERATORS}
    decomposed = program.run_decompositions(
        {op: getattr(reference, name) for op, name in operators.items() if op not in translated}
    )
    written = torch.onnx.export(
        decomposed,
        input_names=["images", "sizes"],
        output_names=["boxes", "scores", "labels", "counts"],
        opset_version=OPSET,
        custom_translation_table=translated,
        dynamo=True,
        verbose=False,
    )
    for node in written.model.graph:  # source lines and paths
        node.metadata_props.clear()
    written.model.metadata_props["classes"] = json.dumps(list(class_names))
    with replacing(file) as temporary:
        written.save(temporary)


def translations() -> dict[torch._ops.OpOverload, object]:
    """The custom translation table for `torch.onnx.export`.

    It holds the operators that ONNX has counterparts of, or that PyTorch cannot translate. NMS is
    translated for labels from 1 and with counts, as detectors use it.
    """
    from onnxscript import opset20 as op

    def deform_conv(
        input, offset, mask, weight, bias, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], offset_groups: int,
    ):  # fmt: skip
        return op.DeformConv(
            input, weight, offset, bias, mask,
            kernel_shape=list(weight.shape[2:]), strides=list(stride), pads=[*padding, *padding],
            dilations=list(dilation), offset_group=offset_groups,
        )  # fmt: skip

    def nms_mask(boxes, labels, counts, iou_threshold: float, legacy: bool):
        images, most = boxes.shape[:2]
        limit = np.float32(iou_threshold)  # ONNX suppresses above it
        if legacy or float(limit) > iou_threshold:
            limit = np.nextafter(limit, np.float32(0))
        if legacy:  # both corners belong to a box
            boxes = op.Add(boxes, [0.0, 0.0, 1.0, 1.0])
        present = op.Less(list(range(most)), op.Unsqueeze(counts, [1]))
        labels = op.Where(present, labels, 0)
        classes = op.Range(1, op.Add(op.ReduceMax(labels, keepdims=0), 1), 1)
        own = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))
        # Scores that keep the given order; boxes with score 0 are not considered.
        scores = op.Where(own, [float(rank) for rank in range(most, 0, -1)], 0.0)
        kept = op.NonMaxSuppression(boxes, scores, [most], [float(limit)], [0.0])
        places = op.Gather(kept, [0, 2], axis=1)  # image and index, without the class
        ones = op.Expand(1, op.Slice(op.Shape(places), [0], [1]))
        return op.Cast(op.ScatterND(op.Expand(0, [images, most]), places, ones), to=_BOOL)

    def stable_sort(input, stable: bool, dim: int = -1, descending: bool = False):
        """TopK is stable, but does not accept booleans."""
        is_bool, count = input.dtype == _BOOL, input.shape[dim]
        input = op.Cast(input, to=_INT32) if is_bool else input
        values, indices = op.TopK(input, [count], axis=dim, largest=int(descending))
        return (op.Cast(values, to=_BOOL) if is_bool else values), indices

    return {
        torch.ops.nasfcos.modulated_deform_conv2d.default: deform_conv,
        _NMS_MASK: nms_mask,
        torch.ops.aten.sort.stable: stable_sort,
    }
