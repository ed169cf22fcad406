"""Compare two reports of tools/benchmark.py: what became slower or faster?

  python tools/compare_benchmarks.py old.json new.json --threshold 1.1

Compares ratios to the main rival where there is one, so that the speed of the machine matters
little, and otherwise shares of a measured limit or seconds. The exit code is 1 if something became
slower or fails now, and 2 if a file cannot be used.
"""

import argparse
import sys

from nasfcos.benchmark.compare import (
    FAILS,
    SLOWER,
    ReportError,
    compare,
    format_changes,
    machine_differences,
    read_report,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD.json", help="report to compare with")
    parser.add_argument("new", metavar="NEW.json", help="report to judge")
    parser.add_argument(
        "--threshold", type=float, default=1.1, metavar="FACTOR",
        help="smallest factor that counts as a change (default: 1.1)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.threshold < 1:
        parser.error("--threshold must be at least 1")
    try:
        old, new = read_report(args.old), read_report(args.new)
    except ReportError as error:
        parser.error(str(error))
    if differences := machine_differences(old, new):
        print(
            "warning: the reports come from different machines or libraries, so times in seconds "
            "say little about the program:\n  " + "\n  ".join(differences),
            file=sys.stderr,
        )
    changes = compare(old, new, args.threshold)
    print(format_changes(changes, args.threshold))
    return int(any(change.verdict in (SLOWER, FAILS) for change in changes))


if __name__ == "__main__":
    sys.exit(main())
