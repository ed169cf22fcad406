"""Registries of the backbones, necks and heads that a config can choose by name.

A builder takes the config tree and what the part depends on, and returns a module:

- ``BACKBONES``: ``build(cfg)``. The module turns a batch [N, 3, H, W] into the maps C2..C5 (strides
  4 to 32). It has ``out_channels``, their numbers of channels, and ``freeze_after(index)``, which
  excludes the layers behind map `index` from training.
- ``NECKS``: ``build(cfg, in_channels)``. The module turns C2..C5 into P3..P7 (strides 8 to 128)
  with MODEL.NECK.CHANNELS channels. It has ``deepest_input``, the index of the deepest map that it
  uses.
- ``HEADS``: ``build(cfg, num_classes, post_process)``. The module is a
  `nasfcos.models.heads.dense.DenseHead`, whose abstract methods it defines (or a subclass of
  `FCOSHead` or `RetinaNetHead`, which define them). In a search MODEL.HEAD.TOWER says whether
  its towers should be those of the genotype.

For inference, a detector's parameters and maps have the dtype TEST.DTYPE; buffers stay float32. A
part must return maps in the dtype of its input.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..config.errors import ConfigError, nearest

Builder = TypeVar("Builder", bound=Callable)


class Registry:
    """Builders by name.

    Args:
        key: the config key that chooses a builder, for error messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._builders: dict[str, Callable] = {}

    def register(self, name: str) -> Callable[[Builder], Builder]:
        """Decorator that makes a builder available under `name`.

        Raises:
            ValueError: the name belongs to another builder.
        """

        def add(builder: Builder) -> Builder:
            known = self._builders.get(name)
            if known is not None and not _is_reimported(builder, known):
                raise ValueError(f"{self.key}: {name!r} is registered already")
            self._builders[name] = builder
            return builder

        return add

    def __getitem__(self, name: str) -> Callable:
        """The builder with a name.

        Raises:
            ConfigError: there is none.
        """
        try:
            return self._builders[name]
        except KeyError:
            raise ConfigError(
                f"{self.key} is {name!r}, but there are only {', '.join(self._builders)}."
                f"{nearest(name, self._builders)}"
            ) from None


def _is_reimported(builder: Callable, known: Callable) -> bool:
    """Whether a builder is the same definition as a known one, executed again: by reloading a
    module, by importing the running script, or in a cell of a notebook."""
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
    """Import modules that register parts.

    Args:
        modules: their names, as in an ``import`` statement.

    Raises:
        ConfigError: a module, or one that it imports, is not found.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"MODEL.IMPORTS names {name!r}, which cannot be imported ({error}). Its folder "
                "must be named by the environment variable PYTHONPATH"
            ) from error
