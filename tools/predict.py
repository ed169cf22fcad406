"""Detect objects in an image, a folder, a glob pattern or a video; write pictures and JSON.

    python tools/predict.py --config-file configs/search/R_50_NAS_head.yaml \
        --input street.jpg --output found MODEL.WEIGHT model_final.pth
"""

import argparse
import logging
import sys

from nasfcos.config import ConfigError, load_config
from nasfcos.data import DataError
from nasfcos.download import DownloadError
from nasfcos.engine.logging import log_to_console
from nasfcos.models.weights import WeightsError
from nasfcos.predictor import Predictor, predict_files

logger = logging.getLogger("nasfcos.predict")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--input", required=True, help="image, video, folder, or glob pattern in quotes"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--score", type=float, default=0.3, help="leave out detections below it (default 0.3)"
    )
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides"
    )
    arguments = parser.parse_args()

    log_to_console()
    try:
        predictor = Predictor(load_config(arguments.config_file, arguments.overrides))
        summary = predict_files(predictor, arguments.input, arguments.output, arguments.score)
    except (ConfigError, DataError, DownloadError, WeightsError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info(
        "%d images and %d videos written to %s; %d skipped because they cannot be read",
        summary.images, summary.videos, arguments.output, summary.skipped,
    )  # fmt: skip
    return 0 if summary.images or summary.videos else 1


if __name__ == "__main__":
    sys.exit(main())
