"""The config file that a run writes to its output folder."""

from __future__ import annotations

from pathlib import Path

import yaml
from yacs.config import CfgNode

from ..files import replacing
from .defaults import get_defaults
from .errors import ConfigError

RUN_CONFIG = "config.yaml"

JOURNAL = "search.db"
"""File in OUTPUT_DIR that holds the journals of all stages of an architecture search."""


def write_run_config(cfg: CfgNode) -> None:
    """Write the whole tree to OUTPUT_DIR (see `check_run_config`)."""
    with replacing(Path(cfg.OUTPUT_DIR) / RUN_CONFIG) as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")


def check_run_config(cfg: CfgNode) -> None:
    """Check that `write_run_config` would replace a file written by a run, or none.

    Raises:
        ConfigError: OUTPUT_DIR holds another config file of this name.
    """
    path = Path(cfg.OUTPUT_DIR) / RUN_CONFIG
    try:
        content = path.read_bytes()
    except OSError:
        return
    # After a crash of the machine, a file may be empty or filled with zeros.
    if content.strip(b"\0 \r\n\t") and not is_of_run(content):
        raise ConfigError(
            f"{path} was not written by a run, but a run in OUTPUT_DIR {cfg.OUTPUT_DIR} would "
            "replace it: rename it, or name another folder"
        )


def is_of_run(content: bytes) -> bool:
    """Whether the content of a config file is a whole tree without comments, as a run writes it."""
    try:
        text = content.decode()
        tree = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return False
    is_whole = isinstance(tree, dict) and tree.keys() >= get_defaults().keys()
    return is_whole and not any(line.startswith("#") for line in text.splitlines())
