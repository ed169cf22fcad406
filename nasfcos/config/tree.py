"""Conversions between dotted names of settings and nested sections."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in a tree; nothing for an empty section."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of settings that are given by their dotted names; the inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


def get_setting(tree: Mapping[str, Any], name: str) -> Any:
    """The setting or section with a dotted name.

    Raises:
        KeyError: there is no such setting.
    """
    for part in name.split("."):
        tree = tree[part]
    return tree


def with_settings(cfg: CfgNode, settings: Mapping[str, Any]) -> CfgNode:
    """A frozen copy of a config tree with some settings replaced, without conversion or checks.

    `override_config` is for values written by people, which need both.

    Args:
        cfg: the config tree.
        settings: values by the dotted names of the settings.

    Raises:
        KeyError: there is no such setting, and its section accepts no new ones.
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
    """The value of a text that is a Python literal; any other value or text unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return value
