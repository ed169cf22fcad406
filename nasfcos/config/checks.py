"""Checks of values: choices, bounds, and settings that must fit each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

from yacs.config import CfgNode

from ..genotype import (
    AGGREGATIONS,
    FPN_OPS,
    HEAD_OPS,
    NUM_OUTPUTS,
    Genotype,
    GenotypeError,
)
from .errors import ConfigError, nearest
from .tree import get_setting

CHOICES = {
    "MODEL.HEAD.TOWER": ("plain", "searched"),
    "MODEL.RESNET.NORM": ("frozen_bn", "bn"),
    "SOLVER.OPTIMIZER": ("sgd", "adamw"),
    "SOLVER.SCHEDULE": ("step", "cosine"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.AMP": ("off", "bf16", "fp16"),
    "TEST.DTYPE": ("float32", "bfloat16", "float16"),
    "SEARCH.PROXY.AMP": ("off", "bf16"),
    "SEARCH.STRATEGY": ("ppo", "random", "evolution"),
    "SEARCH.OBJECTIVE.COST": ("none", "flops", "latency"),
    "SEARCH.EXECUTOR": ("inline", "local", "ray"),
}

# Lists whose entries must be among these, without repetition.
SUBSETS = {
    "SEARCH.STAGES": ("fpn", "head"),
    "SEARCH.SPACE.FPN_OPS": FPN_OPS,
    "SEARCH.SPACE.AGGREGATIONS": AGGREGATIONS,
    "SEARCH.SPACE.HEAD_OPS": HEAD_OPS,
}

AT_LEAST = {
    "MODEL.NUM_CLASSES": 0,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNET.NUM_GROUPS": 1,
    "MODEL.RESNET.WIDTH_PER_GROUP": 1,
    "MODEL.RESNET.STEM_CHANNELS": 1,
    "MODEL.NECK.CHANNELS": 1,
    "MODEL.HEAD.NUM_CONVS": 0,
    "MODEL.HEAD.FOCAL_GAMMA": 0,
    "MODEL.RETINANET.SCALES_PER_OCTAVE": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 1,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.BRIGHTNESS": 0,
    "INPUT.CONTRAST": 0,
    "INPUT.SATURATION": 0,
    "INPUT.HUE": 0,
    "DATASETS.MAX_BAD_IMAGES": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.SIZE_DIVISIBILITY": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.BIAS_LR_FACTOR": 0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0,
    "SOLVER.GAMMA": 0,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.CLIP_GRAD_NORM": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.KEEP_CHECKPOINTS": 1,
    "SOLVER.LOG_PERIOD": 1,
    "TEST.IMS_PER_BATCH": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PRE_NMS_TOP_N": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "SEARCH.SPACE.CELLS": NUM_OUTPUTS,
    "SEARCH.SPACE.HEAD_LAYERS": 1,
    "SEARCH.CACHE.SIZE": 32,
    "SEARCH.CACHE.CROPS": 1,
    "SEARCH.PROXY.FPN_CHANNELS": 2,
    "SEARCH.PROXY.HEAD_CHANNELS": 2,
    "SEARCH.PROXY.ITERATIONS": 1,
    "SEARCH.PROXY.BATCH": 1,
    "SEARCH.PROXY.LR": 0,
    "SEARCH.PROXY.NECK_ITERATIONS": 1,
    "SEARCH.TRIALS.FPN": 1,
    "SEARCH.TRIALS.HEAD": 1,
    "SEARCH.BATCH": 1,
    "SEARCH.PPO.HIDDEN": 1,
    "SEARCH.PPO.LR": 0,
    "SEARCH.PPO.EPOCHS": 1,
    "SEARCH.PPO.CLIP": 0,
    "SEARCH.PPO.ENTROPY": 0,
    "SEARCH.PPO.CLIP_GRAD_NORM": 0,
    "SEARCH.EVOLUTION.POPULATION": 1,
    "SEARCH.EVOLUTION.TOURNAMENT": 1,
    "SEARCH.OBJECTIVE.WEIGHT": 0,
    "SEARCH.PRUNING.STARTUP": 1,
    "SEARCH.WORKERS": 0,
    "SEARCH.RETRIES": 0,
    "SEARCH.TRIAL_TIMEOUT": 0,
    "SEARCH.REPORT_PERIOD": 0,
    "SEARCH.SELECT.CANDIDATES": 1,
    "SEARCH.SELECT.RETRIALS": 0,
    "SEARCH.SELECT.FPN": 1,
    "SEARCH.SELECT.HEAD": 1,
    "SEARCH.SELECT.SEEDS": 1,
}

IN_0_TO_1 = (
    "MODEL.HEAD.FOCAL_ALPHA",
    "MODEL.RETINANET.FG_IOU",
    "MODEL.RETINANET.BG_IOU",
    "INPUT.FLIP_PROB",
    "TEST.SCORE_THRESHOLD",
    "TEST.NMS_IOU",
    "SOLVER.MOMENTUM",
    "SOLVER.BETA2",
    "SOLVER.WARMUP_FACTOR",
    "SEARCH.META_VAL",
    "SEARCH.PROXY.POLYAK",
    "SEARCH.PPO.BASELINE_DECAY",
    "SEARCH.PRUNING.KEEP",
)

POSITIVE = (  # of a list: every entry
    "MODEL.RESNET.BLOCKS",
    "MODEL.MOBILENET.WIDTH",
    "MODEL.FCOS.SIZE_LIMITS",
    "MODEL.RETINANET.ANCHOR_SIZE",
    "MODEL.RETINANET.ASPECT_RATIOS",
    "MODEL.RETINANET.SMOOTH_L1_BETA",
    "MODEL.RETINANET.BOX_LOSS_DIVISOR",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_RANGE_TRAIN",
    "SOLVER.STEPS",
    "SEARCH.PRUNING.RUNGS",
    "SEARCH.OBJECTIVE.TARGET",
    "SEARCH.OBJECTIVE.TARGET_HEAD",
)

# Group norms have at least two channels per group, deformable convolutions two offset groups.
EVEN = ("MODEL.NECK.CHANNELS", "SEARCH.PROXY.FPN_CHANNELS", "SEARCH.PROXY.HEAD_CHANNELS")

LENGTHS = {"MODEL.RESNET.BLOCKS": 4, "MODEL.FCOS.SIZE_LIMITS": 4}

# Keys of an entry of DATASETS.CUSTOM, by its FORMAT.
DATASET_KEYS = {
    "coco": ("FORMAT", "IMAGES", "ANNOTATIONS", "CLASSES"),
    "voc": ("FORMAT", "IMAGES", "ANNOTATIONS", "SPLIT", "CLASSES"),
}

# Raises a ConfigError; called with the name of a setting, what is wrong with it, and the names of
# other settings that it conflicts with.
Fail = Callable[..., NoReturn]


def check_config(cfg: CfgNode, sources: Mapping[str, str], source: str) -> None:
    """Check the values of a config tree whose names and types have been checked.

    Args:
        cfg: the config tree.
        sources: the file or command line that set a setting, by the setting's dotted name.
        source: named in errors about settings that are not in `sources`.

    Raises:
        ConfigError: a value is invalid, by itself or together with others.
    """

    def fail(name: str, why: str, *others: str) -> NoReturn:
        blamed = next((sources[key] for key in (name, *others) if key in sources), source)
        raise ConfigError(f"{blamed}: {name} {why}")

    _check_choices(cfg, fail)
    _check_bounds(cfg, fail)
    _check_settings(cfg, fail)
    _check_genotype(cfg, fail)
    _check_subsets(cfg, fail)
    _check_search(cfg, fail)
    for name, entry in cfg.DATASETS.CUSTOM.items():
        check_dataset(name, entry, fail)


def check_dataset(name: str, entry: object, fail: Fail) -> None:
    """Check an entry of DATASETS.CUSTOM; missing keys are no error here, only when it is used.

    Raises:
        ConfigError: an unknown key, or a value that is not possible.
    """
    section = f"DATASETS.CUSTOM.{name}"
    if not isinstance(entry, Mapping):
        keys = ", ".join(DATASET_KEYS["coco"])
        fail(section, f"must be a section with the keys {keys}, not {entry!r}")
    kind = entry.get("FORMAT")
    if kind is not None and (not isinstance(kind, str) or kind not in DATASET_KEYS):
        fail(
            f"{section}.FORMAT",
            f"is {kind!r}, but must be 'coco' (a COCO JSON file) or 'voc' (PASCAL VOC XML files)."
            f"{nearest(str(kind).lower(), DATASET_KEYS)}",
            section,
        )
    known = DATASET_KEYS["voc" if kind is None else kind]  # "voc" has the keys of both
    for part, value in entry.items():
        key = f"{section}.{part}"
        if part not in known:
            where = f"for FORMAT {kind} " if kind is not None else ""
            hint = nearest(str(part).upper(), known)
            fail(key, f"is unknown {where}(known: {', '.join(known)}).{hint}", section)
        if value is None:
            continue
        if part == "CLASSES":
            proper = isinstance(value, (list, tuple)) and len(value) > 0
            if not proper or not all(isinstance(c, str) and c.strip() for c in value):
                fail(key, f"must be a list of names, not {value!r}", section)
            if len(set(value)) < len(value):
                fail(key, f"names a class twice: {list(value)!r}", section)
        elif not isinstance(value, str) or not value.strip():
            fail(key, f"must be text, not {value!r}", section)


def _check_choices(cfg: CfgNode, fail: Fail) -> None:
    for name, allowed in CHOICES.items():
        value = get_setting(cfg, name)
        if value not in allowed:
            fail(name, f"is {value!r}, but must be one of {allowed}.{nearest(value, allowed)}")


def _check_bounds(cfg: CfgNode, fail: Fail) -> None:
    for name, least in AT_LEAST.items():
        value = get_setting(cfg, name)
        if not least <= value < math.inf:  # also refuses NaN
            fail(name, f"is {value!r}, but must be at least {least}, and finite")
    for name in IN_0_TO_1:
        value = get_setting(cfg, name)
        if not 0 <= value <= 1:
            fail(name, f"is {value!r}, but must lie in 0..1")
    for name in POSITIVE:
        value = get_setting(cfg, name)
        entries = value if isinstance(value, (list, tuple)) else [value]
        if not all(0 < entry < math.inf for entry in entries):
            fail(name, f"is {value!r}, but must be positive, and finite")
    for name in EVEN:
        if (value := get_setting(cfg, name)) % 2:
            fail(name, f"is {value!r}, but must be even")
    for name, length in LENGTHS.items():
        if len(value := get_setting(cfg, name)) != length:
            fail(name, f"needs {length} entries, not {value!r}")


def _check_settings(cfg: CfgNode, fail: Fail) -> None:
    for name in cfg.MODEL.IMPORTS:
        if not all(part.isidentifier() for part in name.split(".")):
            fail("MODEL.IMPORTS", f"has {name!r}, but modules are named as in an import statement")
    if len(cfg.INPUT.MIN_SIZE_RANGE_TRAIN) not in (0, 2):
        fail("INPUT.MIN_SIZE_RANGE_TRAIN", "must be empty or (low, high)")
    if list(cfg.INPUT.MIN_SIZE_RANGE_TRAIN) != sorted(cfg.INPUT.MIN_SIZE_RANGE_TRAIN):
        fail("INPUT.MIN_SIZE_RANGE_TRAIN", f"is {cfg.INPUT.MIN_SIZE_RANGE_TRAIN}: low comes first")
    for name in ("SOLVER.MOMENTUM", "SOLVER.BETA2"):
        if cfg.SOLVER.OPTIMIZER == "adamw" and get_setting(cfg, name) == 1:
            fail(name, "is 1, but must be below 1 for adamw", "SOLVER.OPTIMIZER")
    if not cfg.OUTPUT_DIR:
        fail("OUTPUT_DIR", "is empty: name a folder ('.' for the current one)")
    if cfg.MODEL.BACKBONE.NAME == "resnet" and cfg.MODEL.BACKBONE.FREEZE_AT > 5:
        fail("MODEL.BACKBONE.FREEZE_AT", f"is {cfg.MODEL.BACKBONE.FREEZE_AT}, but must lie in 0..5")
    limits = list(cfg.MODEL.FCOS.SIZE_LIMITS)
    if limits != sorted(limits):
        fail("MODEL.FCOS.SIZE_LIMITS", f"is {limits}, but must rise from P3 to P6")
    if cfg.INPUT.HUE > 0.5:
        fail("INPUT.HUE", f"is {cfg.INPUT.HUE}, but must be at most 0.5, half the colour circle")
    if not -1 <= cfg.SEED < 2**31:
        fail("SEED", f"is {cfg.SEED}, but must be -1 or lie in 0..{2**31 - 1}")
    if cfg.SEED + cfg.SEARCH.SELECT.SEEDS > 2**31:
        fail(
            "SEARCH.SELECT.SEEDS",
            f"is {cfg.SEARCH.SELECT.SEEDS}, but the seeds from SEED {cfg.SEED} on must not exceed "
            f"{2**31 - 1}",
        )
    if not 0 < cfg.MODEL.HEAD.PRIOR_PROB < 1:
        fail("MODEL.HEAD.PRIOR_PROB", f"is {cfg.MODEL.HEAD.PRIOR_PROB}, but must be within 0..1")
    if cfg.MODEL.RETINANET.BG_IOU > cfg.MODEL.RETINANET.FG_IOU:
        above = f"is above FG_IOU, {cfg.MODEL.RETINANET.FG_IOU}"
        fail("MODEL.RETINANET.BG_IOU", above, "MODEL.RETINANET.FG_IOU")
    if not cfg.INPUT.MIN_SIZE_TRAIN and not cfg.INPUT.MIN_SIZE_RANGE_TRAIN:
        fail("INPUT.MIN_SIZE_TRAIN", "is empty: name at least one size")
    if not cfg.MODEL.RETINANET.ASPECT_RATIOS:
        fail("MODEL.RETINANET.ASPECT_RATIOS", "is empty: name at least one ratio")


def _check_genotype(cfg: CfgNode, fail: Fail) -> None:
    name = "MODEL.GENOTYPE"
    searched_neck = cfg.MODEL.NECK.NAME == "nas_fpn"
    searched_head = cfg.MODEL.HEAD.TOWER == "searched"
    if not cfg.MODEL.GENOTYPE:
        if searched_neck or searched_head:
            part = "MODEL.NECK.NAME nas_fpn" if searched_neck else "MODEL.HEAD.TOWER searched"
            fail(name, f"is empty, but {part} is built from it", part.split()[0])
        return
    try:
        genotype = Genotype.parse(cfg.MODEL.GENOTYPE)
    except GenotypeError as error:
        fail(name, f"is invalid: {error}")
    if searched_head and genotype.head_split is None:
        fail(
            name,
            "has no head part ([i], [operations]), but MODEL.HEAD.TOWER is 'searched'",
            "MODEL.HEAD.TOWER",
        )


def _check_subsets(cfg: CfgNode, fail: Fail) -> None:
    for name, allowed in SUBSETS.items():
        value = get_setting(cfg, name)
        if not value:
            fail(name, f"is empty: name at least one of {allowed}")
        for entry in value:
            if entry not in allowed:
                fail(name, f"has {entry!r}, but may name {allowed} only.{nearest(entry, allowed)}")
        if len(set(value)) < len(value):
            fail(name, f"names an entry twice: {value!r}")


def _check_search(cfg: CfgNode, fail: Fail) -> None:
    search = cfg.SEARCH
    if tuple(search.STAGES) == ("head", "fpn"):
        fail("SEARCH.STAGES", "must be in order: the head is searched on the FPN that was found")
    for name in ("SEARCH.META_VAL", "SEARCH.PRUNING.KEEP", "SEARCH.PROXY.POLYAK"):
        value = get_setting(cfg, name)
        if value == 1 or (value == 0 and name != "SEARCH.PROXY.POLYAK"):
            fail(name, f"is {value!r}, but must lie between 0 and 1")
    if search.OBJECTIVE.COST != "none" and search.OBJECTIVE.WEIGHT == 0:
        fail(
            "SEARCH.OBJECTIVE.WEIGHT",
            f"is 0, so SEARCH.OBJECTIVE.COST {search.OBJECTIVE.COST} would have no effect",
            "SEARCH.OBJECTIVE.COST",
        )
    rungs = list(search.PRUNING.RUNGS)
    if rungs != sorted(set(rungs)):
        fail("SEARCH.PRUNING.RUNGS", f"is {rungs!r}, but must be iterations in rising order")
    if rungs and rungs[-1] >= search.PROXY.ITERATIONS:
        fail(
            "SEARCH.PRUNING.RUNGS",
            f"ends at {rungs[-1]}, but a trial has SEARCH.PROXY.ITERATIONS = "
            f"{search.PROXY.ITERATIONS}: a rung must come before its end",
            "SEARCH.PROXY.ITERATIONS",
        )
    if search.EVOLUTION.TOURNAMENT > search.EVOLUTION.POPULATION:
        fail(
            "SEARCH.EVOLUTION.TOURNAMENT",
            f"is {search.EVOLUTION.TOURNAMENT}, more than SEARCH.EVOLUTION.POPULATION = "
            f"{search.EVOLUTION.POPULATION}",
            "SEARCH.EVOLUTION.POPULATION",
        )
