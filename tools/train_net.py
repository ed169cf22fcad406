"""Train a detector, then test it.

python tools/train_net.py --config-file configs/demo/nas_fcos.yaml OUTPUT_DIR output/mine
torchrun --nproc_per_node=4 tools/train_net.py --config-file FILE [--resume] KEY VALUE ...
"""

import sys

from nasfcos.engine import train
from nasfcos.engine.launch import argument_parser, launch


def main() -> int:
    parser = argument_parser("Train a detector, then test it.")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--skip-test", action="store_true", help="do not test the finished model")
    args = parser.parse_intermixed_args()
    return launch(
        args, lambda cfg, device: train(cfg, device, resume=args.resume, skip_test=args.skip_test)
    )


if __name__ == "__main__":
    sys.exit(main())
