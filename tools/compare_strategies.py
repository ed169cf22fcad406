"""Compare search strategies on known rewards: trials until one of the best is found.

python tools/search_net.py --config-file configs/nas/demo_table.yaml     # makes a table of rewards
python tools/compare_strategies.py --config-file configs/nas/demo_table.yaml \
    --table docs/demo_head_table.csv --output docs/strategies.png
python tools/compare_strategies.py --config-file configs/nas/voc_R_50_fpn.yaml --stage fpn \
    --trials 800 --top 0.003 --output strategies_fpn.png                 # made-up rewards
"""

import argparse
import csv
import json
import logging
import sys
from functools import partial
from pathlib import Path
from statistics import median

from yacs.config import CfgNode

from nasfcos.config import ConfigError, load_config, override_config
from nasfcos.engine.launch import argument_parser, run
from nasfcos.files import replacing, write_json
from nasfcos.search.records import COMPLETE, TrialResult
from nasfcos.search.simulate import (
    SyntheticRewards,
    first_hit,
    first_hits,
    goal_size,
    draw_first_hits,
    replay_pruning,
    stopped_hit,
    uniform_hits,
)
from nasfcos.search.space import Space, build_space, given_cells
from nasfcos.search.stage import Pruning
from nasfcos.search.strategies import build_strategy

logger = logging.getLogger("nasfcos.compare_strategies")

STRATEGIES = ("ppo", "evolution", "random")
MOST_SEQUENCES = 10**6
"""No table has larger spaces."""


def main() -> int:
    parser = argument_parser(
        "Simulate searches with each strategy on a table of rewards (the trials_*.csv of a search "
        "that tried the whole space) or on made-up ones, and draw how many trials each needs to "
        "find one of the best."
    )
    parser.add_argument("--table", metavar="CSV", help="true rewards; without it they are made up")
    parser.add_argument("--trials", type=int, default=800, help="of a search on made-up rewards")
    parser.add_argument("--stage", choices=("fpn", "head"), default="head")
    parser.add_argument("--top", type=float, default=0.01, help="the goal, a share of the graphs")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", required=True, metavar="PNG", help="a JSON file goes beside it")
    args = parser.parse_intermixed_args()
    if args.seeds < 1 or args.trials < 1:
        parser.error("--seeds and --trials must be at least 1")
    if not 0 < args.top <= 1:
        parser.error(f"--top is a share of the graphs, above 0 and up to 1, not {args.top:g}")
    if not args.output.lower().endswith(".png"):
        parser.error(f"--output must end in .png, not {args.output!r}")

    def job() -> None:
        cfg = load_config(args.config_file, args.overrides)
        cells = given_cells(cfg) if args.stage == "head" else None
        space = build_space(cfg, args.stage, cells)
        strategies = {
            name: override_config(cfg, ["SEARCH.STRATEGY", name], "the comparison")
            for name in STRATEGIES
        }
        if args.table:
            hits, max_trials, goal = on_table(args, cfg, space, strategies)
        else:
            max_trials, goal = args.trials, f"the best {100 * args.top:g} %"
            hits = {name: [] for name in strategies}
            for seed in range(args.seeds):
                rewards = SyntheticRewards(space, seed)
                best = rewards.best(args.top)
                for name, chosen in strategies.items():
                    strategy = build_strategy(chosen, space, seed)
                    trials = first_hit(
                        space, rewards, strategy, best, cfg.SEARCH.BATCH, max_trials
                    )
                    hits[name].append(trials)
                    logger.info("seed %d, %s: %d trials", seed, name, trials)
        for name, trials in hits.items():
            logger.info("%s: median %g trials, %s", name, median(trials), sorted(trials))
        figure = draw_first_hits(hits, max_trials, goal)
        with replacing(args.output) as temporary:
            figure.savefig(temporary)
        write_json(Path(args.output).with_suffix(".json"), hits)

    return run(job)


def on_table(
    args: argparse.Namespace, cfg: CfgNode, space: Space, strategies: dict[str, CfgNode]
) -> tuple[dict[str, list[int]], int, str]:
    """Searches on a table: hits by strategy, how many graphs there are, and the goal in words."""
    if space.size() > MOST_SEQUENCES:
        raise ConfigError(
            f"the {args.stage} space has {space.size():.2g} architectures, so no table can "
            "have them all: make SEARCH.SPACE small, as configs/nas/demo_table.yaml does, or leave "
            "--table out"
        )
    rows = read_rows(args.table)
    table = {row["key"]: float(row["reward"]) for row in rows}
    if missing := {space.key(c) for c in space} - table.keys():
        raise ConfigError(
            f"{args.table} lacks {len(missing)} of the graphs of the {args.stage} space: raise "
            f"SEARCH.TRIALS.{args.stage.upper()} and go on with the search that made it"
        )
    hits = {}
    for name, chosen in strategies.items():
        build = partial(build_strategy, chosen, space)
        hits[name] = first_hits(
            space, table, build, range(args.seeds), args.top, cfg.SEARCH.BATCH, len(table)
        )
    goal = goal_size(len(table), args.top)
    if cfg.SEARCH.PRUNING.RUNGS:
        log_early_stopping(cfg, rows)
        best = sorted(table.values(), reverse=True)[goal - 1]
        for name, chosen in strategies.items():
            log_learning(chosen, space, rows, best, args.seeds, median(hits[name]))
    hits["random over graphs, exact"] = uniform_hits(len(table), goal, args.seeds)
    return hits, len(table), f"the best {goal} of {len(table)}"


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
        usual_pruning(cfg),
        cfg.SEARCH.PROXY.ITERATIONS,
        cfg.SEARCH.BATCH,
    )
    logger.info(
        "early stopping at %s: %d of %d trials stopped, %.0f%% of the iterations saved; %.0f%% of "
        "the best tenth kept; the best reward lower by %.4f; Kendall's tau with the rewards at the "
        "end: %s",
        tuple(cfg.SEARCH.PRUNING.RUNGS), outcome.stopped, len(rows), 100 * outcome.saved,
        100 * outcome.best_kept, 0.0 - outcome.best_found,
        ", ".join(f"{tau:.2f} at {rung}" for rung, tau in outcome.taus.items()),
    )  # fmt: skip


def log_learning(
    cfg: CfgNode, space: Space, rows: list[dict[str, str]], goal: float, seeds: int, without: float
) -> None:
    """What searches that stop trials early, and learn from those too, spend for the goal."""
    trials = {
        row["key"]: TrialResult(
            COMPLETE, float(row["reward"]), curve=tuple(map(tuple, json.loads(row["curve"])))
        )
        for row in rows
    }
    spent = [
        stopped_hit(
            space,
            trials,
            build_strategy(cfg, space, seed),
            goal,
            usual_pruning(cfg),
            cfg.SEARCH.PROXY.ITERATIONS,
            cfg.SEARCH.BATCH,
        )
        for seed in range(seeds)
    ]
    logger.info(
        "%s with early stopping: one of the best after iterations of %g whole trials (median), "
        "without it %g", cfg.SEARCH.STRATEGY, median(spent), without,
    )  # fmt: skip


def usual_pruning(cfg: CfgNode) -> Pruning:
    """SEARCH.PRUNING, but from its usual start on: that of a table's search is never."""
    return Pruning(tuple(cfg.SEARCH.PRUNING.RUNGS), cfg.SEARCH.PRUNING.KEEP)


if __name__ == "__main__":
    sys.exit(main())
