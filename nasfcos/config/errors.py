"""The exception for errors in a config, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A config that cannot be used. The message names the file, the key and the remedy."""


def did_you_mean(matches: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` for the first of `matches`, or an empty string if there are none."""
    return f" Did you mean {matches[0]!r}?" if matches else ""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`did_you_mean` for the candidate closest to `name`, if one is close enough."""
    return did_you_mean(difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5))
