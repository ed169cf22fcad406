"""Write a trained detector, from images to detections, as one file.

  python tools/export.py --config-file FILE --output detector.onnx
  python tools/export.py --config-file FILE --output detector.pt2 --size 800 1088 --batch 4 --uint8

An ONNX file needs nothing of this package; it is float32, for any device. A .pt2 file is a program
of torch.export, with MODEL.DEVICE and TEST.DTYPE built in. The weights are those of MODEL.WEIGHT on
the command line, else of the newest checkpoint in OUTPUT_DIR, else of MODEL.WEIGHT in the config
file.
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
from nasfcos.models.export import MIN_SIDE
from nasfcos.models.onnx import check_onnx

logger = logging.getLogger("nasfcos.export")

SUFFIXES = (".onnx", ".pt2")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="file to write, .onnx or .pt2"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
        help="fix the size of the canvas on which images are placed, in pixels; best when images "
        "nearly fill it (default: any size from "
        f"{MIN_SIDE} x {MIN_SIDE} pixels up)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images per call (default: %(default)s)"
    )
    parser.add_argument(
        "--uint8", action="store_true", help="take images as bytes in 0..255, not floats in 0..1"
    )
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
        # An ONNX file does not depend on the device.
        device = ["MODEL.DEVICE", "cpu"] if is_onnx else []
        cfg = load_config(args.config_file, [*args.overrides, *device])
        if is_onnx:
            try:
                check_onnx(getattr(torch, cfg.TEST.DTYPE), cfg.TEST.NMS_IOU)
            except (ImportError, ValueError) as error:
                raise ConfigError(error) from error
        predictor = nasfcos.Predictor(cfg)
        dtype = torch.uint8 if args.uint8 else torch.float32
        # All pixels share one element of memory: only shape, type and device matter.
        images = torch.zeros((), dtype=dtype, device=predictor.device)
        images = images.expand(args.batch, 3, *(args.size or (MIN_SIDE, MIN_SIDE)))
        program = nasfcos.export_detector(predictor.model, images, any_size=not args.size)
        if is_onnx:
            nasfcos.export_onnx(program, args.output, predictor.class_names)
        else:
            names = {"classes.json": json.dumps(predictor.class_names)}
            content = io.BytesIO()  # on a full disk, PyTorch's own writer would abort the process
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
