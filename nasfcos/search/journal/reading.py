"""Reading a journal, possibly while another process writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ..records import TrialRecord, TrialResult
from .file import JournalError, open_study

SETTINGS = "settings"
"""User attribute of a study: settings that must not change, by name."""

FIGURES = "figures of batch "
"""Prefix of user attributes: statistics of the strategy after the batch with this number."""

REEVALUATION = "again "
"""Prefix of user attributes: reward of a re-evaluation, by "<trial index>.<seed offset>"."""


def read_records(path: str | Path, stage: str) -> list[TrialRecord]:
    """The finished trials of a stage, ordered by index; none if the stage has not begun.

    Changes nothing and needs no lock: the search may be running.

    Raises:
        JournalError: the file does not exist or is no journal.
    """
    finished = tuple(state for state in TrialState if state.is_finished())
    with open_study(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return []
        trials = storage.get_all_trials(study_id, deepcopy=False, states=finished)
    records = [record_of(trial) for trial in trials if is_finished(trial)]
    return sorted(records, key=lambda record: record.index)


def read_settings(path: str | Path, stage: str) -> dict[str, Any]:
    """The settings in the journal of a stage, which must not change; none if it has not begun.

    Changes nothing and needs no lock; raises as `read_records`.
    """
    with open_study(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return {}
        return storage.get_study_user_attrs(study_id).get(SETTINGS, {})


def has_trials(path: str | Path, stage: str) -> bool:
    """Whether a stage has begun: whether its journal, if there is one, holds any trial.

    Raises:
        JournalError: the file is no journal.
    """
    path = Path(path)
    if not path.exists():
        return False
    with open_study(path, stage) as (storage, study_id):
        return study_id is not None and storage.get_n_trials(study_id) > 0


def check_settings(path: str | Path, stage: str, settings: Mapping[str, Any]) -> None:
    """Refuse some of the settings as `Journal` would, but before anything is changed.

    A stage without trials accepts all settings. For the process that holds the lock of OUTPUT_DIR.

    Raises:
        JournalError: the file is no journal, or settings differ; the message names them.
    """
    if has_trials(path, stage):
        before = read_settings(path, stage)
        refuse_others(Path(path), stage, settings, {n: before[n] for n in settings if n in before})


def refuse_others(
    path: Path, stage: str, settings: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Refuse settings that differ from those of the journal.

    Raises:
        JournalError: settings differ; the message names them.
    """
    if changes := differences(settings, before):
        raise JournalError(
            f"{path} holds a search of the {stage} stage with other settings: {changes}. Set them "
            "as they were to go on with it, or name another OUTPUT_DIR (and leave out --resume)"
        )


def differences(settings: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """In words, how settings differ from those of a journal; "" if they do not."""
    settings = json.loads(json.dumps(settings))
    missing = object()
    return "; ".join(
        f"{name} was {_brief(before.get(name, '(nothing)'))} and is now "
        f"{_brief(settings.get(name, '(nothing)'))}"
        for name in sorted({*settings, *before})
        if settings.get(name, missing) != before.get(name, missing)
    )


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_finished(trial: FrozenTrial) -> bool:
    """Whether an Optuna trial holds a result, and is not an attempt that was cut off."""
    attributes = trial.user_attrs
    return "index" in attributes and "status" in attributes and trial.state.is_finished()


def choices_of(trial: FrozenTrial) -> tuple[int, ...]:
    """The index of the choice made in each decision."""
    return tuple(
        int(trial.distributions[name].to_internal_repr(value))
        for name, value in trial.params.items()
    )


def record_of(trial: FrozenTrial) -> TrialRecord:
    """The record of a finished Optuna trial, from what `Journal.finish` wrote."""
    attributes = trial.user_attrs
    names = [field.name for field in fields(TrialResult) if field.name != "curve"]
    return TrialRecord(
        index=attributes["index"],
        batch=attributes["batch"],
        choices=choices_of(trial),
        key=attributes["key"],
        genotype=attributes["genotype"],
        result=TrialResult(
            **{name: attributes[name] for name in names if name in attributes},
            curve=tuple(sorted(trial.intermediate_values.items())),
        ),
        objective=attributes["objective"],
        duplicate_of=attributes.get("reused"),
        finished=trial.datetime_complete.timestamp(),
    )


def batch_stats(attributes: Mapping[str, Any]) -> list[dict[str, float]]:
    """The strategy's statistics of each batch, in order, from the attributes of a study."""
    stats = []
    while f"{FIGURES}{len(stats)}" in attributes:
        stats.append(attributes[f"{FIGURES}{len(stats)}"])
    return stats


def reevaluation_rewards(attributes: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """The rewards of re-evaluated trials by trial index and seed offset."""
    return {
        tuple(map(int, name.removeprefix(REEVALUATION).split("."))): reward
        for name, reward in attributes.items()
        if name.startswith(REEVALUATION)
    }
