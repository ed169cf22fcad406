"""Compare search strategies on a table of true rewards: trials until the best are found.

python tools/search_net.py --config-file configs/nas/demo_table.yaml     # makes the table
python tools/compare_strategies.py --config-file configs/nas/demo_table.yaml \
    --table docs/demo_head_table.csv --output docs/strategies.png
"""

import csv
import logging
import sys
from statistics import median

from nasfcos.config import load_config, override_config
from nasfcos.engine.launch import USER_ERRORS, argument_parser
from nasfcos.engine.logging import log_to_console
from nasfcos.evaluation.files import replacing, write_json
from nasfcos.genotype import Genotype
from nasfcos.search.simulate import first_hits, plot_first_hits
from nasfcos.search.space import build_space
from nasfcos.search.strategies import build_strategy

logger = logging.getLogger("nasfcos.compare")

STRATEGIES = ("ppo", "evolution", "random")


def main() -> int:
    parser = argument_parser(
        "Simulate searches with each strategy on a table of rewards (the trials_*.csv of a search "
        "that tried the whole space), and draw how many trials each needs to find the best."
    )
    parser.add_argument("--table", required=True, metavar="CSV")
    parser.add_argument("--stage", choices=("fpn", "head"), default="head")
    parser.add_argument("--top", type=float, default=0.01, help="the goal, a share of the graphs")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", required=True, metavar="PNG", help="a JSON file goes beside it")
    args = parser.parse_intermixed_args()
    log_to_console()
    try:
        cfg = load_config(args.config_file, args.overrides)
        cells = Genotype.parse(cfg.MODEL.GENOTYPE).cells if args.stage == "head" else None
        space = build_space(cfg, args.stage, cells)
        table = read_table(args.table)
        hits = {}
        for name in STRATEGIES:
            chosen = override_config(cfg, ["SEARCH.STRATEGY", name], "the comparison")
            hits[name] = first_hits(
                space,
                table,
                lambda seed, chosen=chosen: build_strategy(chosen, space, seed),
                range(args.seeds),
                args.top,
                cfg.SEARCH.BATCH,
                len(table),
            )
            logger.info("%s: median %g trials %s", name, median(hits[name]), sorted(hits[name]))
        goal = max(1, int(args.top * len(table)))
        figure = plot_first_hits(hits, len(table), goal)
        with replacing(args.output) as temporary:
            figure.savefig(temporary)
        write_json(f"{args.output.removesuffix('.png')}.json", hits)
    except USER_ERRORS as error:
        logger.error("%s", error)
        return 2
    return 0


def read_table(path: str) -> dict[str, float]:
    """Reward by key, of the complete trials of a search's CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "complete"]
    return {row["key"]: float(row["reward"]) for row in rows}


if __name__ == "__main__":
    sys.exit(main())
