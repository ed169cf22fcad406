"""Exported detectors as ONNX files, for runtimes that know nothing of this package."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
import torch

from ..files import replacing
from ..ops import reference
from ..ops.library import OPERATORS

# The first with bilinear sampling at offsets (DeformConv) is 19; ONNX Runtime has it since 1.25.
OPSET = 20
# onnx.TensorProto's numbers of types.
_INT32, _BOOL = 6, 9

_NMS_MASK = torch.ops.nasfcos.nms_mask.default


def check_onnx(dtype: torch.dtype, nms_iou: float) -> None:
    """Say before the work what stands against an ONNX file.

    Args:
        dtype: of the detector's maps and weights.
        nms_iou: at which its NMS suppresses.

    Raises:
        ImportError: the packages of ``nasfcos[onnx]`` are not installed.
        ValueError: another dtype than float32, or an IoU of 0.
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
    """Write a detector of `export_detector` as an ONNX file, of standard operators only.

    Its inputs ``images`` and ``sizes`` and its outputs ``boxes``, ``scores``, ``labels`` and
    ``counts`` are those of the program.

    Args:
        program: the detector, in float32.
        file: the path to write to; a file there is replaced once the new one is complete.
        class_names: the name of label n at n - 1; kept as a JSON list under ``classes`` in the
            file's metadata.

    Raises:
        ImportError, ValueError: as `check_onnx`; or the program is no detector's.
    """
    suppressions = program.graph.find_nodes(op="call_function", target=_NMS_MASK)
    if len(suppressions) != 1:
        raise ValueError("export_onnx takes what export_detector made of a detector")
    (nms,) = suppressions
    # Where weights are in half precision, some stay in float32.
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
    for node in written.model.graph:  # lines and paths of the sources
        node.metadata_props.clear()
    written.model.metadata_props["classes"] = json.dumps(list(class_names))
    with replacing(file) as temporary:
        written.save(temporary)


def translations() -> dict[torch._ops.OpOverload, object]:
    """For `torch.onnx.export`: what ONNX has operators of its own for, or PyTorch no translation.

    NMS is taken with labels from 1 and counts, as detectors use it.
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
        limit = np.float32(iou_threshold)  # ONNX: above it
        if legacy or float(limit) > iou_threshold:
            limit = np.nextafter(limit, np.float32(0))
        if legacy:  # both ends belong to a side
            boxes = op.Add(boxes, [0.0, 0.0, 1.0, 1.0])
        present = op.Less(list(range(most)), op.Unsqueeze(counts, [1]))
        labels = op.Where(present, labels, 0)
        classes = op.Range(1, op.Add(op.ReduceMax(labels, keepdims=0), 1), 1)
        own = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))
        # In the order that they have; 0 is not considered.
        scores = op.Where(own, [float(rank) for rank in range(most, 0, -1)], 0.0)
        kept = op.NonMaxSuppression(boxes, scores, [most], [float(limit)], [0.0])
        places = op.Gather(kept, [0, 2], axis=1)  # image and index, without the class
        ones = op.Expand(1, op.Slice(op.Shape(places), [0], [1]))
        return op.Cast(op.ScatterND(op.Expand(0, [images, most]), places, ones), to=_BOOL)

    def stable_sort(input, stable: bool, dim: int = -1, descending: bool = False):
        """TopK takes the earlier one of equals, but no booleans."""
        is_bool, count = input.dtype == _BOOL, input.shape[dim]
        input = op.Cast(input, to=_INT32) if is_bool else input
        values, indices = op.TopK(input, [count], axis=dim, largest=int(descending))
        return (op.Cast(values, to=_BOOL) if is_bool else values), indices

    return {
        torch.ops.nasfcos.modulated_deform_conv2d.default: deform_conv,
        _NMS_MASK: nms_mask,
        torch.ops.aten.sort.stable: stable_sort,
    }
