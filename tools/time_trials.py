"""What the feature cache and a second worker are worth: trials per hour, side by side.

python tools/time_trials.py --config-file configs/nas/demo.yaml --count 6
python tools/time_trials.py --config-file configs/nas/demo.yaml --count 6 --stage head

Everything is made in time_trials/ of OUTPUT_DIR. Without the cache, images are read and run through
the backbone in the trial's own process, and in the head stage through the FPN (of MODEL.GENOTYPE)
as well.
"""

import json
import logging
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from nasfcos.data import build_dataset
from nasfcos.data.catalog import class_names
from nasfcos.engine.launch import argument_parser, launch
from nasfcos.search.cache import FeatureCache, build_caches, cache_pyramid
from nasfcos.search.crops import Crops
from nasfcos.search.executors import LocalExecutor
from nasfcos.search.prepare import prepare_backbone
from nasfcos.search.proxy import Examples, ProxyTask, assigning_head, stage_config, train_neck
from nasfcos.search.records import TrialJob
from nasfcos.search.space import build_space, given_cells
from nasfcos.search.split import split_training_data

logger = logging.getLogger("nasfcos.time_trials")


class LiveFeatures:
    """A cache's face without the cache: images are read, and run through the backbone, each time.

    Args:
        cache: of the same crops, for their targets.
        crops: where the images come from.
        preprocess: from images to a batch, as a detector's.
        features: from the batch to what the cache holds.
    """

    def __init__(
        self, cache: FeatureCache, crops: Crops, preprocess: nn.Module, features: nn.Module
    ) -> None:
        self.targets, self.size, self.maps = cache.targets, cache.size, cache.maps
        self.crops, self.preprocess, self.features = crops, preprocess, features

    def __len__(self) -> int:
        return len(self.targets)

    @torch.no_grad()
    def read(self, indices, device) -> list[Tensor]:
        images = []
        for index in indices:
            image, number = divmod(int(index), self.crops.per_image)
            images.append(self.crops[image][number][0])
        batch, _ = self.preprocess(images)
        return self.features(batch)


def main() -> int:
    parser = argument_parser("Time trials with and without the feature cache, and with workers.")
    parser.add_argument("--count", type=int, default=6, help="architectures (default: 6)")
    parser.add_argument("--stage", choices=("fpn", "head"), default="fpn")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_intermixed_args()
    if args.count < 1 or args.workers < 1:
        parser.error("--count and --workers must be at least 1")

    def job(cfg, device) -> None:
        folder = Path(cfg.OUTPUT_DIR) / "time_trials"
        cfg = split_training_data(cfg, folder / "split", cfg.SEED)
        model = prepare_backbone(cfg, device, folder / "backbone")
        caches = build_caches(cfg, model, folder / "cache")
        classes = len(class_names(cfg))
        features, cells = model.backbone, None
        if args.stage == "head":
            cells = given_cells(cfg)
            neck = train_neck(cfg, caches, cells, classes, device, folder / "neck")
            features = nn.Sequential(features, neck)
            caches = tuple(cache_pyramid(folder / "cache", neck, cache) for cache in caches)
        parts = [caches[0].folder, caches[1].folder, classes, str(device), cfg.SEED]
        cached = ProxyTask(cfg, args.stage, *parts)
        head = assigning_head(stage_config(cfg, args.stage), classes)
        examples = tuple(
            Examples(
                LiveFeatures(cache, Crops([build_dataset(cfg, n) for n in names],
                                          cfg.SEARCH.CACHE.SIZE, crops, cfg.SEED),
                             model.preprocess, features),
                head,
                device,
            )
            for cache, names, crops in (
                (caches[0], cfg.DATASETS.TRAIN, cfg.SEARCH.CACHE.CROPS),
                (caches[1], cfg.DATASETS.TEST, 0),
            )
        )  # fmt: skip
        live = ProxyTask(cfg, args.stage, *parts, examples=examples)
        space = build_space(cfg, args.stage, cells)
        rng = random.Random(0)
        jobs = [
            TrialJob(i, space.genotype(space.sample(rng)).to_list()) for i in range(args.count)
        ]
        cached.run(jobs[0])  # opens the caches, warms up
        ratios = []
        for trial in jobs:
            seconds = []
            for task in (cached, live):
                started = time.perf_counter()
                task.run(trial)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[1] / seconds[0])
            logger.info("trial %d: cached %.2f s, live %.2f s, ratio %.2f", trial.index, *seconds,
                        ratios[-1])  # fmt: skip
        logger.info("without the cache a trial takes %.2f times as long (median; %.2f to %.2f)",
                    median(ratios), min(ratios), max(ratios))  # fmt: skip
        rates = {}
        for workers in (1, args.workers):
            with LocalExecutor(cached, workers) as executor:
                list(executor.run(jobs[:workers]))  # starts the workers, opens their caches
                started = time.perf_counter()
                list(executor.run(jobs))
                rates[workers] = 3600 * len(jobs) / (time.perf_counter() - started)
            logger.info("%d worker(s): %.0f trials/h", workers, rates[workers])
        print(json.dumps({"ratios": ratios, "trials_per_hour": rates}))

    return launch(args, job)


if __name__ == "__main__":
    sys.exit(main())
