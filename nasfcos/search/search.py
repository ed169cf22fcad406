"""A whole search: prepare, search each stage, select; it can be stopped and resumed anywhere."""

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
from ..config.run_file import JOURNAL, RUN_CONFIG, check_run_config, write_run_config
from ..engine import distributed
from ..engine.checkpoint import checkpoint_files
from ..engine.train import check_training
from ..files import remove_temporary
from ..genotype import Cell, Genotype
from ..locks import only_one
from ..signals import StopRequest
from ..transfer import free_gpu_memory
from .best import best_weights, write_best
from .cache import FeatureCache, build_caches
from .cost import Objective, build_objective
from .executors import Executor, build_executor
from .full_training import check_full_training, full_config, outdated
from .journal import (
    Journal,
    check_settings,
    has_trials,
    read_records,
    read_settings,
    writing,
)
from .prepare import backbone_changes, prepare_backbone, prepare_config
from .ranking import RANKING, Selected, by_merit, read_ranking, write_ranking
from .records import TrialRecord, ranked
from .reevaluation import reevaluate
from .report import StageReport, write_report
from .select import Candidate, FullTraining, choose_candidates
from .settings import FEATURES, FPN, PYRAMIDS, SPLIT, fixed_settings
from .space import Space, build_space, given_cells, graph_key, starting_choices
from .split import Split, plan_split
from .stage import Pruning, StageRunner
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
        device: device of the preparation, of trials in this process, and of the full trainings.
        config_file: file that `cfg` was loaded from. ``best.yaml`` inherits from it or, if that
            is a search's config on top of an ordinary one, from the latter; of this base a copy is
            kept beside ``best.yaml``.
        overrides: KEY VALUE pairs by which `cfg` differs from the file.
        resume: continue the search in OUTPUT_DIR, if there is one.

    Returns:
        The path of ``best.yaml``; its weights are beside it, in ``best.pth``.

    Raises:
        ConfigError, DataError, JournalError: the search cannot be done as asked.
        Interrupted: by SIGTERM or SIGINT; nothing that was finished is lost.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            "a search is started as one process; SEARCH.EXECUTOR local or ray runs its trials on "
            "several GPUs or machines"
        )
    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / JOURNAL).exists():
        _check_folder(cfg, folder)
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another search is running in OUTPUT_DIR {folder}; see it with --status"
    with (
        only_one(folder / LOCK_FILE, busy),  # --status, too, holds the lock for a moment
        StopRequest("--resume goes on from what is finished") as stop,
        stop.heeded_at_once(),
    ):
        if (folder / JOURNAL).exists() and not resume:
            raise ConfigError(
                f"OUTPUT_DIR {folder} holds a search: go on with it by --resume, or name another "
                "folder"
            )
        remove_temporary(folder)
        return _Search(cfg, device, Path(config_file), overrides).run()


class _Search:
    """The stages of one search, and what each hands on to the next."""

    def __init__(
        self, cfg: CfgNode, device: torch.device, config_file: Path, overrides: Sequence[Any]
    ) -> None:
        self.cfg = cfg
        self.device = device
        self.config_file = config_file
        self.overrides = overrides
        self.folder = Path(cfg.OUTPUT_DIR)
        self.journal = self.folder / JOURNAL
        self.reports: dict[str, StageReport] = {}
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
        # Copied now, since these files may be changed while the search runs.
        base, keys = ordinary_base(self.config_file)
        base = copy_with_bases(base, folder / "base")
        proxy_cfg = split.cfg
        write_progress(folder, "preparing the backbone")
        detector = prepare_backbone(proxy_cfg, self.device, folder / "backbone")
        write_progress(folder, "caching the backbone's features")
        caches = build_caches(proxy_cfg, detector, cache_folder(cfg), self._check_features)
        del detector

        for stage in cfg.SEARCH.STAGES:
            stage_caches = caches
            settings = fixed_settings(cfg, stage) | {SPLIT: split.name} | _names(FEATURES, caches)
            if stage == "head":
                settings[FPN] = Genotype(cells).to_list()
                check_settings(self.journal, "head", settings)
                write_progress(folder, "training the FPN of the head stage")
                stage_caches = head_caches(proxy_cfg, caches, cells, self.device)
                settings |= _names(PYRAMIDS, stage_caches)
            space = build_space(cfg, stage, cells)
            records = self._search_stage(proxy_cfg, stage, space, stage_caches, settings)
            if stage == cfg.SEARCH.STAGES[-1]:
                self._select_best(stage, records)
            else:
                cells = self._select_fpn(records)
        best, weights = best_weights(cfg, self.device, folder, self.ranking[0])
        if best is not self.ranking[0]:
            self.ranking[0] = best
            write_ranking(folder / RANKING, self.ranking)
        keys = [*keys, *map(str, self.overrides[::2])]
        path = write_best(cfg, folder, best, weights, base, keys)
        write_progress(folder, FINISHED)
        self._report(force=True)
        logger.info("the best architecture is in %s, the report in %s", path, folder / "report")
        return path

    def _given_cells(self) -> tuple[Cell, ...] | None:
        """The FPN of the head stage if the FPN is not searched."""
        return None if "fpn" in self.cfg.SEARCH.STAGES else given_cells(self.cfg)

    def _check_configs(self) -> None:
        """Find mistakes in the settings of later stages now, not after days."""
        prepared = prepare_config(self.cfg, self.folder)
        check_training(prepared, self.device, prepared.TEST.EVAL_PERIOD > 0)
        _check_seed(self.cfg, "")
        _check_seed(prepared, "SEARCH.PREPARE.OVERRIDES: ")
        trainings = []
        for stage in self.cfg.SEARCH.STAGES:
            example = [[[0, 1, 0, 0, 0]]] * 3 + ([[0], [0]] if stage == "head" else [])
            starting_choices(self.cfg, build_space(self.cfg, stage, Genotype.parse(example).cells))
            trainings.append(full_config(self.cfg, stage, example, self.folder))
            _check_seed(trainings[-1], "SEARCH.SELECT.OVERRIDES: ")
        # This reads the data, so it is done for one stage: they differ in the decoder only. Once
        # the search has begun, the weight file is not needed any more.
        check_full_training(trainings[-1], self.device, weights=not self.journal.exists())

    def _check_changes(self, split: Split, cells: tuple[Cell, ...] | None) -> None:
        """Refuse settings for which finished trials would not count, before anything is changed."""
        stages = self.cfg.SEARCH.STAGES
        for stage in stages:
            check_settings(self.journal, stage, fixed_settings(self.cfg, stage))
        for stage in stages:
            check_settings(self.journal, stage, {SPLIT: split.name})
        if cells is not None:
            check_settings(self.journal, "head", {FPN: Genotype(cells).to_list()})
        backbone = self.folder / "backbone"
        begun = any(has_trials(self.journal, stage) for stage in stages)
        if not begun or self.cfg.SEARCH.PREPARE.WEIGHT:
            return
        if changes := backbone_changes(prepare_config(split.cfg, backbone), backbone):
            raise ConfigError(
                f"the trials in {self.journal} stand on the backbone in {backbone}, which "
                f"was trained with other settings: {'; '.join(changes)}. Set them as they were to "
                "go on (SEARCH.SELECT.OVERRIDES is for what shall differ in the full trainings), "
                "or name another OUTPUT_DIR (and leave out --resume)"
            )

    def _check_features(self, *names: str) -> None:
        """Refuse features that differ from those of finished trials; `names`: of their caches."""
        for stage in self.cfg.SEARCH.STAGES:
            check_settings(self.journal, stage, dict(zip(FEATURES, names, strict=True)))

    def _search_stage(
        self,
        cfg: CfgNode,
        stage: str,
        space: Space,
        caches: tuple[FeatureCache, FeatureCache],
        fixed: dict[str, Any],
    ) -> list[TrialRecord]:
        """Run the trials of a stage; its complete trials, best first, re-evaluated if asked for."""
        if self.device.type == "cuda":  # the trials may run in other processes
            free_gpu_memory()
        settings = cfg.SEARCH
        trials = settings.TRIALS[stage.upper()]
        logger.info("%s stage: %d trials by %s\n%s", stage, trials, settings.STRATEGY,
                    space.describe())  # fmt: skip
        task = build_task(cfg, stage, caches, self.device)
        journal = Journal(self.journal, space, settings.RETRIES, fixed)
        start = starting_choices(cfg, space)
        strategy = build_strategy(cfg, space, cfg.SEED, start)
        objective = build_objective(cfg, stage)
        pruning = Pruning(
            tuple(settings.PRUNING.RUNGS), settings.PRUNING.KEEP, settings.PRUNING.STARTUP
        )
        self.reports[stage] = StageReport(stage, [], space.decisions, [], settings.STRATEGY, trials)
        with (
            writing(journal.path),
            build_executor(cfg, task) as executor,
            StageProgress(self.folder, journal, trials, self.reports[stage], self._report) as note,
        ):
            runner = StageRunner(journal, strategy, executor, objective, pruning, note)
            runner.run(trials, settings.BATCH, start)
            return self._rank(stage, journal, executor, objective, trials)

    def _rank(
        self, stage: str, journal: Journal, executor: Executor, objective: Objective, trials: int
    ) -> list[TrialRecord]:
        """The complete trials of a stage, best first, after the re-evaluation of the best ones and
        of the decoder that the search started from."""
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

        reevaluated = reevaluate(journal, executor, objective, chosen, settings.RETRIALS, note)
        failed = [record for record in reevaluated if math.isnan(record.objective)]
        indices = {record.index for record in chosen}
        others = [record for record in best if record.index not in indices]
        return reevaluated[: len(reevaluated) - len(failed)] + others + failed

    def _select_best(self, stage: str, records: Sequence[TrialRecord]) -> None:
        """Rank the best of the last stage by full training, and the decoder to start from."""
        count = self.cfg.SEARCH.SELECT[stage.upper()]
        given = self._given_decoder(stage)
        self._train_in_full(choose_candidates(stage, records, count, given))

    def _select_fpn(self, records: Sequence[TrialRecord]) -> tuple[Cell, ...]:
        """Rank the best FPNs, and choose the cells of the one that the head stage builds on.

        Once the head stage has trials, that FPN stays, whatever further trials or full trainings
        say, and FPNs are not trained any more.
        """
        begun = has_trials(self.journal, "head")
        earlier = read_ranking(self.folder / RANKING) if begun else []
        earlier = [self._without_outdated_AP(row) for row in earlier if row.stage == "fpn"]
        if earlier:
            self.ranking = sorted(earlier, key=by_merit)
        else:
            count = self.cfg.SEARCH.SELECT.FPN
            candidates = choose_candidates("fpn", records, count)
            if begun:  # the file of the ranking is lost
                full = FullTraining(self.cfg, self.device, self.folder)
                self._update_ranking([full.recall(candidate) for candidate in candidates])
            elif count > 1:
                self._train_in_full(candidates)
            else:
                self._update_ranking([candidate.row for candidate in candidates])
        if begun:
            return Genotype.parse(read_settings(self.journal, "head")[FPN]).cells
        return Genotype.parse(self.ranking[0].genotype).cells

    def _train_in_full(self, candidates: Sequence[Candidate]) -> None:
        """Train candidates in full, and add them to the ranking."""
        for row in FullTraining(self.cfg, self.device, self.folder).train(candidates):
            self._update_ranking([*self.ranking, row])

    def _update_ranking(self, rows: Sequence[Selected]) -> None:
        self.ranking = sorted(rows, key=by_merit)
        write_ranking(self.folder / RANKING, self.ranking)
        self._report(force=True)

    def _without_outdated_AP(self, row: Selected) -> Selected:
        """Drop an AP of another schedule or other data, which cannot be compared with new ones."""
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
        """The decoder that the search started from, if any, with the head in the head stage."""
        if not self.cfg.SEARCH.FROM_GENOTYPE:
            return None
        given = Genotype.parse(self.cfg.MODEL.GENOTYPE)
        return given if stage == "head" else Genotype(given.cells)

    def _report(self, force: bool = False) -> bool:
        """Write the report, and return True, unless it is younger than SEARCH.REPORT_PERIOD."""
        if not force and time.monotonic() - self._reported < self.cfg.SEARCH.REPORT_PERIOD:
            return False
        try:
            write_report(self.folder / "report", list(self.reports.values()), self.ranking)
        except Exception:  # a picture is no reason to end a search
            logger.exception("the report could not be written")
        self._reported = time.monotonic()
        return True


def search_status(cfg: CfgNode) -> str:
    """How far the search in OUTPUT_DIR is, in words, whether it is running or not."""
    folder = Path(cfg.OUTPUT_DIR)
    path = folder / JOURNAL
    try:  # the settings of the search, not those of the command that asks for its status
        settings = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))["SEARCH"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # it has only just begun
        settings = cfg.SEARCH
    stages = []
    for stage in settings["STAGES"]:
        trials = settings["TRIALS"][stage.upper()]
        records = read_records(path, stage) if path.exists() else []
        stages.append((stage, [record for record in records if record.index < trials], trials))
    return format_status(folder, stages)


def _check_folder(cfg: CfgNode, folder: Path) -> None:
    """Refuse to start in an output folder whose files the search would replace."""
    check_run_config(cfg)
    if checkpoint_files(folder):
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds a training, whose config a search would replace: name "
            "another folder"
        )
    if (folder / RANKING).exists():
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds the results of a search, but not its journal {JOURNAL}: "
            "put that back to go on, or name another folder"
        )


def _check_seed(cfg: CfgNode, source: str) -> None:
    """Refuse a SEED that is drawn anew each time; `source` begins the message."""
    if cfg.SEED < 0:
        raise ConfigError(
            f"{source}SEED is -1, but a search that can be resumed needs one of its own"
        )


def _names(settings: Sequence[str], caches: Sequence[FeatureCache]) -> dict[str, str]:
    """The names of caches as settings of a journal."""
    return {name: cache.folder.name for name, cache in zip(settings, caches, strict=True)}
