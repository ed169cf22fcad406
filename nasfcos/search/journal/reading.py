"""What a journal says, also while another process writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ..records import TrialRecord, TrialResult
from .file import JournalError, open_study

SETTINGS, FIGURES, AGAIN = "settings", "figures of batch ", "again "
"""User attributes of a study: what must not change, what a batch (of this number) taught, and the
reward of a trial (of this index) that was tried again (for this time)."""


def read_records(path: str | Path, stage: str) -> list[TrialRecord]:
    """The finished trials of a stage, ordered by index, from a search that may be running.

    Changes nothing and needs no lock.

    Raises:
        JournalError: there is no such file, or it is no journal. A stage that has not begun has no
            trials.
    """
    finished = tuple(state for state in TrialState if state.is_finished())
    with open_study(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return []
        trials = storage.get_all_trials(study_id, deepcopy=False, states=finished)
    records = [record_of(trial) for trial in trials if is_finished(trial)]
    return sorted(records, key=lambda record: record.index)


def read_settings(path: str | Path, stage: str) -> dict[str, Any]:
    """What must not change while a stage is searched, as its journal has it; see `read_records`.

    A stage that has not begun has none.
    """
    with open_study(Path(path), stage) as (storage, study_id):
        if study_id is None:
            return {}
        return storage.get_study_user_attrs(study_id).get(SETTINGS, {})


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
    with open_study(path, stage) as (storage, study_id):
        if study_id is None or not storage.get_n_trials(study_id):
            return False
        before = storage.get_study_user_attrs(study_id).get(SETTINGS, {})
    refuse_others(path, stage, settings, {n: v for n, v in before.items() if n in settings})
    return True


def refuse_others(
    path: Path, stage: str, settings: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Refuse settings that are not those from before.

    Raises:
        JournalError: they are others; the message names them.
    """
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


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_finished(trial: FrozenTrial) -> bool:
    """Whether an Optuna trial is the end of a proposal, not an attempt that was cut off."""
    attributes = trial.user_attrs
    return "index" in attributes and "status" in attributes and trial.state.is_finished()


def choices_of(trial: FrozenTrial) -> tuple[int, ...]:
    """Which choice was made in each decision."""
    return tuple(
        int(trial.distributions[name].to_internal_repr(value))
        for name, value in trial.params.items()
    )


def record_of(trial: FrozenTrial) -> TrialRecord:
    """A finished trial as the search knows it; the only reading of what `finish` writes."""
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
        reused=attributes.get("reused"),
        finished=trial.datetime_complete.timestamp(),
    )


def batch_stats(attributes: Mapping[str, Any]) -> list[dict[str, float]]:
    """The figures of the batches, in their order, from a study's attributes."""
    figures = []
    while f"{FIGURES}{len(figures)}" in attributes:
        figures.append(attributes[f"{FIGURES}{len(figures)}"])
    return figures


def retrial_rewards(attributes: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """The rewards of trials that were tried again, by index and repeat."""
    return {
        tuple(map(int, name.removeprefix(AGAIN).split("."))): reward
        for name, reward in attributes.items()
        if name.startswith(AGAIN)
    }
