"""Write a trained detector, from images to detections, as one file.

A .pt2 file has MODEL.DEVICE and TEST.DTYPE built in, an ONNX file is float32 for any device.

python tools/export.py --config-file FILE --output detector.onnx
python tools/export.py --config-file FILE --output detector.pt2 --size 800 1088 --batch 4 --uint8
"""

import io
import json
import logging
import sys
from pathlib import Path

import torch

import nasfcos
from nasfcos.config import ConfigError, load_config
from nasfcos.engine.launch import argument_parser, run
from nasfcos.files import replacing
from nasfcos.models.export import LEAST_SIDE
from nasfcos.models.onnx import check_onnx

logger = logging.getLogger("nasfcos.export")

SUFFIXES = (".onnx", ".pt2")


def main() -> int:
    parser = argument_parser(
        "Write a detector as an ONNX file, which needs nothing of this package, or as a program of "
        "torch.export. The weights are those that tools/predict.py takes."
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
        help="of the canvases that images lie on, best such as they nearly fill; without it images "
        f"may have any size from {LEAST_SIDE} x {LEAST_SIDE} pixels up",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("--uint8", action="store_true", help="images are bytes, not floats in 0..1")
    args = parser.parse_intermixed_args()
    if args.output.suffix not in SUFFIXES:
        parser.error(f"--output must end in {' or '.join(SUFFIXES)}, not {args.output.name!r}")
    if min([args.batch, *(args.size or ())]) < 1:
        parser.error("--size and --batch must be above 0")

    def job() -> None:
        if args.output.is_dir():
            raise ConfigError(f"--output {args.output} is a folder; name a file")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        is_onnx = args.output.suffix == ".onnx"
        # Of the device nothing is left in an ONNX file.
        device = ["MODEL.DEVICE", "cpu"] if is_onnx else []
        cfg = load_config(args.config_file, [*args.overrides, *device])
        if is_onnx:
            try:
                check_onnx(getattr(torch, cfg.TEST.DTYPE), cfg.TEST.NMS_IOU)
            except (ImportError, ValueError) as error:
                raise ConfigError(error) from error
        predictor = nasfcos.Predictor(cfg)
        dtype = torch.uint8 if args.uint8 else torch.float32
        # One value for all pixels: only their number, type and device matter.
        images = torch.zeros((), dtype=dtype, device=predictor.device)
        images = images.expand(args.batch, 3, *(args.size or (LEAST_SIDE, LEAST_SIDE)))
        program = nasfcos.export_detector(predictor.model, images, any_size=not args.size)
        if is_onnx:
            nasfcos.export_onnx(program, args.output, predictor.class_names)
        else:
            names = {"classes.json": json.dumps(predictor.class_names)}
            content = io.BytesIO()  # where the disk is full, PyTorch's own writing ends the process
            torch.export.save(program, content, extra_files=names)
            with replacing(args.output) as temporary:
                temporary.write_bytes(content.getbuffer())
        logger.info(
            "%s takes images %s %s and their sizes, and gives boxes, scores, labels and counts",
            args.output, "uint8" if args.uint8 else "float32",
            list(images.shape) if args.size else [args.batch, 3, "height", "width"],
        )  # fmt: skip

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
