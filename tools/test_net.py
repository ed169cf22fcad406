"""Test a detector on DATASETS.TEST.

python tools/test_net.py --config-file FILE MODEL.WEIGHT output/model_final.pth
torchrun --nproc_per_node=4 tools/test_net.py --config-file FILE TEST.IMS_PER_BATCH 16
"""

import sys

from nasfcos.engine import load_test_model, test, test_sets
from nasfcos.engine.launch import argument_parser, launch


def main() -> int:
    parser = argument_parser(
        "Test a detector on DATASETS.TEST. Its weights are MODEL.WEIGHT of the command line, else "
        "the newest checkpoint in OUTPUT_DIR, else MODEL.WEIGHT of the config file."
    )
    args = parser.parse_intermixed_args()

    def job(cfg, device):
        model, classes = load_test_model(cfg, device)
        test(cfg, model, test_sets(cfg, classes))

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
