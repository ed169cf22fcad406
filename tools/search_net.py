"""Search an architecture for the data of a config.

  python tools/search_net.py --config-file configs/nas/demo.yaml [--resume] KEY VALUE ...
  python tools/search_net.py --config-file configs/nas/demo.yaml --status

Fine-tunes the backbone, searches the FPN and then the head (SEARCH.STAGES), and trains the best
architectures in full. Writes to OUTPUT_DIR: best.yaml and best.pth (config and weights of the best
detector), ranking.json (all selected architectures), report/report.html, search.db (all
trials), trials_<stage>.csv (a table of them), and folders with what the stages hand on.
"""

import sys

from nasfcos.config import load_config
from nasfcos.engine.launch import argument_parser, launch, run
from nasfcos.search.search import search, search_status


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--resume", action="store_true", help="continue the search in OUTPUT_DIR"
    )
    parser.add_argument(
        "--status", action="store_true", help="print how far the search in OUTPUT_DIR is, and exit"
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
