"""Settings by their dotted names, and as nested sections."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any


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


def literal(value: Any) -> Any:
    """What a text says as a Python literal; anything else, and a text that is none, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return value
