"""The config tree: merging files and overrides with type checks, and the checks of the whole."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from ..genotype import (
    AGGREGATIONS,
    FPN_OPS,
    HEAD_OPS,
    NUM_OUTPUTS,
    Genotype,
    GenotypeError,
)
from .defaults import get_defaults
from .errors import ConfigError, nearest
from .inheritance import BASE_KEY, read_file
from .released import is_released, successor_of, translate_released
from .tree import get_setting, literal, nested

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
WEIGHT = "MODEL.WEIGHT"
# Where a tree keeps MODEL.WEIGHT as its file has it, which no setting shows.
_FILES_WEIGHT = "__files_weight__"

# Lists whose entries are of any type: KEY VALUE pairs.
FREE_LISTS = ("SEARCH.PREPARE.OVERRIDES", "SEARCH.SELECT.OVERRIDES")

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

# Each entry is one of a tuple, and none comes twice.
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

POSITIVE = (  # each entry, where it is a list
    "MODEL.RESNET.BLOCKS",
    "MODEL.MOBILENET.WIDTH",
    "MODEL.FCOS.SIZE_LIMITS",
    "MODEL.RETINANET.ANCHOR_SIZE",
    "MODEL.RETINANET.ASPECT_RATIOS",
    "MODEL.RETINANET.SMOOTH_L1_BETA",
    "MODEL.RETINANET.BOX_LOSS_DIVISOR",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_RANGE_TRAIN",
    "SEARCH.PRUNING.RUNGS",
    "SEARCH.OBJECTIVE.TARGET",
    "SEARCH.OBJECTIVE.TARGET_HEAD",
)

# Empty by default, which does not show what their entries are.
INTEGER_LISTS = ("INPUT.MIN_SIZE_RANGE_TRAIN", "SEARCH.PRUNING.RUNGS")


# Norms have groups of at least two channels, deformable convolutions two groups of offsets.
EVEN = ("MODEL.NECK.CHANNELS", "SEARCH.PROXY.FPN_CHANNELS", "SEARCH.PROXY.HEAD_CHANNELS")


def load_config(
    file: str | os.PathLike[str] | None = None, overrides: Sequence[Any] = ()
) -> CfgNode:
    """The config tree of a YAML file, with overrides on top.

    Args:
        file: a YAML file of this project, or one of the original release (which is translated, and
            the translation logged). None: the defaults.
        overrides: alternating keys and values, ``["SOLVER.BASE_LR", 0.02, ...]``; values may be
            text, as they come from a command line.

    Returns:
        The tree, frozen.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, a wrong type, a value out of its
            range, an invalid genotype. The message names the file and the key.
    """
    cfg = get_defaults()
    # The place each leaf was last set, so that a check of the whole can name the file.
    sources: dict[str, str] = {}
    for source, tree in _inheritance_chain(Path(file)) if file is not None else ():
        _merge(cfg, tree, source, sources)
    cfg.__dict__[_FILES_WEIGHT] = cfg.MODEL.WEIGHT
    _merge_overrides(cfg, overrides, COMMAND_LINE, sources)
    return _finished(cfg, sources, source="default config")


def _finished(cfg: CfgNode, sources: dict[str, str], source: str) -> CfgNode:
    """The tree, checked and frozen."""
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    _check(cfg, sources, source)
    cfg.freeze()
    return cfg


def _inheritance_chain(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    """The file's tree after those of the files it inherits from, oldest ancestor first."""
    tree, bases = read_file(path, named_by=seen[-1] if seen else None)
    seen = (*seen, path.resolve())
    for base in bases.values():
        if base.resolve() in seen:
            chain = " -> ".join(str(p) for p in (*seen, base.resolve()))
            raise ConfigError(f"{path}: {BASE_KEY} inherits in a circle: {chain}")
        yield from _inheritance_chain(base, seen)
    if is_released(tree):
        tree, notes = translate_released(tree, str(path))
        logger.info(
            "%s is a config of the original release; translated:\n%s",
            path,
            "\n".join(f"  {note}" for note in notes),
        )
    yield str(path), tree


def _merge(
    node: CfgNode, tree: dict, source: str, sources: dict[str, str], prefix: str = ""
) -> None:
    """Set the values of `tree` in `node`, checking names and types."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in node:
            if not node.is_new_allowed():
                raise ConfigError(_unknown_key(name, value, source))
            if "." in key:  # it would be taken for a section and a key
                raise ConfigError(f"{source}: the name {key!r} in {prefix[:-1]} must have no dot")
            node[key] = _free_form(value)
            sources[name] = source
        elif isinstance(node[key], CfgNode):
            if value is None:  # a section that the file leaves empty
                continue
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{source}: {name} is a section with keys of its own, not a value ({value!r})"
                )
            _merge(node[key], value, source, sources, f"{name}.")
        else:
            node[key] = _coerce(value, node[key], name, source)
            sources[name] = source


def override_config(cfg: CfgNode, overrides: Sequence[Any], source: str) -> CfgNode:
    """A copy of a config tree with KEY VALUE pairs on top, checked like a file.

    Args:
        cfg: the tree.
        overrides: alternating keys and values.
        source: where they come from, for messages.

    Raises:
        ConfigError: as `load_config`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    sources: dict[str, str] = {}
    _merge_overrides(cfg, overrides, source, sources)
    return _finished(cfg, sources, source)


def _merge_overrides(
    cfg: CfgNode, overrides: Sequence[Any], source: str, sources: dict[str, str]
) -> None:
    if len(overrides) % 2:
        raise ConfigError(
            f"{source}: overrides come as KEY VALUE pairs, but there are {len(overrides)} "
            f"words: {' '.join(map(str, overrides))}"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        _merge(cfg, nested({str(key): value}), source, sources)
        if key == WEIGHT:
            cfg.__dict__[_FILES_WEIGHT] = None


def is_weight_given(cfg: CfgNode) -> bool:
    """Whether weights were named for the purpose at hand, by an override of MODEL.WEIGHT or in the
    tree itself, rather than in the config file, where they may be what the training started from.
    """
    return cfg.MODEL.WEIGHT not in ("", cfg.__dict__.get(_FILES_WEIGHT))


def _free_form(value: Any) -> Any:
    if isinstance(value, dict):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            node[str(key)] = _free_form(item)
        return node
    # A list on a command line is text.
    return literal(value) if isinstance(value, str) and value[:1] in "[(" else value


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")


def _unknown_key(name: str, value: Any, source: str) -> str:
    while isinstance(value, dict) and value:  # of a section, the first key that is set in it
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    near = [successor] if (successor := successor_of(name)) else _near_keys(name.upper())
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{source}: there is no key {name!r} in the config tree.{hint}"


def _near_keys(name: str) -> list[str]:
    """Keys that an unknown one may stand for, as difflib ranks them."""
    keys = list(_all_keys(get_defaults()))
    keys = [key for key in keys if not name.startswith(f"{key}.")]  # not the sections it names
    section, _, last = name.rpartition(".")
    parts = [key.rpartition(".") for key in keys]
    siblings = [key for above, _, key in parts if above == section]
    misspelt = get_close_matches(last, siblings, 1, 0.6)
    shortened = [key for key in siblings if key.endswith(f"_{last}")]
    misplaced = [key for key, part in zip(keys, parts, strict=True) if part[2] == last]
    return (
        [f"{section}.{key}".lstrip(".") for key in misspelt + shortened]
        or get_close_matches(name, misplaced, 1, 0)
        or get_close_matches(name, keys, 1, 0.5)
    )


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
    """`value` as the type of `default`; text is read as a literal where text is not meant."""
    if isinstance(value, str) and not isinstance(default, str):
        value = literal(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    entries = (0,) if name in INTEGER_LISTS else default
    entries = entries if isinstance(default, (list, tuple)) and name not in FREE_LISTS else ()
    if isinstance(default, tuple) and entries and _like(value, entries[0]):
        value = (value,)  # one where several are wanted
    if isinstance(default, bool) and str(value).lower() in ("true", "false"):  # as YAML has them
        value = str(value).lower() == "true"
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, float) and isinstance(value, int):
        fits = abs(value) <= sys.float_info.max
        value = float(value) if fits else value
    elif isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        value, fits = type(default)(value), True
    else:
        fits = isinstance(value, type(default))
    if fits and entries:
        fits = all(_like(item, entries[0]) for item in value)
    if not fits:
        wanted = type(default).__name__
        if entries:
            wanted += f" of {type(entries[0]).__name__}"
        raise ConfigError(
            f"{source}: {name} must be {wanted} (such as {default!r}), "
            f"not {type(value).__name__} {value!r}"
        )
    return value


def _like(item: Any, example: Any) -> bool:
    if isinstance(item, bool) or isinstance(example, bool):
        return isinstance(item, bool) and isinstance(example, bool)
    return isinstance(item, (int, float) if isinstance(example, float) else type(example))


def _check(cfg: CfgNode, sources: dict[str, str], source: str) -> None:
    """What the types alone do not show; `source` is to blame for what none of `sources` set."""

    def fail(name: str, why: str, *others: str) -> NoReturn:
        """For a setting that is wrong, by itself or beside others."""
        blamed = next((sources[key] for key in (name, *others) if key in sources), source)
        raise ConfigError(f"{blamed}: {name} {why}")

    for name, allowed in CHOICES.items():
        value = get_setting(cfg, name)
        if value not in allowed:
            fail(name, f"is {value!r}, but must be one of {allowed}.{nearest(value, allowed)}")
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
    for name, length in (("MODEL.RESNET.BLOCKS", 4), ("MODEL.FCOS.SIZE_LIMITS", 4)):
        if len(get_setting(cfg, name)) != length:
            fail(name, f"needs {length} entries, not {get_setting(cfg, name)!r}")
    if len(cfg.INPUT.MIN_SIZE_RANGE_TRAIN) not in (0, 2):
        fail("INPUT.MIN_SIZE_RANGE_TRAIN", "must be empty or (low, high)")
    if list(cfg.INPUT.MIN_SIZE_RANGE_TRAIN) != sorted(cfg.INPUT.MIN_SIZE_RANGE_TRAIN):
        fail("INPUT.MIN_SIZE_RANGE_TRAIN", f"is {cfg.INPUT.MIN_SIZE_RANGE_TRAIN}: low comes first")
    for name in ("SOLVER.MOMENTUM", "SOLVER.BETA2"):
        if cfg.SOLVER.OPTIMIZER == "adamw" and get_setting(cfg, name) == 1:
            fail(name, "is 1, but adamw needs less", "SOLVER.OPTIMIZER")
    if not cfg.OUTPUT_DIR:
        fail("OUTPUT_DIR", "is empty: name a folder ('.' for the current one)")
    if cfg.MODEL.BACKBONE.NAME == "resnet" and cfg.MODEL.BACKBONE.FREEZE_AT > 5:
        fail("MODEL.BACKBONE.FREEZE_AT", f"is {cfg.MODEL.BACKBONE.FREEZE_AT}, but must lie in 0..5")
    limits = list(cfg.MODEL.FCOS.SIZE_LIMITS)
    if limits != sorted(limits):
        fail("MODEL.FCOS.SIZE_LIMITS", f"is {limits}, but must rise from P3 to P6")
    if cfg.INPUT.HUE > 0.5:
        fail("INPUT.HUE", f"is {cfg.INPUT.HUE}, but the whole circle of colours is 0.5 either way")
    if not -1 <= cfg.SEED < 2**31:
        fail("SEED", f"is {cfg.SEED}, but must be -1 or lie in 0..{2**31 - 1}")
    if not 0 < cfg.MODEL.HEAD.PRIOR_PROB < 1:
        fail("MODEL.HEAD.PRIOR_PROB", f"is {cfg.MODEL.HEAD.PRIOR_PROB}, but must lie within 0..1")
    if cfg.MODEL.RETINANET.BG_IOU > cfg.MODEL.RETINANET.FG_IOU:
        above = f"is above FG_IOU, {cfg.MODEL.RETINANET.FG_IOU}"
        fail("MODEL.RETINANET.BG_IOU", above, "MODEL.RETINANET.FG_IOU")
    if not cfg.INPUT.MIN_SIZE_TRAIN and not cfg.INPUT.MIN_SIZE_RANGE_TRAIN:
        fail("INPUT.MIN_SIZE_TRAIN", "is empty: name at least one size")
    if not cfg.MODEL.RETINANET.ASPECT_RATIOS:
        fail("MODEL.RETINANET.ASPECT_RATIOS", "is empty: name at least one ratio")
    _check_genotype(cfg, fail)
    _check_search(cfg, fail)


def _check_genotype(cfg: CfgNode, fail: Callable[..., NoReturn]) -> None:
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


def _check_search(cfg: CfgNode, fail: Callable[..., NoReturn]) -> None:
    search = cfg.SEARCH
    for name, allowed in SUBSETS.items():
        value = get_setting(cfg, name)
        if not value:
            fail(name, f"is empty: name at least one of {allowed}")
        for entry in value:
            if entry not in allowed:
                fail(name, f"has {entry!r}, but may name {allowed} only.{nearest(entry, allowed)}")
        if len(set(value)) < len(value):
            fail(name, f"names an entry twice: {value!r}")
    if tuple(search.STAGES) == ("head", "fpn"):
        fail("SEARCH.STAGES", "is ('head', 'fpn'), but the head is searched on a found FPN")
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
