"""Search an architecture: prepare the backbone, search FPN and head, train the best in full.

python tools/search_net.py --config-file configs/nas/demo.yaml [--resume] KEY VALUE ...
python tools/search_net.py --config-file configs/nas/demo.yaml --status
"""

import sys

from nasfcos.config import load_config
from nasfcos.engine.launch import argument_parser, launch, run
from nasfcos.search.search import search, search_status


def main() -> int:
    parser = argument_parser(
        "Search an architecture for the config's data; leaves best.yaml, best.pth and a report in "
        "OUTPUT_DIR."
    )
    parser.add_argument("--resume", action="store_true", help="go on with OUTPUT_DIR's search")
    parser.add_argument(
        "--status", action="store_true", help="show how far the search in OUTPUT_DIR is, and end"
    )
    args = parser.parse_intermixed_args()
    if args.status:
        return run(lambda: print(search_status(load_config(args.config_file, args.overrides))))
    return launch(
        args,
        lambda cfg, device: search(cfg, device, args.config_file, args.overrides, args.resume),
    )


if __name__ == "__main__":
    sys.exit(main())
