"""Measure how time and memory grow with image size, batch, objects, classes, ...

  python tools/measure_growth.py --json output/growth.json --plots output/growth
  python tools/measure_growth.py --only image batch --device cuda

Prints a table for each axis. The exit code is 1 if something raised an exception, and 130 after
Ctrl-C, which ends the run with the axes that were measured until then.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from nasfcos.benchmark.growth import format_growth, has_errors, measure_growth
from nasfcos.benchmark.plots import plot_growth
from nasfcos.benchmark.setting import Setting, add_arguments, require_writable, set_threads
from nasfcos.config import ConfigError
from nasfcos.engine.distributed import resolve_device
from nasfcos.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, quick="the three smallest values of each axis, few repetitions")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS",
        help="axes to measure, of image, batch, objects, classes, detections and processes "
        "(default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--plots", metavar="FOLDER", help="write a picture of each axis, AXIS.png, to this folder"
    )
    args = parser.parse_args()
    set_threads(parser, args.threads)
    require_writable(parser, "--json", args.json)
    require_writable(parser, "--plots", args.plots, is_folder=True)
    try:
        device = resolve_device(args.device)
        with tempfile.TemporaryDirectory(prefix="nasfcos_growth_") as folder:
            report = measure_growth(args.only, Setting(device, Path(folder), args.quick))
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    print(format_growth(report), flush=True)
    if args.json:
        write_json(args.json, report, indent=2)
    if args.plots:
        for axis in report["axes"]:
            if axis["curves"]:
                plot_growth(axis, Path(args.plots) / f"{axis['name']}.png")
    return 130 if report["interrupted"] else int(has_errors(report))


if __name__ == "__main__":
    sys.exit(main())
