"""Train a detector on DATASETS.TRAIN, then test it on DATASETS.TEST.

  python tools/train_net.py --config-file configs/demo/nas_fcos.yaml OUTPUT_DIR output/mine
  torchrun --nproc_per_node=4 tools/train_net.py --config-file FILE [--resume] KEY VALUE ...

Writes to OUTPUT_DIR: config.yaml (all settings), log.txt, checkpoints (model_*.pth, at the end
model_final.pth), metrics.jsonl and tensorboard/ (losses, learning rate, AP), training.png (their
curves) and inference/<data set>/ (detections and metrics of the tests).
"""

import sys

from nasfcos.engine import train
from nasfcos.engine.launch import argument_parser, launch


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in OUTPUT_DIR; without one, start from scratch",
    )
    parser.add_argument("--skip-test", action="store_true", help="do not test the finished model")
    args = parser.parse_intermixed_args()
    return launch(
        args, lambda cfg, device: train(cfg, device, resume=args.resume, skip_test=args.skip_test)
    )


if __name__ == "__main__":
    sys.exit(main())
