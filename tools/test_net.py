"""Test a detector on DATASETS.TEST.

  python tools/test_net.py --config-file FILE MODEL.WEIGHT output/model_final.pth
  torchrun --nproc_per_node=4 tools/test_net.py --config-file FILE TEST.IMS_PER_BATCH 16

The weights are those of MODEL.WEIGHT on the command line, else of the newest checkpoint in
OUTPUT_DIR, else of MODEL.WEIGHT in the config file.

Prints the metrics, and writes to OUTPUT_DIR: inference/<data set>/bbox.json (detections in the COCO
results format) and metrics.json, and log.txt.
"""

import sys

import torch
from yacs.config import CfgNode

from nasfcos.engine import load_test_model, test, test_sets
from nasfcos.engine.launch import argument_parser, launch


def main() -> int:
    args = argument_parser(__doc__).parse_intermixed_args()

    def job(cfg: CfgNode, device: torch.device) -> None:
        model, classes = load_test_model(cfg, device)
        test(cfg, model, test_sets(cfg, classes))

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
