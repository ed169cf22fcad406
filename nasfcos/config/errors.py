"""The error of everything that is wrong in a config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config that cannot be used; the message names the file, the key and the remedy."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of the candidates, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
