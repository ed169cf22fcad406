"""How good the proxy is: does the reward of a short trial predict AP, and is it reproducible?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.run_file import JOURNAL
from ..engine.monitor import NonFiniteLossError
from ..files import replacing, write_json
from .executors import WorkerLost, build_executor
from .full_training import check_full_training, full_config, train_in_full
from .journal import differences, read_records, read_settings
from .plots import draw_agreement
from .records import COMPLETE, TrialJob, TrialRecord, kendall_tau, ranked
from .settings import fixed_settings
from .tasks import reopen_task

logger = logging.getLogger(__name__)


def spread(records: Sequence[TrialRecord], count: int) -> list[TrialRecord]:
    """Choose `count` complete trials whose rewards are spaced as evenly as possible, worst first.

    They cover the range of the middle 98 % of the trials, of which an outlier could take up half.

    Raises:
        ConfigError: there are fewer complete trials.
    """
    rising = ranked(records)[::-1]
    if len(rising) < count:
        raise ConfigError(f"only {len(rising)} architectures were tried to the end, not {count}")
    rewards = np.array([record.result.reward for record in rising])
    free = np.ones(len(rising), dtype=bool)
    chosen = []
    for reward in np.linspace(*np.quantile(rewards, (0.01, 0.99)), count):
        nearest = np.where(free, np.abs(rewards - reward), np.inf).argmin()
        free[nearest] = False
        chosen.append(rising[nearest])
    return sorted(chosen, key=lambda record: record.result.reward)


def check_agreement(
    cfg: CfgNode, device: torch.device, folder: Path, stage: str, count: int
) -> float:
    """Train architectures of a search in full, spread over the range of its rewards.

    Writes ``agreement/<stage>.json`` and ``.png`` in `folder`. Finished trainings are not repeated,
    so a check that was stopped continues. Trainings that diverge are left out.

    Args:
        cfg: config of the search; the full trainings have SEARCH.SELECT.OVERRIDES on top.
        device: device of the trainings.
        folder: directory of the search.
        stage: "fpn" or "head".
        count: number of architectures, at least two.

    Returns:
        Kendall's tau (b) between reward and AP.

    Raises:
        ConfigError, DataError: `count` is below two or above the number of complete trials, a full
            training cannot be done, or fewer than two of them came to their end.
    """
    chosen = _chosen(folder, stage, count)
    full = full_config(cfg, stage, chosen[0].genotype, folder)
    # Once the check has begun, the weight file is not needed any more.
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


def check_repeatability(
    cfg: CfgNode, device: torch.device, folder: Path, stage: str, count: int
) -> float:
    """Re-evaluate architectures of a search, with other initial weights and other batches.

    If the rewards then come in another order, their order is luck, and trials are too short. Writes
    ``agreement/<stage>_again.json`` and ``.png`` in `folder`.

    Args:
        cfg: config of the search; SEARCH.PROXY may differ, say to see whether shorter trials do.
        device: device of trials in this process.
        folder: directory of the search, which is its OUTPUT_DIR.
        stage: "fpn" or "head".
        count: number of architectures, at least two.

    Returns:
        Kendall's tau (b) between the old and the new rewards.

    Raises:
        ConfigError, DataError: `count` is below two or above the number of complete trials, the
            settings are invalid, or fewer than two trials came to their end again.
    """
    chosen = {record.index: record for record in _chosen(folder, stage, count)}
    task = reopen_task(cfg, device, stage)
    _warn_of_changes(cfg, folder, stage)
    jobs = [TrialJob(index, record.genotype, seed_offset=1) for index, record in chosen.items()]
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


def _warn_of_changes(cfg: CfgNode, folder: Path, stage: str) -> None:
    """Tell by which settings new trials differ from those of a search, beside their seed."""
    matter = ("MODEL.", "INPUT.", "SEARCH.PROXY.", "SEARCH.CACHE.")
    before, now = (
        {name: value for name, value in settings.items() if name.startswith(matter)}
        for settings in (read_settings(folder / JOURNAL, stage), fixed_settings(cfg, stage))
    )
    if changes := differences(now, before):
        logger.warning("the new trials differ from those of the search: %s", changes)


def _chosen(folder: Path, stage: str, count: int) -> list[TrialRecord]:
    """The trials of a search to be checked, from its journal."""
    if count < 2:
        raise ConfigError(f"{count} architectures have no order: compare at least two")
    return spread(read_records(folder / JOURNAL, stage), count)


def _compare(
    folder: Path, name: str, rows: list[dict], key: str, label: str, title: str
) -> float:
    """Kendall's tau between the column "reward" and another one; writes the rows and a plot."""
    rewards, others = ([row[column] for row in rows] for column in ("reward", key))
    tau = kendall_tau(rewards, others)
    write_json(folder / "agreement" / f"{name}.json", {"tau": tau, "rows": rows}, indent=2)
    pairs = list(zip(rewards, others, strict=True))
    same_scale = key == "again"
    picture = draw_agreement({title: pairs}, "reward of the trial", label, same_scale)
    with replacing(folder / "agreement" / f"{name}.png") as temporary:
        temporary.write_bytes(picture)
    return tau
