"""Generate the demo detection data set (COCO format)."""

import argparse
import sys

from nasfcos.data.demo import DemoSettings, make_demo_data
from nasfcos.engine.launch import run


def main() -> int:
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="datasets/demo", help="folder to write")
    parser.add_argument("--train", type=int, default=defaults.train, help="training pictures")
    parser.add_argument("--val", type=int, default=defaults.val, help="held-out pictures")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        default=(defaults.short_side, defaults.long_side),
        help="sides of the pictures in pixels",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args()
    short, long = args.size
    settings = DemoSettings(args.train, args.val, long, short, args.seed)
    return run(lambda: make_demo_data(args.output, settings))


if __name__ == "__main__":
    sys.exit(main())
