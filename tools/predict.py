"""Detect objects in images and videos; write pictures with boxes, and detections as JSON.

  python tools/predict.py --config-file FILE --input street.jpg --output found
  python tools/predict.py --config-file FILE --input "*.jpg" --output found MODEL.WEIGHT model.pth

The weights are those of MODEL.WEIGHT on the command line, else of the newest checkpoint in
OUTPUT_DIR, else of MODEL.WEIGHT in the config file.
"""

import logging
import sys

from nasfcos.config import load_config
from nasfcos.data import DataError
from nasfcos.engine.launch import argument_parser, run
from nasfcos.prediction import predict_files
from nasfcos.predictor import Predictor
from nasfcos.signals import StopRequest

logger = logging.getLogger("nasfcos.predict")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--input", required=True, help="image, video, folder of them, or glob pattern in quotes"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="folder for pictures with boxes, detections.json and, for several images, sheet.jpg "
        "(an overview); for each video an MP4 with boxes and a JSON-lines file",
    )
    parser.add_argument(
        "--score",
        type=float,
        default=0.3,
        help="leave out detections with a lower score (default: %(default)s)",
    )
    args = parser.parse_intermixed_args()
    for name in ("input", "output"):
        if not getattr(args, name):
            parser.error(f"--{name} is empty")
    if not 0 <= args.score <= 1:
        parser.error(f"--score {args.score} does not lie in 0..1")

    def job() -> None:
        cfg = load_config(args.config_file, args.overrides)
        if args.score < cfg.TEST.SCORE_THRESHOLD:
            logger.warning(
                "--score %g is below TEST.SCORE_THRESHOLD %g, which leaves out more",
                args.score, cfg.TEST.SCORE_THRESHOLD,
            )  # fmt: skip
        predictor = Predictor(cfg)
        remedy = f"the pictures and videos that were finished are in {args.output}"
        with StopRequest(remedy) as stop, stop.heeded_at_once():
            summary = predict_files(predictor, args.input, args.output, args.score)
        logger.info(
            "%d images and %d videos written to %s, %d skipped because they cannot be read",
            summary.images, summary.videos, args.output, summary.skipped,
        )  # fmt: skip
        if not summary.images and not summary.videos:
            raise DataError(f"nothing that {args.input} names could be read")

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
