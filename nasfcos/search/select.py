"""The selection of a stage: its best architectures are chosen and trained in full."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..engine.monitor import NonFiniteLossError
from ..genotype import Genotype
from .full_training import METRICS, finished, full_config, train_in_full
from .ranking import Selected
from .records import COMPLETE, TrialRecord, TrialResult
from .space import graph_key
from .status import write_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An architecture that may be trained in full.

    Attributes:
        name: "trial 7", or "given"; also names the directory of its training.
        row: its row of the ranking as it is before a full training.
    """

    name: str
    row: Selected


def choose_candidates(
    stage: str, records: Sequence[TrialRecord], count: int, given: Genotype | None = None
) -> list[Candidate]:
    """The best architectures of a stage, best first, and the one that the search started from.

    Args:
        stage: "fpn" or "head".
        records: the stage's trials that were trained to the end, best first.
        count: number of the best trials to choose.
        given: decoder that the search started from; added at the end if it is not among the best.

    Raises:
        ConfigError: the stage has no complete trial.
    """
    if not records:
        raise ConfigError(
            f"no trial of the {stage} stage is complete: see the reasons in trials_{stage}.csv; "
            "a lower SEARCH.PROXY.LR or a smaller SEARCH.PROXY.BATCH may help"
        )
    given_key = None if given is None else graph_key(given)
    every = [
        Candidate(
            f"trial {record.index}",
            Selected(
                stage,
                rank,
                record.genotype,
                record.objective,
                record.result.reward,
                record.result.params,
                record.result.flops,
                given=record.key == given_key,
            ),
        )
        for rank, record in enumerate(records, 1)
    ]
    best, rest = every[:count], every[count:]
    if given is None or any(candidate.row.given for candidate in best):
        return best
    tried = [candidate for candidate in rest if candidate.row.given]
    return best + (tried[:1] or [_untried(stage, given, records)])


def _untried(stage: str, given: Genotype, records: Sequence[TrialRecord]) -> Candidate:
    """The given decoder if it has no trial of its own.

    Its cost is that of trial 0, if that is complete: it tried the part of the decoder that the
    stage searches.
    """
    first = next((r.result for r in records if r.index == 0), TrialResult(COMPLETE))
    row = Selected(
        stage,
        rank=0,
        genotype=given.to_list(),
        objective=math.nan,
        reward=math.nan,
        params=first.params,
        flops=first.flops,
        given=True,
    )
    return Candidate("given", row)


class FullTraining:
    """Trains candidates in full, with SEARCH.SELECT.SEEDS seeds each.

    Args:
        cfg: config of the search, with the whole training data.
        device: device of the trainings.
        folder: directory of the search.
    """

    def __init__(self, cfg: CfgNode, device: torch.device, folder: Path) -> None:
        self.cfg = cfg
        self.device = device
        self.folder = folder
        self.seeds = cfg.SEARCH.SELECT.SEEDS

    def train(self, candidates: Sequence[Candidate]) -> Iterator[Selected]:
        """Train candidates of one stage, at least one, one after the other.

        Yields:
            The row of each after its trainings; without AP if one of them diverged.

        Raises:
            NonFiniteLossError: a training of every candidate diverged.
        """
        diverged = 0
        for number, candidate in enumerate(candidates):
            row = candidate.row
            logger.info(
                "%d of %d to train in full (%s stage, %s, reward %.4f):\n%s",
                number + 1, len(candidates), row.stage, candidate.name, row.reward,
                Genotype.parse(row.genotype).describe(),
            )  # fmt: skip
            row = self._train_seeds(candidate, number, len(candidates))
            diverged += row.AP is None
            yield row
        if diverged == len(candidates):
            raise NonFiniteLossError(
                f"none of the {diverged} full trainings of the {row.stage} stage came to its end; "
                "see the log, change the solver by SEARCH.SELECT.OVERRIDES, and go on with --resume"
            )

    def recall(self, candidate: Candidate) -> Selected:
        """The row of a candidate with the results of earlier trainings, if all are finished and
        still hold; without them otherwise."""
        row, metrics = candidate.row, []
        for seed_offset, run in enumerate(self._runs(candidate)):
            path = self.folder / run
            found = finished(full_config(self.cfg, row.stage, row.genotype, path, seed_offset))
            if found is None:
                return row
            metrics.append(found)
        return self._with_metrics(candidate, metrics)

    def _train_seeds(self, candidate: Candidate, number: int, total: int) -> Selected:
        """The row of a candidate with the results of its trainings; without, if one diverged."""
        row, metrics = candidate.row, []
        try:
            for seed_offset, run in enumerate(self._runs(candidate)):
                write_progress(
                    self.folder,
                    f"training the best of the {row.stage} stage in full",
                    done=number * self.seeds + seed_offset,
                    total=total * self.seeds,
                )
                path = self.folder / run
                full = full_config(self.cfg, row.stage, row.genotype, path, seed_offset)
                metrics.append(train_in_full(full, self.device))
        except (NonFiniteLossError, torch.OutOfMemoryError) as error:
            logger.warning("%s is out of the ranking: %s", candidate.name, error)
            return row
        return self._with_metrics(candidate, metrics)

    def _runs(self, candidate: Candidate) -> list[Path]:
        """The directories of a candidate's trainings, by seed, relative to that of the search."""
        name = candidate.name.replace(" ", "_")
        names = [name, *(f"{name}_seed_{n}" for n in range(1, self.seeds))]
        return [Path("select") / candidate.row.stage / name for name in names]

    def _with_metrics(self, candidate: Candidate, metrics: Sequence[dict[str, float]]) -> Selected:
        """The row of a candidate with the metrics of its trainings, by seed."""
        means = {key: mean(each[key] for each in metrics) for key in METRICS}
        row = replace(candidate.row, APs=[each["AP"] for each in metrics], **means)
        return replace(row, folder=str(self._runs(candidate)[row.best_seed]))
