"""Names for the parts that a config can choose."""

from __future__ import annotations

from collections.abc import Callable
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
            if name in self._builders:
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


BACKBONES = Registry("MODEL.BACKBONE.NAME")
NECKS = Registry("MODEL.NECK.NAME")
HEADS = Registry("MODEL.HEAD.NAME")
