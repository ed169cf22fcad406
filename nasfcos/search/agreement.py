"""What the reward of a short trial is worth: does it foretell AP, and does it come again?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..engine.monitor import NonFiniteLossError
from ..files import replacing, write_json
from .executors import WorkerLost, build_executor
from .journal import JOURNAL, read_records
from .plots import draw_agreement
from .records import COMPLETE, TrialJob, TrialRecord, kendall_tau, ranked
from .select import check_full_training, full_config, train_in_full
from .tasks import reopen_task

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
        ConfigError, DataError: fewer than two, more than were tried to the end, something that
            would stop a full training, or fewer than two of them came to their end.
    """
    chosen = _chosen(folder, stage, count)
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
        raise ConfigError(
            f"{len(rows)} of {count} full trainings came to their end, too few to compare; see the "
            "log, and change the solver by SEARCH.SELECT.OVERRIDES"
        )
    title = f"{stage} stage, {cfg.DATASETS.TEST[0]}"
    return _compare(folder, stage, rows, "AP", "AP after full training", title)


def check_repeats(
    cfg: CfgNode, device: torch.device, folder: Path, stage: str, count: int
) -> float:
    """Try `count` architectures of a search again, with other first weights and other batches.

    The order of rewards that come in another order is luck. Where it is for most, trials are too
    short. Leaves ``agreement/<stage>_again.json`` and ``.png`` in `folder`.

    Args:
        cfg: of the search; SEARCH.PROXY may be changed, say to see whether shorter trials would do.
        device: of the main process.
        folder: of the search, which is its OUTPUT_DIR.
        stage: whose trials are repeated.
        count: of architectures, at least two.

    Returns:
        Kendall's tau (b) between the two rewards.

    Raises:
        ConfigError, DataError: fewer than two, more than were tried to the end, settings that
            cannot be, or fewer than two came to their end again.
    """
    chosen = {record.index: record for record in _chosen(folder, stage, count)}
    task = reopen_task(cfg, device, stage)
    jobs = [TrialJob(index, record.genotype, repeat=1) for index, record in chosen.items()]
    rows = []
    with build_executor(cfg, task) as executor:
        for job, result in executor.run(jobs):
            if isinstance(result, WorkerLost) or result.status != COMPLETE:
                logger.warning("trial %d is left out: %s", job.index, result.reason)
                continue
            before = chosen[job.index].result.reward
            rows.append(
                {"trial": job.index, "genotype": job.genotype, "reward": before}
                | {"again": result.reward}
            )
            logger.info("trial %d: reward %.4f, again %.4f (%d of %d)", job.index, before,
                        result.reward, len(rows), count)  # fmt: skip
    if len(rows) < 2:
        raise ConfigError(
            f"{len(rows)} of {count} trials came to their end again, too few to compare; see the "
            "reasons above. If losses were not finite, a lower SEARCH.PROXY.LR may help"
        )
    rows.sort(key=lambda row: row["reward"])
    title = f"{stage} stage, {cfg.DATASETS.TRAIN[0]}"
    return _compare(folder, f"{stage}_again", rows, "again", "reward when re-evaluated", title)


def _chosen(folder: Path, stage: str, count: int) -> list[TrialRecord]:
    if count < 2:
        raise ConfigError(f"{count} architectures have no order: compare at least two")
    return spread(read_records(folder / JOURNAL, stage), count)


def _compare(
    folder: Path, name: str, rows: list[dict], key: str, label: str, title: str
) -> float:
    """Kendall's tau between the rewards and another figure; leaves both, and a plot."""
    rewards, others = ([row[column] for row in rows] for column in ("reward", key))
    tau = kendall_tau(rewards, others)
    write_json(folder / "agreement" / f"{name}.json", {"tau": tau, "rows": rows}, indent=2)
    pairs = list(zip(rewards, others, strict=True))
    same_scale = key == "again"
    picture = draw_agreement({title: pairs}, "reward of the trial", label, same_scale)
    with replacing(folder / "agreement" / f"{name}.png") as temporary:
        temporary.write_bytes(picture)
    return tau
