"""Measure the detectors and their parts beside torchvision's and other usual libraries.

python tools/benchmark.py --json output/benchmark.json
python tools/benchmark.py --only inference/R_50_NAS_head training
python tools/benchmark.py --device cuda --compile

All of it takes the better part of an hour on two CPU cores; --quick tries everything on small work,
in some minutes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from nasfcos.benchmark.report import format_report
from nasfcos.benchmark.setting import Setting, add_arguments, require_writable, set_threads
from nasfcos.benchmark.suite import BENCHMARKS, choose, has_failures, run
from nasfcos.config import ConfigError
from nasfcos.engine.distributed import resolve_device
from nasfcos.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the detectors and their parts side by side with usual libraries.",
        epilog=f"benchmarks: {', '.join(b.name for b in BENCHMARKS)}",
    )
    add_arguments(parser, quick="small work: some minutes")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help='names of benchmarks, their beginnings ("inference") or patterns ("*/R_50_NAS_head")',
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of the images, in pixels"
    )
    parser.add_argument("--images", metavar="FOLDER", help="pictures for data loading")
    parser.add_argument(
        "--compile", action="store_true", help="measure compiled models too (minutes to start)"
    )
    args = parser.parse_args()
    try:
        benchmarks = choose(args.only)
        device = resolve_device(args.device)
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    if args.size and min(args.size) < 32:
        parser.error("--size: images must be 32 pixels high and wide at least")
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
