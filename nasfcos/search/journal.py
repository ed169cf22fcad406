"""The journal of a search: every proposal and every finished trial, durable in one SQLite file.

The file is an Optuna storage with a study per stage, so ``optuna-dashboard sqlite:///search.db``
and Optuna's plots and importances work on it. Of a proposal it keeps the decisions as categorical
parameters, of a finished trial the objective as its value (to be maximised), the rewards at the
rungs as intermediate values, and the rest as user attributes.

What can happen to a trial::

    propose -> WAITING -> start -> RUNNING -> finish -> COMPLETE, PRUNED or FAIL (finished)
                  ^                   |
                  +------- FAIL <-----+   its worker died, or the search was killed: tried again

A trial that is tried again becomes a new trial of Optuna's, linked to the failed one by Optuna's
own callback for that. So a proposal, known by its ``index``, may stand in several of them, of
which at most one is finished: a FAIL that carries no ``status`` is none.

Two things differ from how a study of Optuna's is mostly used. Trials are written through the
storage's own interface, not by ``enqueue_trial``, ``ask`` and ``tell``: these write each of the
decisions in a transaction of its own, and give out trials in their order only. And stale trials
are found without a heartbeat: whoever opens a journal for writing holds the lock of OUTPUT_DIR, so
a trial that is RUNNING at that moment belongs to a process that is gone.

Writes go through SQLite's rollback journal in its safest mode. It is slower than a write-ahead log,
but a crash of the machine loses nothing either, and a search on a network file system can be
watched from another machine.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import sqlite3
import warnings
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

try:
    import optuna
except ImportError as error:
    raise ImportError(
        "the architecture search keeps its journal with Optuna, which is not installed: "
        "pip install 'nasfcos[search]'"
    ) from error
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, get_storage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ..config import ConfigError
from ..files import replacing
from .records import COMPLETE, FAILED, PRUNED, TrialRecord, TrialResult
from .space import Space

logger = logging.getLogger(__name__)

JOURNAL = "search.db"
"""The file of a search's journals, in its OUTPUT_DIR."""

# Otherwise there would be a line for each study that is made.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Seconds that a process waits while another one (the dashboard, a reader) holds the file.
LOCK_TIMEOUT = 60.0

# User attributes of an Optuna trial that a further attempt at the same proposal inherits.
PROPOSAL = ("index", "batch", "batch_size", "key", "genotype", "deaths")

# `_engine` says which file is opened: in a URL some characters of its path would have a meaning.
URL = "sqlite:///journal"

STATES = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}

SETTINGS, FIGURES, AGAIN = "settings", "figures of batch ", "again "
"""User attributes of a study: what must not change, what a batch (of this number) taught, and the
reward of a trial (of this index) that was tried again (for this time)."""


class JournalError(ConfigError):
    """A journal that cannot be opened, or that belongs to a different search."""


@dataclass
class _Trial:
    """The newest Optuna trial of a proposal."""

    id: int
    batch: int
    choices: tuple[int, ...]
    deaths: tuple[str, ...]


class Journal:
    """The journal of one stage, opened by the one process that writes it.

    That process must hold the lock of OUTPUT_DIR: trials that are still running in the file are
    taken for stale, and wait to be tried again.

    Args:
        path: of the SQLite file; made when missing.
        space: of the stage; its `stage` is the name of the study.
        retries: how often a trial is tried again whose worker died.
        settings: what must not change between the runs of one search, JSON values by name.

    Raises:
        JournalError: the file is no journal, or its settings are others; the message names them.
    """

    def __init__(
        self, path: str | Path, space: Space, retries: int, settings: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.space = space
        self.retries = retries
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _readable(self.path):
            self._storage = get_storage(RDBStorage(URL, _engine(self.path, "rwc")))
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
        self._figures = _batch_figures(attributes)
        self._retrials = _retrials(attributes)
        self._trials: dict[int, _Trial] = {}
        self._batch_sizes: dict[int, int] = {}
        self._records: list[TrialRecord] = []
        self._recover()

    # -------------------------------------------------------------------------------- reading
    def records(self) -> list[TrialRecord]:
        """The finished trials, ordered by index."""
        return list(self._records)

    def batch_size(self, batch: int) -> int:
        """How many proposals a batch has; 0 where it has not been proposed yet."""
        return self._batch_sizes.get(batch, 0)

    def proposed(self, batch: int) -> list[tuple[int, ...]]:
        """The choices of a batch's proposals, as far as they are in the journal, by index."""
        return [t.choices for _, t in sorted(self._trials.items()) if t.batch == batch]

    def batch_figures(self) -> list[dict[str, float]]:
        """What `note_batch` stored, by batch."""
        return list(self._figures)

    def retrials(self) -> dict[tuple[int, int], float]:
        """The rewards that `note_retrial` stored, by index and repeat."""
        return dict(self._retrials)

    # -------------------------------------------------------------------------------- writing
    def propose(self, batch: int, proposals: Sequence[tuple[int, ...]]) -> None:
        """Note the proposals of a batch, before any of them runs.

        Their indices follow those of the batch before. What is in the journal already stands: a
        batch that a kill had cut short is completed.
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
        """Note that a proposed trial runs now.

        Raises:
            ValueError: it is not waiting.
        """
        if not self._storage.set_trial_state_values(self._trials[index].id, TrialState.RUNNING):
            raise ValueError(f"trial {index} is not waiting to be run")

    def finish(
        self, index: int, result: TrialResult, objective: float, reused: int | None = None
    ) -> TrialRecord:
        """Note the end of a started trial: all of it, or nothing if a kill comes between.

        Args:
            index: of the trial.
            result: how it ended.
            objective: what the strategy learns from it; nan for a failed trial.
            reused: index of the trial that `result` was taken from.

        Raises:
            ValueError: a trial that did not fail has no objective.
        """
        objective = float(objective)
        if result.status != FAILED and math.isnan(objective):
            raise ValueError(f"trial {index} is {result.status}, but its objective is nan")
        trial_id = self._trials[index].id
        for iteration, reward in result.curve:
            self._storage.set_trial_intermediate_value(trial_id, int(iteration), float(reward))
        # The status is the last: a trial that has it has everything (`_recover`).
        attributes = _result_attributes(result) | {"objective": objective}
        if reused is not None:
            attributes["reused"] = reused
        for name, value in (attributes | {"status": result.status}).items():
            self._storage.set_trial_user_attr(trial_id, name, value)
        return self._settle(trial_id, result.status, objective)

    def retry(self, index: int, reason: str) -> bool:
        """Note that the worker of a running trial died.

        Args:
            index: of the trial.
            reason: how the worker died.

        Returns:
            True when the trial waits to be started again. False when it has been tried again
            often enough: then it has failed, and is finished.
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
        self._try_again(trial.id)
        return True

    def note_batch(self, batch: int, figures: Mapping[str, float]) -> None:
        """Store what the strategy tells of a batch it has learnt from.

        A batch that a resumed search learns from again is not stored twice.
        """
        if batch < len(self._figures):
            return
        if batch > len(self._figures):
            raise ValueError(f"batch {batch} is learnt from before batch {len(self._figures)}")
        figures = {name: float(value) for name, value in figures.items()}
        self._study.set_user_attr(f"{FIGURES}{batch}", figures)
        self._figures.append(figures)

    def note_retrial(self, index: int, repeat: int, reward: float) -> None:
        """Store what a finished trial came to when it was tried again; nan where that failed."""
        self._study.set_user_attr(f"{AGAIN}{index}.{repeat}", reward)
        self._retrials[index, repeat] = reward

    def export_csv(self, path: str | Path) -> None:
        """Write the finished trials as CSV with a header, a line per trial; all of it or nothing.

        The decisions are the last columns, with their names and by their names. The rewards of a
        trial that was tried again are a list, as its curve is.
        """
        losses = sorted({name for record in self._records for name in record.result.losses})
        plain = [f.name for f in fields(TrialResult) if f.name not in ("losses", "curve")]
        again: dict[int, list[float]] = {}
        for (index, _), reward in sorted(self._retrials.items()):
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
                    + [record.objective, record.reused, record.finished]
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

    # -------------------------------------------------------------------------------- inner parts
    def _check_settings(self, settings: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Store the settings in a journal without trials; refuse others in one that has some."""
        if before is None or not self._storage.get_n_trials(self._study_id):
            self._study.set_user_attr(SETTINGS, json.loads(json.dumps(settings)))
        else:
            _refuse_others(self.path, self.space.stage, settings, before)

    def _recover(self) -> None:
        """Read the file, and put in order what a kill left in it.

        Every step may itself be cut off by a kill: the next opening takes it up again.
        """
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        # Of a proposal the last one counts: it is tried again only after an attempt was cut off.
        newest = {t.user_attrs["index"]: t for t in trials if "index" in t.user_attrs}
        for index, trial in newest.items():
            self._note_trial(trial)
            trial_id = self._trials[index].id
            if _is_finished(trial):
                self._add_record(trial)
            elif trial.state == TrialState.RUNNING and "status" in trial.user_attrs:
                # Cut off in the last step of `finish`: only the state is missing.
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
                self._try_again(trial_id)
            elif trial.state == TrialState.FAIL:
                # Cut off between these two steps, here or in `retry`.
                self._try_again(trial_id)

    def _note_trial(self, trial: FrozenTrial) -> None:
        """Remember an Optuna trial as the newest of its proposal."""
        attributes = trial.user_attrs
        self._trials[attributes["index"]] = _Trial(
            self._id(trial),
            attributes["batch"],
            _choices(trial),
            tuple(attributes.get("deaths", ())),
        )
        self._batch_sizes[attributes["batch"]] = attributes["batch_size"]

    def _id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _settle(self, trial_id: int, status: str, objective: float) -> TrialRecord:
        """Give a trial, whose attributes are written, its final state: now it is finished."""
        values = None if status == FAILED else [objective]
        self._storage.set_trial_state_values(trial_id, STATES[status], values)
        return self._add_record(self._storage.get_trial(trial_id))

    def _add_record(self, trial: FrozenTrial) -> TrialRecord:
        record = _record(trial)
        insort(self._records, record, key=lambda other: other.index)
        return record

    def _fail(self, trial_id: int) -> None:
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _try_again(self, trial_id: int) -> None:
        """Add a waiting trial for the proposal of a failed one."""
        # A copy, for the callback changes it; without what `finish` had begun to write.
        failed = copy.deepcopy(self._storage.get_trial(trial_id))
        failed.user_attrs = {k: v for k, v in failed.user_attrs.items() if k in PROPOSAL}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            again = RetryHeartbeatStaleTrialCallback()
        again(self._study, failed)
        waiting = self._storage.get_all_trials(
            self._study_id, deepcopy=False, states=(TrialState.WAITING,)
        )
        index = failed.user_attrs["index"]
        self._note_trial(next(t for t in waiting if t.user_attrs.get("index") == index))


def check_settings(path: str | Path, stage: str, settings: Mapping[str, Any]) -> bool:
    """Refuse settings that `Journal` would refuse, some of them, before they do any harm.

    For the process that holds the lock of OUTPUT_DIR.

    Returns:
        whether the stage has trials; one without any takes all settings.

    Raises:
        JournalError: the file is no journal, or these settings are others; the message names them.
    """
    path = Path(path)
    if not path.exists():
        return False
    with _readable(path):
        storage = RDBStorage(URL, _engine(path, "rw"))
        try:
            study_id = storage.get_study_id_from_name(stage)
            trials = storage.get_n_trials(study_id)
            before = storage.get_study_user_attrs(study_id).get(SETTINGS, {})
        except KeyError:
            return False
        finally:
            storage.engine.dispose()
    if trials:
        _refuse_others(path, stage, settings, {n: v for n, v in before.items() if n in settings})
    return trials > 0


def _refuse_others(
    path: Path, stage: str, settings: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    settings = json.loads(json.dumps(settings))
    missing = object()
    different = [
        name
        for name in sorted({*settings, *before})
        if settings.get(name, missing) != before.get(name, missing)
    ]
    if different:
        changes = "; ".join(
            f"{name} was {_brief(before.get(name, '(nothing)'))} and is now "
            f"{_brief(settings.get(name, '(nothing)'))}"
            for name in different
        )
        raise JournalError(
            f"{path} holds a search of the {stage} stage with other settings: {changes}. Set them "
            "as they were to go on with it, or name another OUTPUT_DIR (and leave out --resume)"
        )


def read_records(path: str | Path, stage: str) -> list[TrialRecord]:
    """The finished trials of a stage, ordered by index, from a search that may be running.

    Changes nothing and needs no lock.

    Raises:
        JournalError: there is no such file, or it is no journal. A stage that has not begun has no
            trials.
    """
    finished = tuple(state for state in TrialState if state.is_finished())
    with _reading(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return []
        trials = storage.get_all_trials(study_id, deepcopy=False, states=finished)
    records = [_record(trial) for trial in trials if _is_finished(trial)]
    return sorted(records, key=lambda record: record.index)


def read_settings(path: str | Path, stage: str) -> dict[str, Any]:
    """What must not change while a stage is searched, as its journal has it; see `read_records`.

    A stage that has not begun has none.
    """
    with _reading(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return {}
        return storage.get_study_user_attrs(study_id).get(SETTINGS, {})


@contextmanager
def _reading(path: Path, stage: str) -> Iterator[tuple[RDBStorage | None, int | None]]:
    """A journal that may be written at the same time, and the number of a stage's study in it; None
    where the stage has not begun."""
    if not path.exists():
        raise JournalError(f"there is no search in {path.parent}: {path.name} is missing")
    with _readable(path):
        if not _is_made(path):
            yield None, None
            return
        storage = RDBStorage(URL, _engine(path, "rw"), skip_table_creation=True)
        try:
            study_id = storage.get_study_id_from_name(stage)
        except KeyError:
            study_id = None
        try:
            yield storage, study_id
        finally:
            storage.engine.dispose()


def _is_made(path: Path) -> bool:
    """Whether Optuna has made all its tables: which version they are of is the last it writes."""
    with closing(_engine(path, "rw")["creator"]()) as connection:
        table = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        return all(
            connection.execute(query).fetchone()
            for query in (table, "SELECT 1 FROM alembic_version")
        )


def _engine(path: Path, mode: str) -> dict[str, Any]:
    """How SQLAlchemy is to open a file, in a mode of SQLite's URIs.

    A reader needs "rw", too: after a kill in the middle of a transaction it is the next one to
    open the file that takes back the half of it.
    """

    def connect() -> sqlite3.Connection:
        uri = f"file:{quote(str(path.resolve()))}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, check_same_thread=False)

    return {"creator": connect}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what is raised at a file that is no journal into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, RuntimeError) as error:
        raise JournalError(f"{path} cannot be read as a journal: {_cause(error)}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what is raised where a journal cannot be written into `JournalError`."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise JournalError(
            f"{path} cannot be written: {_cause(error)}. No finished trial is lost: make room on "
            "its disk, or end what keeps the file locked, and go on with --resume"
        ) from error


def _cause(error: Exception) -> str:
    """What SQLite said, below what SQLAlchemy and Optuna made of it."""
    inner = error.__cause__ or error
    return str(getattr(inner, "orig", None) or inner).splitlines()[0]


def _is_finished(trial: FrozenTrial) -> bool:
    """Whether an Optuna trial is the end of a proposal, not an attempt that was cut off."""
    attributes = trial.user_attrs
    return "index" in attributes and "status" in attributes and trial.state.is_finished()


def _choices(trial: FrozenTrial) -> tuple[int, ...]:
    return tuple(
        int(trial.distributions[name].to_internal_repr(value))
        for name, value in trial.params.items()
    )


def _result_attributes(result: TrialResult) -> dict[str, Any]:
    """The fields of a result that differ from their defaults, in types that JSON knows."""
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
        if value != getattr(default, name) and value == value  # a nan is the default
    }


def _record(trial: FrozenTrial) -> TrialRecord:
    """A finished trial as the search knows it; the only reading of what `finish` writes."""
    attributes = trial.user_attrs
    names = [field.name for field in fields(TrialResult) if field.name != "curve"]
    return TrialRecord(
        index=attributes["index"],
        batch=attributes["batch"],
        choices=_choices(trial),
        key=attributes["key"],
        genotype=attributes["genotype"],
        result=TrialResult(
            **{name: attributes[name] for name in names if name in attributes},
            curve=tuple(sorted(trial.intermediate_values.items())),
        ),
        objective=attributes["objective"],
        reused=attributes.get("reused"),
        finished=trial.datetime_complete.timestamp(),
    )


def _batch_figures(attributes: Mapping[str, Any]) -> list[dict[str, float]]:
    """The figures of the batches, in their order, from a study's attributes."""
    figures = []
    while f"{FIGURES}{len(figures)}" in attributes:
        figures.append(attributes[f"{FIGURES}{len(figures)}"])
    return figures


def _retrials(attributes: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    return {
        tuple(map(int, name.removeprefix(AGAIN).split("."))): reward
        for name, reward in attributes.items()
        if name.startswith(AGAIN)
    }


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
