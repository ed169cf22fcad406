"""The ranking of the selected architectures, and its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..files import read_json, write_json

RANKING = "ranking.json"
"""File in the search's directory that lists all selected architectures."""

# Fields of a row that are nan if unknown; in JSON, which has no nan, they are null.
_NUMBERS = ("objective", "reward", "flops")


@dataclass(frozen=True)
class Selected:
    """One architecture of a ranking.

    Attributes:
        stage: stage in which it was found.
        rank: rank by the search's objective within the stage, from 1; 0 if it has no trial of its
            own (see `given`).
        genotype: the whole decoder, as a nested list.
        objective, reward: those of its trial, or their means if it was re-evaluated; nan without
            a trial.
        params, flops: parameters and multiply-adds of the trial's decoder (see `TrialResult`).
        AP, AP50: metrics of the full training on the first of DATASETS.TEST, averaged over the
            seeds; None if it was not trained in full.
        APs: AP of each seed.
        folder: directory of the full training with the best seed, relative to that of the search;
            "" if it was not trained, or not to the end.
        given: whether it is the decoder that the search started from. No trial of the stage need
            be equal to that: each stage continues from what the previous one found.
    """

    stage: str
    rank: int
    genotype: list
    objective: float
    reward: float
    params: int
    flops: float
    AP: float | None = None
    AP50: float | None = None
    APs: list[float] = field(default_factory=list)
    folder: str = ""
    given: bool = False

    @property
    def best_seed(self) -> int:
        """Offset of the seed with the highest AP."""
        return max(range(len(self.APs)), key=self.APs.__getitem__, default=0)


def by_merit(row: Selected) -> tuple[bool, float]:
    """Sort key, best first: architectures trained in full by AP, then the others by objective."""
    if row.AP is not None:
        return False, -row.AP
    return True, math.inf if math.isnan(row.objective) else -row.objective


def write_ranking(path: Path, rows: Sequence[Selected]) -> None:
    """Write a ranking, best first, as JSON."""
    write_json(path, [asdict(row) for row in rows], indent=2)


def read_ranking(path: Path) -> list[Selected]:
    """What `write_ranking` wrote; empty if the file is missing or cannot be read."""
    try:
        rows = [Selected(**row) for row in read_json(path)]
    except TypeError:
        return []
    return [replace(row, **{name: math.nan for name in _NUMBERS if getattr(row, name) is None})
            for row in rows]  # fmt: skip
