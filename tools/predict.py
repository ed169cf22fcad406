"""Detect objects in an image, a folder, a glob pattern or a video; write pictures and JSON.

python tools/predict.py --config-file FILE --input street.jpg --output found
python tools/predict.py --config-file FILE --input "*.jpg" --output found MODEL.WEIGHT model.pth
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
    parser = argument_parser(
        "Detect objects and write pictures with boxes and JSON. The weights are MODEL.WEIGHT of "
        "the command line, else the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT of the "
        "config file."
    )
    parser.add_argument(
        "--input", required=True, help="image, video, folder, or glob pattern in quotes"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--score", type=float, default=0.3, help="leave out detections below it (default: 0.3)"
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
