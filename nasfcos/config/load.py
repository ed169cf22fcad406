"""Loading a config tree: files and overrides are merged, with checks of names and types."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from .checks import check_config
from .defaults import get_defaults
from .errors import ConfigError, did_you_mean
from .inheritance import BASE_KEY, read_file
from .released import is_released, successor_of, translate_released
from .tree import get_setting, literal, nested

logger = logging.getLogger(__name__)

DEFAULTS = get_defaults()
COMMAND_LINE = "command line"
WEIGHT = "MODEL.WEIGHT"
# Hidden attribute of a tree: MODEL.WEIGHT as read from the file. It is not a setting, because it
# describes how this tree was made: a printed config, loaded again, is a file.
_FILES_WEIGHT = "__files_weight__"

# Lists of KEY VALUE pairs, whose entries are of any type.
FREE_LISTS = ("SEARCH.PREPARE.OVERRIDES", "SEARCH.SELECT.OVERRIDES")

# Lists that are empty by default, so that the default does not show the type of their entries.
INTEGER_LISTS = ("INPUT.MIN_SIZE_RANGE_TRAIN", "SEARCH.PRUNING.RUNGS")
TEXT_LISTS = ("MODEL.IMPORTS",)

# Prefix of the user's own settings, where text is read as a literal. In DATASETS.CUSTOM text stays
# text, because a folder's name may look like a number.
OWN_VALUES = "MODEL.CUSTOM."


def load_config(
    file: str | os.PathLike[str] | None = None, overrides: Sequence[Any] = ()
) -> CfgNode:
    """Load the config tree of a YAML file, with overrides on top.

    Args:
        file: YAML file of this project, or of the original release (which is translated, and the
            translation logged). None: the defaults.
        overrides: alternating keys and values, ``["SOLVER.BASE_LR", 0.02, ...]``; values may be
            text, as on a command line.

    Returns:
        The frozen tree.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, a wrong type, a value out of
            range, an invalid genotype. The message names the file and the key.
    """
    cfg = get_defaults()
    # Which file or command line set each setting last, for messages of the final check.
    sources: dict[str, str] = {}
    for source, tree in _inheritance_chain(Path(file)) if file is not None else ():
        _merge(cfg, tree, source, sources)
    cfg.__dict__[_FILES_WEIGHT] = cfg.MODEL.WEIGHT
    _merge_overrides(cfg, overrides, COMMAND_LINE, sources)
    return _finished(cfg, sources, source="default config")


def _finished(cfg: CfgNode, sources: dict[str, str], source: str) -> CfgNode:
    """Check and freeze a tree."""
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    check_config(cfg, sources, source)
    cfg.freeze()
    return cfg


def _inheritance_chain(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    """(source, tree) of a file and of all files it inherits from, the most basic one first."""
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
    """Merge `tree` into `node`, whose dotted name is `prefix`, with checks of names and types."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in node:
            if not node.is_new_allowed():
                raise ConfigError(_unknown_key(name, value, source))
            if "." in key:
                raise ConfigError(f"{source}: the name {key!r} in {prefix[:-1]} must have no dot")
            node[key] = _free_form(value, name, source)
            sources[name] = source
        elif isinstance(node[key], CfgNode):
            if value is None:  # an empty section
                continue
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{source}: {name} is a section with keys of its own, not a value ({value!r})"
                )
            _merge(node[key], value, source, sources, f"{name}.")
        else:
            if node.is_new_allowed():
                node[key] = _free_form(value, name, source)
            else:  # the type is that of the default: the value so far may be an empty list
                node[key] = _coerce(value, get_setting(DEFAULTS, name), name, source)
            sources[name] = source


def override_config(cfg: CfgNode, overrides: Sequence[Any], source: str) -> CfgNode:
    """A copy of a config tree with KEY VALUE pairs on top, with the checks of `load_config`.

    Args:
        cfg: the config tree.
        overrides: alternating keys and values.
        source: where the overrides come from, for messages.

    Raises:
        ConfigError: an unknown key, a wrong type or an invalid value.
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
    """Whether MODEL.WEIGHT was set by an override or in code, not by the config file, where it is
    usually the initialisation of the training."""
    return cfg.MODEL.WEIGHT not in ("", cfg.__dict__.get(_FILES_WEIGHT))


def _free_form(value: Any, name: str, source: str) -> Any:
    """The value of a setting, or section, that users define."""
    if isinstance(value, dict):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            if "." in str(key):  # it would read as a section and a key
                raise ConfigError(f"{source}: the name {key!r} in {name} must have no dot")
            node[str(key)] = _free_form(item, f"{name}.{key}", source)
        return node
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    # Values of the command line are text.
    is_literal = isinstance(value, str) and (value[:1] in "[(" or name.startswith(OWN_VALUES))
    return literal(value) if is_literal else value


def _all_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")


def _unknown_key(name: str, value: Any, source: str) -> str:
    while isinstance(value, dict) and value:  # of a section: its first key
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    near = [successor] if (successor := successor_of(name)) else _near_keys(name.upper())
    return f"{source}: there is no key {name!r} in the config tree.{did_you_mean(near)}"


def _near_keys(name: str) -> list[str]:
    """Keys that an unknown one may stand for, best first."""
    keys = list(_all_keys(DEFAULTS))
    keys = [key for key in keys if not name.startswith(f"{key}.")]  # not its own sections
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
    """Convert `value` to the type of `default`; text is read as a literal unless `default` is text.

    Raises:
        ConfigError: the types do not match.
    """
    if isinstance(value, str) and not isinstance(default, str):
        value = literal(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    entries = (0,) if name in INTEGER_LISTS else ("",) if name in TEXT_LISTS else default
    entries = entries if isinstance(default, (list, tuple)) and name not in FREE_LISTS else ()
    if isinstance(default, tuple) and entries and _like(value, entries[0]):
        value = (value,)  # one entry without brackets
    if isinstance(default, bool) and str(value).lower() in ("true", "false"):  # as in YAML
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
