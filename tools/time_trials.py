"""Measure trials per hour with and without the feature cache, and with several workers.

  python tools/time_trials.py --config-file configs/nas/demo.yaml --count 6
  python tools/time_trials.py --config-file configs/nas/demo.yaml --count 6 --stage head

Without the cache, each trial reads the images and runs the backbone on them, in the head stage also
the FPN of MODEL.GENOTYPE. All files are made in time_trials/ of OUTPUT_DIR; the results are printed
as JSON.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from nasfcos.data import build_dataset
from nasfcos.data.catalog import class_names
from nasfcos.engine.launch import argument_parser, launch
from nasfcos.genotype import Cell
from nasfcos.search.cache import FeatureCache, build_caches, cache_pyramid
from nasfcos.search.crops import Crops
from nasfcos.search.decoder import stage_config
from nasfcos.search.examples import Examples, assigning_head
from nasfcos.search.executors import LocalExecutor
from nasfcos.search.neck import train_neck
from nasfcos.search.prepare import prepare_backbone
from nasfcos.search.proxy import ProxyTask
from nasfcos.search.records import TrialJob
from nasfcos.search.space import build_space, given_cells
from nasfcos.search.split import split_training_data

logger = logging.getLogger("nasfcos.time_trials")


class LiveFeatures:
    """Has the interface of a `FeatureCache`, but computes the maps from the images at every read.

    Args:
        cache: cache of the same crops, for their targets.
        crops: the crops.
        preprocess: preprocessing of a detector, which makes a batch of images.
        features: computes the maps of a batch.
    """

    def __init__(
        self, cache: FeatureCache, crops: Crops, preprocess: nn.Module, features: nn.Module
    ) -> None:
        self.targets, self.size, self.maps = cache.targets, cache.size, cache.maps
        self.crops, self.preprocess, self.features = crops, preprocess, features

    def __len__(self) -> int:
        return len(self.targets)

    def release(self) -> bool:
        return False  # no maps are held on a GPU

    @torch.no_grad()
    def read(self, indices: np.ndarray, device: torch.device) -> list[Tensor]:
        images = []
        for index in indices:
            image, number = divmod(int(index), self.crops.per_image)
            images.append(self.crops[image][number][0])
        batch, _ = self.preprocess(images)
        return self.features(batch)


@dataclass
class LiveExamples:
    """Opens the examples of a `ProxyTask` without the cache.

    Attributes:
        folder: directory of the prepared backbone, and of the neck in the head stage.
        cells: cells of the neck; None in the FPN stage.
        c2_to_c5: directories of the caches that the neck was trained on.
    """

    folder: Path
    cells: tuple[Cell, ...] | None
    c2_to_c5: tuple[Path, Path]

    def __call__(self, task: ProxyTask, device: torch.device) -> tuple[Examples, Examples]:
        cfg = task.cfg
        model = prepare_backbone(cfg, device, self.folder / "backbone")
        features = model.backbone
        if self.cells is not None:
            caches = tuple(FeatureCache.open(folder) for folder in self.c2_to_c5)
            neck = train_neck(
                cfg, caches, self.cells, task.num_classes, device, self.folder / "neck"
            )
            features = nn.Sequential(features, neck)
        head = assigning_head(stage_config(cfg, task.stage), task.num_classes)
        examples = []
        for folder, names, per_image in (
            (task.train, cfg.DATASETS.TRAIN, cfg.SEARCH.CACHE.CROPS),
            (task.val, cfg.DATASETS.TEST, 0),
        ):
            datasets = [build_dataset(cfg, name) for name in names]
            crops = Crops(datasets, cfg.SEARCH.CACHE.SIZE, per_image, cfg.SEED)
            live = LiveFeatures(FeatureCache.open(folder), crops, model.preprocess, features)
            examples.append(Examples(live, head, device))
        return tuple(examples)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--count",
        type=int,
        default=6,
        help="random architectures to try (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        choices=("fpn", "head"),
        default="fpn",
        help="stage of the search whose trials are timed (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="worker processes, compared with a single one (default: %(default)s)",
    )
    args = parser.parse_intermixed_args()
    if args.count < 1 or args.workers < 1:
        parser.error("--count and --workers must be at least 1")

    def job(cfg: CfgNode, device: torch.device) -> None:
        folder = Path(cfg.OUTPUT_DIR) / "time_trials"
        cfg = split_training_data(cfg, folder / "split", cfg.SEED)
        model = prepare_backbone(cfg, device, folder / "backbone")
        caches = build_caches(cfg, model, folder / "cache")
        classes = len(class_names(cfg))
        cells, c2_to_c5 = None, tuple(cache.folder for cache in caches)
        if args.stage == "head":
            cells = given_cells(cfg)
            neck = train_neck(cfg, caches, cells, classes, device, folder / "neck")
            caches = tuple(cache_pyramid(folder / "cache", neck, cache) for cache in caches)
        train, val = (cache.folder for cache in caches)
        cached = ProxyTask(cfg, args.stage, train, val, classes, str(device), cfg.SEED)
        live = replace(cached, open_examples=LiveExamples(folder, cells, c2_to_c5))
        tasks = {"cached": cached, "live": live}
        space = build_space(cfg, args.stage, cells)
        rng = random.Random(0)
        jobs = [
            TrialJob(i, space.genotype(space.sample(rng)).to_list()) for i in range(args.count)
        ]
        report = {}
        for workers in sorted({1, args.workers}):
            seconds = time_by_turns(tasks, jobs, workers)
            total = {name: sum(times) for name, times in seconds.items()}
            rates = {name: 3600 * len(jobs) / value for name, value in total.items()}
            ratios = [b / a for a, b in zip(seconds["cached"], seconds["live"], strict=True)]
            logger.info(
                "%d worker(s): %.0f trials/h with the cache, %.0f without it: %.2f times as many "
                "(of the turns the median is %.2f, the range %.2f to %.2f)",
                workers, rates["cached"], rates["live"], total["live"] / total["cached"],
                median(ratios), min(ratios), max(ratios),
            )  # fmt: skip
            report[workers] = {"trials_per_hour": rates, "seconds": seconds}
        print(json.dumps(report))

    return launch(args, job)


def time_by_turns(
    tasks: dict[str, ProxyTask], jobs: Sequence[TrialJob], workers: int
) -> dict[str, list[float]]:
    """Time the same jobs as trials of several tasks.

    The jobs are run in rounds of one job or, with several workers, of two jobs per worker. In each
    round all tasks run, in alternating order, so that a change of the machine's speed favours none.

    Args:
        tasks: tasks by name.
        jobs: jobs to run.
        workers: number of worker processes of each task.

    Returns:
        Seconds of each round, by task.
    """
    with ExitStack() as stack:
        executors = {
            name: stack.enter_context(LocalExecutor(task, workers)) for name, task in tasks.items()
        }
        for executor in executors.values():
            list(executor.run(jobs[:1] * workers))  # start the workers and open their examples
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        count = 1 if workers == 1 else 2 * workers
        for first in range(0, len(jobs), count):
            turn = jobs[first : first + count]
            order = list(executors.items())
            for name, executor in order if first // count % 2 == 0 else order[::-1]:
                started = time.perf_counter()
                list(executor.run(turn))
                seconds[name].append(time.perf_counter() - started)
            logger.info("%d worker(s), trials %d to %d: cached %.2f s, live %.2f s", workers, first,
                        first + len(turn) - 1, *(seconds[name][-1] for name in tasks))  # fmt: skip
    return seconds


if __name__ == "__main__":
    sys.exit(main())
