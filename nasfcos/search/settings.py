"""Settings that must not change while a stage is resumed."""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from ..config.tree import get_setting, leaves

# Keys in the sections that a stage depends on which only matter to the other stage.
OF_OTHERS = {
    "fpn": (
        *("SEARCH.SPACE.HEAD_LAYERS", "SEARCH.SPACE.HEAD_OPS"),
        *("SEARCH.PROXY.HEAD_CHANNELS", "SEARCH.PROXY.NECK_ITERATIONS"),
        "SEARCH.OBJECTIVE.TARGET_HEAD",
    ),
    "head": (
        *("SEARCH.SPACE.CELLS", "SEARCH.SPACE.FPN_OPS", "SEARCH.SPACE.AGGREGATIONS"),
        *("SEARCH.PROXY.FPN_CHANNELS", "SEARCH.OBJECTIVE.TARGET"),
    ),
}

# Names in the journal of what a stage's trials depend on besides the config.
SPLIT = "the split of the data (DATASETS.TRAIN, their images and boxes)"
FEATURES = ("features of meta-train (data, PREPARE, CACHE)", "features of meta-val (data, PREPARE)")
FPN = "the FPN below the head (the best of the FPN stage, or MODEL.GENOTYPE)"
PYRAMIDS = ("outputs of the FPN on meta-train (neck.pth)", "outputs of the FPN on meta-val")


def fixed_settings(cfg: CfgNode, stage: str) -> dict[str, Any]:
    """The settings that a stage's trials depend on, by their names in its journal.

    Those of the backbone's training are not among them (see `prepare.backbone_changes`).
    """
    sections = [
        f"SEARCH.{name}" for name in ("SPACE", "PROXY", "PPO", "EVOLUTION", "OBJECTIVE", "PRUNING")
    ]
    sections += ["MODEL.HEAD", "MODEL.FCOS", "MODEL.RETINANET", "MODEL.CUSTOM"]
    names = ["SEED", "INPUT.MIN_SIZE_TEST", "SEARCH.STRATEGY", "SEARCH.BATCH", "SEARCH.META_VAL"]
    names += ["DATALOADER.SKIP_EMPTY", "SEARCH.CACHE.SIZE", "SEARCH.CACHE.CROPS"]
    names += ["SEARCH.FROM_GENOTYPE", *(["MODEL.GENOTYPE"] if cfg.SEARCH.FROM_GENOTYPE else [])]
    fixed = {name: get_setting(cfg, name) for name in names}
    fixed["SEARCH.PREPARE.WEIGHT"] = "a file" if cfg.SEARCH.PREPARE.WEIGHT else "none"
    if stage == "fpn":
        # How trials draw first weights, by its version: with another, rewards would not compare.
        fixed["first weights of the plain head (by the version of nasfcos)"] = "as in all trials"
    if stage == "head" and "fpn" in cfg.SEARCH.STAGES:
        chose = ["SEARCH.TRIALS.FPN", "SEARCH.SELECT.FPN"]
        chose += ["SEARCH.SELECT.RETRIALS"]
        chose += ["SEARCH.SELECT.CANDIDATES"] if cfg.SEARCH.SELECT.RETRIALS else []
        chose += ["SEARCH.SELECT.SEEDS"] if cfg.SEARCH.SELECT.FPN > 1 else []
        for name in chose:
            fixed[f"{name} (which chose the FPN below the head)"] = get_setting(cfg, name)
    if stage == "head":
        fixed["SEARCH.STAGES"] = list(cfg.SEARCH.STAGES)
    for section in sections:
        fixed.update(leaves(get_setting(cfg, section), f"{section}."))
    return {name: value for name, value in fixed.items() if name not in OF_OTHERS[stage]}
