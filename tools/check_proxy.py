"""Check the proxy of a search: do rewards predict AP, and do they agree between seeds?

  python tools/check_proxy.py --config-file configs/nas/demo.yaml --stage head --count 12
  python tools/check_proxy.py --config-file configs/nas/demo.yaml --stage fpn --count 24 --again

Takes architectures from the search in OUTPUT_DIR, evenly spread over its rewards. They are trained
in full or, with --again, evaluated by another short trial, which takes minutes. Writes Kendall's
tau and all values to OUTPUT_DIR/agreement/<stage>.json (with --again, <stage>_again.json), and a
plot beside it. A check that was stopped before all full trainings were done continues with them.
"""

import logging
import sys
from pathlib import Path

import torch
from yacs.config import CfgNode

from nasfcos.engine.launch import argument_parser, launch
from nasfcos.search.agreement import check_agreement, check_repeatability


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--stage",
        choices=("fpn", "head"),
        default="head",
        help="stage that the architectures are taken from (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=12,
        help="number of architectures (default: %(default)s)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="compare with the reward for another seed, not with AP after full training",
    )
    args = parser.parse_intermixed_args()
    check = check_repeatability if args.again else check_agreement

    def job(cfg: CfgNode, device: torch.device) -> None:
        tau = check(cfg, device, Path(cfg.OUTPUT_DIR), args.stage, args.count)
        logging.getLogger("nasfcos.check_proxy").info("Kendall's tau: %.3f", tau)

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
