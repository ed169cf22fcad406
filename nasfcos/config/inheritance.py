"""Reading config files (YAML), and the files that they inherit from."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from ..files import replacing
from .errors import ConfigError, nearest
from .released import is_released
from .tree import leaves

BASE_KEY = "_BASE_"
MERGE_TAG = "tag:yaml.org,2002:merge"


class _YamlLoader(yaml.SafeLoader):
    """YAML with the booleans of version 1.2: true and false, but not on, off, yes and no.

    All keys become strings. A repeated key, or one that is a list or a section, is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    "in a section", node.start_mark,
                    "a key is a list or a section (text that begins with [ or { needs quotes)",
                    key.start_mark,
                )  # fmt: skip
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "in a section", node.start_mark, f"the key {key.value!r} appears twice",
                    key.start_mark,
                )  # fmt: skip
            seen.add(key.value)
            if key.tag != MERGE_TAG:
                key.tag = "tag:yaml.org,2002:str"  # a data set may have a number as its name
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_file(path: Path, named_by: Path | None = None) -> tuple[dict, dict[str, Path]]:
    """Read one config file, without the files that it inherits from.

    Args:
        path: config file.
        named_by: the file that inherits from it, for messages.

    Returns:
        The tree that the file sets, and the paths of the files it inherits from, by their names in
        ``_BASE_``.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    why = f" (named by {BASE_KEY} of {named_by})" if named_by else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"config file {path} does not exist{why}.{nearest(path.name, siblings)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read{why}: {error}") from None
    try:
        tree = yaml.load(text, Loader=_YamlLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(tree).__name__}")
    names = tree.pop(BASE_KEY, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: {BASE_KEY} must be a file name or a list, not {names!r}")
    return tree, {name: path.parent / Path(name).expanduser() for name in names}


def ordinary_base(path: Path) -> tuple[Path, list[str]]:
    """The first config in the inheritance chain without a SEARCH section, and the dotted keys that
    the more derived files set.

    Stops at a file in the released format, or with no or several bases.
    """
    keys: list[str] = []
    while _is_of_search(path):
        tree, bases = read_file(path)
        if len(bases) != 1 or is_released(tree):
            break
        tree.pop("SEARCH", None)
        # None stands for an empty section.
        keys += [name for name, value in leaves(tree) if value is not None]
        (path,) = bases.values()
    return path, keys


def _is_of_search(path: Path) -> bool:
    tree, bases = read_file(path)
    # SEARCH in the released format describes the result of a search, not a search.
    searches = "SEARCH" in tree and not is_released(tree)
    return searches or any(map(_is_of_search, bases.values()))


def copy_with_bases(path: Path, folder: Path) -> Path:
    """Copy a config and all files that it inherits from, so that the copy can be used elsewhere.

    The copies have the same relative paths to each other as the originals.

    Args:
        path: config file.
        folder: directory to copy to.

    Returns:
        The copy of `path` in `folder`.
    """
    found: dict[Path, dict[str, Path]] = {}

    def place(path: Path) -> Path:
        return path.parent.resolve() / path.name

    def collect(path: Path) -> None:
        if place(path) not in found:
            _, found[place(path)] = read_file(path)
            for base in found[place(path)].values():
                collect(base)

    collect(path)
    root = os.path.commonpath([file.parent for file in found])
    for file, bases in found.items():
        copy, text = folder / file.relative_to(root), file.read_text(encoding="utf-8")
        for name, base in bases.items():
            target = folder / place(base).relative_to(root)
            relative = Path(os.path.relpath(target, copy.parent)).as_posix()
            if os.path.normpath(name) != os.path.normpath(relative):  # an absolute path
                text = text.replace(name, relative)
        with replacing(copy) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / place(path).relative_to(root)
