"""The progress of a stage while it is searched."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..engine.logging import PERIODIC, on_terminal
from ..engine.metrics import format_duration, tensorboard_writer
from .journal import Journal
from .records import COMPLETE, TrialRecord, ranked
from .report import StageReport
from .status import best_in_words, write_progress

logger = logging.getLogger(__name__)


class StageProgress:
    """Shows a stage's progress: bar, log, TensorBoard, progress.json, the report and the table.

    Args:
        folder: directory of the search.
        journal: journal of the stage.
        trials: number of planned trials.
        report: the stage's part of the report; kept up to date.
        publish: writes the report if it is due, or in any case if the argument is True; returns
            whether it did.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        trials: int,
        report: StageReport,
        publish: Callable[[bool], bool],
    ) -> None:
        self.folder = folder
        self.journal = journal
        self.stage = report.stage
        self.trials = trials
        self.report = report
        self.publish = publish
        self.shown: set[int] = set()
        self.plotted = self.batches = 0
        self.best = -math.inf

    def __enter__(self) -> StageProgress:
        records = self._records()
        self.shown = {record.index for record in records}
        self.began, self.before = time.monotonic(), len(self.shown)
        self.bar = tqdm(
            total=self.trials, initial=self.before, unit="trial", disable=not on_terminal()
        )
        # Rewrite the curves from the start: an earlier run may have been killed before it wrote
        # them.
        self.board = tensorboard_writer(self.folder / "tensorboard" / self.stage, start=0)
        self._plot(records, self.journal.batch_stats())
        self._note_phase()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self.board.close()
        self._refresh(self._records(), self.journal.batch_stats())
        self._publish(force=True)  # even if an error ends the search here

    def _records(self) -> list[TrialRecord]:
        """The finished ones of the planned trials; an earlier run may have planned more."""
        return [record for record in self.journal.records() if record.index < self.trials]

    def __call__(self, journal: Journal) -> None:
        records = self._records()
        new = [record for record in records if record.index not in self.shown]
        if new:
            self.shown.update(record.index for record in new)
            self._log(records, new)
            self.bar.update(len(new))
        stats = journal.batch_stats()
        self._plot(new, stats)
        self._note_phase()
        self._refresh(records, stats)
        self._publish()

    def _log(self, records: Sequence[TrialRecord], new: Sequence[TrialRecord]) -> None:
        best = ranked(records)[:1]
        per_trial = (time.monotonic() - self.began) / max(1, len(records) - self.before)
        for record in new:
            result = record.result
            logger.info(
                "%s trial %d  reward %.4f%s  best %s  %.1f s  (%d/%d done, %.0f/h, %s to go)",
                self.stage, record.index, result.reward, _remark(record),
                best_in_words(best[0]) if best else "-",
                result.seconds, len(records), self.trials, 3600 / per_trial,
                format_duration(per_trial * (self.trials - len(records))),
                extra=PERIODIC,
            )  # fmt: skip
        if best:
            self.bar.set_postfix(best=f"{best[0].objective:.4f}", refresh=False)

    def _plot(self, new: Sequence[TrialRecord], stats: Sequence[dict[str, float]]) -> None:
        """Add new trials, and the statistics of new batches, to TensorBoard's curves."""
        for record in sorted(new, key=lambda record: record.finished):
            self.board.add_scalar(f"{self.stage}/reward", record.result.reward, record.index)
            self.best = max([self.best, *(one.objective for one in ranked([record]))])
            if math.isfinite(self.best):
                self.board.add_scalar(f"{self.stage}/best", self.best, self.plotted)
            self.plotted += 1
        for number in range(self.batches, len(stats)):
            for name, value in stats[number].items():
                self.board.add_scalar(f"{self.stage}/{name}", value, number)
        self.batches = len(stats)

    def _note_phase(self) -> None:
        phase = f"trials of the {self.stage} stage"
        write_progress(self.folder, phase, done=len(self.shown), total=self.trials)

    def _publish(self, force: bool = False) -> None:
        """Write the report and, with it, the table of the trials."""
        if not self.publish(force):
            return
        path = self.folder / f"trials_{self.stage}.csv"
        try:
            self.journal.export_csv(path)
        except Exception:  # a missing table is no reason to end a search
            logger.exception("%s could not be written", path)

    def _refresh(self, records: list[TrialRecord], stats: list[dict[str, float]]) -> None:
        self.report.records, self.report.batch_stats = records, stats


def _remark(record: TrialRecord) -> str:
    if record.duplicate_of is not None:
        return f" (of trial {record.duplicate_of}, the same graph)"
    return "" if record.result.status == COMPLETE else f" ({record.result.status})"
