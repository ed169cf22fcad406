"""How well the reward of a short trial foretells the AP of a full training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from yacs.config import CfgNode

from ..config import ConfigError
from ..engine.monitor import NonFiniteLossError
from ..files import replacing, write_json
from .journal import read_records
from .records import TrialRecord, ranked
from .report import kendall_tau
from .select import check_full_training, full_config, train_in_full

logger = logging.getLogger(__name__)


def spread(records: Sequence[TrialRecord], count: int) -> list[TrialRecord]:
    """`count` of the complete trials, with rewards as evenly spaced as they come; worst first.

    The range is that of the middle 98 % of the trials, so that no outlier takes half of it.
    """
    rising = ranked(records)[::-1]
    if len(rising) < count:
        raise ConfigError(f"only {len(rising)} architectures were tried to the end, not {count}")
    rewards = np.array([record.result.reward for record in rising])
    free = np.ones(len(rising), dtype=bool)
    chosen = []
    for wanted in np.linspace(*np.quantile(rewards, (0.01, 0.99)), count):
        place = np.where(free, np.abs(rewards - wanted), np.inf).argmin()
        free[place] = False
        chosen.append(rising[place])
    return sorted(chosen, key=lambda record: record.result.reward)


def check_agreement(
    cfg: CfgNode, device: torch.device, folder: Path, stage: str, count: int
) -> float:
    """Train `count` architectures of a search in full, spread over the range of its rewards.

    Leaves ``agreement/<stage>.json`` and ``.png`` in `folder`; a training that is finished is not
    done again, so a check that was stopped goes on. One that diverges is left out.

    Args:
        cfg: of the search; the full trainings have SEARCH.SELECT.OVERRIDES on top.
        device: of the trainings.
        folder: of the search.
        stage: whose trials are checked.
        count: of architectures, at least two.

    Returns:
        Kendall's tau (b) between reward and AP.

    Raises:
        ConfigError, DataError: fewer than two, more than were tried to the end, or something that
            would stop a full training.
        NonFiniteLossError: fewer than two of the full trainings came to their end.
    """
    if count < 2:
        raise ConfigError(f"{count} architectures have no order: compare at least two")
    chosen = spread(read_records(folder / "search.db", stage), count)
    full = full_config(cfg, stage, chosen[0].genotype, folder)
    # Later, what the trainings start from may be gone without harm.
    begun = (folder / "agreement" / stage).exists()
    check_full_training(full, device, weights=not begun)
    rows = []
    for record in chosen:
        place = folder / "agreement" / stage / str(record.index)
        try:
            metrics = train_in_full(full_config(cfg, stage, record.genotype, place), device)
        except (NonFiniteLossError, torch.OutOfMemoryError) as error:
            logger.warning("trial %d is left out: %s", record.index, error)
            continue
        rows.append(
            {"trial": record.index, "genotype": record.genotype, "reward": record.result.reward}
            | metrics
        )
        logger.info("trial %d: reward %.4f, AP %.4f", record.index, rows[-1]["reward"],
                    rows[-1]["AP"])  # fmt: skip
    if len(rows) < 2:
        raise NonFiniteLossError(
            f"{len(rows)} of {count} full trainings came to their end, too few to compare; see the "
            "log, and change the solver by SEARCH.SELECT.OVERRIDES"
        )
    tau = kendall_tau([row["reward"] for row in rows], [row["AP"] for row in rows])
    write_json(folder / "agreement" / f"{stage}.json", {"tau": tau, "rows": rows}, indent=2)
    with replacing(folder / "agreement" / f"{stage}.png") as temporary:
        plot_agreement(rows, tau, f"{stage} stage, {cfg.DATASETS.TEST[0]}").savefig(temporary)
    return tau


def plot_agreement(rows: Sequence[dict], tau: float, title: str) -> Figure:
    """Reward of the trials against AP after full training."""
    figure = Figure(figsize=(5.2, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.scatter([row["reward"] for row in rows], [row["AP"] for row in rows], color="#2f6fb5",
                 zorder=3)  # fmt: skip
    axis.set_xlabel("reward of the trial")
    axis.set_ylabel("AP after full training")
    axis.set_title(f"{title}: Kendall's tau {tau:.2f} over {len(rows)}")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
