"""Settings by their dotted names, and as nested sections."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of a tree; an empty section has none."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of settings given by their dotted names; undoes `leaves`."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


def get_setting(tree: Mapping[str, Any], name: str) -> Any:
    """The setting, or section, with a dotted name.

    Raises:
        KeyError: there is none.
    """
    for part in name.split("."):
        tree = tree[part]
    return tree


def with_settings(cfg: CfgNode, settings: Mapping[str, Any]) -> CfgNode:
    """A frozen copy of a config tree with settings by their dotted names, set as they are:
    `override_config` is for what people write, which needs reading and checks.

    Raises:
        KeyError: there is no such setting, and none may be added.
    """
    copy = cfg.clone()
    copy.defrost()
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        node = get_setting(copy, section) if section else copy
        if key not in node and not node.is_new_allowed():
            raise KeyError(name)
        node[key] = value
    copy.freeze()
    return copy


def literal(value: Any) -> Any:
    """What a text says as a Python literal; anything else, and a text that is none, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return value
