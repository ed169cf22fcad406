"""Compare search strategies by simulated searches: trials until one of the best is found.

  python tools/search_net.py --config-file configs/nas/demo_table.yaml      # makes a table
  python tools/compare_strategies.py --config-file configs/nas/demo_table.yaml \\
      --table docs/demo_head_table.csv --output docs/strategies.png
  python tools/compare_strategies.py --config-file configs/nas/voc_R_50_fpn.yaml --stage fpn \\
      --trials 800 --top 0.003 --output strategies_fpn.png                  # synthetic rewards

Rewards are either those of a table (the trials_*.csv of a search that tried the whole space) or
synthetic, with others for each seed. Writes a plot, and a JSON file beside it with the number of
trials of each search, by strategy.
"""

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
from nasfcos.search.plots import draw_first_hits
from nasfcos.search.records import COMPLETE, TrialResult
from nasfcos.search.simulate import (
    SyntheticRewards,
    first_hit,
    first_hits,
    goal_size,
    replay_pruning,
    stopped_hit,
    uniform_hits,
)
from nasfcos.search.space import Space, build_space, given_cells
from nasfcos.search.stage import Pruning
from nasfcos.search.strategies import build_strategy

logger = logging.getLogger("nasfcos.compare_strategies")

STRATEGIES = ("ppo", "evolution", "random")
MAX_SEQUENCES = 10**6
"""Largest space for which a table is accepted."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--table", metavar="CSV", help="table of true rewards; without it, rewards are synthetic"
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=800,
        help="trials of a search on synthetic rewards (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        choices=("fpn", "head"),
        default="head",
        help="search space: FPNs, or heads on the FPN of MODEL.GENOTYPE (default: %(default)s)",
    )
    parser.add_argument(
        "--top",
        type=float,
        default=0.01,
        help="share of the architectures that count as the best (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=20, help="searches per strategy (default: %(default)s)"
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="file of the plot")
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
        if args.table:
            rows = read_rows(args.table, space)
            max_trials = len({row["key"] for row in rows})
            best = goal_size(max_trials, args.top)
            goal = f"the best {best} of {max_trials} architectures"
            hits = on_table(cfg, space, rows, args.top, args.seeds)
        else:
            max_trials, goal = args.trials, f"the best {100 * args.top:g} % of the architectures"
            hits = on_synthetic_rewards(cfg, space, args.top, args.seeds, max_trials)
        for name, trials in hits.items():
            logger.info("%s: median %g trials, %s", name, median(trials), sorted(trials))
        with replacing(args.output) as temporary:
            temporary.write_bytes(draw_first_hits(hits, max_trials, goal))
        write_json(Path(args.output).with_suffix(".json"), hits)

    return run(job)


def strategy_configs(cfg: CfgNode) -> dict[str, CfgNode]:
    """The config with each strategy, by the strategy's name."""
    return {
        name: override_config(cfg, ["SEARCH.STRATEGY", name], "the comparison")
        for name in STRATEGIES
    }


def on_synthetic_rewards(
    cfg: CfgNode, space: Space, top: float, seeds: int, max_trials: int
) -> dict[str, list[int]]:
    """Trials until a search finds one of the best, on synthetic rewards of its own seed.

    Args:
        cfg: config of the strategies.
        space: search space.
        top: share of the architectures that count as the best.
        seeds: number of searches per strategy.
        max_trials: trials of a search; one that has not found any by then gives `max_trials + 1`.

    Returns:
        Trials of each search, by strategy.
    """
    configs = strategy_configs(cfg)
    hits = {name: [] for name in configs}
    for seed in range(seeds):
        rewards = SyntheticRewards(space, seed)
        best = rewards.best(top)
        for name, chosen in configs.items():
            strategy = build_strategy(chosen, space, seed)
            trials = first_hit(space, rewards, strategy, best, cfg.SEARCH.BATCH, max_trials)
            hits[name].append(trials)
            logger.info("seed %d, %s: %d trials", seed, name, trials)
    return hits


def on_table(
    cfg: CfgNode, space: Space, rows: list[dict[str, str]], top: float, seeds: int
) -> dict[str, list[int]]:
    """Trials until a search finds one of the best of a table.

    Logs what early stopping would change, if the config has rungs.

    Args:
        cfg: config of the strategies.
        space: search space.
        rows: the table, as `read_rows` returns it.
        top: share of the architectures that count as the best.
        seeds: number of searches per strategy.

    Returns:
        Trials of each search, by strategy; also those of ideal random draws without repetition.
    """
    table = {row["key"]: float(row["reward"]) for row in rows}
    configs = strategy_configs(cfg)
    hits = {
        name: first_hits(
            space, table, partial(build_strategy, chosen, space), range(seeds), top,
            cfg.SEARCH.BATCH, len(table),
        )
        for name, chosen in configs.items()
    }  # fmt: skip
    goal = goal_size(len(table), top)
    if cfg.SEARCH.PRUNING.RUNGS:
        log_early_stopping(cfg, rows)
        best = sorted(table.values(), reverse=True)[goal - 1]
        for name, chosen in configs.items():
            log_learning(chosen, space, rows, best, seeds, median(hits[name]))
    hits["random over graphs, exact"] = uniform_hits(len(table), goal, seeds)
    return hits


def read_rows(path: str, space: Space) -> list[dict[str, str]]:
    """The complete trials in the CSV file of a search that tried the whole space.

    Raises:
        ConfigError: the space is too large, or the file lacks columns or architectures.
    """
    if space.size() > MAX_SEQUENCES:
        raise ConfigError(
            f"the {space.stage} space has {space.size():.2g} architectures, so no table can "
            "have them all: make SEARCH.SPACE small, as configs/nas/demo_table.yaml does, or leave "
            "--table out"
        )
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"status", "key", "reward", "curve"} - set(reader.fieldnames or ()):
            raise ConfigError(
                f"{path} is no table of trials: it has no column {', '.join(sorted(missing))}"
            )
        rows = [row for row in reader if row["status"] == "complete"]
    if missing := {space.key(choices) for choices in space} - {row["key"] for row in rows}:
        raise ConfigError(
            f"{path} lacks {len(missing)} of the graphs of the {space.stage} space: raise "
            f"SEARCH.TRIALS.{space.stage.upper()} and go on with the search that made it"
        )
    return rows


def log_early_stopping(cfg: CfgNode, rows: list[dict[str, str]]) -> None:
    """Log what SEARCH.PRUNING would have done to the search that made the table."""
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
    """Log what searches spend for the goal that stop trials early, and learn from those too.

    Args:
        cfg: config with the strategy.
        space: search space.
        rows: the table.
        goal: reward to reach.
        seeds: number of searches.
        without: median number of trials of searches without early stopping.
    """
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
    """SEARCH.PRUNING with the default start: the search that makes a table never stops trials."""
    return Pruning(tuple(cfg.SEARCH.PRUNING.RUNGS), cfg.SEARCH.PRUNING.KEEP)


if __name__ == "__main__":
    sys.exit(main())
