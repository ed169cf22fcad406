"""Generate the demo detection data set in COCO format.

  python tools/make_demo_data.py --output datasets/demo

Writes train/ and val/ (pictures) and annotations/train.json and val.json. The same arguments give
the same pictures.
"""

import argparse
import sys

from nasfcos.data.demo import DemoSettings, make_demo_data
from nasfcos.engine.launch import HelpFormatter, run


def main() -> int:
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--output",
        default="datasets/demo",
        metavar="FOLDER",
        help="folder to write to (default: %(default)s)",
    )
    parser.add_argument(
        "--train",
        type=int,
        default=defaults.train,
        metavar="N",
        help="number of training pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--val",
        type=int,
        default=defaults.val,
        metavar="N",
        help="number of held-out pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        default=(defaults.short_side, defaults.long_side),
        help="sides of the pictures in pixels (default: "
        f"{defaults.short_side} {defaults.long_side})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="seed of all pictures (default: %(default)s)",
    )
    args = parser.parse_args()
    short, long = args.size
    settings = DemoSettings(args.train, args.val, long, short, args.seed)
    return run(lambda: make_demo_data(args.output, settings))


if __name__ == "__main__":
    sys.exit(main())
