"""Names for the parts that a config can choose, and own ones among them.

A builder takes the config tree and what it builds upon, and gives a module:

- ``BACKBONES``: ``build(cfg)``. The module turns a batch [N, 3, H, W] into the maps C2..C5 (strides
  4 to 32), has their channels as ``out_channels``, and ``freeze_after(index)``, which ends the
  training of what lies behind map `index`.
- ``NECKS``: ``build(cfg, in_channels)``. The module turns C2..C5 into P3..P7 (strides 8 to 128) of
  MODEL.NECK.CHANNELS channels, and has the index of the deepest map that it uses as
  ``deepest_input``.
- ``HEADS``: ``build(cfg, num_classes, post_process)``. The module is a
  `nasfcos.models.heads.dense.DenseHead`. In a search MODEL.HEAD.TOWER says whether its towers are
  to be the genotype's.

For inference a detector's parameters take the dtype of TEST.DTYPE, as its maps have it; buffers
stay float32. What a part puts out must have the dtype of its input.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..config.errors import ConfigError, nearest

Builder = TypeVar("Builder", bound=Callable)


class Registry:
    """Builders by name; the config key that chooses among them is part of every error."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._builders: dict[str, Callable] = {}

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """Decorator: make a builder available under `name`."""

        def add(builder: Builder) -> Builder:
            known = self._builders.get(name)
            if known is not None and not _is_again(builder, known):
                raise ValueError(f"{self.key}: {name!r} is registered already")
            self._builders[name] = builder
            return builder

        return add

    def __getitem__(self, name: str) -> Callable:
        try:
            return self._builders[name]
        except KeyError:
            raise ConfigError(
                f"{self.key} is {name!r}, but there are only {', '.join(self._builders)}."
                f"{nearest(name, self._builders)}"
            ) from None


def _is_again(builder: Callable, known: Callable) -> bool:
    """Whether a definition is a known one once more: of a module that is imported again, a script
    that is imported too, or a cell of a notebook."""
    one, other = (
        (getattr(x, "__qualname__", None), getattr(x, "__module__", None)) for x in (builder, known)
    )
    if one[0] is None or one[0] != other[0]:
        return False
    file, known_file = (getattr(sys.modules.get(x[1]), "__file__", None) for x in (one, other))
    return one[1] == other[1] or file is not None and file == known_file


BACKBONES = Registry("MODEL.BACKBONE.NAME")
NECKS = Registry("MODEL.NECK.NAME")
HEADS = Registry("MODEL.HEAD.NAME")


def import_parts(modules: Sequence[str]) -> None:
    """Import modules, by their names in Python, that register parts.

    Raises:
        ConfigError: a module that Python does not find, or that needs one that is not there.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"MODEL.IMPORTS names {name!r}, which cannot be imported ({error}). Its folder "
                "must be named by the environment variable PYTHONPATH"
            ) from error
