"""Test a detector on DATASETS.TEST.

python tools/test_net.py --config-file FILE MODEL.WEIGHT output/model_final.pth
torchrun --nproc_per_node=4 tools/test_net.py --config-file FILE TEST.IMS_PER_BATCH 16
"""

import sys

from nasfcos.engine import build_model, load_test_weights, test
from nasfcos.engine.launch import argument_parser, launch


def main() -> int:
    parser = argument_parser(
        "Test a detector on DATASETS.TEST. Its weights are MODEL.WEIGHT of the command line, else "
        "the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT of the config file."
    )
    args = parser.parse_intermixed_args()

    def job(cfg, device):
        model = build_model(cfg, device)
        load_test_weights(cfg, model, prefer_config="MODEL.WEIGHT" in args.overrides[::2])
        test(cfg, model, device)

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
