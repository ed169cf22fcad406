"""Translation of the original release's YAML files to this project's keys.

The release's config tree serves many detectors, and its eight files set keys that these models
never read. Each key is listed here once: with the key that it becomes, with the value it must have,
or as unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..genotype import Genotype, GenotypeError
from .errors import ConfigError, nearest
from .tree import leaves, literal, nested

RESNET_BLOCKS = {
    "R-50": [3, 4, 6, 3],
    "R-101": [3, 4, 23, 3],
}


SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Rule(NamedTuple):
    """The translation of a released key.

    Attributes:
        settings: maps the key's value to settings of this project, by dotted names.
        target: the key of this project that corresponds to it, if there is one.
    """

    settings: Callable[[Any], dict[str, Any]]
    target: str | None = None


UNUSED = Rule(lambda value: {})


def _body(value: str) -> dict[str, Any]:
    if value == "MobileNetV2":
        return {"MODEL.BACKBONE.NAME": "mobilenet_v2"}
    blocks = RESNET_BLOCKS.get(str(value).removesuffix("-NAS"))
    if blocks is None:
        raise ValueError("known are MobileNetV2, R-50-NAS and R-101-NAS")
    return {"MODEL.BACKBONE.NAME": "resnet", "MODEL.RESNET.BLOCKS": blocks}


def _to(key: str, convert: Callable[[Any], Any] = lambda v: v) -> Rule:
    return Rule(lambda value: {key: convert(value)}, key)


def _switch(value: Any) -> bool:
    """A boolean as the release reads it: in YAML 1.1, with yes, no, on and off as well."""
    value = SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def _when(key: str, setting: Any) -> Rule:
    """Set a key if the released switch is on."""
    return Rule(lambda value: {key: setting} if _switch(value) else {}, key)


def _must_be(wanted: bool) -> Rule:
    def check(value: Any) -> dict[str, Any]:
        if _switch(value) != wanted:
            raise ValueError(f"only {wanted} is supported")
        return {}

    return Rule(check)


def _only(*allowed: Any) -> Rule:
    def check(value: Any) -> dict[str, Any]:
        if value not in allowed:
            raise ValueError(f"only {' or '.join(map(repr, allowed))} is supported")
        return {}

    return Rule(check)


def _classes(count: int) -> dict[str, Any]:
    if count < 2:
        raise ValueError("the background counts as a class, so there are at least 2")
    return {"MODEL.NUM_CLASSES": count - 1}


# Released key -> the settings it becomes. A key ending in ".*" stands for a whole section.
TRANSLATION: dict[str, Rule] = {
    "MODEL.META_ARCHITECTURE": _only("SingleStageDetector"),
    "MODEL.RPN_ONLY": _must_be(True),
    "MODEL.DENSEBOX_ON": _when("MODEL.HEAD.NAME", "fcos"),
    "MODEL.RETINANET_ON": _when("MODEL.HEAD.NAME", "retinanet"),
    "MODEL.BACKBONE.CONV_BODY": Rule(_body, "MODEL.BACKBONE.NAME"),
    "MODEL.BACKBONE.OUT_CHANNELS": UNUSED,
    "MODEL.BACKBONE.ENCODER_OUT_CHANNELS": UNUSED,
    "MODEL.BACKBONE.FREEZE_CONV_BODY_AT": _to("MODEL.BACKBONE.FREEZE_AT", lambda n: max(n, 0)),
    "MODEL.RESNETS.STRIDE_IN_1X1": _to("MODEL.RESNET.STRIDE_IN_1X1", _switch),
    "MODEL.RESNETS.NUM_GROUPS": _to("MODEL.RESNET.NUM_GROUPS"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": _to("MODEL.RESNET.WIDTH_PER_GROUP"),
    "MODEL.RESNETS.BACKBONE_OUT_CHANNELS": UNUSED,
    "MODEL.RETINANET.NUM_CLASSES": Rule(_classes, "MODEL.NUM_CLASSES"),
    "MODEL.RETINANET.NMS_TH": _to("TEST.NMS_IOU"),
    "MODEL.RETINANET.FG_IOU_THRESHOLD": _to("MODEL.RETINANET.FG_IOU"),
    "MODEL.RETINANET.BG_IOU_THRESHOLD": _to("MODEL.RETINANET.BG_IOU"),
    "MODEL.RETINANET.SCALES_PER_OCTAVE": _to("MODEL.RETINANET.SCALES_PER_OCTAVE"),
    "MODEL.RETINANET.STRADDLE_THRESH": _only(-1),
    "MODEL.RETINANET.USE_C5": _must_be(False),
    "MODEL.RPN.*": UNUSED,
    "MODEL.ROI_HEADS.*": UNUSED,
    "MODEL.ROI_BOX_HEAD.*": UNUSED,
    "SEARCH.NAS_DECODER_ON": _when("MODEL.NECK.NAME", "nas_fpn"),
    "SEARCH.NAS_HEAD_ON": _when("MODEL.HEAD.TOWER", "searched"),
    "SEARCH.DECODER.CONFIG": _to("MODEL.GENOTYPE"),
    "SEARCH.DECODER.AGG_SIZE": _to("MODEL.NECK.CHANNELS"),
    "SEARCH.DECODER.VERSION": _only(2),
    "SEARCH.DECODER.NUM_CELLS": UNUSED,  # but see _check_counts
    "SEARCH.DECODER.OP_SIZE": UNUSED,
    "SEARCH.HEAD.NUM_HEAD_LAYERS": UNUSED,  # likewise
    "SEARCH.HEAD.OP_SIZE": UNUSED,
    "SEARCH.HEAD.AGG_OP_SIZE": UNUSED,
    "SEARCH.HEAD.OUTPUT_CONCAT": _must_be(False),
    "SEARCH.HEAD.WEIGHT_SHARE_SEARCH": _must_be(True),
    "SOLVER.NUM_GPUS": UNUSED,
    **{
        key: _to(key)
        for key in (
            "MODEL.WEIGHT",
            "MODEL.DEVICE",
            "DATASETS.TRAIN",
            "DATASETS.TEST",
            "INPUT.MIN_SIZE_TRAIN",
            "INPUT.MAX_SIZE_TRAIN",
            "INPUT.MIN_SIZE_RANGE_TRAIN",
            "INPUT.MIN_SIZE_TEST",
            "INPUT.MAX_SIZE_TEST",
            "DATALOADER.SIZE_DIVISIBILITY",
            "DATALOADER.NUM_WORKERS",
            "DATALOADER.ASPECT_RATIO_GROUPING",
            "SOLVER.BASE_LR",
            "SOLVER.BIAS_LR_FACTOR",
            "SOLVER.MOMENTUM",
            "SOLVER.WEIGHT_DECAY",
            "SOLVER.WEIGHT_DECAY_BIAS",
            "SOLVER.GAMMA",
            "SOLVER.STEPS",
            "SOLVER.MAX_ITER",
            "SOLVER.WARMUP_FACTOR",
            "SOLVER.WARMUP_ITERS",
            "SOLVER.WARMUP_METHOD",
            "SOLVER.CHECKPOINT_PERIOD",
            "SOLVER.IMS_PER_BATCH",
            "TEST.IMS_PER_BATCH",
            "OUTPUT_DIR",
        )
    },
}

MARKS = (("MODEL", "META_ARCHITECTURE"), ("MODEL", "RPN_ONLY"), ("SEARCH", "NAS_DECODER_ON"))


def is_released(tree: dict) -> bool:
    """Whether a YAML tree has the format of the original release, by keys that only it has."""
    return any(
        isinstance(tree.get(section), dict) and key in tree[section] for section, key in MARKS
    )


def translate_released(tree: dict, source: str) -> tuple[dict, list[str]]:
    """Translate a released tree to this project's keys.

    Args:
        tree: content of the YAML file.
        source: name of the file, for messages.

    Returns:
        The translated tree, and a line of explanation for each key that changed.

    Raises:
        ConfigError: a key is not known to the released detectors, or a value selects a detector
            other than the eight.
    """
    settings: dict[str, Any] = {}
    notes = []
    for name, raw in leaves(tree):
        if raw is None and any(key.startswith(f"{name}.") for key in TRANSLATION):
            continue  # a section without keys
        rule = TRANSLATION.get(name)
        if rule is None:
            rule = next((TRANSLATION[s] for s in _sections(name) if s in TRANSLATION), None)
        if rule is None:
            raise ConfigError(
                f"{source}: there is no key {name!r} in the release's searched detectors."
                f"{nearest(name, TRANSLATION)}"
            )
        value = literal(raw)  # the release has tuples as text: (60000,80000,)
        try:
            made = rule.settings(value)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source}: {name} is {value!r}: {error}") from None
        settings.update(made)
        if made != {name: value}:
            became = ", ".join(f"{k} = {v!r}" for k, v in made.items()) or "not needed"
            notes.append(f"{name} = {value!r}  ->  {became}")
    _check_counts(tree, source)
    heads = ("MODEL.DENSEBOX_ON", "MODEL.RETINANET_ON")
    if "MODEL.HEAD.NAME" not in settings and any(name in heads for name, _ in leaves(tree)):
        raise ConfigError(f"{source}: neither {heads[0]} nor {heads[1]} is True: there is no head")
    # In the release, the absence of a switch means the plain pyramid or tower.
    settings.setdefault("MODEL.NECK.NAME", "fpn")
    settings.setdefault("MODEL.HEAD.TOWER", "plain")
    return nested(settings), notes


def _check_counts(tree: dict, source: str) -> None:
    """Check that the numbers of cells and head layers are those of the genotype."""
    given = {name: literal(value) for name, value in leaves(tree)}
    try:
        genotype = Genotype.parse(given["SEARCH.DECODER.CONFIG"])
    except (KeyError, GenotypeError):  # reported by the check of the whole tree
        return
    for name, has in (
        ("SEARCH.DECODER.NUM_CELLS", len(genotype.cells)),
        ("SEARCH.HEAD.NUM_HEAD_LAYERS", len(genotype.head_ops)),
    ):
        if has and given.get(name, has) != has:
            raise ConfigError(
                f"{source}: {name} is {given[name]!r}, but SEARCH.DECODER.CONFIG has {has}"
            )


def successor_of(name: str) -> str | None:
    """The key of this project that a released key of another name corresponds to, if any."""
    return TRANSLATION[name].target if name in TRANSLATION else None


def _sections(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:end]) + ".*"
