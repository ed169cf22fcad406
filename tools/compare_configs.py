"""Train several configs with several seeds each, and compare their AP.

  python tools/compare_configs.py --configs output/nas/bccd/best.yaml configs/bccd/nas_fcos.yaml \\
      configs/bccd/fpn_fcos.yaml --seeds 3 --output output/compare DATASETS.ROOT datasets

Writes results.json (metrics of all trainings) and results.md (a table with mean and range of AP and
AP50 for each config), and the trainings in a folder each. Finished trainings are not repeated, so
the same command continues a comparison that was stopped. A training that diverges is left out.
"""

import argparse
import logging
import sys
from pathlib import Path
from statistics import mean

import torch

from nasfcos.config import load_config, override_config
from nasfcos.data import build_dataset
from nasfcos.engine.distributed import session
from nasfcos.engine.launch import run
from nasfcos.engine.logging import log_to_file
from nasfcos.engine.monitor import NonFiniteLossError
from nasfcos.files import replacing, write_json
from nasfcos.search.full_training import check_full_training, train_in_full

logger = logging.getLogger("nasfcos.compare_configs")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--configs", nargs="+", required=True, metavar="FILE", help="YAML files to compare"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="trainings per config, with the seeds 0, 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder of the results and trainings"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY VALUE",
        help="config keys to override in all configs, in pairs; nasfcos/config/defaults.py "
        "describes all keys",
    )
    args = parser.parse_intermixed_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    output = Path(args.output)
    results: dict[str, list[dict[str, float]]] = {file: [] for file in args.configs}

    def job() -> None:
        configs = {file: load_config(file, args.overrides) for file in args.configs}
        with session(configs[args.configs[0]].MODEL.DEVICE) as device:
            log_to_file(output)
            for cfg in configs.values():
                check_full_training(cfg, device)
                for name in cfg.DATASETS.TRAIN:
                    build_dataset(cfg, name)
            # The configs take turns, so that a change of the machine's speed favours none.
            for seed in range(args.seeds):
                for number, (file, cfg) in enumerate(configs.items()):
                    folder = output / f"{number}_{Path(file).stem}" / f"seed_{seed}"
                    own = ["SEED", seed, "OUTPUT_DIR", str(folder)]
                    cfg = override_config(cfg, own, "the comparison")
                    try:
                        metrics = train_in_full(cfg, device)
                    except (NonFiniteLossError, torch.OutOfMemoryError) as error:
                        logger.error("%s, seed %d: %s", file, seed, error)
                        continue
                    results[file].append(metrics)
                    logger.info("%s, seed %d: AP %.4f", file, seed, metrics["AP"])
                    write_json(output / "results.json", results, indent=2)
        table = as_table(results)
        with replacing(output / "results.md") as temporary:
            temporary.write_text(table, encoding="utf-8")
        print(table)

    return run(job)


def as_table(results: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table with mean, lowest and highest AP and AP50 of each config."""
    lines = ["| config | AP | AP50 |", "|---|:-:|:-:|"]
    for file, runs in results.items():
        cells = []
        for name in ("AP", "AP50"):
            values = [metrics[name] for metrics in runs]
            if not values:
                cells.append("failed")
                continue
            cells.append(f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| `{file}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
