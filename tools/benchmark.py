"""Measure the detectors and their parts side by side with torchvision and other libraries.

  python tools/benchmark.py --json output/benchmark.json
  python tools/benchmark.py --only inference/R_50_NAS_head training
  python tools/benchmark.py --device cuda --compile

Prints a table of medians, quartiles and memory for each benchmark. All benchmarks take most of an
hour on two CPU cores, with --quick a few minutes. The exit code is 1 if a benchmark raised an
exception, and 130 after Ctrl-C, which ends the run with what was measured until then.
"""

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

from nasfcos.benchmark.report import format_report
from nasfcos.benchmark.setting import Setting, add_arguments, require_writable, set_threads
from nasfcos.benchmark.suite import BENCHMARKS, choose, has_failures, run
from nasfcos.config import ConfigError
from nasfcos.engine.distributed import resolve_device
from nasfcos.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=textwrap.fill(
            f"benchmarks: {', '.join(b.name for b in BENCHMARKS)}", 100, break_on_hyphens=False
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, quick="small work and few repetitions, only to see that all of it runs")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help='benchmarks to run: full names, the part before a slash ("inference") or patterns '
        '("*/R_50_NAS_head"); default: all',
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"),
        help="height and width of the images in pixels (default: each benchmark's own)",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="FOLDER",
        help="pictures for the data-loading benchmarks (default: made-up ones)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="also measure models compiled by torch.compile, which takes minutes to start",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        benchmarks = choose(args.only)
        device = resolve_device(args.device)
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    if args.size and min(args.size) < 32:
        parser.error("--size: images must be at least 32 pixels high and wide")
    if args.images and not Path(args.images).is_dir():
        parser.error(f"--images: {args.images} is no folder")
    set_threads(parser, args.threads)
    require_writable(parser, "--json", args.json)
    with tempfile.TemporaryDirectory(prefix="nasfcos_benchmark_") as folder:
        setting = Setting(
            device=device,
            folder=Path(folder),
            quick=args.quick,
            size=tuple(args.size) if args.size else None,
            images=Path(args.images) if args.images else None,
            compile=args.compile,
        )
        report = run(benchmarks, setting)
    print(format_report(report), flush=True)
    if args.json:
        write_json(args.json, report, indent=2)
    return 130 if report["interrupted"] else int(has_failures(report))


if __name__ == "__main__":
    sys.exit(main())
