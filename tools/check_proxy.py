"""Is the proxy worth something? Take architectures of a search, spread over its rewards, and train
them in full; or, which takes minutes, see whether their rewards come again with another seed.

python tools/check_proxy.py --config-file configs/nas/demo.yaml --stage head --count 12
python tools/check_proxy.py --config-file configs/nas/demo.yaml --stage fpn --count 24 --again
"""

import logging
import sys
from pathlib import Path

from nasfcos.engine.launch import argument_parser, launch
from nasfcos.search.agreement import check_agreement, check_repeats


def main() -> int:
    parser = argument_parser(
        "Train architectures of the search in OUTPUT_DIR in full, spread evenly over its rewards, "
        "or try them again, and compare: Kendall's tau, a JSON file and a plot in "
        "OUTPUT_DIR/agreement."
    )
    parser.add_argument("--stage", choices=("fpn", "head"), default="head")
    parser.add_argument("--count", type=int, default=12, help="architectures (default: 12)")
    parser.add_argument("--again", action="store_true", help="try them again, with another seed")
    args = parser.parse_intermixed_args()
    check = check_repeats if args.again else check_agreement

    def job(cfg, device) -> None:
        tau = check(cfg, device, Path(cfg.OUTPUT_DIR), args.stage, args.count)
        logging.getLogger("nasfcos.check_proxy").info("Kendall's tau: %.3f", tau)

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
