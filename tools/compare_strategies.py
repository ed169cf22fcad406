"""Compare search strategies on a table of true rewards: trials until the best are found.

python tools/search_net.py --config-file configs/nas/demo_table.yaml     # makes the table
python tools/compare_strategies.py --config-file configs/nas/demo_table.yaml \
    --table docs/demo_head_table.csv --output docs/strategies.png
"""

import csv
import json
import logging
import sys
from pathlib import Path
from statistics import median

from yacs.config import CfgNode

from nasfcos.config import ConfigError, load_config, override_config
from nasfcos.engine.launch import argument_parser, run
from nasfcos.evaluation.files import replacing, write_json
from nasfcos.search.simulate import (
    first_hits,
    goal_size,
    plot_first_hits,
    replay_pruning,
    uniform_hits,
)
from nasfcos.search.space import build_space, given_cells
from nasfcos.search.stage import Pruning
from nasfcos.search.strategies import build_strategy

logger = logging.getLogger("nasfcos.compare")

STRATEGIES = ("ppo", "evolution", "random")
MOST_SEQUENCES = 10**6
"""Larger spaces are refused."""


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
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if not args.output.lower().endswith(".png"):
        parser.error(f"--output must end in .png, not {args.output!r}")

    def job() -> None:
        cfg = load_config(args.config_file, args.overrides)
        cells = given_cells(cfg) if args.stage == "head" else None
        space = build_space(cfg, args.stage, cells)
        if space.size() > MOST_SEQUENCES:
            raise ConfigError(
                f"the {args.stage} space has {space.size():.2g} architectures, so no table can "
                "have them all: make SEARCH.SPACE small, as configs/nas/demo_table.yaml does"
            )
        rows = read_rows(args.table)
        table = {row["key"]: float(row["reward"]) for row in rows}
        if missing := {space.key(c) for c in space} - table.keys():
            raise ConfigError(
                f"{args.table} lacks {len(missing)} of the graphs of the {args.stage} space: raise "
                f"SEARCH.TRIALS.{args.stage.upper()} and go on with the search that made it"
            )
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
        if cfg.SEARCH.PRUNING.RUNGS:
            log_early_stopping(cfg, rows)
        goal = goal_size(len(table), args.top)
        hits["random over graphs, exact"] = uniform_hits(len(table), goal, args.seeds)
        for name, trials in hits.items():
            logger.info("%s: median %g trials, %s", name, median(trials), sorted(trials))
        figure = plot_first_hits(hits, len(table), goal)
        with replacing(args.output) as temporary:
            figure.savefig(temporary)
        write_json(Path(args.output).with_suffix(".json"), hits)

    return run(job)


def read_rows(path: str) -> list[dict[str, str]]:
    """The complete trials of a search's CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"status", "key", "reward", "curve"} - set(reader.fieldnames or ()):
            raise ConfigError(
                f"{path} is no table of trials: it has no column {', '.join(sorted(missing))}"
            )
        return [row for row in reader if row["status"] == "complete"]


def log_early_stopping(cfg: CfgNode, rows: list[dict[str, str]]) -> None:
    """What SEARCH.PRUNING, from its usual start on, would have done to the search of the table."""
    curves = [dict(json.loads(row["curve"])) for row in rows]
    if missing := set(cfg.SEARCH.PRUNING.RUNGS) - set(curves[0]):
        raise ConfigError(
            f"SEARCH.PRUNING.RUNGS has {sorted(missing)}, but the table's trials were judged at "
            f"{sorted(curves[0])} only"
        )
    outcome = replay_pruning(
        [float(row["reward"]) for row in rows],
        curves,
        Pruning(tuple(cfg.SEARCH.PRUNING.RUNGS), cfg.SEARCH.PRUNING.KEEP),
        cfg.SEARCH.PROXY.ITERATIONS,
        cfg.SEARCH.BATCH,
    )
    logger.info(
        "early stopping at %s: %d of %d trials stopped, %.0f%% of the iterations saved; %.0f%% of "
        "the best tenth kept; the best reward lower by %.4f",
        tuple(cfg.SEARCH.PRUNING.RUNGS), outcome.stopped, len(rows), 100 * outcome.saved,
        100 * outcome.best_kept, 0.0 - outcome.best_found,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
