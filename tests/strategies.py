"""Search strategies as the config makes them, with its defaults but for what a test names."""

from nasfcos.config import get_defaults
from nasfcos.search.strategies import build_strategy


def ppo(space, seed, **settings):
    return _build("ppo", space, seed, settings)


def evolution(space, seed, **settings):
    return _build("evolution", space, seed, settings)


def _build(name, space, seed, settings):
    cfg = get_defaults()
    cfg.SEARCH.STRATEGY = name
    for key, value in settings.items():
        cfg.SEARCH[name.upper()][key.upper()] = value
    return build_strategy(cfg, space, seed)
