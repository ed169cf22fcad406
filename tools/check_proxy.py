"""Is the proxy worth something? Train architectures of a search in full, spread over its rewards.

python tools/check_proxy.py --config-file configs/nas/demo.yaml --stage head --count 12
"""

import logging
import sys
from pathlib import Path

from nasfcos.engine.launch import argument_parser, launch
from nasfcos.search.agreement import check_agreement


def main() -> int:
    parser = argument_parser(
        "Train architectures of the search in OUTPUT_DIR in full, spread evenly over its rewards, "
        "and compare: Kendall's tau, a JSON file and a plot in OUTPUT_DIR/agreement."
    )
    parser.add_argument("--stage", choices=("fpn", "head"), default="head")
    parser.add_argument("--count", type=int, default=12, help="architectures (default: 12)")
    args = parser.parse_intermixed_args()

    def job(cfg, device) -> None:
        tau = check_agreement(cfg, device, Path(cfg.OUTPUT_DIR), args.stage, args.count)
        logging.getLogger("nasfcos.check_proxy").info("Kendall's tau: %.3f", tau)

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
