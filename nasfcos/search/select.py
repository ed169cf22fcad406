"""The last stage of a search: the best architectures trained in full, and compared."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..config.tree import get_setting, with_settings
from ..data import build_dataset, build_train_loader
from ..data.catalog import find_dataset
from ..data.voc import voc_names
from ..download import local_path, sha256
from ..engine import distributed
from ..engine.monitor import NonFiniteLossError
from ..engine.train import check_training, train
from ..files import read_json, write_json
from ..genotype import Genotype
from ..models import build_detector
from .prepare import changes_since_run, is_run_of, with_overrides
from .records import COMPLETE, TrialRecord, TrialResult
from .space import graph_key
from .status import write_progress

logger = logging.getLogger(__name__)

# Of a ranking's row: where there is none it is nan, which JSON has not.
_NUMBERS = ("objective", "reward", "flops")

RANKING = "ranking.json"
"""All architectures that were selected, in the search's folder."""

SUMMARY = "selected.json"
"""What a full training found out, in its folder, and of which annotations."""
_FIGURES = ("AP", "AP50")
_DATA = TRAIN, TEST = "DATASETS.TRAIN", "DATASETS.TEST"


@dataclass(frozen=True)
class Selected:
    """One architecture of a ranking.

    Attributes:
        stage: in which it was found.
        rank: by the search's objective in its stage, from 1.
        genotype: the whole decoder, as a nested list.
        objective, reward: of its trial, or the mean of its trials after that (`try_again`).
        params, flops: of its trial's decoder (see `TrialResult`).
        AP, AP50: after full training, on the first of DATASETS.TEST, the means of all seeds; None:
            not trained in full.
        APs: of each seed.
        folder: of the best seed's full training, relative to the search's; "" where it was not
            trained, or not to the end.
        given: whether the search started from it; where no trial of this stage is the whole of it,
            its rank is 0, and its objective and reward are nan.
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
        """Which of the seeds, from 0, came to the highest AP."""
        return max(range(len(self.APs)), key=self.APs.__getitem__, default=0)


def full_config(
    cfg: CfgNode, stage: str, genotype: Sequence, folder: Path, seed: int = 0
) -> CfgNode:
    """The config of a full training of a genotype, SEARCH.SELECT.OVERRIDES on top.

    Args:
        cfg: the search's config, with the whole training data.
        stage: "fpn" (the head is the plain one) or "head".
        genotype: the decoder.
        folder: of the training run.
        seed: is added to the config's.
    """
    tower = "searched" if stage == "head" else "plain"
    searched = [
        *("MODEL.NECK.NAME", "nas_fpn", "MODEL.HEAD.TOWER", tower),
        *("MODEL.GENOTYPE", list(genotype), "OUTPUT_DIR", str(folder)),
    ]
    full = with_overrides(cfg, searched, "SEARCH.SELECT.OVERRIDES")
    if full.SEED < 0:  # each training has a new one
        return full
    return with_settings(full, {"SEED": full.SEED + seed})


def check_full_training(cfg: CfgNode, device: torch.device, weights: bool = True) -> None:
    """Find what would stop a full training or its test now, not after other trainings.

    Args:
        cfg: of the training.
        device: of both.
        weights: whether a file that MODEL.WEIGHT names must be there.

    Raises:
        ConfigError: nothing to test on, a part that does not exist, a batch that does not divide,
            classes that do not fit the data, no weights, or a device that does not suit.
        DataError: a data set cannot be read.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: what is trained is compared on data")
    for name in cfg.DATASETS.TEST:
        dataset = build_dataset(cfg, name)
        if not any((~record.ignored).any() for record in dataset.records):
            raise ConfigError(
                f"DATASETS.TEST {name} has no object to find: comparing needs annotations"
            )
    check_training(cfg, device, tests=True)
    build_train_loader(with_settings(cfg, {"SEED": max(0, cfg.SEED)}))
    build_detector(cfg)
    source = local_path(cfg.MODEL.WEIGHT) if weights and cfg.MODEL.WEIGHT else None
    if source is not None and not source.is_file():
        raise ConfigError(f"the weight file {source} does not exist (MODEL.WEIGHT)")


def train_in_full(cfg: CfgNode, device: torch.device) -> dict[str, float]:
    """Train and test a config's detector, or read what an earlier call with it found out.

    A training of another config in the same folder is set aside (`is_run_of`), as is one of
    annotations that have changed since; where only those of the test have, it is tested again.

    Returns:
        AP and AP50 on the first of DATASETS.TEST.

    Raises:
        ConfigError: called in one of several processes.
        NonFiniteLossError: the training diverged.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            "architectures are trained and compared by one process; train one config with several "
            "by tools/train_net.py"
        )
    folder = Path(cfg.OUTPUT_DIR)
    summary = folder / SUMMARY
    same = is_run_of(cfg, folder)
    before = _read_summary(summary) if same else {}
    data = {key: _annotations_hash(cfg, key) for key in _DATA}
    changed = [key for key in _DATA if before.get(key, data[key]) != data[key]]
    if changed:
        logger.warning("%s: the annotations have changed since (%s)", folder, ", ".join(changed))
    if before.keys() >= set(_FIGURES) and not changed:
        return {name: before[name] for name in _FIGURES}
    again = TRAIN in changed
    # What a training that is now cut off, perhaps before it has begun, was or would be trained on.
    write_json(summary, {TRAIN: before[TRAIN] if again else data[TRAIN]})
    metrics = train(cfg, device, resume=same and not again)[cfg.DATASETS.TEST[0]]
    found = {name: metrics[name] for name in _FIGURES}
    write_json(summary, found | data)
    return found


def outdated(cfg: CfgNode) -> list[str]:
    """Why the figures of an earlier `train_in_full` in a config's folder do not hold for the config
    and its data as they are now; nothing where there are none."""
    folder = Path(cfg.OUTPUT_DIR)
    before = _read_summary(folder / SUMMARY)
    changed = [key for key in _DATA if key in before and before[key] != _annotations_hash(cfg, key)]
    return changes_since_run(cfg, folder) + [f"annotations of {key}" for key in changed]


def _read_summary(path: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read: then the test is done again."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _annotations_hash(cfg: CfgNode, key: str) -> str:
    """Of the annotations of the data sets that a key of the config names."""
    digest = hashlib.sha256()
    for spec in (find_dataset(cfg, name) for name in get_setting(cfg, key)):
        files = [spec.annotations]
        if spec.annotations.is_dir():
            names = voc_names(spec.annotations, spec.split)
            files = [spec.annotations / f"{name}.xml" for name in names]
        for file in filter(Path.exists, files):
            status = file.stat()
            digest.update(os.fsencode(file.name))
            digest.update(_file_hash(file, status.st_size, status.st_mtime_ns).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1 << 18)
def _file_hash(path: Path, size: int, time: int) -> str:
    """Of the content of a file that had this size and time."""
    return sha256(path)


def select(
    cfg: CfgNode,
    device: torch.device,
    folder: Path,
    stage: str,
    records: Sequence[TrialRecord],
    count: int,
    train_them: bool,
    on_progress: Callable[[list[Selected]], None] = lambda rows: None,
    given: Genotype | None = None,
) -> list[Selected]:
    """Rank a stage's best architectures, after full training unless `train_them` is False.

    Args:
        cfg: the search's config, with the whole training data.
        device: of the training.
        folder: of the search.
        stage: whose best are wanted.
        records: its trials that were trained to the end, best first.
        count: how many are looked at.
        on_progress: called after each full training, with those so far, best first.
        given: what the search started from, to be looked at too.

    Returns:
        The best first: by AP where they were trained, else by the search's objective.

    Raises:
        ConfigError: no trial of the stage is complete.
        NonFiniteLossError: of no architecture did all full trainings come to their end.
    """
    every = list(enumerate(records, 1))
    best = every[:count]
    if not best:
        raise ConfigError(
            f"no trial of the {stage} stage is complete: see the reasons in trials_{stage}.csv; "
            "a lower SEARCH.PROXY.LR or a smaller SEARCH.PROXY.BATCH may help"
        )
    given_key = None if given is None else graph_key(given)
    if given is not None and all(record.key != given_key for _, record in best):
        best += [item for item in every if item[1].key == given_key][:1] or [
            (0, _untried(given, records))
        ]
    rows = [
        Selected(
            stage,
            rank,
            record.genotype,
            record.objective,
            record.result.reward,
            record.result.params,
            record.result.flops,
            given=record.key == given_key,
        )
        for rank, record in best
    ]
    if not train_them:
        return sorted(rows, key=by_merit)
    for number, (_, record) in enumerate(best):
        name = f"trial {record.index}" if rows[number].rank else "given"
        logger.info(
            "%d of %d to train in full (%s stage, %s, reward %.4f):\n%s",
            number + 1, len(best), stage, name, record.result.reward,
            Genotype.parse(record.genotype).describe(),
        )  # fmt: skip
        done_before, total = (n * cfg.SEARCH.SELECT.SEEDS for n in (number, len(best)))
        rows[number] = _train_seeds(cfg, device, folder, rows[number], name, done_before, total)
        on_progress(sorted(rows[: number + 1], key=by_merit))
    if all(row.AP is None for row in rows):
        raise NonFiniteLossError(
            f"none of the {len(rows)} full trainings of the {stage} stage came to its end; see the "
            "log, change the solver by SEARCH.SELECT.OVERRIDES, and go on with --resume"
        )
    return sorted(rows, key=by_merit)


def _train_seeds(
    cfg: CfgNode,
    device: torch.device,
    folder: Path,
    row: Selected,
    name: str,
    done_before: int,
    total: int,
) -> Selected:
    """An architecture with what its full trainings came to, one with each seed; without, where one
    of them did not come to its end."""
    place = Path("select") / row.stage / name.replace(" ", "_")
    further = range(1, cfg.SEARCH.SELECT.SEEDS)
    places = [place, *(place.with_name(f"{place.name}_seed_{seed}") for seed in further)]
    metrics = []
    try:
        for seed, run in enumerate(places):
            phase = f"training the best of the {row.stage} stage in full"
            write_progress(folder, phase, done=done_before + seed, total=total)
            full = full_config(cfg, row.stage, row.genotype, folder / run, seed)
            metrics.append(train_in_full(full, device))
    except (NonFiniteLossError, torch.OutOfMemoryError) as error:
        logger.warning("%s is out of the ranking: %s", name, error)
        return row
    means = {key: mean(each[key] for each in metrics) for key in _FIGURES}
    row = replace(row, APs=[each["AP"] for each in metrics], **means)
    return replace(row, folder=str(places[row.best_seed]))


def by_merit(row: Selected) -> tuple[bool, float]:
    """Sorts the best first: by AP what was trained in full, then the rest by objective."""
    if row.AP is not None:
        return False, -row.AP
    return True, math.inf if math.isnan(row.objective) else -row.objective


def _untried(genotype: Genotype, records: Sequence[TrialRecord]) -> TrialRecord:
    """In the place of the trial that a decoder has not had. The stage's first one, if it came to
    its end, tried the part of it that the stage searches, and tells its cost."""
    first = next((r.result for r in records if r.index == 0), TrialResult(COMPLETE))
    return replace(
        records[0],
        key=graph_key(genotype),
        genotype=genotype.to_list(),
        result=replace(first, reward=math.nan),
        objective=math.nan,
    )


def write_ranking(path: Path, rows: Sequence[Selected]) -> None:
    """All architectures that were selected, best first, as JSON."""
    write_json(path, [asdict(row) for row in rows], indent=2)


def read_ranking(path: Path) -> list[Selected]:
    """What `write_ranking` wrote; empty where there is nothing that can be read."""
    try:
        rows = [Selected(**row) for row in read_json(path)]
    except TypeError:
        return []
    return [replace(row, **{name: math.nan for name in _NUMBERS if getattr(row, name) is None})
            for row in rows]  # fmt: skip
