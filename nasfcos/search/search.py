"""A whole search: prepare, search each stage, select; stopped and resumed anywhere."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.inheritance import copy_with_bases, ordinary_base
from ..config.run_file import RUN_CONFIG, check_run_config, write_run_config
from ..engine import distributed
from ..engine.train import check_training
from ..genotype import Cell, Genotype
from ..locks import only_one
from ..signals import StopRequest
from ..transfer import free_gpu_memory
from .best import best_weights, write_best
from .cache import FeatureCache, build_caches
from .cost import build_objective
from .executors import Executor, build_executor
from .journal import JOURNAL, Journal, check_settings, read_records, read_settings, writing
from .prepare import backbone_changes, prepare_backbone, prepare_config
from .records import TrialRecord, ranked
from .report import StageReport, write_report
from .retrials import try_again
from .select import (
    RANKING,
    Selected,
    by_merit,
    check_full_training,
    full_config,
    outdated,
    read_ranking,
    select,
    write_ranking,
)
from .settings import FEATURES, FPN, PYRAMIDS, SPLIT, fixed_settings
from .space import Space, build_space, given_cells, graph_key, starting_choices
from .split import Split, plan_split
from .stage import Pruning, run_stage
from .stage_progress import StageProgress
from .status import FINISHED, LOCK_FILE, format_status, write_progress
from .strategies import build_strategy
from .tasks import build_task, cache_folder, head_caches

logger = logging.getLogger(__name__)


def search(
    cfg: CfgNode,
    device: torch.device,
    config_file: str | os.PathLike[str],
    overrides: Sequence[Any] = (),
    resume: bool = False,
) -> Path:
    """Search an architecture as the config says.

    Args:
        cfg: the config tree.
        device: of the preparation, of trials in this process, and of the full trainings.
        config_file: that `cfg` was loaded from; ``best.yaml`` inherits from it, or from what it
            inherits from itself where that is an ordinary config.
            A copy of that base is kept with it.
        overrides: KEY VALUE pairs that `cfg` has on top of it.
        resume: go on with the search in OUTPUT_DIR, if there is one.

    Returns:
        The path of ``best.yaml``; its weights lie beside it as ``best.pth``.

    Raises:
        ConfigError, DataError, JournalError: what was asked for cannot be done.
        Interrupted: by SIGTERM or SIGINT; nothing that was finished is lost.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            "a search is started as one process; SEARCH.EXECUTOR local or ray runs its trials on "
            "several GPUs or machines"
        )
    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / JOURNAL).exists():
        check_run_config(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another search is running in OUTPUT_DIR {folder}; see it with --status"
    with (
        only_one(folder / LOCK_FILE, busy),  # --status takes it for a moment
        StopRequest() as stop,
        stop.heeded_at_once(),
    ):
        if (folder / JOURNAL).exists() and not resume:
            raise ConfigError(
                f"OUTPUT_DIR {folder} holds a search: go on with it by --resume, or name another "
                "folder"
            )
        return _Search(cfg, device, Path(config_file), overrides).run()


class _Search:
    """The stages of one search, and what they hand on."""

    def __init__(
        self, cfg: CfgNode, device: torch.device, config_file: Path, overrides: Sequence[Any]
    ) -> None:
        self.cfg = cfg
        self.device = device
        self.config_file = config_file
        self.overrides = overrides
        self.folder = Path(cfg.OUTPUT_DIR)
        self.reports: dict[str, StageReport] = {}
        self.standing: dict[str, list[TrialRecord]] = {}
        self.ranking: list[Selected] = []
        self._reported = 0.0

    def run(self) -> Path:
        cfg, folder = self.cfg, self.folder
        cells = self._given_cells()
        self._check_configs()
        split = plan_split(cfg, folder / "split", cfg.SEED)
        self._check_changes(split, cells)
        write_run_config(cfg)
        split.write()
        # Now, for these files may be changed as long as the search runs.
        base, keys = ordinary_base(self.config_file)
        base = copy_with_bases(base, folder / "base")
        proxy_cfg = split.cfg
        write_progress(folder, "preparing the backbone")
        detector = prepare_backbone(proxy_cfg, self.device, folder / "backbone")
        write_progress(folder, "caching the backbone's features")
        caches = build_caches(proxy_cfg, detector, cache_folder(cfg), self._check_features)
        del detector

        best: Selected | None = None
        for stage in cfg.SEARCH.STAGES:
            stage_caches = caches
            settings = fixed_settings(cfg, stage) | {SPLIT: split.name} | _names(FEATURES, caches)
            if stage == "head":
                settings[FPN] = Genotype(cells).to_list()
                self._check("head", settings)
                write_progress(folder, "training the FPN of the head stage")
                stage_caches = head_caches(proxy_cfg, caches, cells, self.device)
                settings |= _names(PYRAMIDS, stage_caches)
            space = build_space(cfg, stage, cells)
            self._search_stage(proxy_cfg, stage, space, stage_caches, settings)
            best = self._select(stage, last=stage == cfg.SEARCH.STAGES[-1])
            cells = self._cells_below_head() or Genotype.parse(best.genotype).cells
        best, weights = best_weights(cfg, self.device, folder, best)
        if best is not self.ranking[0]:
            self.ranking[0] = best
            write_ranking(folder / RANKING, self.ranking)
        keys = [*keys, *map(str, self.overrides[::2])]
        path = write_best(cfg, folder, best, weights, base, keys)
        write_progress(folder, FINISHED)
        self._report(force=True)
        logger.info("the best architecture is in %s, the report in %s", path, folder / "report")
        return path

    def _cells_below_head(self) -> tuple[Cell, ...] | None:
        """The FPN that trials of the head stand on, if it has any: it is not chosen anew, whatever
        further trials and full trainings say."""
        if not self._check("head", {}):
            return None
        return Genotype.parse(read_settings(self.folder / JOURNAL, "head")[FPN]).cells

    def _given_cells(self) -> tuple[Cell, ...] | None:
        """The FPN of the head stage where the FPN is not searched."""
        return None if "fpn" in self.cfg.SEARCH.STAGES else given_cells(self.cfg)

    def _check_configs(self) -> None:
        """Find mistakes in the settings of later stages now, not after days."""
        prepared = prepare_config(self.cfg, self.folder)
        check_training(prepared, self.device, prepared.TEST.EVAL_PERIOD > 0)
        for stage in self.cfg.SEARCH.STAGES:
            example = [[[0, 1, 0, 0, 0]]] * 3 + ([[0], [0]] if stage == "head" else [])
            full = full_config(self.cfg, stage, example, self.folder)
            starting_choices(self.cfg, build_space(self.cfg, stage, Genotype.parse(example).cells))
        for cfg, where in (
            (self.cfg, ""),
            (prepared, "SEARCH.PREPARE.OVERRIDES: "),
            (full, "SEARCH.SELECT.OVERRIDES: "),
        ):
            if cfg.SEED < 0:
                raise ConfigError(
                    f"{where}SEED is -1, but a search that can be resumed needs one of its own"
                )
        # Later, what the trainings start from may be gone without harm.
        check_full_training(full, self.device, weights=not (self.folder / JOURNAL).exists())

    def _check_changes(self, split: Split, cells: tuple[Cell, ...] | None) -> None:
        """Refuse to go on where finished trials would not count, while nothing is touched yet."""
        begun = [s for s in self.cfg.SEARCH.STAGES if self._check(s, fixed_settings(self.cfg, s))]
        for stage in begun:
            self._check(stage, {SPLIT: split.name})
        if cells is not None:
            self._check("head", {FPN: Genotype(cells).to_list()})
        backbone = self.folder / "backbone"
        if not begun or self.cfg.SEARCH.PREPARE.WEIGHT:
            return
        if changes := backbone_changes(prepare_config(split.cfg, backbone), backbone):
            raise ConfigError(
                f"the trials in {self.folder / JOURNAL} stand on the backbone in {backbone}, which "
                f"was trained with other settings: {'; '.join(changes)}. Set them as they were to "
                "go on (SEARCH.SELECT.OVERRIDES is for what shall differ in the full trainings), "
                "or name another OUTPUT_DIR (and leave out --resume)"
            )

    def _check_features(self, *names: str) -> None:
        for stage in self.cfg.SEARCH.STAGES:
            self._check(stage, dict(zip(FEATURES, names, strict=True)))

    def _check(self, stage: str, settings: dict[str, Any]) -> bool:
        return check_settings(self.folder / JOURNAL, stage, settings)

    def _search_stage(
        self,
        cfg: CfgNode,
        stage: str,
        space: Space,
        caches: tuple[FeatureCache, FeatureCache],
        fixed: dict[str, Any],
    ) -> None:
        if self.device.type == "cuda":  # the trials may run in other processes
            free_gpu_memory()
        settings = cfg.SEARCH
        trials = settings.TRIALS[stage.upper()]
        logger.info("%s stage: %d trials by %s\n%s", stage, trials, settings.STRATEGY,
                    space.describe())  # fmt: skip
        task = build_task(cfg, stage, caches, self.device)
        journal = Journal(self.folder / JOURNAL, space, settings.RETRIES, fixed)
        start = starting_choices(cfg, space)
        self.reports[stage] = StageReport(stage, [], space.decisions, [], settings.STRATEGY, trials)
        with (
            writing(journal.path),
            build_executor(cfg, task) as executor,
            StageProgress(self.folder, journal, trials, self.reports[stage], self._report) as note,
        ):
            run_stage(
                journal,
                space,
                build_strategy(cfg, space, cfg.SEED, start),
                executor,
                trials,
                settings.BATCH,
                build_objective(cfg, stage),
                Pruning(
                    tuple(settings.PRUNING.RUNGS), settings.PRUNING.KEEP, settings.PRUNING.STARTUP
                ),
                note,
                start,
            )
            self.standing[stage] = self._rank(stage, journal, executor, trials)

    def _rank(
        self, stage: str, journal: Journal, executor: Executor, trials: int
    ) -> list[TrialRecord]:
        """The complete trials of a stage, best first. The best of them, and what the search started
        from, are tried again."""
        settings = self.cfg.SEARCH.SELECT
        best = ranked([record for record in journal.records() if record.index < trials])
        if not settings.RETRIALS:
            return best
        count = max(settings.CANDIDATES, settings[stage.upper()])
        given = self._given_decoder(stage)
        key = None if given is None else graph_key(given)
        chosen = best[:count] + [record for record in best[count:] if record.key == key]

        def note(done: int, total: int) -> None:
            phase = f"trying the best of the {stage} stage again"
            write_progress(self.folder, phase, done=done, total=total)

        again = try_again(journal, executor, chosen, settings.RETRIALS, note)
        failed = [record for record in again if math.isnan(record.objective)]
        tried = {record.index for record in chosen}
        others = [record for record in best if record.index not in tried]
        return again[: len(again) - len(failed)] + others + failed

    def _select(self, stage: str, last: bool) -> Selected:
        begun = not last and self._check("head", {})
        if begun:  # then FPNs are not trained again
            rows = read_ranking(self.folder / RANKING)
            if chosen := [row for row in rows if row.stage == stage]:
                self.ranking = sorted(map(self._without_old_figures, chosen), key=by_merit)
                return self.ranking[0]
        count = self.cfg.SEARCH.SELECT[stage.upper()]
        train_them = last or count > 1 and not begun
        before = self.ranking

        def note(rows: list[Selected]) -> None:
            self.ranking = sorted(before + rows, key=by_merit)
            write_ranking(self.folder / RANKING, self.ranking)
            self._report(force=True)

        rows = select(
            self.cfg,
            self.device,
            self.folder,
            stage,
            self.standing[stage],
            count,
            train_them,
            note,
            self._given_decoder(stage) if last else None,
        )
        if not train_them:
            note(rows)
        return rows[0] if not last else self.ranking[0]

    def _without_old_figures(self, row: Selected) -> Selected:
        """Without an AP of another schedule or other data, which says nothing beside today's."""
        if not row.folder:
            return row
        run = self.folder / row.folder
        changes = outdated(full_config(self.cfg, row.stage, row.genotype, run, row.best_seed))
        if not changes:
            return row
        logger.warning("the AP of %s does not count any more, for these have changed: %s", run,
                       "; ".join(changes))  # fmt: skip
        return replace(row, AP=None, AP50=None, APs=[], folder="")

    def _given_decoder(self, stage: str) -> Genotype | None:
        """What the search started from, with the head if `stage` searches that."""
        if not self.cfg.SEARCH.FROM_GENOTYPE:
            return None
        given = Genotype.parse(self.cfg.MODEL.GENOTYPE)
        return given if stage == "head" else Genotype(given.cells)

    def _report(self, force: bool = False) -> bool:
        """Refresh the report, unless it is younger than SEARCH.REPORT_PERIOD; says whether."""
        if not force and time.monotonic() - self._reported < self.cfg.SEARCH.REPORT_PERIOD:
            return False
        try:
            write_report(self.folder / "report", list(self.reports.values()), self.ranking)
        except Exception:  # a picture is no reason to end a search
            logger.exception("the report could not be written")
        self._reported = time.monotonic()
        return True


def search_status(cfg: CfgNode) -> str:
    """How far the search in OUTPUT_DIR is, in words; it may be running or not."""
    folder = Path(cfg.OUTPUT_DIR)
    path = folder / JOURNAL
    try:  # its own settings, not those of the command that asks
        settings = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))["SEARCH"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # it has hardly begun
        settings = cfg.SEARCH
    stages = []
    for stage in settings["STAGES"]:
        trials = settings["TRIALS"][stage.upper()]
        records = read_records(path, stage) if path.exists() else []
        stages.append((stage, [record for record in records if record.index < trials], trials))
    return format_status(folder, stages)


def _names(settings: Sequence[str], caches: Sequence[FeatureCache]) -> dict[str, str]:
    return {name: cache.folder.name for name, cache in zip(settings, caches, strict=True)}
