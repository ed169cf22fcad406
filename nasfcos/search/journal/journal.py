"""The journal of a stage, for the one process that writes it."""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import warnings
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback, get_storage
from optuna.trial import FrozenTrial, TrialState

from ...files import replacing
from ..records import COMPLETE, FAILED, PRUNED, TrialRecord, TrialResult
from ..space import Space
from .file import open_storage, readable
from .reading import (
    FIGURES,
    REEVALUATION,
    SETTINGS,
    batch_stats,
    choices_of,
    is_finished,
    record_of,
    reevaluation_rewards,
    refuse_others,
)

logger = logging.getLogger(__name__)

# User attributes of an Optuna trial that the next attempt at the same proposal inherits.
PROPOSAL = ("index", "batch", "batch_size", "key", "genotype", "deaths")

STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


@dataclass
class _Trial:
    """The latest Optuna trial of a proposal."""

    id: int
    batch: int
    choices: tuple[int, ...]
    deaths: tuple[str, ...]


class Journal:
    """The journal of one stage, opened for writing.

    The process must hold the lock of OUTPUT_DIR: trials that are still running according to the
    file are considered stale and requeued.

    Args:
        path: path of the SQLite file; it is created if missing.
        space: search space of the stage; its `stage` is the name of the study.
        retries: how often a trial is requeued if its worker died.
        settings: JSON values by name that must not change between the runs of one search.

    Raises:
        JournalError: the file is no journal, or settings differ; the message names them.
    """

    def __init__(
        self, path: str | Path, space: Space, retries: int, settings: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.space = space
        self.retries = retries
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with readable(self.path):
            self._storage = get_storage(open_storage(self.path, "rwc"))
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=space.stage,
                direction="maximize",
                load_if_exists=True,
            )
        self._study_id = self._storage.get_study_id_from_name(space.stage)
        self._distributions = {
            decision.name: CategoricalDistribution(decision.choices) for decision in space.decisions
        }
        attributes = self._study.user_attrs
        self._check_settings(
            {**settings, "decisions": [[d.name, list(d.choices)] for d in space.decisions]},
            attributes.get(SETTINGS),
        )
        self._stats = batch_stats(attributes)
        self._reevaluations = reevaluation_rewards(attributes)
        self._trials: dict[int, _Trial] = {}
        self._batch_sizes: dict[int, int] = {}
        self._records: list[TrialRecord] = []
        self._recover()

    # -------------------------------------------------------------------------------- reading
    def records(self) -> list[TrialRecord]:
        """The finished trials, ordered by index."""
        return list(self._records)

    def batch_size(self, batch: int) -> int:
        """The number of proposals in a batch; 0 if it has not been proposed yet."""
        return self._batch_sizes.get(batch, 0)

    def proposed(self, batch: int) -> list[tuple[int, ...]]:
        """The choices of a batch's proposals as far as they are in the journal, in order."""
        return [t.choices for _, t in sorted(self._trials.items()) if t.batch == batch]

    def batch_stats(self) -> list[dict[str, float]]:
        """What `note_batch` stored, for each batch."""
        return list(self._stats)

    def reevaluations(self) -> dict[tuple[int, int], float]:
        """The rewards that `note_reevaluation` stored, by trial index and seed offset."""
        return dict(self._reevaluations)

    # -------------------------------------------------------------------------------- writing
    def propose(self, batch: int, proposals: Sequence[tuple[int, ...]]) -> None:
        """Record the proposals of a batch, before any of them runs.

        Their indices continue those of the previous batch. Proposals that are in the journal
        already are kept; only those that a kill cut off are added.
        """
        first = sum(self._batch_sizes[earlier] for earlier in range(batch))
        for index, choices in enumerate(proposals, start=first):
            if index in self._trials:
                continue
            choices = tuple(int(choice) for choice in choices)
            trial = optuna.trial.create_trial(
                state=TrialState.WAITING,
                params={
                    decision.name: decision.choices[choice]
                    for decision, choice in zip(self.space.decisions, choices, strict=True)
                },
                distributions=self._distributions,
                user_attrs={
                    "index": index,
                    "batch": batch,
                    "batch_size": len(proposals),
                    "key": self.space.key(choices),
                    "genotype": self.space.genotype(choices).to_list(),
                },
            )
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
            self._trials[index] = _Trial(trial_id, batch, choices, ())
            self._batch_sizes[batch] = len(proposals)

    def start(self, index: int) -> None:
        """Record that a proposed trial is running.

        Raises:
            ValueError: the trial is not waiting.
        """
        if not self._storage.set_trial_state_values(self._trials[index].id, TrialState.RUNNING):
            raise ValueError(f"trial {index} is not waiting to be run")

    def finish(
        self, index: int, result: TrialResult, objective: float, duplicate_of: int | None = None
    ) -> TrialRecord:
        """Record the end of a running trial, completely or, if a kill interrupts it, not at all.

        Args:
            index: index of the trial.
            result: its result.
            objective: what the strategy learns from it; nan for a failed trial.
            duplicate_of: index of the earlier trial whose result `result` is.

        Raises:
            ValueError: the objective of a trial that did not fail is nan.
        """
        objective = float(objective)
        if result.status != FAILED and math.isnan(objective):
            raise ValueError(f"trial {index} is {result.status}, but its objective is nan")
        trial_id = self._trials[index].id
        for iteration, reward in result.curve:
            self._storage.set_trial_intermediate_value(trial_id, int(iteration), float(reward))
        # The status is written last: a trial with a status is complete (`_recover`).
        attributes = _result_attributes(result) | {"objective": objective}
        if duplicate_of is not None:
            attributes["reused"] = duplicate_of
        for name, value in (attributes | {"status": result.status}).items():
            self._storage.set_trial_user_attr(trial_id, name, value)
        return self._settle(trial_id, result.status, objective)

    def requeue(self, index: int, reason: str) -> bool:
        """Requeue a running trial whose worker died, unless it has used up its retries.

        Args:
            index: index of the trial.
            reason: how the worker died.

        Returns:
            Whether the trial waits to be started again; if not, it is finished as failed.
        """
        trial = self._trials[index]
        deaths = (*trial.deaths, reason)
        if len(deaths) > self.retries:
            times = "once" if len(deaths) == 1 else f"{len(deaths)} times"
            self.finish(
                index,
                TrialResult(FAILED, reason=f"the worker died {times}, at last: {reason}"),
                math.nan,
            )
            return False
        self._storage.set_trial_user_attr(trial.id, "deaths", list(deaths))
        self._fail(trial.id)
        self._add_attempt(trial.id)
        return True

    def note_batch(self, batch: int, stats: Mapping[str, float]) -> None:
        """Store the statistics that the strategy returned for a batch.

        A resumed search learns from earlier batches again; these are not stored twice.

        Raises:
            ValueError: an earlier batch is missing.
        """
        if batch < len(self._stats):
            return
        if batch > len(self._stats):
            raise ValueError(f"batch {batch} is learnt from before batch {len(self._stats)}")
        stats = {name: float(value) for name, value in stats.items()}
        self._study.set_user_attr(f"{FIGURES}{batch}", stats)
        self._stats.append(stats)

    def note_reevaluation(self, index: int, seed_offset: int, reward: float) -> None:
        """Store the reward of a finished trial with another seed; nan if that attempt failed."""
        self._study.set_user_attr(f"{REEVALUATION}{index}.{seed_offset}", reward)
        self._reevaluations[index, seed_offset] = reward

    def export_csv(self, path: str | Path) -> None:
        """Write the finished trials to a CSV file, one per line, with a header; atomically.

        The last columns are the decisions, with the names of decisions and choices. The curve of a
        trial and its rewards when re-evaluated (``again``) are JSON lists.
        """
        losses = sorted({name for record in self._records for name in record.result.losses})
        plain = [f.name for f in fields(TrialResult) if f.name not in ("losses", "curve")]
        again: dict[int, list[float]] = {}
        for (index, _), reward in sorted(self._reevaluations.items()):
            again.setdefault(index, []).append(reward)
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(
                ["index", "batch", *plain, "objective", "reused", "finished", "curve", "again"]
                + [f"loss.{name}" for name in losses]
                + ["key", "genotype", *(decision.name for decision in self.space.decisions)]
            )
            for record in self._records:
                result = record.result
                writer.writerow(
                    [record.index, record.batch, *(getattr(result, name) for name in plain)]
                    + [record.objective, record.duplicate_of, record.finished]
                    + [json.dumps(result.curve), json.dumps(again.get(record.index, []))]
                    + [result.losses.get(name) for name in losses]
                    + [record.key, json.dumps(record.genotype)]
                    + [
                        decision.choices[choice]
                        for decision, choice in zip(
                            self.space.decisions, record.choices, strict=True
                        )
                    ]
                )

    # -------------------------------------------------------------------------------- internals
    def _check_settings(self, settings: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Store the settings if there are no trials yet; otherwise refuse different ones."""
        if before is None or not self._storage.get_n_trials(self._study_id):
            self._study.set_user_attr(SETTINGS, json.loads(json.dumps(settings)))
        else:
            refuse_others(self.path, self.space.stage, settings, before)

    def _recover(self) -> None:
        """Read the file, and repair what a kill left unfinished.

        A kill may interrupt this, too; the next opening then continues.
        """
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        # The last trial of a proposal counts: the earlier ones are attempts that were cut off.
        newest = {t.user_attrs["index"]: t for t in trials if "index" in t.user_attrs}
        for index, trial in newest.items():
            self._note_trial(trial)
            trial_id = self._trials[index].id
            if is_finished(trial):
                self._add_record(trial)
            elif trial.state == TrialState.RUNNING and "status" in trial.user_attrs:
                # A kill interrupted `finish` before its last step: only the state is missing.
                attributes = trial.user_attrs
                self._settle(trial_id, attributes["status"], attributes["objective"])
            elif trial.state == TrialState.RUNNING:
                kills = len(trial.system_attrs.get("retry_history", ())) + 1
                logger.warning(
                    "trial %d was running when the search was ended; it is tried again%s",
                    index,
                    f" for the {kills}th time: if it is this trial that ends the search, with its "
                    "memory perhaps, SEARCH.EXECUTOR local keeps it apart"
                    if kills > 3
                    else "",
                )
                self._fail(trial_id)
                self._add_attempt(trial_id)
            elif trial.state == TrialState.FAIL:
                # A kill came between the two steps above, or between those in `requeue`.
                self._add_attempt(trial_id)

    def _note_trial(self, trial: FrozenTrial) -> None:
        """Remember an Optuna trial as the latest one of its proposal."""
        attributes = trial.user_attrs
        self._trials[attributes["index"]] = _Trial(
            self._id(trial),
            attributes["batch"],
            choices_of(trial),
            tuple(attributes.get("deaths", ())),
        )
        self._batch_sizes[attributes["batch"]] = attributes["batch_size"]

    def _id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _settle(self, trial_id: int, status: str, objective: float) -> TrialRecord:
        """Set the final state of a trial whose attributes are written: it is finished now."""
        values = None if status == FAILED else [objective]
        self._storage.set_trial_state_values(trial_id, STATES[status], values)
        return self._add_record(self._storage.get_trial(trial_id))

    def _add_record(self, trial: FrozenTrial) -> TrialRecord:
        record = record_of(trial)
        insort(self._records, record, key=lambda other: other.index)
        return record

    def _fail(self, trial_id: int) -> None:
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _add_attempt(self, trial_id: int) -> None:
        """Add a waiting trial for the proposal of a failed one."""
        # A copy, since the callback changes it, and without what `finish` had begun to write.
        failed = copy.deepcopy(self._storage.get_trial(trial_id))
        failed.user_attrs = {k: v for k, v in failed.user_attrs.items() if k in PROPOSAL}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            add_attempt = RetryHeartbeatStaleTrialCallback()
        add_attempt(self._study, failed)
        waiting = self._storage.get_all_trials(
            self._study_id, deepcopy=False, states=(TrialState.WAITING,)
        )
        index = failed.user_attrs["index"]
        self._note_trial(next(t for t in waiting if t.user_attrs.get("index") == index))


def _result_attributes(result: TrialResult) -> dict[str, Any]:
    """The fields of a result that differ from their defaults, as JSON types."""
    values = {
        "reward": float(result.reward),
        "losses": {name: float(value) for name, value in result.losses.items()},
        "params": int(result.params),
        "flops": float(result.flops),
        "latency": float(result.latency),
        "seconds": float(result.seconds),
        "reason": result.reason,
    }
    default = TrialResult(result.status)
    return {
        name: value
        for name, value in values.items()
        if value != getattr(default, name) and value == value  # a nan is a default
    }
